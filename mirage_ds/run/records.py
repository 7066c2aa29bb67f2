"""The records of a run: opened by every rank, measured, packed, with the features that are kept of them.

W ranks, R usable rows.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mirage_ds.config.columns import parse_columns
from mirage_ds.config.mixture import Mixture, Records
from mirage_ds.config.run import LOSSES, RunConfig, cache_folder
from mirage_ds.data.encode import IMAGE_PAD, LATENT_TOKENS, Encoder
from mirage_ds.data.features import KeptFeatures
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.index import Index, open_made
from mirage_ds.data.index_part import Plan
from mirage_ds.data.load import load_encoder
from mirage_ds.data.loader import Loader
from mirage_ds.data.make_index import Maker
from mirage_ds.data.pack import Planner, total_steps
from mirage_ds.data.record import NO_LATENTS, Fault
from mirage_ds.data.record_files import told
from mirage_ds.data.selection import Selection, usable, weighed, without
from mirage_ds.engine.setup import World, everyone, from_rank_zero, shared_fate
from mirage_ds.errors import Stopped, UserError
from mirage_ds.evaluate.scoring import NOTHING, check_metric, marks, spread, task_of
from mirage_ds.model.folder import resolve_folder
from mirage_ds.model.load import check_vocabulary, read_config
from mirage_ds.model.loss import StepCounts
from mirage_ds.model.targets import Targets
from mirage_ds.model.vision import FrozenTower
from mirage_ds.rl.rewards import Rewards
from mirage_ds.run.features import keep_features
from mirage_ds.tasks import seen_by_scorer

if TYPE_CHECKING:
    from mirage_ds.run.settings import Run


class Evaluation(NamedTuple):
    """Records whose loss is measured while training, packed once for all ranks.

    Attributes:
        bins: bins[micro-step][rank] = rows; counts: what they hold together.
    """

    loader: Loader
    bins: list[list[list[int]]]
    counts: StepCounts


def finder_of(config: RunConfig, data_path: Records) -> ImageFinder:
    """Build the finder of the images of one source of records, or of the first of several."""
    first = data_path.parts[0].file if isinstance(data_path, Mixture) else data_path
    return ImageFinder.beside(first, config.image_root, config.confine_paths)


def model_folders(config: RunConfig, tick: Callable[[], None] = lambda: None) -> list[Path]:
    """Folders that give weights, config, tokenizer and image processor, the first that has a part giving it.

    Args:
        tick: is called again and again while one is fetched.
    """
    named = [("--load_model_path", config.load_model_path), ("--model", config.model)]
    return [resolve_folder(str(name), flag, config.cache_dir, tick) for flag, name in named if name is not None]


def sources_of(config: RunConfig, encoder: Encoder) -> list[tuple[Records, Encoder]]:
    """Return the sources of a run's records, those to train on first, each with the encoder that finds its images."""
    records = config.records
    found: list[tuple[Records, Encoder]] = [(records, replace(encoder, finder=finder_of(config, records)))]
    if file := config.eval_data_path:
        # The loss on a record's own answer is that of stage2, with latents where it has some.
        stage = "stage2" if config.stage == "rl" else config.stage
        found.append((file, replace(encoder, finder=finder_of(config, file), stage=stage)))
    return found


def index_beforehand(config: RunConfig) -> Iterator[str]:
    """Make the indices that a run of these settings opens, in this process; yield a line for each.

    Raises:
        UserError: as the run would for its records.
    """
    encoder = make_encoder(config, model_folders(config))
    columns = parse_columns(config.columns)
    for file, own in sources_of(config, encoder):
        yield from told(file, columns)
        cache, quiet = cache_folder(config.cache_dir), False
        rows = Maker(file, own, config.kept_fields, cache, quiet, config.check_images, columns=columns).index()
        index = _usable(config, file, rows)
        yield f"{file}: {len(rows)} records, {len(index.row_ids)} rows to train on, index {rows.place}"


