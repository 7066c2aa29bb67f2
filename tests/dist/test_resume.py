"""Resume, retention, evaluation while training and export of sharded checkpoints: ZeRO-3 on two ranks.

Every run is train.py's own `train`; what is compared is what it leaves on the disk.
"""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.alike import slowly
from support.group import Group
from support.indices import open_index
from support.models import untie
from support.on_disk import files, log_of, rewrite

from mirage_ds import train
from mirage_ds.cluster.status.facts import Facts
from mirage_ds.cluster.status.summary import summary
from mirage_ds.config.mixture import records_of
from mirage_ds.config.run import RunConfig
from mirage_ds.data.batch import collate
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.record_files import scan
from mirage_ds.engine.checkpoint import CheckpointWriter
from mirage_ds.engine.save import export_folder
from mirage_ds.errors import UserError
from mirage_ds.files import GENERATE
from mirage_ds.model.load import load_model
from mirage_ds.model.loss import StepCounts, objective
from mirage_ds.run.journal import Logs
from mirage_ds.run.settings import Run

K, STEPS = 2, 6
# 12 rows, 3 a step on two ranks, one a micro-step: a rank is idle in every other one; 6 steps are an epoch and a half.
BASE: dict[str, Any] = dict(
    latent_size=K, stage="stage2", global_batch_size=3, micro_batch_size=1, max_steps=STEPS, warmup_steps=2,
    learning_rate=3e-3, num_workers=0, report_to=["none"], save_every=2, keep_checkpoints=3,
    gradient_checkpointing=False,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------- on the ranks


def _train(world: Any, settings: dict[str, Any]) -> str | None:
    """Train; the user's mistake as a sentence, if there is one."""
    config = RunConfig(**settings)
    try:
        run = Run(config, world)
        data, learner = train.open_run(run)
    except UserError as error:
        return str(error)
    train.train(run, data, learner)
    learner.engine.destroy()
    return None


class _Engine:
    """Writes nothing but the folder, on one rank."""

    checkpoint_engine = None
    zero_offload_optimizer = zero_offload_param = staticmethod(lambda: None)

    def save_checkpoint(self, folder: str, tag: str, **_: Any) -> None:
        dist.barrier()


def _retain(world: Any, folder: Path, saves: list[tuple[int, int]]) -> list[tuple[str, list[str]]]:
    """Save the steps in order; (latest, folders) after each."""
    found = []
    for step, keep in saves:
        CheckpointWriter(_Engine(), folder, {"step": step}, world).finish(keep)
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
        found.append(((folder / "latest").read_text(), names))
    return found


# ---------------------------------------------------------------------------------------------------- in this process


class Runs:
    def __init__(self, group: Group, base: dict[str, Any], scratch: Path):
        self.group, self.base, self.scratch = group, base, scratch

    def train(self, out: Path, **settings: Any) -> str | None:
        said = self.group.run(_train, self.base | dict(save_model_path=out) | settings)
        assert said[0] == said[1]
        return said[0]


@pytest.fixture(scope="module")
def runs(group: Group, nano: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    scratch = tmp_path_factory.mktemp("resume")
    return Runs(group, BASE | dict(model=str(nano), data_path=mixed, cache_dir=scratch / "cache"), scratch)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    """The uninterrupted run; checkpoints of steps 2, 4 and 6. In an empty folder `auto` starts."""
    out = runs.scratch / "whole"
    assert runs.train(out, resume="auto") is None
    return out


@pytest.fixture
def stopped(whole: Path, tmp_path: Path):
    """Copy the run as it was when it broke off after `step`."""

    def make(step: int, logged: int, name: str = "stopped") -> Path:
        out = tmp_path / name
        checkpoints = out / "run/checkpoints"
        shutil.copytree(whole / f"run/checkpoints/global_step{step}", checkpoints / f"global_step{step}")
        (checkpoints / "latest").write_text(f"global_step{step}")
        lines = (whole / "run/log.jsonl").read_text().splitlines(keepends=True)
        (out / "run/log.jsonl").write_text("".join(lines[:logged]))
        return out

    return make


def same_tensors(one: Path, other: Path) -> None:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(first[name].dtype == second[name].dtype for name in first)


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(("step", "logged"), [(2, 3), (4, 6)])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(runs: Runs, whole: Path, stopped, step, logged) -> None:
    # It had logged beyond its checkpoint when it broke off.
    out = stopped(step, logged)
    assert runs.train(out, resume="auto") is None
    # Every step once; losses, gradient norms, rates, rows and epochs to the last digit.
    assert [line["step"] for line in log_of(out)] == list(range(1, STEPS + 1))
    assert log_of(out) == log_of(whole)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    # Its optimizer is where the other's is, too.
    shards = sorted((whole / f"run/checkpoints/global_step{STEPS}").glob("*optim_states.pt"))
    assert len(shards) == 2
    for shard in shards:
        places = (shard, out / f"run/checkpoints/global_step{STEPS}" / shard.name)
        one, other = (torch.load(place, weights_only=False)["optimizer_state_dict"] for place in places)
        assert_equal(one, other)


def assert_equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        for first, second in zip(one, other, strict=True):
            assert_equal(first, second)
    elif isinstance(one, (int, float, str)):
        assert one == other


def test_uninterrupted_run_moves_and_its_steps_differ(whole: Path, nano: Path) -> None:
    lines = log_of(whole)
    assert len({line["loss"] for line in lines}) == STEPS
    assert max(line["epoch"] for line in lines) > 1
    before, after = load_file(nano / "model.safetensors"), load_file(whole / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_its_folder_says_how_a_run_stands(whole: Path) -> None:
    done = summary(Facts(whole), time.time())
    assert (done["state"], done["step"], done["steps"], done["world_size"]) == ("finished", STEPS, STEPS, 2)
    assert done["checkpoint"]["step"] == STEPS
    assert all(line["model_flops"] > 0 for line in log_of(whole))
    before = files(whole)
    summary(Facts(whole), time.time())
    assert files(whole) == before


def test_half_a_last_line_in_the_log_is_dropped(whole: Path, stopped) -> None:
    # The disk was full, or the node died.
    out = stopped(4, 5)
    with (out / "run/log.jsonl").open("a") as log:
        log.write('{"step": 6, "epo')
    Logs(out / "run", STEPS, [], start=4).close("finished")
    assert log_of(out) == log_of(whole)[:4]


@pytest.mark.parametrize(
    ("written", "settings", "sentence"),
    [
        ({"zero_stage": 2}, {}, "ZeRO stage of --deepspeed 2, this run has 3"),
        ({}, {"stage": "sft"}, "--stage stage2, this run has sft"),
        ({}, {"latent_size": 3}, "--latent_size 2, this run has 3"),
        ({}, {"global_batch_size": 4}, "--global_batch_size 3, this run has 4"),
        ({}, {"seed": 7}, "--seed 42, this run has 7"),
        ({}, {"train_vision": True}, "--train_vision False, this run has True"),
        ({}, {"columns": "helper=image_output"}, "content of --data_path, --columns (SHA-256) "),
        ({}, {"data_path": "other"}, "content of --data_path, --columns (SHA-256) "),
    ],
)
def test_other_run_is_refused_with_both_values(runs: Runs, stopped, mixed: Path, written, settings, sentence) -> None:
    out = stopped(2, 2)
    if "data_path" in settings:
        other = mixed.parent / "other.jsonl"
        other.write_text(mixed.read_text().replace("Question", "Questions", 1))
        settings = {"data_path": other}
    state = out / "run/checkpoints/global_step2/mirage_state.json"
    rewrite(state, written)
    before = files(out)
    said = runs.train(out, resume="auto", **settings)
    assert said.startswith(f"--resume auto: {state.parent} was written with {sentence}")
    assert said.endswith("; go on with the same, or train into another --save_model_path")
    assert files(out) == before


def test_a_mixture_trains_its_own_rows_and_goes_on_with_its_weights_alone(
    runs: Runs, nano: Path, mixed: Path, tmp_path: Path
) -> None:
    other, out = mixed.parent / "twice.jsonl", tmp_path / "mixture"
    other.write_text(mixed.read_text().replace("Question", "Questions"))
    # Several files are indexed by processes, which those of a group cannot start.
    encoder = load_encoder([str(nano)], ImageFinder.beside(mixed, None), "stage2", K)
    open_index(records_of([mixed, other]), encoder, ("image_input",), runs.scratch / "cache")
    settings: dict[str, Any] = dict(data_path=[f"{mixed}:1", f"{other}:3"], log_rows=True, global_batch_size=4)
    assert runs.train(out, **settings | dict(max_steps=2)) is None
    assert runs.train(out, **settings | dict(max_steps=4, resume="auto")) is None
    # 4 of the first file's 12 rows and all 12 of the second's are an epoch, of 4 steps.
    met = sorted(row for line in log_of(out) for row in line["row_ids"])
    assert len(set(met)) == len(met) == 16
    assert met[4:] == list(range(12, 24))
    turned = runs.train(out, **settings | dict(data_path=[f"{mixed}:3", f"{other}:1"], max_steps=4, resume="auto"))
    assert "content of --data_path, --columns (SHA-256) " in turned


def test_finished_model_without_checkpoint_is_refused(runs: Runs, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "finished"
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("checkpoints"))
    before = files(out)
    said = runs.train(out, resume="auto")
    assert said.startswith(f"--resume auto: {out} holds a finished model and no checkpoint to continue from")
    assert files(out) == before


# ---------------------------------------------------------------------------------------------------------- retention


def test_newest_checkpoints_stay_and_latest_is_one_of_them(runs: Runs, tmp_path: Path) -> None:
    found, _ = runs.group.run(_retain, tmp_path / "checkpoints", [(step, 2) for step in (2, 4, 6, 8, 10, 12)])
    steps = [[2], [2, 4], [4, 6], [6, 8], [8, 10], [10, 12]]
    names = [sorted(f"global_step{step}" for step in kept) for kept in steps]
    assert found == [(f"global_step{kept[-1]}", name) for kept, name in zip(steps, names, strict=True)]


def test_going_on_from_an_older_checkpoint_never_deletes_the_one_just_written(runs: Runs, tmp_path: Path) -> None:
    # `latest` set back to step 2 by hand, as a sentence of load_checkpoint advises, and fewer are kept from now on.
    found, _ = runs.group.run(_retain, tmp_path / "checkpoints", [(2, 3), (4, 3), (6, 3), (3, 1), (4, 1)])
    for latest, names in found:
        assert latest in names
    assert "global_step3" not in found[-1][1]


# --------------------------------------------------------------------------------------------------------- evaluation


def by_one_process(folder: Path, data: Path) -> dict[str, float]:
    """The mean losses of all rows, one row a forward, without DeepSpeed."""
    encoder = load_encoder([str(folder)], ImageFinder.beside(data, None), "stage2", K)
    samples = [encoder.encode(record, row) for row, record in enumerate(scan(data)[0])]
    loaded = load_model(folder, stage="stage2", dtype=torch.float32, device=torch.device("cpu"), checkpointing=False)
    labels = [int((sample.labels >= 0).sum()) for sample in samples]
    counts = StepCounts(len(samples), sum(labels), sum(K * len(sample.runs) for sample in samples))
    loss = token_ce = 0.0
    latents = []
    for sample in samples:
        with torch.no_grad():
            depth = 1 + sum(k for _, k in sample.runs)
            sums, traced = loaded.model.trace(loaded.tower.attach(collate([sample], depth, encoder.dummy(1))))
            # Of its first block: the states before its places.
            latents += [traced.hidden[start - 1 : start - 1 + k] for start, k in sample.runs[:1]]
            loss += float(objective(sums, counts, 1.0, "sample")[0])
        token_ce += float(sums.token_ce)
    alike = {f"eval_{name}": value for name, value in slowly(torch.stack(latents)).items()}
    return dict(eval_loss=loss, eval_ce=loss, eval_token_ce=token_ce / sum(labels), **alike)


def test_evaluation_measures_the_models_loss_and_changes_no_bit(
    runs: Runs, whole: Path, stopped, mixed: Path, tmp_path: Path
) -> None:
    # Five rows for two ranks: one of them is idle in the last micro-step.
    data, out = mixed.parent / "held_out.jsonl", stopped(4, 4)
    data.write_text("".join(mixed.read_text().splitlines(keepends=True)[3:8]))
    assert runs.train(out, resume="auto", eval_data_path=data, eval_every=1, save_every=1) is None
    assert log_of(out) == log_of(whole)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    made = log_of(out, evaluations=True)
    assert [line["step"] for line in made] == [5, 6]
    export_folder(out / "run/checkpoints/global_step5", tmp_path / "five", None, None)
    for line, folder in zip(made, (tmp_path / "five", out), strict=True):
        del line["step"]
        assert line == pytest.approx(by_one_process(folder, data), abs=1e-5)


# ------------------------------------------------------------------------------------------------------------- export


@pytest.fixture(scope="module")
def free(runs: Runs, nano: Path) -> Path:
    """A run of two steps from a model with an output matrix of its own."""
    folder, out = untie(nano, runs.scratch / "untied"), runs.scratch / "free"
    assert runs.train(out, model=str(folder), max_steps=2, warmup_steps=0) is None
    return out


@pytest.mark.parametrize("run", ["whole", "free"])
def test_exported_checkpoint_equals_the_saved_model(run: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    out, made = request.getfixturevalue(run), tmp_path / "made"
    step = {"whole": STEPS, "free": 2}[run]
    said = export_folder(out / f"run/checkpoints/global_step{step}", made, None, None)
    assert said == f"{made}: step {step} of stage2, float32"
    same_tensors(made, out)
    assert ("lm_head.weight" in load_file(made / "model.safetensors")) == (run == "free")
    names = {path.name for path in out.iterdir() if path.is_file()} | {GENERATE}
    assert {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()} == names
    for name in names - {"model.safetensors"}:
        assert (made / name).read_bytes() == (out / name).read_bytes(), name
    plain, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(made, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    head = load_file(made / "model.safetensors").get("lm_head.weight", plain.get_input_embeddings().weight)
    assert torch.equal(plain.lm_head.weight, head)


def test_earlier_checkpoint_is_another_model(whole: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    export_folder(whole / "run/checkpoints/global_step2", made, None, None)
    first, last = load_file(made / "model.safetensors"), load_file(whole / "model.safetensors")
    # Only the frozen tower is the same.
    trained = {name for name in first if not torch.equal(first[name], last[name])}
    assert trained == {name for name in first if not name.startswith("visual.")}


def test_export_refuses_and_changes_nothing(whole: Path, stopped, tmp_path: Path) -> None:
    source, made = whole / "run/checkpoints/global_step2", tmp_path / "made"
    made.mkdir()
    (made / "notes.txt").write_text("mine")
    with pytest.raises(UserError) as error:
        export_folder(source, made, None, None)
    assert str(error.value) == f"{made} exists already; give a new folder"
    assert files(made) == {"notes.txt": b"mine"}
    # The base has been moved away; a wrong one does not fit.
    out = stopped(2, 2)
    state = out / "run/checkpoints/global_step2/mirage_state.json"
    gone = tmp_path / "gone"
    rewrite(state, {"sources": [str(gone)]})
    refused = partial(export_folder, state.parent, tmp_path / "new", None)
    with pytest.raises(UserError, match="gone: no such folder"):
        refused(None)
    assert not (tmp_path / "new").exists()
    # Found again by --model.
    refused(whole)
    export_folder(source, tmp_path / "wanted", None, None)
    same_tensors(tmp_path / "new", tmp_path / "wanted")
