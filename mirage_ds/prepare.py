"""Before the first step: check everything that needs no GPU, then load the model and start the engine.

W ranks, k latents a run.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from mirage_ds import run_folder
from mirage_ds.config import LOSSES, RunConfig, cache_folder
from mirage_ds.data.encode import IMAGE_PAD, LATENT_TOKENS, Encoder
from mirage_ds.data.features import KeptFeatures
from mirage_ds.data.index import EncodedRows
from mirage_ds.data.indexing import open_index, open_made
from mirage_ds.data.load import load_encoder
from mirage_ds.data.loader import Index, Loader, usable, without
from mirage_ds.data.pack import Planner, check_patches, pack, total_steps
from mirage_ds.data.record import Fault, ImageFinder, record_of
from mirage_ds.data.weigh import content, weighed
from mirage_ds.engine import ds_config as ds
from mirage_ds.engine.adapter import note_of
from mirage_ds.engine.card import model_card
from mirage_ds.engine.checkpoint import Found, find_checkpoint, load_checkpoint
from mirage_ds.engine.compiled import say_waits
from mirage_ds.engine.export import Parts, save_model, trained_of
from mirage_ds.engine.frozen import check_same, notes_of_engine, notes_of_tower
from mirage_ds.engine.offload import check_offload
from mirage_ds.engine.setup import World, check_ds_config, everyone, from_rank_zero, make_engine
from mirage_ds.engine.swap_folders import Swap, claim_folders
from mirage_ds.engine.universal import use_universal
from mirage_ds.errors import UserError
from mirage_ds.events import LOAD_BEGINS, note
from mirage_ds.files import write_atomically
from mirage_ds.keep_features import keep_features
from mirage_ds.mfu import ModelFlops, peak_flops
from mirage_ds.mixture import Mixture, Records
from mirage_ds.model.attention import choose_backend
from mirage_ds.model.load import (
    Loaded,
    check_vocabulary,
    check_weights,
    expected_shapes,
    load_model,
    load_tower,
    read_config,
    resolve_folder,
)
from mirage_ds.model.lora import Lora, check_peft, find_targets, trained_shapes
from mirage_ds.model.loss import StepCounts
from mirage_ds.model.vision import FrozenTower
from mirage_ds.scale import sizes, two_layers
from mirage_ds.scoring import check_evaluation, spread
from mirage_ds.sinks import check_installed
from mirage_ds.startup import Begin, quiet
from mirage_ds.stop import never

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
        swap: this rank's hold on the run's folders on NVMe, to be released at the end.
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
    swap: Swap
    flops: ModelFlops
    peak: float | None


@dataclass(frozen=True)
class Measured:
    """Records that have been checked: their rows, measures and plan, the kept features of each field.

    Attributes:
        encoder: finds images beside these very records.
    """

    encoder: Encoder
    records: EncodedRows
    index: Index
    planner: Planner
    features: dict[str, KeptFeatures]


class Evaluation(NamedTuple):
    """Records whose loss is measured while training, packed once for all ranks.

    Attributes:
        bins: bins[micro-step][rank] = rows; counts: what they hold together.
    """

    loader: Loader
    bins: list[list[list[int]]]
    counts: StepCounts


def _model_folders(config: RunConfig, world: World) -> list[Path]:
    """Folders that give weights, config, tokenizer and image processor, the first that has a part giving it."""
    named = [("--load_model_path", config.load_model_path), ("--model", config.model)]
    given = [(flag, str(name)) for flag, name in named if name is not None]
    return from_rank_zero(lambda: [resolve_folder(name, flag, config.cache_dir) for flag, name in given], world)


def finder_of(config: RunConfig, data_path: Records) -> ImageFinder:
    """Build the finder of the images of one source of records, or of the first of several."""
    first = data_path.parts[0].file if isinstance(data_path, Mixture) else data_path
    return ImageFinder.beside(first, config.image_root, config.confine_paths)


def make_encoder(config: RunConfig, folders: list[Path]) -> Encoder:
    """Build the encoder that a run's settings describe and check that its tokens fit the model."""
    encoder = load_encoder(
        [str(folder) for folder in folders],
        finder_of(config, config.records),
        config.stage,
        config.latent_size,
        (config.min_pixels, config.max_pixels),
        (config.helper_min_pixels, config.helper_max_pixels),
        config.cache_dir,
        config.slots,
        config.compress_strategy,
    )
    check_vocabulary(read_config(folders[0]), {t: encoder.id_of(t) for t in (*LATENT_TOKENS, IMAGE_PAD)})
    return encoder


