"""A step of a run taken again on the run's own ranks, its gradients layer by layer, and the trace of some steps."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from math import hypot
from pathlib import Path
from typing import Any

import pytest
from support.group import Group
from support.on_disk import files, lines_of

from mirage_ds import train
from mirage_ds.cluster.replay.again import logged_step, settings_of, take_again
from mirage_ds.config.run import RunConfig
from mirage_ds.errors import UserError
from mirage_ds.run.settings import Run

STEPS = 5
# Checkpoints of steps 2 and 4. Micro-steps of one row: gradients are sums over several of them.
BASE: dict[str, Any] = dict(
    stage="stage2", latent_size=2, global_batch_size=4, micro_batch_size=1, max_steps=STEPS, warmup_steps=0,
    learning_rate=3e-3, num_workers=0, report_to=["none"], save_every=2, log_rows=True,
    gradient_checkpointing=False, profile_steps="3:4",
)  # fmt: skip


def _train(world: Any, settings: dict[str, Any]) -> None:
    run = Run(RunConfig(**settings), world)
    data, learner = train.open_run(run)
    train.train(run, data, learner)
    learner.engine.destroy()


def _again(world: Any, folder: Path, number: int, nowhere: Path) -> Any:
    """What the step came to, or the sentence of a user's error."""
    try:
        return tuple(take_again(Run(settings_of(folder, str(nowhere)), world), folder, number))
    except UserError as error:
        return str(error)


@pytest.fixture(scope="module")
def ran(group: Group, nano: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return the folder of a run of two ranks under a ZeRO stage; the records are a copy of its own."""
    made: dict[int, Path] = {}

    def run(stage: int) -> Path:
        if stage not in made:
            scratch = tmp_path_factory.mktemp("replayed")
            shutil.copytree(mixed.parent, scratch / "data")
            own = {"deepspeed": scratch / "zero.json", "save_model_path": scratch / "run"}
            kept = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
            own["deepspeed"].write_text(json.dumps({"zero_optimization": {"stage": stage, **kept}}))
            data = {"data_path": scratch / "data" / mixed.name, "cache_dir": scratch / "cache"}
            group.run(_train, timeout_s=300, settings=BASE | own | data | {"model": str(nano)})
            made[stage] = scratch / "run"
        return made[stage]

    return run


@pytest.mark.parametrize("stage", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1, 2))])
@pytest.mark.parametrize("number", [3, 4])
def test_a_step_taken_again_is_the_one_that_was_logged(
    stage: int, number: int, ran: Callable[[int], Path], group: Group, tmp_path: Path
) -> None:
    out = ran(stage)
    before = files(out)
    loss, rows, norms = group.run(_again, out, number, tmp_path)[0]
    line = lines_of(out)[number - 1]
    # On the same ranks nothing is summed in another order: to the bit.
    assert loss == line["loss"]
    assert hypot(*norms.values()) == pytest.approx(line["grad_norm"], rel=1e-5)
    assert sorted(one["row"] for one in rows) == sorted(line["row_ids"])
    assert all(one["line"] == one["row"] + 1 and one["file"].endswith("mixed.jsonl") for one in rows)
    # The step's loss is the mean of its rows'.
    losses = [one["loss"] for one in rows]
    assert sum(losses) / len(losses) == pytest.approx(loss, rel=1e-5)
    assert losses == sorted(losses, reverse=True)
    assert {"language_model.layers.0", "language_model.layers.1", "language_model.embed_tokens"} <= norms.keys()
    assert all(norm > 0 for norm in norms.values())
    assert files(out) == before


def test_what_cannot_be_taken_again_is_said(ran: Callable[[int], Path], group: Group, tmp_path: Path) -> None:
    out = ran(3)
    for number, sentence in (
        (6, f"step 6: the last in {out}/run/log.jsonl is step 5; name one in there"),
        (2, f"step 2: {out}/run/checkpoints has no checkpoint of an earlier step (the oldest is of step 2); "),
    ):
        with pytest.raises(UserError) as error:
            logged_step(out, number)
        assert str(error.value).startswith(sentence)
    copied = tmp_path / "copied"
    shutil.copytree(out, copied)
    shutil.rmtree(copied / "run/checkpoints")
    with pytest.raises(UserError, match=r"has no checkpoint of an earlier step \(there is none\)"):
        logged_step(copied, 2)


def test_a_step_on_sampled_answers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("stage: rl\nmodel: m\ndata_path: d\nsave_model_path: o\n")
    with pytest.raises(UserError, match=r"replay takes no steps of --stage rl; run/completions\.jsonl has"):
        settings_of(tmp_path, str(tmp_path))


def test_other_records_are_refused(ran: Callable[[int], Path], group: Group, tmp_path: Path) -> None:
    out = ran(3)
    records = out.parent / "data/mixed.jsonl"
    own = records.read_text()
    records.write_text(own.replace("Question", "Questions", 1))
    said = group.run(_again, out, 3, tmp_path)
    records.write_text(own)
    assert said[0] == said[1]
    place = out / "run/checkpoints/global_step2"
    assert said[0].startswith(f"step 3: {place} was written with content of --data_path, --columns (SHA-256) ")


def test_other_ranks_are_told_how(ran: Callable[[int], Path], one_rank: Group, tmp_path: Path) -> None:
    out = ran(3)
    (said,) = one_rank.run(_again, out, 3, tmp_path)
    place = out / "run/checkpoints/global_step2"
    assert said.startswith(f"step 3: {place} was written by 2 rank(s), this run has 1; `mirage-ds checkpoint convert ")


def test_the_steps_that_were_asked_for_are_traced(ran: Callable[[int], Path]) -> None:
    (trace,) = (ran(3) / "run/profile").iterdir()
    assert trace.name.startswith("steps_3-4_rank0.")
    assert trace.name.endswith(".pt.trace.json.gz")
    names = [event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    # torch counts from 0.
    assert {name for name in names if name.startswith("ProfilerStep")} == {"ProfilerStep#2", "ProfilerStep#3"}
    assert names.count("ProfilerStep#2") == 1
    assert any("mm" in name for name in names)
