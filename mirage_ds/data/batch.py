"""The Batch: the Samples of one micro-step, packed without padding, with the schedule of its passes.

T tokens of the packed batch, N samples, M labelled tokens, P patches, F merged features, k latents a block, H hidden.
Made in the data-loader's workers, so that the forward only indexes.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from mirage_ds.config.run import passes_of_block
from mirage_ds.data.passes import PassPlan, schedule, schedule_auxiliary
from mirage_ds.data.pooling import DROPPED
from mirage_ds.data.sample import IGNORE, Sample
from mirage_ds.data.ship import mapped

Tree = TypeVar("Tree")


class Pass(NamedTuple):
    """One pass of the forward, on tensors (see passes.PassPlan).

    Attributes:
        tokens: (Tq,) packed indices; fed: (Lq,) places in them where states of the pass before are fed back; sources:
            (Lq,) places of those states there.
        keys: (Tk,) order of the visible keys; cu_q, cu_k: (Nq + 1,) int32 cumulative lengths of the Nq parts; max_q,
            max_k: longest.
        labelled: (Mj,) places in `tokens` whose next token is a label, where they run for the last time.
    """

    tokens: torch.Tensor
    fed: torch.Tensor
    sources: torch.Tensor
    keys: torch.Tensor
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    labelled: torch.Tensor


class Batch(NamedTuple):
    """N samples packed to T tokens.

    Attributes:
        rows: (N,) dataset rows, −1 for the dummy row of weight zero; weight: (N,) float32, 1 or 0.
        input_ids: (T,); position_ids: (3, T); cu_seqlens: (N + 1,) int32.
        targets: (M,) labels in the order in which the passes reach them; target_sample: (M,) the sample of each;
            label_count: (N,) labels of each sample.
        latents: (N_blocks · k,) packed positions of the latents; latent_sample: their samples; latent_count: (N,).
        image_positions: (F,) packed positions of input images' features.
        pixel_values, image_grid_thw: (P, 1176) and (n, 3); image_features: (F, H) where they were kept, or once the
            tower has run.
        helper_…: the same for the helper images of stage1; where targets were kept, these are the features.
        pool_from, pool_to: which helper feature goes into the mean of which latent's target; pool_size: (N_blocks · k,)
            features in each mean.
        passes: the schedule, one Pass a pass.
        fed: (N_blocks · k, H) what was fed at the latents when the rows were decoded, in the order of `latents`, where
            it is fed again (MirageModel.forward); None where it is not.
    """

    rows: torch.Tensor
    weight: torch.Tensor
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    targets: torch.Tensor
    target_sample: torch.Tensor
    label_count: torch.Tensor
    latents: torch.Tensor
    latent_sample: torch.Tensor
    latent_count: torch.Tensor
    image_positions: torch.Tensor
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor
    image_features: torch.Tensor | None
    helper_pixel_values: torch.Tensor
    helper_grid_thw: torch.Tensor
    helper_features: torch.Tensor | None
    pool_from: torch.Tensor
    pool_to: torch.Tensor
    pool_size: torch.Tensor
    passes: tuple[Pass, ...]
    fed: torch.Tensor | None = None


def deepest(samples: Sequence[Sample], latent_passes: int | None) -> int:
    """Return the passes behind the first that samples need whose latents are fed back; −1 without samples."""
    return max((sum(passes_of_block(k, latent_passes) for _, k in sample.runs) for sample in samples), default=-1)


def _cumulative(lengths: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def _pass(plan: PassPlan, predicts: np.ndarray) -> Pass:
    return Pass(
        tokens=torch.from_numpy(plan.tokens),
        fed=torch.from_numpy(plan.fed),
        sources=torch.from_numpy(plan.sources),
        keys=torch.from_numpy(plan.keys),
        cu_q=_cumulative(plan.query_lengths),
        cu_k=_cumulative(plan.key_lengths),
        max_q=max(plan.query_lengths),
        max_k=max(plan.key_lengths),
        labelled=torch.from_numpy(np.flatnonzero(predicts[plan.tokens])),
    )


def collate(
    samples: Sequence[Sample], passes: int, dummy: Sample, auxiliary: bool = False, latent_passes: int | None = None
) -> Batch:
    """Pack Samples into one Batch.

    Args:
        passes: passes of this micro-step on every rank (RunConfig.passes).
        dummy: row of weight zero (Encoder.dummy), appended where some pass would find no token.
        auxiliary: the answer does not attend to the latents.
        latent_passes: as passes.schedule takes it.
    """
    packed = list(samples)
    recurrent = passes > 1 and not auxiliary
    behind = deepest(packed, latent_passes)
    if not packed or (recurrent and behind + 1 < passes) or (auxiliary and behind < 1):
        packed.append(dummy)
    lengths = [len(sample.input_ids) for sample in packed]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    labels = torch.cat([sample.labels for sample in packed]).numpy()
    # labels[i + 1] is predicted at i; a sample's first token is nobody's target.
    predicts = np.zeros(len(labels), dtype=bool)
    predicts[:-1] = labels[1:] != IGNORE
    predicts[starts[1:-1] - 1] = False
    if auxiliary:
        plans = schedule_auxiliary(lengths, [sample.runs for sample in packed])
    else:
        hidden = [() if sample.hidden is None else sample.hidden.numpy() for sample in packed]
        plans = schedule(lengths, [sample.runs for sample in packed], passes, latent_passes, hidden)
    last = np.zeros(len(labels), dtype=np.int64)
    for number, plan in enumerate(plans):
        last[plan.tokens] = number
    made = tuple(_pass(plan, predicts & (last == number)) for number, plan in enumerate(plans))
    labelled = np.concatenate([plan.tokens[one.labelled.numpy()] for plan, one in zip(plans, made, strict=True)])
    sample_of = np.repeat(np.arange(len(packed)), lengths)
    latents = [at + start + np.arange(k) for one, at in zip(packed, starts, strict=False) for start, k in one.runs]
    latent_count = torch.tensor([sum(k for _, k in sample.runs) for sample in packed])
    pools = _pools(packed)
    return Batch(
        rows=torch.tensor([sample.row for sample in packed]),
        weight=torch.tensor([float(sample.row >= 0) for sample in packed]),
        input_ids=torch.cat([sample.input_ids for sample in packed]),
        position_ids=torch.cat([sample.position_ids for sample in packed], dim=1),
        cu_seqlens=_cumulative(lengths),
        targets=torch.from_numpy(labels[labelled + 1]),
        target_sample=torch.from_numpy(sample_of[labelled]),
        label_count=torch.from_numpy(np.bincount(sample_of[labelled], minlength=len(packed))),
        latents=_indices(latents),
        latent_sample=torch.arange(len(packed)).repeat_interleave(latent_count),
        latent_count=latent_count,
        image_positions=torch.cat([one.image_positions + int(at) for one, at in zip(packed, starts, strict=False)]),
        pixel_values=torch.cat([sample.pixel_values for sample in packed]),
        image_grid_thw=torch.cat([sample.image_grid_thw for sample in packed]),
        image_features=_features([sample.image_features for sample in packed]),
        helper_pixel_values=torch.cat([sample.helper_pixel_values for sample in packed]),
        helper_grid_thw=torch.cat([sample.helper_grid_thw for sample in packed]),
        helper_features=_features([sample.helper_features for sample in packed]),
        pool_from=pools[0],
        pool_to=pools[1],
        pool_size=pools[2],
        passes=made,
    )


def _features(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Join kept features; a dummy row has none. None where nothing was kept."""
    kept = [part for part in parts if part is not None]
    return torch.cat(kept) if kept else None


def _indices(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *parts]).astype(np.int64))


def _pools(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Build the pooling indices of all helpers; one helper a latent block, in order.

    A dummy with latents has no helper: its targets are zero.
    """
    sources, targets, sizes = [], [], []
    feature = latent = 0
    for sample in samples:
        groups = sample.helper_groups.numpy()
        kept = np.flatnonzero(groups != DROPPED)
        sources.append(feature + kept)
        targets.append(latent + groups[kept])
        sizes.append(np.ones(sum(k for _, k in sample.runs)) if sample.row < 0 else np.bincount(groups[kept]))
        feature += len(groups)
        latent += len(sizes[-1])
    return _indices(sources), _indices(targets), _indices(sizes)


def to_device(tree: Tree, device: torch.device) -> Tree:
    """Move every tensor of a (nested) named tuple to a device."""
    return mapped(tree, torch.Tensor, lambda tensor: tensor.to(device, non_blocking=True))