def index_records(
    config: RunConfig, encoder: Encoder, data_path: Records, world: World, tick: Callable[[], None]
) -> Index:
    """Open the index of records on every rank, made by rank 0 where there is none. All ranks call it.

    Where the hosts share no --cache_dir, each of them makes its own.

    Args:
        tick: is called again and again while an index is made.

    Raises:
        UserError: see data.loader.build_index; or a host has other records or images.
    """
    cache, keep = cache_folder(config.cache_dir), config.kept_fields

    def make() -> EncodedRows:
        return open_index(data_path, encoder, keep, config.cache_dir, quiet=world.rank > 0, tick=tick)

    made: list[EncodedRows] = []

    def on_rank_zero() -> tuple[Path, tuple[Path, ...], str]:
        made.append(make())
        return made[0].place, made[0].files, made[0].digest

    place, files, digest = from_rank_zero(on_rank_zero, world)
    own = made[0] if made else open_made(place, files, cache)
    if everyone([] if own and own.digest == digest else [world.rank], world):
        fault = []
        if (own is None or own.digest != digest) and world.local_rank == 0:
            try:
                own = make()
            except UserError as error:
                fault = [str(error)]
        # Here the others of its host wait for it.
        faults = everyone(fault, world)
        if faults:
            raise UserError(faults[0])
        own = own if own and own.digest == digest else open_made(place, files, cache)
        strangers = everyone([] if own and own.digest == digest else [world.rank], world)
        if strangers:
            raise UserError(
                f"{data_path}: rank {strangers[0]} finds other records or images there than rank 0; copy the same to "
                "every host, or name a --data_path and a --cache_dir that all share"
            )
    assert own is not None
    limits = (config.max_length, config.max_dropped_share)
    index = usable(own, data_path, *limits, keep, config.tolerated_share)
    return weighed(index, data_path, config.seed) if isinstance(data_path, Mixture) else index


def measure(
    config: RunConfig,
    encoder: Encoder,
    tower: FrozenTower | None,
    data_path: Records,
    index: Index,
    whole: bool,
    world: World,
    asked: Callable[[], bool],
    begin: Callable[[str], None],
) -> Measured:
    """Keep the features of the images of indexed records. All ranks call it.

    Args:
        tower: None where it is trained.
        whole: every row is used, not only those that the run's steps reach.

    Raises:
        UserError: on every rank: a broken image; with --skip_bad_records, too large a share of faulty records.
    """
    features: dict[str, KeptFeatures] = {}
    if tower is not None:
        # Which rows are skipped must depend on the records alone: a run that goes on for more steps finds the same.
        whole = whole or config.skip_bad_records
        steps = run_steps(config, index)
        whole = whole or steps * config.rows_per_step >= len(index.row_ids)
        rows = index.row_ids if whole else np.asarray(make_planner(config, index, world).reached(steps))
        place, workers = config.features_folder, config.num_workers
        features, broken = keep_features(
            *(tower, encoder, index.rows, index.images, rows, data_path, place, workers, world),
            skip=config.skip_bad_records,
            asked=asked,
            begin=begin,
        )
        index = without(index, broken, data_path, config.max_bad_share)
    return Measured(encoder, index.rows, index, make_planner(config, index, world), features)


