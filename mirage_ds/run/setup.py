"""Before the first step: check everything that needs no GPU, then load the model and start the engine.

W ranks, k latents a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from mirage_ds.config.mixture import Records
from mirage_ds.config.run import RunConfig
from mirage_ds.data.encode import LATENT_TOKENS, Encoder
from mirage_ds.data.loader import Index, Loader
from mirage_ds.data.record import Fault
from mirage_ds.data.weigh import content
from mirage_ds.engine import ds_config as ds
from mirage_ds.engine.adapter import note_of
from mirage_ds.engine.card import model_card
from mirage_ds.engine.checkpoint import Found, find_checkpoint, load_checkpoint
from mirage_ds.engine.compiled import say_waits
from mirage_ds.engine.frozen import check_same, notes_of_engine, notes_of_tower
from mirage_ds.engine.offload import check_offload
from mirage_ds.engine.private import set_collective_timeout
from mirage_ds.engine.save import Parts, save_model, trained_of
from mirage_ds.engine.setup import World, check_ds_config, everyone, from_rank_zero, make_engine, try_engine
from mirage_ds.engine.spelling import read_base
from mirage_ds.engine.universal import use_universal
from mirage_ds.engine.versions import check_release, gather_safely
from mirage_ds.errors import UserError
from mirage_ds.files import check_log, write_atomically
from mirage_ds.model.attention import choose_backend, head_width_of
from mirage_ds.model.load import Loaded, check_folder, load_model, load_tower, read_config, shape_of
from mirage_ds.model.lora import Lora, check_peft, find_targets, trained_shapes
from mirage_ds.model.shape import Shape
from mirage_ds.model.vision import FrozenTower
from mirage_ds.plan.mfu import ModelFlops, peak_flops
from mirage_ds.plan.settings import two_layers
from mirage_ds.plan.shape import sizes, trained_parameters
from mirage_ds.run import folder as run_folder
from mirage_ds.run.events import LOAD_BEGINS, note
from mirage_ds.run.records import (
    Evaluation,
    check_scores,
    index_records,
    make_encoder,
    make_evaluation,
    make_loader,
    measure,
    model_folders,
    run_steps,
    skipped_lines,
    sources_of,
    usable_rows,
)
from mirage_ds.run.sinks import check_installed
from mirage_ds.run.startup import Begin, quiet
from mirage_ds.run.stop import never

# In the run folder, the records that --skip_bad_records leaves out.
SKIPPED_FILE = "skipped.jsonl"


class Save(Protocol):
    """Writes the trained model; all ranks call it, and what fails is raised on rank 0 once all have done their part."""

    def __call__(self, folder: Path = ..., step: int = ..., scores: Mapping[str, float] | None = ...) -> None:
        """Write it into a folder (the run's own), with the steps it has taken (all) and what it scores, if known."""


class Prepared(NamedTuple):
    """What the loop runs on.

    Attributes:
        engine: the DeepSpeed engine around the MirageModel.
        tower: the frozen tower, or None where it is trained.
        loader: this rank's micro-batches.
        measured: the usable rows, measured.
        steps: optimizer steps of the run.
        save: writes the trained model.
        state: what a checkpoint of this run says of itself (checkpoint.MUST_AGREE, and what training never changes).
        checkpoint: the checkpoint that the engine continues from, if any; resumed: the state saved with it.
        evaluation: the evaluation records, if any.
        skipped: (file, fault) of each record that is left out.
        flops: counts what the model needs of a step; peak: FLOP/s of this rank, None where it is not known.
    """

    world: World
    engine: Any
    tower: FrozenTower | None
    loader: Loader
    measured: Index
    steps: int
    save: Save
    state: dict[str, Any]
    checkpoint: Found | None
    resumed: dict[str, Any]
    evaluation: Evaluation | None
    skipped: list[tuple[Records, Fault]]
    flops: ModelFlops
    peak: float | None


def _check_folders(folders: list[Path], world: World) -> None:
    """Refuse model folders that contradict themselves. All ranks call it."""
    fault = []
    # Once a host: where the hosts have copies of their own, each has to be whole.
    if world.local_rank == 0:
        try:
            check_folder(folders[0], folders[1:])
        except UserError as error:
            fault.append(str(error))
    faults = everyone(fault, world)
    if faults:
        raise UserError(faults[0])


def make_lora(config: RunConfig, model: Shape, encoder: Encoder) -> Lora | None:
    """Describe a run's adapters; None where all weights are trained.

    Raises:
        UserError: a layer that the decoder does not have.
    """
    if config.lora_rank is None:
        return None
    targets = find_targets(model.shapes, config.lora_targets)
    tokens = tuple(encoder.id_of(token) for token in LATENT_TOKENS)
    return Lora(config.lora_rank, config.lora_alpha or 2 * config.lora_rank, targets, tokens, config.seed)


def trained_elements(model: Shape, train_vision: bool, lora: Lora | None) -> list[int]:
    """List the elements of each trained parameter."""
    if lora:
        return [math.prod(shape) for shape in trained_shapes(model.shapes, lora)]
    return [one.elements for one in trained_parameters(model, train_vision)]


def _products(ds_values: dict[str, Any]) -> torch.dtype:
    return torch.bfloat16 if ds.products_in_bf16(ds_values) else torch.float32


def make_model(
    config: RunConfig,
    folder: Path,
    ds_values: dict[str, Any],
    device: torch.device,
    tower: FrozenTower | None,
    lora: Lora | None,
) -> Loaded:
    """Load the model as a run's settings and the resolved DeepSpeed configuration say."""
    return load_model(
        folder,
        stage=config.stage,
        dtype=getattr(torch, ds.compute_dtype(ds_values)),
        device=device,
        tower=tower,
        attention=config.attention,
        products=_products(ds_values),
        checkpointing=config.gradient_checkpointing,
        train_vision=config.train_vision,
        reduction=config.reduction,
        loss_chunk_bytes=config.loss_chunk_mb << 20,
        latent_loss=config.latent_loss,
        detach_latents=config.detach_latents,
        train_targets=config.train_targets,
        ds_config=ds_values,
        lora=lora,
    )


def check_outputs(config: RunConfig) -> None:
    """Refuse, before any work, what cannot be written, and a run folder that holds what is not this run's.

    Raises:
        UserError: names the flag.
    """
    sources = [Path(one) for one in (config.model, config.load_model_path) if one is not None]
    run_folder.check(config.save_model_path, config.overwrite, config.resume == "auto", sources)
    if config.log_file:
        check_log(config.log_file, "--log_file")


def prepare(config: RunConfig, world: World, asked: Callable[[], bool] = never, begin: Begin = quiet) -> Prepared:
    """Check, load and start, from the run's checkpoint where it goes on. All ranks call it.

    Args:
        asked: whether somebody wants this process to stop.
        begin: is told the name of each phase as it begins.

    Raises:
        UserError: the same on every rank; nothing has been trained or overwritten.
        Stopped: the same.
    """
    begin("records")
    if config.rows_per_step < world.size and not config.allow_idle_ranks:
        raise UserError(
            f"{config.rows_per_step} rows an optimizer step (--global_batch_size) are fewer than {world.size} ranks: "
            "use fewer ranks, or --allow_idle_ranks"
        )
    from_rank_zero(lambda: check_outputs(config), world)
    from_rank_zero(partial(check_installed, config.report_to), world)
    json_path = config.deepspeed or ds.default_path(config.stage)
    ds_values = ds.resolve(ds.read_json(json_path, world.device.type), json_path, config, world.size)
    check_release(ds_values, json_path, bool(config.lora_rank) and config.gradient_checkpointing)
    gather_safely(ds_values, world.device.type)
    check_ds_config(ds_values, json_path)
    if config.lora_rank:
        check_peft(f"--lora_rank {config.lora_rank}")
    folders = from_rank_zero(partial(model_folders, config, partial(begin, "records")), world)
    _check_folders(folders, world)
    model_config = read_config(folders[0])
    choose_backend(config.attention, world.device, _products(ds_values), head_width_of(model_config.get_text_config()))
    shape = shape_of(model_config, f"{folders[0]}/config.json")
    ds.fill_limits(ds_values, two_layers(sizes(shape)))
    encoder = make_encoder(config, folders)
    files, encoders = zip(*sources_of(config, encoder), strict=True)
    indices = [
        index_records(config, one, file, world, asked, partial(begin, "records"))
        for file, one in zip(files, encoders, strict=True)
    ]
    if config.eval_data_path:
        from_rank_zero(partial(check_scores, config, config.eval_data_path, indices[-1]), world)
    # All that can refuse the run comes before its folder is claimed: a refused run must not stand in the way of the
    # mended one.
    lora = from_rank_zero(lambda: make_lora(config, shape, encoder), world)
    check_offload(ds_values, json_path, trained_elements(shape, config.train_vision, lora), world)
    if world.local_rank == 0:
        say_waits(ds_values)
    if config.deepspeed:
        # The shipped ones are known to start.
        try_engine(ds_values, json_path)
    begin("vision tower")
    tower = None
    if not config.train_vision:
        dtype = getattr(torch, ds.compute_dtype(ds_values))
        tower = load_tower(folders[0], read_config(folders[0]), dtype, world.device)
    begin("features")
    measured = [
        measure(config, own, tower, file, one, one is not indices[0], world, asked, begin)
        for file, own, one in zip(files, encoders, indices, strict=True)
    ]
    index = measured[0].index
    steps = run_steps(config, index)
    skipped = [(file, fault) for file, one in zip(files, measured, strict=True) for fault in one.index.skipped]
    if tower is not None and "image_input" in config.kept_fields:
        # No step calls it any more; it is kept for the model folder that is saved at the end.
        tower.tower.to("cpu")
    own_folder = from_rank_zero(
        lambda: run_folder.claim(config.save_model_path, config.overwrite, config.resume == "auto"), world
    )
    state = dict(
        world_size=world.size,
        stage=config.stage,
        latent_size=config.latent_size,
        latents=[
            *(config.slots, config.compress_strategy, config.latent_loss),
            *(config.detach_latents, config.train_targets),
        ],
        data=content(index.rows.source, config.records),
        rows=usable_rows(index),
        rows_per_step=config.rows_per_step,
        seed=config.seed,
        train_vision=config.train_vision,
        lora=note_of(lora),
        reduction=config.reduction,
        ce_weight=config.gamma,
        optimizer=[
            *(config.learning_rate, config.lr_scheduler, config.warmup_steps),
            *(config.adam_beta1, config.adam_beta2, config.adam_eps, config.weight_decay),
        ],
        zero_stage=ds.zero_stage(ds_values),
        tower=notes_of_tower(tower.tower if tower else None, world),
        # For `mirage-ds export`: where the rest of a model folder comes from.
        sources=[str(folder.resolve()) for folder in folders],
        dtype=ds.compute_dtype(ds_values),
        pixels=[config.min_pixels, config.max_pixels],
    )
    begin("checkpoints")
    checkpoint = None
    if config.resume == "auto":
        checkpoint = find_checkpoint(own_folder / "checkpoints", state, world)
    use_universal(ds_values, checkpoint is not None and checkpoint.universal)
    if world.rank == 0:
        run_folder.describe(own_folder, config, ds_values)
        note(own_folder, LOAD_BEGINS)
        if config.skip_bad_records:
            write_atomically(own_folder / SKIPPED_FILE, skipped_lines(skipped))
    begin("model", own_folder if world.rank == 0 else None)
    loaded = make_model(config, folders[0], ds_values, world.device, tower, lora)
    # The number of passes is a property of the run: the same on each rank in each micro-step, or ZeRO-3 hangs.
    most_runs = max(int(one.index.runs.max()) for one in measured)
    passes = config.passes(most_runs)
    loader, *others = [make_loader(config, one, world.rank, passes) for one in measured]
    evaluation = make_evaluation(config, others[0], measured[1].index) if others else None
    begin("engine")
    engine = make_engine(loaded.model, config, ds_values, steps)
    # DeepSpeed has made groups of its own.
    set_collective_timeout(config.start_timeout)
    begin("load")
    resumed = load_checkpoint(engine, checkpoint) if checkpoint else {}
    # After the load: what DeepSpeed restores of it is compared too.
    kept = notes_of_engine(engine.module, world)
    if checkpoint:
        check_same(checkpoint.place, resumed.get("kept", {}), kept)
    state["kept"] = kept
    base = read_base(folders[0], encoder.tokenizer)
    parts = Parts(base, encoder.tokenizer, encoder.images, folders[0], trained_of(state))

    def save(
        folder: Path = config.save_model_path, step: int = steps, scores: Mapping[str, float] | None = None
    ) -> None:
        # After an evaluation some may be on their way, prefetched for a backward; they could not be gathered anew.
        engine.empty_partition_cache()
        save_model(
            engine.module,
            loaded.tower.tower if loaded.tower else None,
            folder,
            world.rank,
            parts._replace(card=model_card({**state, "step": step}, scores)),
        )

    return Prepared(
        *(world, engine, loaded.tower, loader, index, steps, save, state, checkpoint, resumed, evaluation, skipped),
        flops=ModelFlops(shape, config.train_vision, config.train_targets),
        peak=peak_flops(config.peak_tflops, *_card(world.device, ds_values)),
    )


def _card(device: torch.device, ds_values: dict[str, Any]) -> tuple[str | None, str]:
    """Return the GPU's name, if there is one, and the precision of its products (cards.Peak)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    if ds.products_in_bf16(ds_values):
        return name, "bf16"
    return name, "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
