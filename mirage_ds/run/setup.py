"""What comes before the first step, once the settings are checked: data, folder, model, engine and logs are opened.

What can be refused is refused before the run's folder is claimed. All ranks call each of these, and their UserError or
Stopped is the same on every rank.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mirage_ds.config.columns import parse_columns
from mirage_ds.config.mixture import Mixture, Records
from mirage_ds.config.run import RunConfig
from mirage_ds.data.batch import Batch
from mirage_ds.data.encode import LATENT_PAD
from mirage_ds.data.folders import unread_lines
from mirage_ds.data.loader import Loader
from mirage_ds.data.record import Fault
from mirage_ds.data.record_files import told
from mirage_ds.data.selection import WARN_DROPPED_SHARE, Selection, describe
from mirage_ds.engine import ds_config as ds
from mirage_ds.engine.card import model_card
from mirage_ds.engine.checkpoint import Found, find_checkpoint, load_checkpoint
from mirage_ds.engine.frozen import check_same, notes_of_engine
from mirage_ds.engine.private import set_collective_timeout
from mirage_ds.engine.save import Parts, save_model, trained_of
from mirage_ds.engine.setup import World, from_rank_zero, make_engine, make_reference, shared_fate
from mirage_ds.engine.spelling import Base, read_base, read_trained
from mirage_ds.engine.universal import use_universal
from mirage_ds.files import TRAINED_KEY, write_atomically
from mirage_ds.model.latents import load_inputs
from mirage_ds.model.load import Loaded, Scaffold, load_model, load_tower, read_config
from mirage_ds.model.targets import Targets, load_targets, whole_tensors, write_encoder
from mirage_ds.model.vision import FrozenTower
from mirage_ds.plan.mfu import ModelFlops, peak_flops
from mirage_ds.rl.rewards import Rewards
from mirage_ds.run import folder as run_folder
from mirage_ds.run.events import LOAD_BEGINS
from mirage_ds.run.journal import Logs
from mirage_ds.run.records import (
    Evaluation,
    check_scores,
    index_records,
    keep,
    longest_block,
    make_evaluation,
    make_loader,
    open_rewards,
    run_steps,
    skipped_lines,
    sources_of,
)
from mirage_ds.run.settings import Checked, Run
from mirage_ds.run.sinks import open_sinks
from mirage_ds.run.state import state_of

# In the run folder, the records that --skip_bad_records leaves out.
SKIPPED_FILE = "skipped.jsonl"
# Steps between two lines on the console, as TRL's default has it, and of a run that shows each of its steps.
LOG_EVERY, SHORT_RUN = 10, 100
# Settings that load_model takes by the same names.
FORWARD = {"stage", "attention", "train_vision", "reduction", "latent_loss", "detach_latents", "train_targets", "feed"}


@dataclass(frozen=True)
class Data:
    """The records of a run, checked and measured.

    Attributes:
        index: the usable rows to train on.
        steps: optimizer steps of the run.
        loader: this rank's micro-batches.
        evaluation: the evaluation records, if any.
        skipped: (file, fault) of each record that is left out.
        tower: the frozen tower, or None where it is trained.
        targets: learned ones of stage1.
        rewards: in rl, on rank 0, what scores answers; its processes run.
    """

    index: Selection
    steps: int
    loader: Loader
    evaluation: Evaluation | None
    skipped: list[tuple[Records, Fault]]
    tower: FrozenTower | None
    targets: Targets | None = None
    rewards: Rewards | None = None


class Learner(NamedTuple):
    """What is trained.

    Attributes:
        engine: the DeepSpeed engine around the MirageModel.
        tower: the frozen tower, or None where it is trained; targets: learned ones of stage1.
        checkpoint: the one that the engine continues from, if any; resumed: the state saved with it.
        state: what a checkpoint of this run says of itself (state_of), and the notes of what stays as it was.
        parts: what the model folder holds besides weights.
        flops: counts what the model needs of a step; peak: FLOP/s of this rank, None where it is not known.
        reference: in rl with a KL, what scores answers by the start's weights; None where they are those in training
            without their adapters.
    """

    engine: Any
    tower: FrozenTower | None
    checkpoint: Found | None
    resumed: dict[str, Any]
    state: dict[str, Any]
    parts: Parts
    flops: ModelFlops
    peak: float | None
    reference: Any = None
    targets: Targets | None = None

    @property
    def start(self) -> int:
        """Optimizer steps that were taken before."""
        return int(self.resumed.get("step", 0))

    def attach(self, batch: Batch) -> Batch:
        """Give a batch the features, or learned targets, of those images that came as pixels and are not trained on."""
        if self.targets is not None:
            batch = self.targets.attach(batch)
        return batch if self.tower is None else self.tower.attach(batch, not self.engine.module.encodes_helpers)

    def save(self, world: World, folder: Path, step: int, scores: Mapping[str, float]) -> None:
        """Write the model into a folder. All ranks call it; rank 0 raises, once all have done their part.

        Args:
            step: optimizer steps that it has taken; scores: of this very model, as far as they are known.

        Raises:
            OSError: on rank 0.
        """
        # After an evaluation some may be on their way, prefetched for a backward; they could not be gathered anew.
        self.engine.empty_partition_cache()
        if (encoder := self.engine.module.target_encoder) is not None:
            tensors = whole_tensors(encoder, keep=world.rank == 0)
            if world.rank == 0:
                write_encoder(tensors, folder, {**self.state["scaffold"], "step": step, "scores": dict(scores)})
            return
        tower = self.tower.tower if self.tower else None
        parts = self.parts._replace(card=model_card({**self.state, "step": step}, scores))
        save_model(self.engine.module, tower, folder, world.rank, parts)


# -------------------------------------------------------------------------------------------------------- the records


def open_data(run: Run, checked: Checked) -> Data:
    """Index the records, keep the features of their images, and pack them."""
    config, world, journal = run.config, run.world, run.journal
    files, encoders = zip(*sources_of(config, checked.encoder), strict=True)
    indices = [index_records(run, own, file) for file, own in zip(files, encoders, strict=True)]
    if config.eval_data_path:
        from_rank_zero(partial(check_scores, config, config.eval_data_path, indices[-1]), world)
    rewards = open_rewards(run, indices[0]) if config.stage == "rl" else None
    journal.phase("vision tower")
    folder, tower, targets = checked.folders[0], None, None
    if not config.trains_tower:
        tower = load_tower(folder, read_config(folder), checked.dtype, world.device, config.attention)
    if config.latent_targets and tower is not None:
        with shared_fate(world):
            targets = load_targets(config.latent_targets, read_config(folder), config.latent_size, tower)
    journal.phase("features")
    kept = [
        keep(run, own, tower, file, index, index is not indices[0], targets)
        for file, own, index in zip(files, encoders, indices, strict=True)
    ]
    indices = [index for index, _ in kept]
    if tower is not None and "image_input" in config.kept_fields:
        # No step calls it any more; it is kept for the model folder that is saved at the end.
        tower.to_cpu()
        if targets is not None:
            targets.tower.to_cpu()
    loader, *others = [make_loader(run, own, *one) for own, one in zip(encoders, kept, strict=True)]
    return Data(
        index=indices[0],
        steps=run_steps(config, indices[0]),
        loader=loader,
        evaluation=make_evaluation(others[0], indices[1]) if others else None,
        skipped=[(file, fault) for file, index in zip(files, indices, strict=True) for fault in index.skipped],
        tower=tower,
        targets=targets,
        rewards=rewards,
    )


# --------------------------------------------------------------------------------------------------------- the folder


def claim_folder(run: Run, checked: Checked, data: Data) -> tuple[dict[str, Any], Found | None]:
    """Make the run's folder its own; return the run's state (state_of) and the checkpoint to continue from, if any."""
    config, world = run.config, run.world
    resume = config.resume == "auto"
    from_rank_zero(partial(run_folder.claim, config.save_model_path, config.overwrite, resume), world)
    run.journal.phase("checkpoints")
    state = state_of(run, checked, data)
    checkpoint = find_checkpoint(run.folder / "checkpoints", state, world) if resume else None
    use_universal(checked.ds_values, checkpoint is not None and checkpoint.universal)
    if world.rank == 0:
        run_folder.describe(run.folder, config, checked.ds_values)
        if config.skip_bad_records:
            write_atomically(run.folder / SKIPPED_FILE, skipped_lines(data.skipped))
    run.journal.claimed(run.folder, writes=world.rank == 0)
    run.journal.tell(LOAD_BEGINS)
    return state, checkpoint


# ------------------------------------------------------------------------------------------- the model and the engine


def open_model(run: Run, checked: Checked, data: Data) -> Loaded:
    """Load the weights as the settings and the DeepSpeed JSON say."""
    config = run.config
    run.journal.phase("model")
    loaded = load_model(
        checked.folders[0],
        dtype=checked.dtype,
        device=run.world.device,
        tower=data.tower,
        products=checked.products,
        checkpointing=config.gradient_checkpointing,
        loss_chunk_bytes=config.loss_chunk_mb and config.loss_chunk_mb << 20,
        ds_config=checked.ds_values,
        lora=checked.lora,
        kernels=config.kernels,
        latent_heads=checked.policy == "gaussian",
        scaffold=Scaffold(config.latent_size, config.seed) if config.stage == "scaffold" else None,
        **config.model_dump(include=FORWARD),
    )
    layers, embedding = loaded.model.layers, loaded.model.language_model.embed_tokens.weight
    if config.latent_passes is not None:
        said = "latent_passes" in read_trained(loaded.config)
        folder, pad, device = checked.folders[0], checked.encoder.id_of(LATENT_PAD), run.world.device
        loaded.model.latent_inputs = load_inputs(
            folder, said, config.latent_passes, config.latent_size, embedding, pad, device
        )
    if ds.zero_stage(checked.ds_values) == 2 and ds.offload_device(checked.ds_values, "optimizer") != "none":
        own = loaded.model.head.parameters()
        loaded.model.how.others = [p for p in own if p.requires_grad and p is not embedding]
    loaded.model.how.region = config.compress_strategy == "region"
    loaded.model.how.split = config.recurrent and layers.defers_more_than_gradients(config.micro_batch_tokens)
    return loaded


def open_engine(
    run: Run, checked: Checked, data: Data, loaded: Loaded, state: dict[str, Any], checkpoint: Found | None
) -> Learner:
    """Start DeepSpeed around the model, and load the checkpoint, if there is one."""
    config, world = run.config, run.world
    run.journal.phase("engine")
    engine = make_engine(loaded.model, config, checked.ds_values, data.steps)
    # DeepSpeed has made groups of its own.
    set_collective_timeout(config.start_timeout)
    run.journal.phase("load")
    resumed = load_checkpoint(engine, checkpoint) if checkpoint else {}
    # After the load: what DeepSpeed restores of it is compared too.
    kept = notes_of_engine(engine.module, world)
    if checkpoint:
        check_same(checkpoint.place, resumed.get("kept", {}), kept)
    state = {**state, "kept": kept}
    reference = None
    if config.beta and checked.lora is None:
        reference = make_reference(open_model(run, checked, data).model, checked.ds_values, world.device)
    folder, encoder = checked.folders[0], checked.encoder
    base = read_base(folder, encoder.tokenizer)
    return Learner(
        engine=engine,
        tower=loaded.tower,
        checkpoint=checkpoint,
        resumed=resumed,
        state=state,
        parts=Parts(base, encoder.tokenizer, encoder.images, folder, trained_of(state)),
        flops=ModelFlops(checked.shape, config.trains_tower, config.trains_helpers, config.stage == "scaffold"),
        peak=peak_flops(config.peak_tflops, *_gpu(world.device, checked.ds_values)),
        reference=reference,
        targets=data.targets,
    )


def _gpu(device: torch.device, ds_values: dict[str, Any]) -> tuple[str | None, str]:
    """Return the GPU's name, if there is one, and the precision of its products (gpus.Peak)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    if ds.products_in_bf16(ds_values):
        return name, "bf16"
    return name, "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"