def run_steps(config: RunConfig, index: Index) -> int:
    """Count the optimizer steps of a run over the usable rows."""
    return total_steps(len(index.row_ids), config.rows_per_step, config.epochs, config.max_steps)


def skipped_lines(skipped: list[tuple[Records, Fault]]) -> str:
    """Write the records that are left out as JSON lines: file, line, field, what, how."""
    rows = ({**asdict(fault), "file": fault.file or str(file)} for file, fault in skipped)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def usable_rows(index: Index) -> int | str:
    """Say which rows a run has, for a checkpoint: their number and, where records are skipped, which these are."""
    if not index.skipped:
        return len(index.row_ids)
    lines = " ".join(
        f"{Path(fault.file).name}:{fault.line}" if fault.file else str(fault.line) for fault in index.skipped
    )
    digest = hashlib.sha256(lines.encode()).hexdigest()[:12]
    return f"{len(index.row_ids)} ({len(index.skipped)} skipped, lines {digest})"


def make_planner(config: RunConfig, index: Index, world: World) -> Planner:
    """Build the planner of a run's steps over the measured rows."""
    return Planner(
        lengths=index.tokens,
        row_ids=index.row_ids,
        rows_per_step=config.rows_per_step,
        world_size=world.size,
        micro_batch_tokens=config.micro_batch_tokens,
        micro_batch_size=config.micro_batch_size,
        seed=config.seed,
        patches=index.patches,
        micro_batch_patches=config.micro_batch_patches,
    )


def make_loader(config: RunConfig, measured: Measured, rank: int, passes: int) -> Loader:
    """Build this rank's loader over a records file."""
    return Loader(
        *(measured.records, measured.encoder, measured.planner, rank, passes, config.num_workers),
        kept=measured.features,
    )


def make_evaluation(config: RunConfig, loader: Loader, index: Index) -> Evaluation:
    """Pack the evaluation rows into micro-steps once; the packing of training rows decides nothing here."""
    planner = loader.planner
    limit = config.micro_batch_patches
    if limit is not None:
        check_patches(index.row_ids, index.patches, limit)
    bins = pack(
        index.tokens, planner.world_size, config.micro_batch_tokens, config.micro_batch_size, index.patches, limit
    )
    rows = [[int(index.row_ids[i]) for i in one] for one in bins]
    counts = StepCounts(len(index.row_ids), int(index.labels.sum()), int(index.runs.sum()) * config.latent_size)
    width = planner.world_size
    return Evaluation(loader, [rows[at : at + width] for at in range(0, len(rows), width)], counts)


def check_scores(config: RunConfig, data_path: Path, index: Index) -> None:
    """Refuse evaluation records that cannot be scored, and a metric that is not measured."""
    losses = [name for name in LOSSES if name != "sim" or config.stage == "stage1"]
    records = [record_of(index.rows[row]) for row in spread(index.row_ids.tolist(), config.eval_decode)]
    check_evaluation(records, data_path, config.task, losses, config.save_best)


def make_lora(config: RunConfig, folder: Path, encoder: Encoder) -> Lora | None:
    """Describe a run's adapters; None where all weights are trained.

    Raises:
        UserError: a layer that the decoder does not have.
    """
    if config.lora_rank is None:
        return None
    targets = find_targets(expected_shapes(read_config(folder)), config.lora_targets)
    tokens = tuple(encoder.id_of(token) for token in LATENT_TOKENS)
    return Lora(config.lora_rank, config.lora_alpha or 2 * config.lora_rank, targets, tokens, config.seed)


