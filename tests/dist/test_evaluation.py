"""Decoding on two ranks: evaluation while training under ZeRO-3 (what it answers, costs and leaves), and `evaluate`.

Ψ elements of the sharded parameters.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.group import Group
from support.on_disk import lines_of
from torch.profiler import ProfilerActivity, profile

from mirage_ds import train
from mirage_ds.cluster.here import free_ports
from mirage_ds.config.run import RunConfig
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record_files import scan
from mirage_ds.engine import whole
from mirage_ds.engine.private import elements_to_gather
from mirage_ds.errors import Stopped, UserError
from mirage_ds.evaluate.decoder import answer_records, load_decoder
from mirage_ds.evaluate.report import evaluate_file
from mirage_ds.evaluate.scoring import spread
from mirage_ds.evaluate.spec import EvaluateSpec, Sampling
from mirage_ds.model.choose import NotFinite
from mirage_ds.model.slots import Limits
from mirage_ds.run import validation
from mirage_ds.run.settings import Run

K, NEW = 2, 6
TASK = "vsp-spatial-planning"
BASE: dict[str, Any] = dict(
    latent_size=K, stage="stage2", global_batch_size=2, max_steps=4, warmup_steps=0, learning_rate=3e-3,
    num_workers=0, report_to=["none"], eval_every=2, eval_new_tokens=NEW, overwrite=True, task=TASK,
)  # fmt: skip
# The suite may share two cores with others.
LONG_S = 200
BOARD = [[1, 0], [0, 2]]
SAMPLED = Sampling(1.5, 0.9)
LOSSES = ("loss", "ce", "token_ce", "grad_norm")


# ------------------------------------------------------------------------------------------------------- on the ranks


def _train(world: Any, settings: dict[str, Any], stop_at: int | None = None, room: int | None = None) -> str:
    """Train; how it ended. `stop_at`: the look at which rank 1 is asked to stop; `room`: bytes that are free."""
    config = RunConfig(**settings)
    looks = iter(range(stop_at - 1)) if stop_at and world.rank == 1 else None
    asked: Callable[[], bool] = (lambda: False) if looks is None else lambda: next(looks, None) is None
    free = whole.free_bytes
    if room is not None:
        whole.free_bytes = lambda world: room - world.rank
    run = Run(config, world)
    data, learner = train.open_run(run)
    try:
        train.train(replace(run, asked=asked), data, learner)
    except (UserError, Stopped) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        whole.free_bytes = free
        learner.engine.destroy()
    return ""


def _train_broken(world: Any, settings: dict[str, Any]) -> str:
    """Train; on rank 1 no answer has finite logits, nor has what rank 0 draws."""

    def broken(*given: Any, **options: Any) -> Any:
        raise NotFinite(3)

    decode, draw = validation.decode_samples, validation.figures
    validation.decode_samples, validation.figures = (broken if world.rank else decode), broken
    try:
        return _train(world, settings)
    finally:
        validation.decode_samples, validation.figures = decode, draw


def _decode(world: Any, settings: dict[str, Any], counts: list[int], new_tokens: list[int]) -> dict[str, Any]:
    """Take a step, decode so many rows and tokens, and listen to what torch sends; then save the model."""
    config = RunConfig(**settings)
    run = Run(config, world)
    data, learner = train.open_run(run)
    for plan, batches in data.loader.steps(0, 1):
        train.step(run, data, learner, plan, batches)
    parameters = list(learner.engine.module.parameters())
    found: dict[str, Any] = dict(gathered=[], answers=[], psi=sum(p.ds_numel for p in parameters))
    rows = data.evaluation.loader.rows
    # Several rounds, of which one rank has fewer to fill.
    validation.BATCH = 2
    for count, tokens in zip(counts, new_tokens, strict=True):
        chosen = spread(data.evaluation.loader.planner.row_ids.tolist(), count)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            answers = validation.decode_rows(run, learner, rows, chosen, Limits(tokens, K, K))
        found["gathered"].append(_gathered(seen.events()))
        found["answers"].append((chosen, answers))
        found["whole"] = [str(p.ds_status) for p in parameters]
    learner.save(world, config.save_model_path, 1, {})
    learner.engine.destroy()
    return found


def _gathered(events: Any) -> int:
    """Elements of the tensors that all-gathers filled, in the parameters' dtype; objects travel as bytes."""
    total = 0
    for event in events:
        if event.name == "c10d::_allgather_base_":
            total += max(torch.Size(shape).numel() for shape in event.input_shapes[:2])
    return total