# ---------------------------------------------------------------------------------------------------------- the logs


def open_logs(run: Run, data: Data, learner: Learner) -> Logs | None:
    """Write run.json and open the logs on rank 0; nothing on the others.

    Raises:
        UserError: a tracker refuses the run; only this rank knows.
    """
    if run.world.rank > 0:
        return None
    config, start = run.config, learner.start
    write_atomically(run.folder / "run.json", json.dumps(facts(run, data, learner), indent=2) + "\n")
    settings = json.loads(config.model_dump_json(exclude_none=True))
    sinks = open_sinks(config.report_to, run.folder, config.save_model_path.name, settings, start)
    peak = learner.peak * run.world.size if learner.peak else None
    every = config.log_every or (1 if data.steps <= SHORT_RUN else LOG_EVERY)
    owed = learner.resumed.get("evaluation_owed", False)
    return Logs(run.folder, data.steps, sinks, config.log_file, start, peak, every, owed)


def facts(run: Run, data: Data, learner: Learner) -> dict[str, Any]:
    """Return what the run came to before its first step, for who looks at its folder."""
    world = run.world
    return {
        "steps": data.steps,
        "start": learner.start,
        "world_size": world.size,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type,
        "peak_flops": learner.peak,
        "rows": len(data.index.row_ids),
        "rows_per_step": run.config.rows_per_step,
        "dropped": data.index.dropped,
        "skipped_records": len(data.skipped),
    }