def _usable(config: RunConfig, data_path: Records, index: Index) -> Selection:
    limits = (config.max_length, config.max_dropped_share)
    answer = config.max_completion_length if config.stage == "rl" and data_path == config.records else 0
    selection = usable(index, data_path, *limits, config.tolerated_share, answer)
    if isinstance(data_path, Mixture):
        selection = weighed(selection, data_path, config.seed)
    # Some rows without latents are well, and an evaluation may have none.
    if config.stage == "stage2" and data_path == config.records and not selection.runs.any():
        raise UserError(f"{data_path}: {'; '.join(NO_LATENTS)}")
    return selection


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
        config.bottleneck,
        config.latent_passes,
    )
    check_vocabulary(read_config(folders[0]), {t: encoder.id_of(t) for t in (*LATENT_TOKENS, IMAGE_PAD)})
    return encoder


def index_records(run: Run, encoder: Encoder, data_path: Records) -> Selection:
    """Open the index of records on every rank; all ranks make it where there is none. All ranks call it.

    Where hosts do not share --cache_dir, the ranks of each make one there.

    Raises:
        UserError: see make_index.Maker.index and selection.usable; or a host has other records or images.
        Stopped: on every rank; the parts that are made stay.
    """
    config, world, cache = run.config, run.world, cache_folder(run.config.cache_dir)
    tick = partial(run.journal.phase, "records")
    columns = parse_columns(config.columns)
    maker = Maker(data_path, encoder, config.kept_fields, cache, world.rank > 0, config.check_images, tick, columns)

    def on_rank_zero() -> tuple[Plan, str | None]:
        plan = maker.plan()
        made = maker.open(plan)
        return plan, None if made is None else made.digest

    plan, digest = from_rank_zero(on_rank_zero, world)
    own = None
    with shared_fate(world):
        if digest:
            # Each host may have another cache, and other images.
            own = maker.open(plan) if world.local_rank == 0 else open_made(plan.place, plan.files, cache)
    if everyone([] if own is not None and own.digest == digest else [world.rank], world):
        _make_index(run, maker, plan)
        own = open_made(plan.place, plan.files, cache)
        digests = everyone(["" if own is None else own.digest], world)
        strangers = [rank for rank, one in enumerate(digests) if not one or one != digests[0]]
        if strangers:
            raise _stranger(data_path, strangers[0])
    assert own is not None
    return _usable(config, data_path, own)


def _stranger(data_path: Records, rank: int) -> UserError:
    return UserError(
        f"{data_path}: rank {rank} finds other records or images there than rank 0; copy the same to every host, or "
        "name a --data_path and a --cache_dir that all share"
    )


def _make_index(run: Run, maker: Maker, plan: Plan) -> None:
    """Make the index wherever a rank lacks it: in the folder that rank 0 sees, and on each host that does not."""
    world = run.world
    plan, token = from_rank_zero(lambda: maker.begin(plan), world)
    host = socket.gethostname()
    group = "" if (plan.parts / token).exists() else host
    everywhere = everyone([(group, host)], world)
    together = [rank for rank, (one, _) in enumerate(everywhere) if one == group]
    leads = together[0] == world.rank
    with shared_fate(world):
        if world.rank > 0:
            # A host's own copies of the files have other times.
            mine = maker.plan()
            if mine.place != plan.place:
                raise _stranger(maker.data_path, world.rank)
            plan = mine._replace(pieces=plan.pieces)
        if leads and group:
            maker.open(plan)
    sharers = sum(one == host for _, one in everywhere)
    with shared_fate(world):
        maker.make_parts(plan, together.index(world.rank), len(together), sharers, run.asked)
    if run.stops():
        raise Stopped
    with shared_fate(world):
        if leads:
            maker.join(plan)


