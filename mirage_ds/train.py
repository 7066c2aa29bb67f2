"""Training: `deepspeed --module mirage_ds.train --model … --stage … --data_path … --save_model_path …`.

Read it from the top: main → run → _prepare → the loop → _step → _micro_step.

W ranks, G micro-steps of a step, B rows of a step.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click

from mirage_ds.config import RunConfig, read_yaml
from mirage_ds.errors import EXIT_USER_ERROR, UserError
from mirage_ds.flags import CONTEXT, build_model, model_options


@click.command(context_settings=CONTEXT, no_args_is_help=True)
@model_options(RunConfig)
@click.option("--config", "yaml_file", type=click.Path(path_type=Path), help="YAML file of the same settings.")
@click.option("--local_rank", hidden=True, help="Passed by some launchers; the environment says it too.")
def command(yaml_file: Path | None, local_rank: str | None, **flags: Any) -> None:
    """Train one stage of a Mirage model. Flags win over the YAML file, which wins over defaults."""
    del local_rank
    values = read_yaml(yaml_file) if yaml_file else None
    run(build_model(RunConfig, flags, values, source=str(yaml_file)))


def main() -> None:
    """Run the command; a user's mistake is one sentence, said by rank 0, and exit code 2 on every rank."""
    # DeepSpeed calls collectives that torch has renamed: nothing the user can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    first = os.environ.get("RANK", "0") == "0"
    try:
        command.main(standalone_mode=False)
    except click.ClickException as error:
        message = error.format_message()
    except UserError as error:
        message, first = str(error), first or getattr(error, "local", False)
    else:
        return
    if first:
        print(f"error: {message}", file=sys.stderr, flush=True)  # noqa: T201  # before any console exists
    sys.exit(EXIT_USER_ERROR)


class _Prepared(NamedTuple):
    """What the loop runs on."""

    world: Any
    engine: Any
    tower: Any
    loader: Any
    index: Any
    steps: int
    save: Any


def run(config: RunConfig) -> None:
    """Train as `config` says. All ranks call it.

    Raises:
        UserError: something the user can mend; nothing has been trained or overwritten.
    """
    import torch.distributed as dist

    from mirage_ds.engine.setup import join

    world = join()
    try:
        _train(config, world)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _train(config: RunConfig, world: Any) -> None:
    from mirage_ds.engine.checkpoint import save_checkpoint
    from mirage_ds.monitor import Monitor

    assert config.save_model_path is not None
    run_folder = config.save_model_path / "run"
    prepared = _prepare(config, world)
    rows = len(prepared.index.row_ids)
    with Monitor(run_folder, prepared.steps, list(config.report_to), config.log_file, world.rank == 0) as monitor:
        for line in _opening_lines(config, prepared):
            monitor.say(line)
        monitor.start_clock()
        for plan, batches in prepared.loader.steps(0, prepared.steps):
            done = plan.step + 1
            metrics, tokens = _step(config, prepared, plan, batches)
            monitor.step(done, done * config.rows_per_step / rows, len(plan.rows), tokens, metrics)
            if config.save_every and done % config.save_every == 0:
                state = dict(step=done, world_size=world.size, stage=config.stage, latent_size=config.latent_size)
                place = save_checkpoint(prepared.engine, run_folder / "checkpoints", done, state)
                monitor.say(f"checkpoint {place}")
                monitor.start_clock()
        prepared.save()
        monitor.say(f"model saved to {config.save_model_path}")


