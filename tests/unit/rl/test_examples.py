"""What TensorBoard and a study's report show of a rollout."""

from __future__ import annotations

from typing import Any

from mirage_ds.rl.examples import told


def line(place: int, reward: float | None, advantage: float, answer: str = "up") -> dict[str, Any]:
    rewards = {"accuracy": reward, "mine:as_is": 0.30000000000000004}
    return {"file": "d.jsonl", "line": place, "question": "<image>Where?", "answer": answer, "reward": reward,
            "rewards": rewards, "advantage": advantage}  # fmt: skip


def test_the_prompt_that_is_rewarded_most_variously_with_its_best_and_worst_answers() -> None:
    other = [line(1, 0.0, -1.0), line(1, 1.0, 1.0), line(1, 0.0, -1.0)]
    long = "<think>so *it* is</think>\n\n" + "right " * 40
    own = [line(2, at / 5, float(at), long if at == 5 else f"a{at}") for at in (2, 5, 0, 3, 4)] + [line(2, None, 0.5)]
    first, text = told([*other, *own, *other])
    assert (first["line"], first["advantage"]) == (2, 5.0)
    paragraphs = text.split("\n\n")
    assert paragraphs[:3] == [
        "Line 2, 6 answers.", "    <image>Where?", "Reward 1 (accuracy 1, mine:as_is 0.3), advantage +5.00:",
    ]  # fmt: skip
    # As it was said, and no line longer than a page is wide.
    shown = text.splitlines()
    at = shown.index("    <think>so *it* is</think>")
    assert shown[at + 1] == "    "
    assert " ".join(one.strip() for one in shown[at + 2 : at + 5]) == ("right " * 40).strip()
    assert max(map(len, shown)) <= 104
    said = [one for one in shown if one.startswith("Reward")]
    assert [one.rpartition(" ")[2] for one in said] == ["+5.00:", "+4.00:", "+0.50:", "+0.00:"]
    assert said[2].startswith("Reward none (accuracy none, ")
    assert told([line(1, 0.0, 0.0, "")])[1].endswith("\n\n    (nothing)")
