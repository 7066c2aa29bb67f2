"""Going on with another number of ranks: a run on two ranks, its checkpoint converted, resumed on 1, 3 and 4.

What a resumed run must equal is the run on two ranks that nobody interrupted: its live state when it saved, its log
lines, its last weights.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.group import Group
from support.models import untie
from support.on_disk import lines_of, rewrite

from mirage_ds import train
from mirage_ds.config.run import RunConfig
from mirage_ds.engine import checkpoint as checkpoints
from mirage_ds.engine.frozen import digest, notes_of_engine
from mirage_ds.engine.manifest import faults, read_manifest
from mirage_ds.engine.save import export_folder
from mirage_ds.engine.setup import everyone
from mirage_ds.engine.universal import convert, needed_bytes, print_list
from mirage_ds.errors import UserError
from mirage_ds.run.settings import Run

ROWS, B, STEPS, SAVED = 12, 5, 5, 2
# 12 rows, 5 a step, bins of at most two: 2 micro-steps on two ranks (one bin of one row), 3 on one, 1 on three and
# four. Saved after 10 rows, in the middle of an epoch; five steps are two epochs and a row.
# ε this large makes AdamW's step a smooth function of the gradient: see tests/dist/test_zero3.py.
BASE: dict[str, Any] = dict(
    latent_size=2, global_batch_size=B, micro_batch_size=2, max_steps=STEPS, warmup_steps=1, learning_rate=3e-3,
    adam_eps=1e-3, weight_decay=0.1, num_workers=0, report_to=["none"], save_every=SAVED, keep_checkpoints=3,
    gradient_checkpointing=False, log_rows=True, max_grad_norm=1.0,
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "stage2": dict(stage="stage2"),
    "sft_untied": dict(stage="sft", model="untied"),
    "zero1": dict(stage="sft", deepspeed="zero1"),
    "zero2": dict(stage="sft", deepspeed="zero2"),
    "zero0": dict(stage="sft", deepspeed="zero0"),
    "bf16": dict(stage="sft", deepspeed="bf16"),
}
# The DeepSpeed JSONs of the cases that do not take the stage's own.
JSONS: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"zero_optimization": {"stage": stage}} for stage in (0, 1, 2)},
    "bf16": {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    },
}
EXACT = ("step", "epoch", "lr", "rows", "tokens", "skipped", "model_flops")
MEASURED = ("loss", "ce", "token_ce", "grad_norm")
# Sixteen times the distance of neighbouring float32 numbers (1.2e-7), relative in losses and norms, absolute in weights
# (below 1). Other ranks and micro-batches add the same terms in another order; three steps carry that on with at most
# lr / ε = 3 times the gradient's change. Measured: 1.9e-7 (docs/reliability.md).
NOISE = 2e-6
# Four ranks on two cores that do other work.
TIMEOUT_S = 240


# ------------------------------------------------------------------------------------------------------- on the ranks


def _state(engine: Any, world: Any) -> dict[str, Any]:
    """Weights, moments, step counts, settings and schedule of a live engine."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    zero, tensors = engine.optimizer, {}
    optimizer = zero.optimizer
    if engine.zero_optimization_partition_weights():
        for name, parameter in engine.module.named_parameters():
            tensors[f"{name} fp32"] = safe_get_full_fp32_param(parameter).numpy().copy()
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{name} {key}"] = safe_get_full_optimizer_state(parameter, key).numpy().copy()
    else:
        # DeepSpeed's getters know no moments of the second group here: each rank's slices, in the order of ranks.
        own = []
        for flat, mapping in zip(zero.single_partition_of_fp32_groups, zero._param_slice_mappings, strict=True):
            flats = {"fp32": flat.detach(), **optimizer.state[flat]}
            for name, at in mapping.items():
                for key in ("fp32", "exp_avg", "exp_avg_sq"):
                    own.append((f"{name} {key}", flats[key][at.start : at.start + at.numel].numpy().copy()))
        for name, part in everyone(own, world):
            tensors[name] = np.concatenate([tensors.get(name, part[:0]), part])
    return dict(
        tensors=tensors,
        counts=[float(state["step"]) for state in optimizer.state.values()],
        groups=[{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups],
        schedule=engine.lr_scheduler.state_dict(),
        taken=engine.global_steps,
    )


def _train(world: Any, settings: dict[str, Any]) -> dict[str, Any] | str | None:
    """Train; the state after the start and at each save, from rank 0; or the user's mistake as a sentence."""
    config = RunConfig(**settings)
    try:
        run = Run(config, world)
        data, learner = train.open_run(run)
    except UserError as error:
        return str(error)
    engine = learner.engine
    found: dict[str, Any] = dict(
        loaded=_state(engine, world) if learner.checkpoint and engine.zero_optimization() else None,
        saved={},
        resumed=learner.resumed,
    )
    save = engine.save_checkpoint

    def noting(*args: Any, **named: Any) -> Any:
        if engine.zero_optimization():
            found["saved"][engine.global_steps] = _state(engine, world)
        return save(*args, **named)

    engine.save_checkpoint = noting
    train.train(run, data, learner)
    engine.destroy()
    return found if world.rank == 0 else None


def _unmended(world: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """What DeepSpeed's own loader makes of the optimizer."""
    own = checkpoints.own_groups_and_steps
    checkpoints.own_groups_and_steps = lambda engine: nullcontext()
    try:
        _, learner = train.open_run(Run(RunConfig(**settings), world))
    finally:
        checkpoints.own_groups_and_steps = own
    optimizer = learner.engine.optimizer.optimizer
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    counters = {id(state["step"]) for state in optimizer.state.values()}
    sub_groups = len(optimizer.state)
    learner.engine.destroy()
    return dict(decays=decays, counters=len(counters), sub_groups=sub_groups)


class _Partly(torch.nn.Module):
    """35 frozen elements and a buffer that checkpoints hold, one that they do not."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = torch.nn.Linear(3, 3)
        self.frozen = torch.nn.Linear(5, 7, bias=False).requires_grad_(False)
        self.register_buffer("mean", torch.arange(3.0))
        self.register_buffer("steps", torch.arange(3), persistent=False)
        self.register_buffer("rates", torch.arange(3.0) / 7, persistent=False)


def _notes(world: Any) -> tuple[Any, Any, Any]:
    import deepspeed

    torch.manual_seed(0)
    plain = _Partly()
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": world.size, "zero_optimization": {"stage": 3}}):
        split = _Partly()
    with deepspeed.zero.GatheredParameters(list(split.parameters()), modifier_rank=0):
        if world.rank == 0:
            for own, given in zip(split.parameters(), plain.parameters(), strict=True):
                own.data.copy_(given)
    for own, given in zip(split.buffers(), plain.buffers(), strict=True):
        own.copy_(given)
    return notes_of_engine(plain, world), notes_of_engine(split, world), digest(plain.frozen.weight)


# ---------------------------------------------------------------------------------------------------- in this process


class Groups:
    """Groups of ranks by their size; of those with more than a rank one at a time, for the memory's sake."""

    def __init__(self, *shared: Group):
        self.shared = shared
        self.made = {group.size: group for group in shared}

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> Any:
        for other, group in self.made.items():
            if 1 != other != size != 1:
                group.stop()
        group = self.made.setdefault(size, Group(size))
        return group.run(function, *args, timeout_s=TIMEOUT_S)[0]

    def stop(self) -> None:
        for group in self.made.values():
            if group not in self.shared:
                group.stop()


class Runs:
    def __init__(self, groups: Groups, base: dict[str, Any], scratch: Path, models: dict[str, Path]):
        self.groups, self.base, self.scratch, self.models = groups, base, scratch, models

    def settings(self, case: str, out: Path, **changed: Any) -> dict[str, Any]:
        values = self.base | CASES[case] | dict(save_model_path=out) | changed
        values["model"] = str(self.models.get(values["model"], values["model"]))
        if "deepspeed" in values:
            values["deepspeed"] = self.scratch / f"{values['deepspeed']}.json"
        return values

    def train(self, case: str, size: int, out: Path, **changed: Any) -> Any:
        return self.groups.run(size, _train, self.settings(case, out, **changed))

    @lru_cache  # noqa: B019  # lives as long as the test file
    def whole(self, case: str) -> Whole:
        """The uninterrupted run on two ranks."""
        return Whole(self, case)

    @lru_cache  # noqa: B019
    def resumed(self, case: str, size: int) -> tuple[Path, dict[str, Any]]:
        """The run that went on with `size` ranks."""
        out = self.scratch / case / f"on_{size}"
        self.whole(case).copy(out)
        return out, self.train(case, size, out, resume="auto")


@pytest.fixture(scope="module")
def runs(
    one_rank: Group, group: Group, nano: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:
    groups, scratch = Groups(one_rank, group), tmp_path_factory.mktemp("world_size")
    for name, values in JSONS.items():
        (scratch / f"{name}.json").write_text(json.dumps(values))
    untied = untie(nano, scratch / "untied")
    base = BASE | dict(model="tied", data_path=mixed, cache_dir=scratch / "cache")
    made = Runs(groups, base, scratch, dict(tied=nano, untied=untied))
    # At once, since other sizes end the group of two. Slow tests alone ask for the others.
    for case in ("stage2", "sft_untied", "bf16"):
        made.whole(case)
    yield made
    groups.stop()


class Whole:
    """An uninterrupted run on two ranks; what it was when it saved, and its folder as it was after SAVED steps.

    The checkpoint in `broken_off` has its universal form, the one in `out` has not.
    """

    def __init__(self, runs: Runs, case: str):
        self.out = runs.scratch / case / "whole"
        self.found = runs.train(case, 2, self.out)
        self.broken_off = runs.scratch / case / "broken_off"
        self.checkpoint = break_off(self.out, self.broken_off, SAVED)
        convert(self.broken_off, say=quiet)

    def copy(self, to: Path) -> Path:
        """Copy the run that broke off; return its checkpoint."""
        shutil.copytree(self.broken_off, to)
        return to / "run/checkpoints" / self.checkpoint.name


def break_off(whole: Path, to: Path, step: int) -> Path:
    """Copy a run as it was when it broke off in the second step after its checkpoint of `step`; return that."""
    name = f"global_step{step}"
    shutil.copytree(whole / "run/checkpoints" / name, to / "run/checkpoints" / name)
    (to / "run/checkpoints/latest").write_text(name)
    lines = (whole / "run/log.jsonl").read_text().splitlines(keepends=True)
    (to / "run/log.jsonl").write_text("".join(lines[: step + 1]))
    return to / "run/checkpoints" / name


def quiet(_: str) -> None: ...


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    """To the bit; how many sub-groups count the steps may differ, what they count may not."""
    assert one["tensors"].keys() == other["tensors"].keys()
    for name, tensor in one["tensors"].items():
        assert tensor.shape == other["tensors"][name].shape, name
        assert np.array_equal(tensor, other["tensors"][name]), name
    assert set(one["counts"]) == set(other["counts"]) == {float(one["taken"])}
    for key in ("groups", "schedule", "taken"):
        assert one[key] == other[key], key


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# --------------------------------------------------------------------------------------------------------- going on


# By size: a group of ranks costs more than its runs.
@pytest.mark.parametrize(
    ("size", "case"),
    [
        (1, "stage2"),
        *(pytest.param(1, case, marks=pytest.mark.slow) for case in ("sft_untied", "zero2")),
        (3, "stage2"),
        *(pytest.param(3, case, marks=pytest.mark.slow) for case in ("sft_untied", "zero1")),
        *(pytest.param(4, case, marks=pytest.mark.slow) for case in ("stage2", "sft_untied", "zero2")),
    ],
)  # fmt: skip
def test_run_goes_on_where_it_was(runs: Runs, case: str, size: int) -> None:
    whole = runs.whole(case)
    out, found = runs.resumed(case, size)
    # Weights, both moments, step counts, groups, schedule: as they were when two ranks saved them.
    assert_same_state(found["loaded"], whole.found["saved"][SAVED])
    # And all that the run said of itself then.
    told = json.loads((whole.checkpoint / "mirage_state.json").read_text())
    assert {"step", "evaluation_owed", "tower", "kept"} < told.keys()
    assert found["resumed"] == told
    moved = [name for name, tensor in found["loaded"]["tensors"].items() if name.endswith("exp_avg") and tensor.any()]
    assert len(moved) * 3 == len(found["loaded"]["tensors"])
    # Two steps later each sub-group has counted two.
    later, wanted = found["saved"][2 * SAVED], whole.found["saved"][2 * SAVED]
    assert set(later["counts"]) == {2.0 * SAVED}
    assert later["groups"] == wanted["groups"]
    # The same rows in each step, each once an epoch; the same losses.
    lines, expected = lines_of(out), lines_of(whole.out)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, other in zip(lines, expected, strict=True):
        assert {key: line[key] for key in EXACT} == {key: other[key] for key in EXACT}
        assert sorted(line["row_ids"]) == sorted(other["row_ids"])
        for key in MEASURED:
            assert line[key] == pytest.approx(other[key], rel=NOISE), (line["step"], key)
    assert {line["micro_steps"] for line in lines[SAVED:]} == {{1: 3, 3: 1, 4: 1}[size]}
    seen = [row for line in lines for row in line["row_ids"]]
    for epoch in range(STEPS * B // ROWS):
        assert set(seen[epoch * ROWS : (epoch + 1) * ROWS]) <= set(range(ROWS))
    assert sorted(Counter(seen).values()) == [2] * (ROWS - 1) + [3]
    # The same model at the end.
    one, other = load_file(out / "model.safetensors"), load_file(whole.out / "model.safetensors")
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=NOISE, rtol=0)


def test_float32_masters_of_bf16_weights_arrive_whole(runs: Runs) -> None:
    _, found = runs.resumed("bf16", 1)
    state = found["loaded"]
    assert_same_state(state, runs.whole("bf16").found["saved"][SAVED])
    masters = [torch.from_numpy(tensor) for name, tensor in state["tensors"].items() if name.endswith("fp32")]
    assert not all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in masters)


def test_frozen_parameters_and_buffers_are_noted_whole(runs: Runs) -> None:
    # 35 elements on three ranks: no multiple.
    plain, split, weight = runs.groups.run(3, _notes)
    assert plain == split
    assert plain.keys() == {"frozen.weight", "mean", "steps", "rates"}
    assert plain["frozen.weight"] == weight
    assert plain["mean"] == digest(torch.arange(3.0))
    assert plain["steps"] == digest(torch.arange(3))
    assert plain["rates"] == pytest.approx([0, 1 / 7, 2 / 7])


@pytest.mark.slow
def test_checkpoints_after_it_are_ordinary_ones(runs: Runs, tmp_path: Path) -> None:
    out, _ = runs.resumed("stage2", 4)
    made = out / "run/checkpoints" / f"global_step{2 * SAVED}"
    assert json.loads((made / "mirage_state.json").read_text())["world_size"] == 4
    assert not (made / "universal").exists()
    # Four ranks go on from it without a conversion, to the last bit.
    again = tmp_path / "again"
    break_off(out, again, 2 * SAVED)
    runs.train("stage2", 4, again, resume="auto")
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_shards_that_were_padded_are_converted_too(runs: Runs, tmp_path: Path) -> None:
    # Three ranks wrote it; hardly a parameter's size is a multiple of three.
    out, found = runs.resumed("stage2", 3)
    sizes = [tensor.size for tensor in found["loaded"]["tensors"].values()]
    assert sum(size % 3 != 0 for size in sizes) > 0.6 * len(sizes)
    back = tmp_path / "back"
    break_off(out, back, 2 * SAVED)
    convert(back, say=quiet)
    loaded = runs.train("stage2", 1, back, resume="auto", keep_checkpoints=1, save_every=1)["loaded"]
    assert_same_state(loaded, found["saved"][2 * SAVED])
    # Retention has deleted both forms together.
    assert [path.name for path in (back / "run/checkpoints").iterdir() if path.is_dir()] == [f"global_step{STEPS}"]


def test_deepspeeds_own_loader_still_needs_mending(runs: Runs, tmp_path: Path) -> None:
    # When this fails, private.own_groups_and_steps can go.
    out = tmp_path / "out"
    runs.whole("stage2").copy(out)
    found = runs.groups.run(1, _unmended, runs.settings("stage2", out, resume="auto"))
    assert found == dict(decays=[0.1, 0.1], counters=1, sub_groups=2)


# ---------------------------------------------------------------------------------------------------------- refusals


def test_without_universal_form_it_is_refused_with_the_command_to_make_it(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    place = break_off(runs.whole("stage2").out, out, SAVED)
    before = files(out)
    assert runs.train("stage2", 1, out, resume="auto") == (
        f"--resume auto: {place} was written by 2 rank(s), this run has 1; `mirage-ds checkpoint convert {place}` "
        "makes it loadable by any number of ranks, or use 2"
    )
    # What is wrong besides comes first: a conversion would not help.
    assert "--seed 42, this run has 7" in runs.train("stage2", 1, out, resume="auto", seed=7)
    assert "--global_batch_size 5, this run has 4" in runs.train("stage2", 1, out, resume="auto", global_batch_size=4)
    assert files(out) == before


def test_zero_0_keeps_its_number_of_ranks(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = tmp_path / "whole"
    runs.train("zero0", 1, whole)
    place = break_off(whole, out, SAVED)
    with pytest.raises(UserError, match="ZeRO stage 0 cannot be converted"):
        convert(out, say=quiet)
    rewrite(place / "mirage_state.json", {"world_size": 2})
    assert runs.train("zero0", 1, out, resume="auto") == (
        f"--resume auto: {place} was written by 2 rank(s), this run has 1; under ZeRO stage 0 that cannot change: use 2"
    )
    # On the same number it goes on, to the bit.
    rewrite(place / "mirage_state.json", {"world_size": 1})
    runs.train("zero0", 1, out, resume="auto")
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_damaged_universal_form_is_refused_and_made_anew(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    place = runs.whole("stage2").copy(out)
    file = next((place / "universal/zero").rglob("exp_avg_sq.pt"))
    good = file.read_bytes()
    file.write_bytes(good[:-40] + bytes([good[-40] ^ 1]) + good[-39:])
    said = runs.train("stage2", 1, out, resume="auto")
    name = file.relative_to(place / "universal")
    assert f"its universal form is damaged ({name} differs from what was written (SHA-256))" in said
    assert f"`mirage-ds checkpoint convert {place}`" in said
    convert(place, say=quiet)
    assert next(faults(place / "universal"), None) is None
    same_tensors({"": torch.load(file)}, {"": torch.load(runs.whole("stage2").checkpoint / file.relative_to(place))})


@pytest.mark.parametrize("form", ["universal", "plain"])
@pytest.mark.parametrize("changed", ["tower", "buffer"])
def test_other_frozen_tensor_is_refused_by_name(runs: Runs, changed: str, form: str, tmp_path: Path) -> None:
    out, model = tmp_path / "out", tmp_path / "model"
    if form == "universal":
        place = runs.whole("stage2").copy(out)
    else:
        place = break_off(runs.resumed("stage2", 1)[0], out, 2 * SAVED)
    shutil.copytree(runs.models["tied"], model)
    if changed == "tower":
        weights = load_file(model / "model.safetensors")
        name = "visual.blocks.0.attn.proj.bias"
        weights[name].view(torch.int32)[3] ^= 1
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    else:
        name = "language_model.rotary_emb.inv_freq"
        values = json.loads((model / "config.json").read_text())
        values["text_config"]["rope_parameters"]["rope_theta"] *= 1.001
        (model / "config.json").write_text(json.dumps(values))
    said = runs.train("stage2", 1, out, resume="auto", model=str(model))
    assert said.startswith(
        f"--resume auto: the frozen tensor {name} is not that of {place} (dtype, shape or bytes); go on with the same "
    )


# ------------------------------------------------------------------------------------------------------ the conversion


class Bomb:
    """Says that it has been unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_deepspeed_sees_files_of_the_manifest_alone(runs: Runs, tmp_path: Path) -> None:
    # The folder's name is a pattern that does not match itself.
    out, mark = tmp_path / "run [1] (copy) +", tmp_path / "mark"
    place = break_off(runs.whole("stage2").out, out, SAVED)
    for name in ("zero_pp_rank_2_mp_rank_00_optim_states.pt", "zero_pp_rank_2_mp_rank_00_model_states.pt"):
        (place / name).write_bytes(pickle.dumps(Bomb(mark)))
    said = convert(out, say=quiet)
    assert said.startswith(f"{place / 'universal'}: step 2, written by 2 rank(s), 0.0")
    assert not mark.exists()
    assert not list(place.glob(".*"))
    assert not list(place.parent.glob("latest_universal"))
    made, known = place / "universal", runs.whole("stage2").checkpoint / "universal"
    assert {entry.name for entry in read_manifest(made)} == {entry.name for entry in read_manifest(known)}
    # All there is; rank 0's shard is not in it once more.
    assert {*files(made)} == {entry.name for entry in read_manifest(made)} | {"mirage_manifest.json"}
    shards = sum(entry.size for entry in read_manifest(place) if "optim_states" in entry.name)
    assert sum(len(content) for content in files(made).values()) < 1.2 * shards
    # Damaged, it reaches nobody's unpickler.
    shutil.rmtree(made)
    (place / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(UserError, match=r"zero_pp_rank_1_mp_rank_00_optim_states.pt has \d+ bytes, \d+ were written"):
        convert(place, say=quiet)
    assert not mark.exists()


@pytest.mark.slow
def test_conversion_is_done_once_and_by_several_processes_alike(runs: Runs, tmp_path: Path) -> None:
    for case in ("stage2", "zero2"):
        whole = runs.whole(case)
        place = break_off(whole.out, tmp_path / case, SAVED)
        (place / ".universal.partial").mkdir()
        (place / ".universal.partial" / "left").write_text("by a conversion that was killed")
        convert(place, workers=2, say=quiet)
        before = files(place)
        assert convert(tmp_path / case, say=quiet) == f"{place / 'universal'}: is there already, and whole"
        assert files(place) == before
        tensors = {name for name in before if name.endswith(("fp32.pt", "exp_avg.pt", "exp_avg_sq.pt"))}
        # Two layers of 12 parameters, embeddings and the last norm: a weight and two moments of each. ZeRO-2 writes the
        # weight of the tied head once more.
        assert len(tensors) == 3 * (2 * 12 + 2) + (case == "zero2")
        for name in tensors:
            one, other = torch.load(place / name), torch.load(whole.checkpoint / name)
            if isinstance(one, dict):
                one, other = one["param"], other["param"]
            assert torch.equal(one, other)


def test_full_disk_leaves_the_checkpoint_as_it_was(runs: Runs, tmp_path: Path) -> None:
    place = break_off(runs.whole("stage2").out, tmp_path / "out", SAVED)
    before = files(tmp_path)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UserError) as error:
            convert(place, say=quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert str(error.value).startswith(f"{place}: not converted: {place / '.universal.partial'}: ")
    assert files(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sft_untied", "zero2"])
def test_room_that_is_asked_for_is_enough(
    runs: Runs, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, sizes, save = break_off(runs.whole(case).out, tmp_path / "out", SAVED), [0], torch.save

    def measuring(value: Any, file: Any, *args: Any) -> None:
        save(value, file, *args)
        made = (place / ".universal.partial").rglob("*")
        sizes.append(sum(path.stat().st_size for path in made if path.is_file()))

    monkeypatch.setattr(torch, "save", measuring)
    convert(place, say=quiet)
    needed = needed_bytes(read_manifest(place) or [])
    # Nor is much more asked for than it takes: rank 0's shard, a third of it, is copied under ZeRO-3 alone.
    assert {"sft_untied": 0.8, "zero2": 0.6}[case] * needed < max(sizes) <= needed


def test_export_takes_the_shards_as_before(runs: Runs, tmp_path: Path) -> None:
    whole = runs.whole("sft_untied")
    export_folder(whole.checkpoint, tmp_path / "with", None, None)
    export_folder(whole.out / "run/checkpoints" / whole.checkpoint.name, tmp_path / "without", None, None)
    same_tensors(load_file(tmp_path / "with/model.safetensors"), load_file(tmp_path / "without/model.safetensors"))


def test_list_says_what_each_checkpoint_is(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")

    def listed(hashes: bool) -> list[list[str]]:
        """The table's cells, without its head."""
        print_list(out, hashes)
        lines = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines() if line.strip()]
        return lines[2:]

    out = tmp_path / "out"
    runs.whole("stage2").copy(out)
    second = break_off(runs.whole("stage2").out, tmp_path / "other", 2 * SAVED)
    shutil.copytree(second, out / "run/checkpoints" / second.name)
    first, other = listed(hashes=True)
    assert [*first[:2], *first[3:]] == [str(SAVED), "2", "yes", "yes"]
    assert [*other[:2], *other[3:]] == [str(2 * SAVED), "2", "yes", "no"]
    assert float(first[2]) > 1.9 * float(other[2])
    file = out / "run/checkpoints" / second.name / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert listed(hashes=False)[1][3] == "yes"
    damaged = listed(hashes=True)[1]
    assert (damaged[1], damaged[3]) == ("?", f"no: {file.name} differs from what was written (SHA-256)")
