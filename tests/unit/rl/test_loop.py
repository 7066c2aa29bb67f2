"""A rollout as the loop makes it: groups drawn anew, what each answer teaches, what is logged, what ends the run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from mirage_ds.config.run import RunConfig
from mirage_ds.data.pack import Planner
from mirage_ds.errors import Stopped, UserError
from mirage_ds.rl import loop, report, rollout
from mirage_ds.rl.examples import SIDE
from mirage_ds.rl.report import Completions, Group, Rollout, measures
from mirage_ds.rl.rewards import Scored
from mirage_ds.rl.rollout import Sampled
from mirage_ds.rl.step import Lesson
from mirage_ds.run import validation
from mirage_ds.run.heartbeat import LOADING

G = 2


def answer(row: int, tokens: int = 3, blocks: int = 0, truncated: bool = False) -> Sampled:
    return Sampled(row, [7] * tokens, [-1.0] * tokens, ((1, 2),) * blocks, None, truncated)


def settings(**given: Any) -> RunConfig:
    base: dict[str, Any] = dict(model="m", data_path="d", save_model_path="o", stage="rl", num_generations=G)
    return RunConfig(**base | dict(prompts_per_rollout=4, max_length=1000) | given)


def data_of(rows: int = 20) -> Any:
    planner = Planner(np.full(rows, 10), np.arange(100, 100 + rows), 4, 1, 100, None, 42)
    index = SimpleNamespace(rows=SimpleNamespace(record=lambda row: SimpleNamespace(extra={"level": row % 2})))
    return cast(Any, SimpleNamespace(loader=SimpleNamespace(planner=planner, rows=None), index=index))


def rolled(monkeypatch: pytest.MonkeyPatch, flat: set[int], rows: int = 20, **given: Any) -> tuple[Rollout, list[Any]]:
    """A rollout in which the rows of `flat` are rewarded alike, and the calls of `sample`."""
    calls: list[tuple[list[int], int]] = []

    def sample(_run: Any, _learner: Any, _rows: Any, chosen: Sequence[int], seed: int) -> list[Sampled]:
        calls.append((list(chosen), seed))
        return [answer(row) for row in chosen for _ in range(G)]

    def judge(_run: Any, _data: Any, answers: Sequence[Sampled]) -> Scored:
        total = [1.0 if one.row in flat else float(at % G) for at, one in enumerate(answers)]
        return Scored(total, {"accuracy": total}, [])

    monkeypatch.setattr(loop, "sample", sample)
    monkeypatch.setattr(loop, "judge", judge)
    run = cast(Any, SimpleNamespace(config=settings(**given), journal=SimpleNamespace(tell=lambda *_: None)))
    return loop.roll(run, data_of(rows), cast(Any, None), 1), calls


def test_groups_without_spread_give_way_to_others_of_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    first, calls = rolled(monkeypatch, set())
    assert len(calls) == 1
    assert first.redrawn == 0
    rows = [group.row for group in first.groups]
    # The second of the rollouts: the prompts are those that the planner would train on in step 2.
    planner = data_of().loader.planner
    assert rows == planner.row_ids[planner.rows_of(1)].tolist() != planner.row_ids[planner.rows_of(0)].tolist()
    flat = set(rows[1:3])
    kept, calls = rolled(monkeypatch, flat)
    assert [group.flat for group in kept.groups] == [False, True, True, False]
    drawn, calls = rolled(monkeypatch, flat, resample=3)
    assert [len(chosen) for chosen, _ in calls] == [4, 2]
    assert len({seed for _, seed in calls}) == 2
    # The others stay where they were, and nobody is asked twice.
    assert [group.row for group in drawn.groups if group.row in rows] == [rows[0], rows[3]]
    assert len({group.row for group in drawn.groups}) == 4
    assert not any(group.flat for group in drawn.groups)
    again, same = rolled(monkeypatch, flat, resample=3)
    assert (drawn.redrawn, drawn.groups, calls) == (2, again.groups, same)


def test_drawing_anew_ends_with_its_rounds_and_with_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = set(range(100, 120))
    rollout, calls = rolled(monkeypatch, everything, resample=2)
    assert [len(chosen) for chosen, _ in calls] == [4, 4, 4]
    assert (len(rollout.groups), rollout.redrawn) == (4, 8)
    # Eight records: four are left for the first round, none for the second.
    rollout, calls = rolled(monkeypatch, everything, rows=8, resample=9)
    assert [len(chosen) for chosen, _ in calls] == [4, 4]


def test_a_slow_judge_and_long_answers_have_the_bounds_of_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    taken = SimpleNamespace(_replace=lambda **_: "step", metrics={})
    pupil = SimpleNamespace(score=lambda: None, update=lambda *_: taken)
    for name in ("check_room", "limits_of", "lesson_of", "Completions", "check"):
        monkeypatch.setattr(loop, name, lambda *_: SimpleNamespace(write=lambda *_: None))
    monkeypatch.setattr(loop, "measures", lambda *_: {})
    monkeypatch.setattr(loop, "Pupil", lambda *_: pupil)
    monkeypatch.setattr(loop, "set_collective_timeout", told.append)
    monkeypatch.setattr(loop, "roll", lambda *_: told.append("rollout"))
    config = settings(start_timeout=70, collective_timeout=7)
    world = SimpleNamespace(size=1, rank=0)
    data = SimpleNamespace(index=SimpleNamespace(tokens=np.array([10])), steps=4, rewards=None)
    learner = SimpleNamespace(state={"latent_policy": "text"}, start=1, engine=None)
    # In the first rollout, after a resume too, the start has not ended.
    for _ in loop.reinforce(
        cast(Any, SimpleNamespace(config=config, world=world, stops=bool)), cast(Any, data), cast(Any, learner)
    ):
        told.append("step")
    assert told == ["rollout", "step", 70, "rollout", 7, "step", 70, "rollout", 7, "step"]
    marks: list[tuple[str, str]] = []
    journal = SimpleNamespace(at=lambda doing, kind="": marks.append((doing, kind)))
    run = cast(Any, SimpleNamespace(config=config, world=world, journal=journal, stops=lambda: False))
    monkeypatch.setattr(loop, "from_rank_zero", lambda *_: None)
    monkeypatch.setattr(rollout, "whole_model", nullcontext)
    monkeypatch.setattr(validation, "everyone", lambda own, _: own)
    rows = cast(Any, SimpleNamespace(rows=None, encoder=None))
    loop.judge(run, cast(Any, SimpleNamespace(index=rows, loader=SimpleNamespace(rows=rows))), [])
    rollout.sample(run, cast(Any, learner), rows, [], 1)
    assert marks == [("scores answers by reward", LOADING), ("samples answers", LOADING)]


def test_an_answer_without_a_reward_or_cut_off_teaches_nothing_where_that_is_asked() -> None:
    groups = [
        Group(100, [answer(100), answer(100, truncated=True)], [1.0, 0.0], {}),
        Group(101, [answer(101), answer(101)], [math.nan, 1.0], {}),
    ]
    rollout = Rollout(groups, 0, {})
    given = cast(Any, SimpleNamespace(config=settings(scale_rewards="none")))
    lesson = loop.lesson_of(given, rollout)
    assert lesson.advantages.tolist() == [0.5, -0.5, 0, 0]
    assert lesson.weights.tolist() == [1, 1, 0, 1]
    masked = loop.lesson_of(cast(Any, SimpleNamespace(config=settings(mask_truncated=True))), rollout)
    assert masked.weights.tolist() == [1, 0, 0, 1]


def test_a_truncated_answer_is_fined_before_its_group_is_looked_at() -> None:
    """So what decides about a group, what is logged and what is learnt are one number."""
    config = settings(scale_rewards="none", truncation_penalty=0.5)
    answers = [answer(100), answer(100, truncated=True), answer(101), answer(101, truncated=True)]
    groups = loop.grouped(config, [100, 101], answers, Scored([1.0, 1.0, 0.5, 1.0], {}, []))
    assert [group.rewards for group in groups] == [[1.0, 0.5], [0.5, 0.5]]
    assert [group.flat for group in groups] == [False, True]
    lesson = loop.lesson_of(cast(Any, SimpleNamespace(config=config)), Rollout(groups, 0, {}))
    assert lesson.advantages.tolist() == [0.25, -0.25, 0, 0]


def test_why_a_reward_failed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the share that ends the run too: where the record is, which reward, and what it did."""
    said: list[str] = []
    faults = [(104, "own:points", "raises boom"), (105, "own:points", "returns nan, no number")]
    given: list[Any] = []
    rewards = SimpleNamespace(
        score=lambda some: given.extend(some) or Scored([], {}, faults), place=lambda row: f"d.jsonl:{row - 99}"
    )
    monkeypatch.setattr(loop, "answer_of", lambda *_: SimpleNamespace(text="", runs=()))
    monkeypatch.setattr(loop, "seen_by_scorer", lambda _: {})
    monkeypatch.setattr(loop, "from_rank_zero", lambda score, _: score())
    journal = SimpleNamespace(at=lambda *_, **__: None, say=said.append)
    run = SimpleNamespace(
        journal=journal, world=None, config=settings(), asked=lambda: stopping, stops=lambda: stopping
    )
    stopping = False
    data = SimpleNamespace(rewards=rewards, index=data_of().index, loader=data_of().loader)
    data.loader.rows = SimpleNamespace(encoder=None)
    loop.judge(cast(Any, run), cast(Any, data), [answer(104)] * 3 * G)
    # A prompt may stand there twice, side by side.
    assert [one.place for one in given] == [0, 0, 1, 1, 2, 2]
    assert said == ["warning: failed rewards: 2; the first: d.jsonl:5, own:points: raises boom"]
    faults.clear()
    loop.judge(cast(Any, run), cast(Any, data), [])
    assert len(said) == 1
    # Where the run is stopped, whose processes were perhaps all signalled, a reward that failed is no fault of it.
    rewards.score = lambda _: (_ for _ in ()).throw(UserError("the process that scores has ended"))
    with pytest.raises(UserError, match="has ended"):
        loop.judge(cast(Any, run), cast(Any, data), [])
    stopping = True
    with pytest.raises(Stopped):
        loop.judge(cast(Any, run), cast(Any, data), [])
    rewards.score = lambda _: Scored([1.0], {}, [])
    with pytest.raises(Stopped):
        loop.judge(cast(Any, run), cast(Any, data), [])