def _prepare(config: RunConfig, world: Any) -> _Prepared:
    """Check everything that needs no GPU, then load the model and start the engine."""
    import torch

    from mirage_ds import run_folder
    from mirage_ds.data.encode import IMAGE_PAD, LATENT_TOKENS, load_encoder
    from mirage_ds.data.loader import Loader, build_index
    from mirage_ds.data.pack import Planner, total_steps
    from mirage_ds.data.record import ImageFinder, open_records
    from mirage_ds.engine import ds_config as ds
    from mirage_ds.engine.export import save_model
    from mirage_ds.engine.setup import from_rank_zero, make_engine
    from mirage_ds.model.attention import choose_backend
    from mirage_ds.model.load import check_vocabulary, load_model, read_config, resolve_folder

    assert config.data_path is not None
    assert config.save_model_path is not None
    if config.rows_per_step < world.size and not config.allow_idle_ranks:
        raise UserError(
            f"{config.rows_per_step} rows an optimizer step (--global_batch_size) are fewer than {world.size} ranks: "
            "use fewer ranks, or --allow_idle_ranks"
        )
    json_path = config.deepspeed or ds.default_path(config.stage, world.device.type)
    ds_values = ds.resolve(ds.read_json(json_path), json_path, config, world.size)
    choose_backend(config.attention, world.device)
    named = [("--load_model_path", config.load_model_path), ("--model", config.model)]
    folders = from_rank_zero(
        lambda: [resolve_folder(str(name), flag, config.cache_dir) for flag, name in named if name is not None], world
    )
    encoder = load_encoder(
        [str(folder) for folder in folders],
        ImageFinder.beside(config.data_path, config.image_root),
        config.stage,
        config.latent_size,
        (config.min_pixels, config.max_pixels),
        (config.helper_min_pixels, config.helper_max_pixels),
        config.cache_dir,
    )
    check_vocabulary(read_config(folders[0]), {t: encoder.id_of(t) for t in (*LATENT_TOKENS, IMAGE_PAD)})
    index = from_rank_zero(
        lambda: build_index(config.data_path, encoder, config.max_length, config.max_dropped_share, quiet=False), world
    )
    own_folder = from_rank_zero(lambda: run_folder.claim(config.save_model_path, config.overwrite), world)
    if world.rank == 0:
        run_folder.describe(own_folder, config, ds_values)
    loaded = load_model(
        folders[0],
        stage=config.stage,
        dtype=getattr(torch, ds.compute_dtype(ds_values)),
        device=world.device,
        attention=config.attention,
        checkpointing=config.gradient_checkpointing,
        train_vision=config.train_vision,
        reduction=config.reduction,
        loss_chunk_bytes=config.loss_chunk_mb << 20,
        ds_config=ds_values,
    )
    steps = total_steps(len(index.row_ids), config.rows_per_step, config.epochs, config.max_steps)
    planner = Planner(
        lengths=index.tokens,
        row_ids=index.row_ids,
        rows_per_step=config.rows_per_step,
        world_size=world.size,
        micro_batch_tokens=config.micro_batch_tokens,
        micro_batch_size=config.micro_batch_size,
        seed=config.seed,
    )
    # The number of passes is a property of the run: the same on each rank in each micro-step, or ZeRO-3 hangs.
    passes = int(index.runs.max()) * config.latent_size + 1 if config.stage == "stage2" else 1
    records = open_records(config.data_path, config.cache_dir)
    loader = Loader(records, encoder, planner, world.rank, passes, config.num_workers)
    engine = make_engine(loaded.model, config, ds_values, steps)
    tower = loaded.tower

    def save() -> None:
        frozen = tower.tower if tower else None
        parts = (config.save_model_path, world.rank, loaded.config, encoder.tokenizer, encoder.images, folders[0])
        save_model(engine.module, frozen, *parts)

    return _Prepared(world, engine, tower, loader, index, steps, save)


def _opening_lines(config: RunConfig, prepared: _Prepared) -> Iterator[str]:
    from mirage_ds.data.loader import WARN_DROPPED_SHARE

    index, world = prepared.index, prepared.world
    rows = len(index.row_ids)
    yield (
        f"{config.stage}: {rows} rows of {index.tokens.min()}–{index.tokens.max()} tokens (mean "
        f"{index.tokens.mean():.0f}), {config.rows_per_step} rows a step, {prepared.steps} steps, {world.size} rank(s) "
        f"on {world.device.type}, attention {prepared.engine.module.attention}, k {config.latent_size}"
    )
    warning = "warning: " if index.dropped_share > WARN_DROPPED_SHARE else ""
    yield f"{warning}{index.dropped} row(s) dropped as longer than --max_length {config.max_length}"


def _step(config: RunConfig, prepared: _Prepared, plan: Any, batches: Iterator[Any]) -> tuple[dict[str, float], int]:
    """Take one optimizer step over its G micro-steps; return its metrics and its tokens over all ranks."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from mirage_ds.model.loss import StepCounts

    engine, index = prepared.engine, prepared.index
    places = np.searchsorted(index.row_ids, plan.rows)
    # Known before the first backward, from the plan alone: no rank asks another.
    counts = StepCounts(
        rows=len(plan.rows),
        labels=int(index.labels[places].sum()),
        latents=int(index.runs[places].sum()) * config.latent_size,
    )
    totals = torch.zeros(4, device=prepared.world.device)
    for number, batch in enumerate(batches):
        engine.set_gradient_accumulation_boundary(number == plan.micro_steps - 1)
        totals += _micro_step(config, prepared, batch, counts)
    learning_rate = engine.get_lr()[0]
    engine.step()
    dist.all_reduce(totals)
    loss, ce, sim, token_ce = totals.tolist()
    metrics = {
        "loss": loss,
        "ce": ce,
        **({"sim": sim} if config.stage == "stage1" else {}),
        "token_ce": token_ce / max(1, counts.labels),
        "grad_norm": float(engine.get_global_grad_norm()),
        "lr": float(learning_rate),
        "micro_steps": plan.micro_steps,
    }
    return metrics, int(index.tokens[places].sum())


def _micro_step(config: RunConfig, prepared: _Prepared, batch: Any, counts: Any) -> Any:
    """Forward and backward over one micro-batch; return (loss, ce, sim, token_ce), its share of the step's."""
    import torch

    from mirage_ds.data.batch import to_device
    from mirage_ds.model.loss import objective

    batch = to_device(batch, prepared.world.device)
    if prepared.tower is not None:
        batch = prepared.tower.attach(batch)
    sums = prepared.engine(batch)
    loss, ce, sim = objective(sums, counts, config.gamma, config.reduction)
    # DeepSpeed divides gradients by the number of ranks (and by an accumulation that it is told is 1).
    prepared.engine.backward(loss * prepared.world.size)
    return torch.stack([loss.detach(), ce.detach(), sim.detach(), sums.token_ce])


if __name__ == "__main__":
    main()
