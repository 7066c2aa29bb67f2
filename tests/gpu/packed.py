"""A nano MirageModel and packed rows on any device, and what one forward and backward over them give.

T tokens of the packed batch, M labelled tokens, k latents a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mirage_ds.data.batch import Batch, collate, to_device
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.record_files import scan
from mirage_ds.data.sample import IGNORE, Sample
from mirage_ds.model.forward import MirageModel
from mirage_ds.model.load import load_model
from mirage_ds.model.loss import LossSums, StepCounts, objective

STAGES = ("sft", "stage1", "stage2")
CPU = torch.device("cpu")
REDUCTION = "sample"


@dataclass(frozen=True)
class Rows:
    """Rows of a records file for one stage, some of them, as often as wanted.

    Attributes:
        model: folder; data: records file.
        chosen: their numbers; all that the stage can use if None.
        times: how often each is in the batch.
    """

    model: Path
    data: Path
    stage: Any
    k: int = 4
    chosen: tuple[int, ...] | None = None
    times: int = 1

    @lru_cache  # noqa: B019  # a test session has a handful of them
    def samples(self) -> tuple[list[Sample], Sample]:
        """The rows and the dummy row."""
        records, faults = scan(self.data)
        assert not faults
        encoder = load_encoder([str(self.model)], ImageFinder.beside(self.data, None), self.stage, self.k)
        numbers = range(len(records)) if self.chosen is None else self.chosen
        usable = [i for i in numbers if self.stage != "stage1" or records[i].image_output]
        found = [encoder.encode(records[i], i) for i in usable]
        return found * self.times, encoder.dummy(1 if self.stage == "stage2" else 0)


class Ready(NamedTuple):
    """A model and a batch on one device; nothing is left to be moved."""

    model: MirageModel
    batch: Batch
    counts: StepCounts

    def loss(self) -> torch.Tensor:
        """Forward alone: the step's mean loss, γ = 1."""
        sums: LossSums = self.model(self.batch)
        return objective(sums, self.counts, 1.0, REDUCTION)[0]

    def step(self) -> torch.Tensor:
        """Forward and backward; gradients are added to those that are there."""
        loss = self.loss()
        loss.backward()
        return loss.detach()


def ready(
    rows: Rows, device: torch.device, dtype: torch.dtype, backend: str, checkpointing: bool = True, **options: Any
) -> Ready:
    """Load the model, pack the rows, run the tower and move all of it.

    Args:
        backend: a key of model.attention.BACKENDS.
        options: of load_model.
    """
    samples, dummy = rows.samples()
    loaded = load_model(
        rows.model, stage=rows.stage, dtype=dtype, device=device, attention="sdpa", checkpointing=checkpointing,
        reduction=REDUCTION, **options,
    )  # fmt: skip
    # Not through load_model: the CPU's tests have back ends of their own.
    loaded.model.how.attention = backend
    batch = collate(samples, rows.k + 1 if rows.stage == "stage2" else 1, dummy)
    assert loaded.tower is not None
    batch = loaded.tower.attach(to_device(batch, device))
    counts = StepCounts(
        rows=len(samples),
        labels=sum(int((sample.labels != IGNORE).sum()) for sample in samples),
        latents=sum(k for sample in samples for _, k in sample.runs),
    )
    return Ready(loaded.model, batch, counts)


class Outcome(NamedTuple):
    """What one forward and backward came to, on the CPU.

    Attributes:
        loss: scalar; ce: (M,) float32; gradients: by name, float32.
    """

    loss: float
    ce: torch.Tensor
    gradients: dict[str, torch.Tensor]


def outcome(made: Ready) -> Outcome:
    """Run it once."""
    with torch.no_grad():
        _, traced = made.model.trace(made.batch)
    made.model.zero_grad()
    loss = made.step()
    gradients = {name: p.grad.float().cpu() for name, p in made.model.named_parameters() if p.grad is not None}
    assert gradients.keys() == dict(made.model.named_parameters()).keys()
    return Outcome(float(loss), traced.ce.float().cpu(), gradients)


class Drift(NamedTuple):
    """How far an outcome is from another.

    Attributes:
        ce: mean absolute difference of a label's cross-entropy.
        all: of all gradients together, relative.
        one: of the parameter whose gradient is furthest off, relative.
    """

    ce: float
    all: float
    one: float


def drift(got: Outcome, wanted: Outcome) -> Drift:
    """Compare with `wanted`, the more exact one."""
    apart = {name: float((got.gradients[name] - grad).norm()) for name, grad in wanted.gradients.items()}
    sizes = {name: float(grad.norm()) for name, grad in wanted.gradients.items()}

    def together(values: dict[str, float]) -> float:
        return sum(value**2 for value in values.values()) ** 0.5

    return Drift(
        ce=float((got.ce - wanted.ce).abs().mean()),
        all=together(apart) / together(sizes),
        one=max(apart[name] / sizes[name] for name in apart),
    )