def test_a_rollout_in_numbers() -> None:
    groups = [
        Group(100, [answer(100, 3, 1), answer(100, 5, truncated=True)], [1.0, 0.0], {"accuracy": [1.0, 0.0]}),
        Group(101, [answer(101, 4), answer(101, 4)], [math.nan, 0.5], {"accuracy": [math.nan, 0.5]}),
    ]
    found = measures(data_of(), Rollout(groups, 3, {"decode_seconds": 1.23456}))
    assert found == {
        "reward": 0.5, "reward_accuracy": 0.5, "reward_level_0": 0.5, "reward_level_1": 0.5, "flat_groups": 0.5,
        "redrawn": 3, "failed_rewards": 1, "answer_tokens": 4, "truncated": 0.25, "latent_share": 0.25,
        "decode_seconds": 1.2346,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ({}, None),
        ({"latent_share": 0.1}, "rollout 3: 10.0% of the answers have latents, below --min_latent_share 0.5"),
        ({"reward": math.nan}, "rollout 3: no answer has a reward"),
    ],
)
def test_what_is_broken_ends_the_run(found: dict[str, float], sentence: str | None) -> None:
    run = cast(Any, SimpleNamespace(config=settings(min_latent_share=0.5)))
    learner = cast(Any, SimpleNamespace(state={"latent_policy": "through"}))
    well = {"latent_share": 0.5, "reward": 0.0}
    if sentence is None:
        loop.check(run, learner, well, 2)
        learner.state["latent_policy"] = "text"
        loop.check(run, learner, well | {"latent_share": 0.0}, 2)
        return
    with pytest.raises(UserError) as caught:
        loop.check(run, learner, well | found, 2)
    assert sentence in str(caught.value)