def _plain(world: Any, settings: dict[str, Any]) -> list[Any]:
    """Look at the plain model while the engine's weights are whole, and at its memory afterwards."""
    config = RunConfig(**settings)
    _, learner = train.open_run(Run(config, world))
    module = learner.engine.module
    with whole.whole_model(learner.engine) as plain:
        hooks = [
            name
            for name, one in plain.named_modules()
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
            if getattr(one, kind)
        ]
        mine, theirs = (dict(one.named_parameters(remove_duplicate=False)) for one in (plain, module))
        shared = mine.keys() == theirs.keys() and all(
            mine[name].data_ptr() == theirs[name].data_ptr() and mine[name].shape == theirs[name].shape for name in mine
        )
        buffers = all(
            torch.equal(mine, theirs)
            for (_, mine), (_, theirs) in zip(plain.named_buffers(), module.named_buffers(), strict=True)
        )
    sharded = [(p, p.ds_shape.numel()) for p in module.parameters()]
    sizes = all(elements_to_gather(p) == elements for p, elements in sharded)
    parts = all(p.ds_tensor.ds_numel == -(-elements // world.size) for p, elements in sharded)
    left = {str(tensor.device) for tensor in (*plain.parameters(), *plain.buffers())}
    learner.engine.destroy()
    return [hooks, shared, buffers, sizes, parts, left]


def _spec(data: Path, most: int | None) -> EvaluateSpec:
    sampled = SAMPLED._asdict()
    return EvaluateSpec(
        data_path=data, task=TASK, max_new_tokens=NEW, decoding="sampled", seed=7, batch_size=2, most=most, **sampled
    )


def _evaluate(world: Any, folder: Path, data: Path, most: int | None) -> dict[str, Any] | str:
    """Be a rank of `evaluate`: the report, or the sentence that every rank raises."""
    decoder = load_decoder(folder, ImageFinder.beside(data, None))
    try:
        return evaluate_file(decoder, _spec(data, most), world=world)
    except UserError as error:
        return str(error)


# ---------------------------------------------------------------------------------------------------- in this process


@pytest.fixture(scope="module")
def base(nano: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Six of the mixed rows, with a board to be scored by."""
    rows = [json.loads(line) | {"map_desc": BOARD} for line in mixed.read_text().splitlines()[:6]]
    data = mixed.parent / "scored.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = tmp_path_factory.mktemp("cache")
    return BASE | dict(model=str(nano), data_path=mixed, eval_data_path=data, cache_dir=cache)


def losses(folder: Path) -> list[tuple]:
    return [tuple(line[name] for name in LOSSES) for line in lines_of(folder) if "loss" in line]


def measured(folder: Path) -> dict[int, dict[str, float]]:
    lines = [line for line in lines_of(folder) if "eval_loss" in line]
    return {line["step"]: {name: value for name, value in line.items() if name != "time"} for line in lines}


@pytest.fixture(scope="module")
def without(group: Group, base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose evaluations decode nothing."""
    out = tmp_path_factory.mktemp("without")
    assert group.run(_train, base | dict(save_model_path=out), timeout_s=LONG_S) == ["", ""]
    return out


@pytest.fixture(scope="module")
def decoded(group: Group, base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, decoding five rows of three batches and keeping the best by its loss."""
    out = tmp_path_factory.mktemp("decoded")
    settings = dict(save_model_path=out, eval_decode=5, eval_pictures=1, save_best="loss", report_to=["tensorboard"])
    assert group.run(_train, base | settings, timeout_s=LONG_S) == ["", ""]
    return out


def test_training_goes_on_to_the_bit_as_without_decoding(without: Path, decoded: Path) -> None:
    assert len(losses(decoded)) == 4
    assert losses(decoded) == losses(without)
    one, other = (load_file(folder / "model.safetensors") for folder in (without, decoded))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_training_goes_on_where_answers_are_not_finite(
    without: Path, group: Group, base: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    log = tmp_path / "log.txt"
    settings = dict(save_model_path=out, eval_decode=5, eval_pictures=1, save_best="success", log_file=log)
    done = group.run(_train_broken, base | settings | dict(report_to=["tensorboard"]), timeout_s=LONG_S)
    assert done == ["", ""]
    assert losses(out) == losses(without)
    for step, line in measured(out).items():
        assert line["eval_loss"] == measured(without)[step]["eval_loss"]
        assert line["eval_success"] is line["eval_count"] is None
    assert not (out / "best").exists()
    for step in (2, 4):
        for what, end in (("evaluation", "nothing is scored"), ("pictures", "none is drawn")):
            said = rf"error: {what} after step {step}: the logits of record 4 are not finite: [^\n]*; {end}\n"
            assert len(re.findall(said, log.read_text())) == 1


def test_scores_are_logged_beside_the_losses(without: Path, decoded: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(decoded / "run/stage2")).Reload()
    for step, line in measured(decoded).items():
        assert {name: line[name] for name in measured(without)[step]} == measured(without)[step]
        assert line["eval_count"] == 5
        assert 0 <= line["eval_success"] <= line["eval_high"] <= 1
        for group, name in (("eval", "success"), ("scores", "invalid"), ("scores", "latents")):
            seen = {one.step: one.value for one in board.Scalars(f"{group}/{name}")}
            assert seen[step] == pytest.approx(line[f"eval_{name}"])


def test_pictures_of_latents_are_in_tensorboard(decoded: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(decoded / "run/stage2")).Reload()
    tags = board.Tags()["images"]
    # The first record has a latent run.
    assert sorted(tags) == [
        f"pictures of latents/line 1/{name}" for name in ("attention", "norms", "similarity", "words")
    ]
    for tag in tags:
        assert [one.step for one in board.Images(tag)] == [2, 4]
        # A latent that has been trained on looks otherwise.
        before, after = (one.encoded_image_string for one in board.Images(tag))
        assert before != after
        picture = Image.open(io.BytesIO(after)).convert("L")
        assert min(picture.size) > 100
        assert len(set(picture.tobytes())) > 20


def test_the_best_folder_is_the_model_of_the_best_evaluation(decoded: Path) -> None:
    note = json.loads((decoded / "best/best.json").read_text())
    seen = measured(decoded)
    assert sorted(seen) == [2, 4]
    step = min(seen, key=lambda step: seen[step]["eval_loss"])
    assert (note["metric"], note["step"], note["value"]) == ("loss", step, seen[step]["eval_loss"])
    # It gets better and better here, so the best is what was trained at last.
    assert step == 4
    best, last = (load_file(folder / "model.safetensors") for folder in (decoded / "best", decoded))
    assert all(torch.equal(best[name], last[name]) for name in last)
    assert [path.name for path in decoded.glob(".best*")] == []
    for folder in (decoded / "best", decoded):
        card = (folder / "README.md").read_text()
        assert f"| loss | {seen[4]['eval_loss']:.4g} |" in card
        assert "| optimizer steps | 4 |" in card


@pytest.mark.parametrize("train_vision", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ranks_answer_as_evaluate_does_with_the_saved_model(
    train_vision: bool, group: Group, base: dict[str, Any], tmp_path: Path
) -> None:
    settings = base | dict(save_model_path=tmp_path / "out", train_vision=train_vision, eval_decode=1)
    # Uneven shares; the last leaves a rank without a row.
    counts, tokens = ([5, 1], [NEW, 2 * NEW]) if not train_vision else ([3], [NEW])
    found = group.run(_decode, settings, counts, tokens, timeout_s=LONG_S)
    decoder = load_decoder(tmp_path / "out", ImageFinder.beside(base["eval_data_path"], None))
    records = scan(base["eval_data_path"])[0]
    for rank in found:
        for (chosen, answers), count, longest in zip(rank["answers"], counts, tokens, strict=True):
            assert len(chosen) == count
            wanted = answer_records(decoder, [records[row] for row in chosen], Limits(longest, K, K))
            assert answers == wanted
        # Once, whatever is decoded; a parameter whose size the ranks do not divide is padded.
        assert all(rank["psi"] <= number < 1.001 * rank["psi"] for number in rank["gathered"])
        assert len(set(rank["gathered"])) == 1
        assert set(rank["whole"]) == {"ZeroParamStatus.NOT_AVAILABLE"}
    assert len({tuple(answer.ids) for answer in found[0]["answers"][0][1]}) > 1


def test_the_plain_model_has_no_hooks_and_no_memory_of_its_own(
    group: Group, base: dict[str, Any], tmp_path: Path
) -> None:
    for rank in group.run(_plain, base | dict(save_model_path=tmp_path, train_vision=True), timeout_s=LONG_S):
        assert rank == [[], *[True] * 4, {"meta"}]


def test_a_stop_inside_decoding_is_honoured_by_all_ranks_and_made_up_for(
    group: Group, base: dict[str, Any], decoded: Path, tmp_path: Path
) -> None:
    settings = base | dict(save_model_path=tmp_path, eval_decode=5, save_best="loss", overwrite=False)
    # Rank 1 looks once before the first step, once in each step, and before each token that it decodes.
    assert group.run(_train, settings, 5, timeout_s=LONG_S) == ["Stopped: "] * 2
    assert measured(tmp_path) == {}
    assert json.loads((tmp_path / "run/checkpoints/global_step2/mirage_state.json").read_text())["evaluation_owed"]
    assert group.run(_train, settings | dict(resume="auto"), timeout_s=LONG_S) == ["", ""]
    assert measured(tmp_path) == measured(decoded)
    assert losses(tmp_path) == losses(decoded)


def test_without_room_for_the_whole_model_nothing_is_trained(
    group: Group, base: dict[str, Any], tmp_path: Path
) -> None:
    settings = base | dict(save_model_path=tmp_path, eval_decode=5)
    for said in group.run(_train, settings, room=1_000_000, timeout_s=LONG_S):
        assert re.fullmatch(
            r"UserError: --eval_decode 5: to decode, each rank needs the whole model, its keys and values, 0\.\d\d GB, "
            r"and rank 1 has 0\.00 GB free: evaluation is a job of its own here; .*",
            said,
        )
    assert lines_of(tmp_path) == []


# ------------------------------------------------------------------------------------------------------ `evaluate`


def alike(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what says how many ranks made it."""
    return report | {"settings": report["settings"] | {"ranks": None}}


@pytest.mark.parametrize("most", [5, 1])
def test_ranks_share_the_records_of_evaluate(most: int, group: Group, nano: Path, base: dict[str, Any]) -> None:
    data = base["eval_data_path"]
    decoder = load_decoder(nano, ImageFinder.beside(data, None))
    alone = evaluate_file(decoder, _spec(data, most))
    assert [one["line"] for one in alone["answers"]] == list(range(1, most + 1))
    for report in group.run(_evaluate, nano, data, most):
        assert report["settings"]["ranks"] == 2
        assert alike(report) == alike(alone)


def test_a_fault_of_one_rank_is_raised_on_all(group: Group, nano: Path, base: dict[str, Any], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in base["eval_data_path"].read_text().splitlines()][:4]
    for row in rows:
        row |= {name: str(base["eval_data_path"].parent / row[name]) for name in ("image_input",) if name in row}
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    # The second and the fourth are rank 1's.
    rows[3] |= {"image_input": str(broken)}
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = group.run(_evaluate, nano, data, None)
    assert said[0] == said[1]
    assert said[0].startswith(f"record on line 4, image_input: image {broken} cannot be decoded")


def launch(*words: object) -> tuple[int, str]:
    """Start `evaluate` on two ranks as a user does; exit code and all that was said."""
    here = Path(sys.executable).parent
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    environment["PATH"] = f"{here}{os.pathsep}{environment['PATH']}"
    launcher = [here / "deepspeed", "--num_accelerators", 2, "--master_port", free_ports(), "--module"]
    command = [*map(str, launcher), "mirage_ds.evaluate", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_the_launcher_writes_one_file(nano: Path, base: dict[str, Any], tmp_path: Path) -> None:
    data, out = base["eval_data_path"], tmp_path / "scores.json"
    words = ("--task", TASK, "--max_new_tokens", NEW, "--most", 3, "--out", out)
    code, said = launch(nano, "--data_path", data, *words)
    assert code == 0, said
    assert said.count(f"{TASK}, {nano}") == 1
    report = json.loads(out.read_text())
    assert report["settings"]["ranks"] == 2
    decoder = load_decoder(nano, ImageFinder.beside(data, None))
    wanted = answer_records(decoder, scan(data)[0][:3], Limits(NEW))
    assert [(one["line"], one["ids"]) for one in report["answers"]] == [
        (i + 1, one.ids) for i, one in enumerate(wanted)
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


@pytest.mark.slow
def test_the_launcher_says_a_fault_once(nano: Path, base: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"text_input": "?", "map_desc": BOARD}] * 3 + [
        {"text_input": "?", "image_input": "gone.png", "map_desc": BOARD}
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, said = launch(nano, "--data_path", data, "--task", TASK, "--out", tmp_path / "scores.json")
    assert code == 2, said
    assert said.count("error: ") == 1
    assert said.count("error: record on line 4, image_input: no image 'gone.png'") == 1
    assert "Traceback" not in said
    assert not (tmp_path / "scores.json").exists()
