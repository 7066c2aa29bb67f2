"""examples/demo.py: the table, the sentence and the picture that it ends with."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mirage_ds.analysis.controls.conditions import choose_partners
from mirage_ds.data.record_files import read_records

ROOT = Path(__file__).parents[3]
SAMPLE = ROOT / "data/sample_planning.jsonl"
demo = runpy.run_path(str(ROOT / "examples/demo.py"))
RECORDS = read_records(SAMPLE)
PARTNERS = choose_partners(RECORDS, demo["SEED"])


def answer(text: str, success: bool, moves: int = 2) -> dict[str, Any]:
    return {"text": text, "metrics": {"success": success, "moves": moves}}


def answers(follows: int) -> list[dict[str, Any]]:
    """All solved with their own latents and lost with another map's; one becomes its partner's answer."""
    own = [answer(f"{record.text_output} {place}", True) for place, record in enumerate(RECORDS)]
    found = [{"own": one, "swap": answer("\\boxed{UP}", False)} for one in own]
    found[follows]["swap"] = answer(own[PARTNERS[follows]]["text"], False)
    return found


@pytest.mark.parametrize("follows", [0, 7, 19])
def test_the_board_shown_follows_the_other_maps_latents(follows: int) -> None:
    assert demo["clearest"](answers(follows), PARTNERS) == follows


def test_the_picture_has_three_boards(tmp_path: Path) -> None:
    controls = {"answers": [{"conditions": one} for one in answers(3)]}
    demo["draw"](controls, SAMPLE, tmp_path / "latents.png")
    width, height = Image.open(tmp_path / "latents.png").size
    assert width > 2 * height


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ((-0.7, -0.77, -0.63), "cost 70 points (63 to 77): this model's answers depend on"),
        ((-0.01, -0.04, 0.02), "cost 1 points (-2 to 4): this model's answers do not depend on"),
    ],
)
def test_the_table_and_the_sentence(
    capsys: pytest.CaptureFixture[str], lost: tuple[float, float, float], said: str
) -> None:
    def score(*numbers: float) -> dict[str, float]:
        return dict(zip(("mean", "low", "high"), numbers, strict=True))

    scores = {"own": score(0.75, 0.69, 0.8), "swap": score(0.05, 0.03, 0.09), "off": score(0, 0, 0.02)}
    controls = {"conditions": {name: {"score": one} for name, one in scores.items()}}
    controls["conditions"]["swap"]["score_difference"] = score(*lost)
    demo["show"](controls, {"all": {"success": 0.8, "low": 0.74, "high": 0.85}}, SAMPLE)
    shown = " ".join(capsys.readouterr().out.split())
    steps = {one.name: one.steps for one in demo["TRAININGS"]}
    base = steps["see"] + steps["read"]
    assert f"its own │ {base} + {steps['stage1'] + steps['stage2']} │ 0.75 (0.69–0.80)" in shown
    assert f"text alone │ {base} + {steps['text']} │ 0.80 (0.74–0.85)" in shown
    assert f"Another map's latents {said} what is in its latents." in shown
    assert "does not show that they help: text alone solves 0.80" in shown


def test_text_alone_has_as_many_steps() -> None:
    steps = {one.name: one.steps for one in demo["TRAININGS"]}
    assert steps["text"] == steps["stage1"] + steps["stage2"]