def test_answers_are_written_and_those_of_an_interrupted_rollout_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        report, "answer_of", lambda made, _: SimpleNamespace(marked=lambda _: f"{len(made.ids)}\u2028\x85tokens")
    )
    rows = SimpleNamespace(
        record=lambda row: SimpleNamespace(text_input="Where to?", image_input=("map.png",)),
        places_of=lambda rows: [{"file": str(tmp_path / "d.jsonl"), "line": rows[0] + 1}],
    )
    data = cast(
        Any,
        SimpleNamespace(index=SimpleNamespace(rows=rows), loader=SimpleNamespace(rows=SimpleNamespace(encoder=None))),
    )
    shown: list[Any] = []
    journal = SimpleNamespace(pictures=lambda *given: shown.append(given))
    place = dict(folder=tmp_path, world=SimpleNamespace(rank=0))
    run = cast(Any, SimpleNamespace(**place, config=settings(updates=2), journal=journal))
    made = Rollout(
        [Group(7, [answer(7), answer(7, 9, truncated=True)], [1.0, math.nan], {"a": [1.0, math.nan]})], 0, {}
    )
    lesson = Lesson(made.answers, torch.tensor([0.5, 0.0]), torch.ones(2))
    written = Completions(run, data, 0)
    for step in (0, 2, 4):
        written.write(step, made, lesson)
    Image.new("RGB", (640, 480), "red").save(tmp_path / "map.png")
    written.write(6, made, lesson)
    assert [(step, sorted(things), group) for step, things, group in shown] == [
        *((step, ["said"], "answers") for step in (1, 3, 5)),
        (7, ["picture", "said"], "answers"),
    ]
    assert shown[3][1]["picture"].size == (SIDE, SIDE * 3 // 4)
    # Of later rollouts each tenth. A picture that has broken since is not shown.
    (tmp_path / "map.png").write_bytes(b"no picture")
    for step in range(18, 40, 2):
        written.write(step, made, lesson)
    assert [(step, [*things]) for step, things, _ in shown[4:]] == [(19, ["said"]), (39, ["said"])]
    content = b"".join((tmp_path / report.FILE).read_bytes().splitlines(keepends=True)[:6])
    (tmp_path / report.FILE).write_bytes(content)
    lines = [json.loads(line) for line in content.splitlines()]
    assert [line["rollout"] for line in lines] == [1, 1, 2, 2, 3, 3]
    assert lines[1] == {
        "rollout": 1, "step": 0, "file": f"{tmp_path}/d.jsonl", "line": 8, "question": "Where to?",
        "image_input": ["map.png"], "answer": "9\u2028\x85tokens", "reward": None, "rewards": {"a": None},
        "advantage": 0.0, "tokens": 9, "truncated": True,
    }  # fmt: skip
    # Killed in the third, perhaps in the middle of a line.
    with (tmp_path / report.FILE).open("a") as file:
        file.write('{"rollout": 3, "st')
    Completions(run, data, 2).write(4, made, lesson)
    assert (tmp_path / report.FILE).read_bytes() == content