def keep(
    run: Run,
    encoder: Encoder,
    tower: FrozenTower | None,
    data_path: Records,
    index: Selection,
    whole: bool,
    targets: Targets | None = None,
) -> tuple[Selection, dict[str, KeptFeatures]]:
    """Keep the features of the images of indexed records. All ranks call it.

    Args:
        tower: None where it is trained.
        whole: every row is used, not only those that the run's steps reach.
        targets: what makes the helpers' targets, where they are learned.

    Returns:
        The rows that are left, and the features by field.

    Raises:
        UserError: on every rank: a broken image; with --skip_bad_records, too large a share of faulty records.
    """
    if tower is None:
        return index, {}
    config = run.config
    # Of rl, rollouts.
    steps = -(-run_steps(config, index) // config.steps_per_rollout)
    # Which rows are skipped must depend on the records alone: a run that goes on for more steps finds the same.
    whole = whole or config.skip_bad_records or config.resample > 0
    if whole or steps * config.rows_per_step >= len(index.row_ids):
        rows = index.row_ids
    else:
        rows = np.asarray(make_planner(config, index, run.world).reached(steps))
    features, broken = keep_features(run, tower, encoder, index, rows, data_path, targets)
    return without(index, broken, data_path, config.max_bad_share), features


def run_steps(config: RunConfig, index: Selection) -> int:
    """Count the optimizer steps of a run over the usable rows."""
    own = len(index.row_ids), config.rows_per_step, config.epochs, config.max_steps
    return total_steps(*own, config.steps_per_rollout)


def skipped_lines(skipped: list[tuple[Records, Fault]]) -> str:
    """Write the records that are left out as JSON lines: file, line, field, what, how."""
    rows = ({**asdict(fault), "file": fault.file or str(file)} for file, fault in skipped)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def usable_rows(index: Selection) -> int | str:
    """Say which rows a run has, for a checkpoint: their number and, where records are skipped, which these are."""
    if not index.skipped:
        return len(index.row_ids)
    lines = " ".join(
        f"{Path(fault.file).name}:{fault.line}" if fault.file else str(fault.line) for fault in index.skipped
    )
    digest = hashlib.sha256(lines.encode()).hexdigest()[:12]
    return f"{len(index.row_ids)} ({len(index.skipped)} skipped, lines {digest})"


def make_planner(config: RunConfig, index: Selection, world: World) -> Planner:
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
        passes=np.array([config.passes(runs) for runs in range(index.runs.max(initial=0) + 1)])[index.runs],
    )


def make_loader(run: Run, encoder: Encoder, index: Selection, features: dict[str, KeptFeatures]) -> Loader:
    """Build this rank's loader over records, with the features that are kept of them."""
    planner = make_planner(run.config, index, run.world)
    return Loader(index.rows, encoder, planner, run.world.rank, run.config.passes, run.config.num_workers, features)


def longest_block(config: RunConfig, index: Selection) -> int:
    """Return how many latents a block has: k, or of regions, one a row, the longest's."""
    return int(index.latents.max(initial=1)) if config.compress_strategy == "region" else config.latent_size


def make_evaluation(loader: Loader, index: Selection) -> Evaluation:
    """Pack the evaluation rows into micro-steps once; the packing of training rows decides nothing here."""
    counts = StepCounts(len(index.row_ids), int(index.labels.sum()), int(index.latents.sum()))
    return Evaluation(loader, loader.planner.packed(np.arange(len(index.row_ids))), counts)


def open_rewards(run: Run, index: Selection) -> Rewards | None:
    """Start what scores sampled answers, on rank 0, and let it score each record's own answer. All ranks call it.

    Raises:
        UserError: on every rank: a reward that does not exist or fails, or a record that cannot be scored.
    """
    config = run.config
    opened: list[Rewards] = []

    def place(row: int) -> str:
        (found,) = index.rows.places_of([row])
        return f"{found['file']}:{found['line']}"

    def open_on_rank_zero() -> None:
        rewards = Rewards(config, config.task, place, run.asked)
        opened.append(rewards.__enter__())
        # The ranks stop together, once the records are read.
        with suppress(Stopped):
            rewards.check({row: seen_by_scorer(index.rows.record(row)) for row in index.row_ids.tolist()})

    from_rank_zero(open_on_rank_zero, run.world)
    return opened[0] if opened else None


def check_scores(config: RunConfig, data_path: Path, index: Selection) -> None:
    """Refuse evaluation records that cannot be scored, and a metric that is not measured."""
    measured = [name for name in LOSSES if name != "sim" or config.stage == "stage1"]
    records = [index.rows.record(row) for row in spread(index.row_ids.tolist(), config.eval_decode)]
    if records:
        measured += marks(records[:1], [NOTHING], task_of(records, data_path, config.task))[0]
    if config.save_best:
        check_metric(config.save_best, measured)