def optimizer_groups(folder: Path, train_vision: bool, lora: Lora | None = None) -> list[list[int]]:
    """Elements of the trained parameters of each optimizer group (setup.weight_decay_groups), from config.json."""
    if lora:
        return [[math.prod(shape) for shape in trained_shapes(expected_shapes(read_config(folder)), lora)]]
    named = sorted(expected_shapes(read_config(folder)).items(), key=lambda item: item[0].startswith("visual."))
    trained = [shape for name, shape in named if train_vision or not name.startswith("visual.")]
    matrices = [math.prod(shape) for shape in trained if len(shape) > 1]
    return [matrices, [math.prod(shape) for shape in trained if len(shape) <= 1]]


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
    from_rank_zero(partial(check_installed, config.report_to), world)
    json_path = config.deepspeed or ds.default_path(config.stage, world.device.type)
    ds_values = ds.resolve(ds.read_json(json_path), json_path, config, world.size)
    check_ds_config(ds_values, json_path)
    if config.lora_rank:
        check_peft(f"--lora_rank {config.lora_rank}")
        if ds.on_nvme(ds_values):
            raise UserError(
                f"--lora_rank {config.lora_rank}: {json_path} offloads to NVMe, and what that takes is not known where "
                "most weights are frozen; adapters have few states: take a JSON without offload, or offload to 'cpu'"
            )
    choose_backend(config.attention, world.device)
    folders = _model_folders(config, world)
    shape = read_config(folders[0]).to_dict()
    ds.fill_limits(ds_values, two_layers(shape["text_config"]))
    encoder = make_encoder(config, folders)
    files: list[Records] = [config.records, *([config.eval_data_path] if config.eval_data_path else [])]
    encoders = [replace(encoder, finder=finder_of(config, file)) for file in files]
    indices = [
        index_records(config, one, file, world, partial(begin, "records"))
        for file, one in zip(files, encoders, strict=True)
    ]
    if config.eval_data_path:
        from_rank_zero(partial(check_scores, config, config.eval_data_path, indices[-1]), world)
    # All that can refuse the run comes before its folder is claimed: a refused run must not stand in the way of the
    # mended one.
    from_rank_zero(lambda: check_weights(folders[0], read_config(folders[0])), world)
    lora = from_rank_zero(lambda: make_lora(config, folders[0], encoder), world)
    check_offload(
        *(ds_values, json_path, optimizer_groups(folders[0], config.train_vision, lora), sizes(shape).matrices, world),
        checkpoints=config.save_every is not None or config.resume == "auto",
    )
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
    # In run/ stands the JSON as given: another start has other folders.
    ds_values, swap = claim_folders(ds_values, world)
    begin("model", own_folder if world.rank == 0 else None)
    loaded = make_model(config, folders[0], ds_values, world.device, tower, lora)
    # The number of passes is a property of the run: the same on each rank in each micro-step, or ZeRO-3 hangs.
    most_runs = max(int(one.index.runs.max()) for one in measured)
    passes = config.passes(most_runs)
    loader, *others = [make_loader(config, one, world.rank, passes) for one in measured]
    evaluation = make_evaluation(config, others[0], measured[1].index) if others else None
    begin("engine")
    if world.local_rank == 0:
        say_waits(ds_values)
    engine = make_engine(loaded.model, config, ds_values, steps)
    begin("load")
    resumed = load_checkpoint(engine, checkpoint) if checkpoint else {}
    # After the load: what DeepSpeed restores of it is compared too.
    kept = notes_of_engine(engine.module, world)
    if checkpoint:
        check_same(checkpoint.place, resumed.get("kept", {}), kept)
    state["kept"] = kept

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
            Parts(
                *(loaded.config, encoder.tokenizer, encoder.images, folders[0], trained_of(state)),
                card=model_card({**state, "step": step}, scores),
            ),
        )

    return Prepared(
        *(world, engine, loaded.tower, loader, index, steps, save, state, checkpoint, resumed, evaluation, skipped),
        swap=swap,
        flops=ModelFlops(shape, config.train_vision, config.train_targets),
        peak=peak_flops(config.peak_tflops, *_card(world.device, ds_values)),
    )


def _card(device: torch.device, ds_values: dict[str, Any]) -> tuple[str | None, str]:
    """Return the GPU's name, if there is one, and the precision of its products (cards.Peak)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    if ds.products_in_bf16(ds_values):
        return name, "bf16"
    return name, "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