def other_latents(config: RunConfig, base: Base) -> Iterator[str]:
    """Warn where the model was trained with blocks of another length."""
    trained = base.config.get(TRAINED_KEY) or base.config
    k = trained.get("latent_size")
    kinds = {config.stage, config.compress_strategy, trained.get("stage"), trained.get("compress_strategy")}
    if not {"sft", "region"} & kinds and k not in (None, config.latent_size):
        yield f"warning: the model was trained with --latent_size {k}, this run has {config.latent_size}"


def opening_lines(run: Run, data: Data, learner: Learner) -> Iterator[str]:
    """Say what is about to be trained."""
    config, index, world = run.config, data.index, run.world
    yield (
        f"{config.stage}: {len(index.row_ids)} rows of {index.tokens.min()}–{index.tokens.max()} tokens (mean "
        f"{index.tokens.mean():.0f}), {config.rows_per_step} rows a step, {data.steps} steps, {world.size} rank(s) "
        f"on {world.device.type}, attention {learner.engine.module.how.attention}, k {longest_block(config, index)}"
    )
    if learner.checkpoint:
        yield from learner.checkpoint.passed_over
        yield f"continuing from {learner.checkpoint.form}"
    if isinstance(config.records, Mixture):
        yield f"a mixture: {describe(index, config.records)}"
    if index.dropped:
        warning = "warning: " if index.dropped_share > WARN_DROPPED_SHARE else ""
        yield f"{warning}{index.dropped} row(s) dropped as longer than --max_length {config.max_length}"
    sources = [config.records, *([config.eval_data_path] if config.eval_data_path else [])]
    yield from other_latents(config, learner.parts.base)
    yield from (line for source in sources for line in told(source, parse_columns(config.columns)))
    yield from (f"warning: {line}" for source in sources for line in unread_lines(source))
    if data.skipped:
        file, fault = data.skipped[0]
        yield (
            f"warning: {len(data.skipped)} faulty record(s) skipped, listed in {run.folder / SKIPPED_FILE}; the first "
            f"is {file}: {fault}"
        )
