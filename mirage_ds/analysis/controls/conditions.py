"""What is fed at the slots of latent blocks, condition by condition.

N rows of a batch, R latent blocks of a row, k latents a block, H hidden.

`own`, `first` and `off` follow from the model as it runs; the others feed vectors that are known beforehand, made here
from the own latents of all records. Those are the states that the model feeds back when it is given the record's text
up to each block (teach.own), so every record has them, whatever it answers.
"""

from __future__ import annotations

import random as stdlib_random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mirage_ds.data.record import Record
from mirage_ds.errors import UserError
from mirage_ds.model.generate import Chooser, LatentTokens
from mirage_ds.tasks import level_of

# Two vectors lie alike on both sides of their mean, so that nothing says how far the estimate may be off.
LEAST = 3


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution estimated from n vectors, fewer than they are wide (H).

    Its covariance is (1 − share) · Xᵀ X / n + share · variance · I, never written out as (H, H).

    Attributes:
        mean: (H,) float64; deviations: X (n, H) float64, the vectors less their mean.
        share: of the covariance that is shrunk to a multiple of the identity.
        variance: mean variance of a coordinate.
    """

    mean: torch.Tensor
    deviations: torch.Tensor
    share: float
    variance: float

    @classmethod
    def of(cls, vectors: torch.Tensor) -> Gaussian:
        """Estimate from vectors (n, H), n ≥ LEAST, with the shrinkage of Ledoit and Wolf.

        J. Multivariate Analysis 88 (2004): the share whose expected squared error is least for any distribution. With
        the sample mean in place of the true one, and covariances divided by n.
        """
        mean = vectors.double().mean(0)
        deviations = vectors.double() - mean
        n, width = deviations.shape
        # Everything follows from the (n, n) inner products: ‖Xᵀ X‖ = ‖X Xᵀ‖.
        inner = deviations @ deviations.T
        variance = float(inner.trace()) / (n * width)
        square = float(inner.square().sum()) / n**2
        # ‖S − m I‖², and the mean over vectors of ‖x xᵀ − S‖² divided by n: how far S may be from the truth.
        spread = square - width * variance**2
        error = (float(inner.diagonal().square().sum()) / n - square) / n
        share = min(1.0, error / spread) if spread > 0 else 0.0
        return cls(mean, deviations, share, variance)

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw (count, H) vectors, float64."""
        n, width = self.deviations.shape
        seen = torch.randn(count, n, dtype=torch.float64, generator=generator)
        free = torch.randn(count, width, dtype=torch.float64, generator=generator)
        scale = ((1 - self.share) / n) ** 0.5
        return self.mean + scale * (seen @ self.deviations) + (self.share * self.variance) ** 0.5 * free


class Material(NamedTuple):
    """What known vectors are made from, a list entry a record.

    Attributes:
        own: (R, k, H) own latents; targets: (R, k, H) the helpers' compressed features, where somebody asks.
        partners: the record whose latents each one gets (choose_partners), where somebody asks.
        pad: (H,) embedding of `<|latent_pad|>`.
        seed: of all draws; a record's draws also depend on its place.
    """

    own: list[torch.Tensor]
    targets: list[torch.Tensor]
    partners: list[int]
    pad: torch.Tensor
    seed: int

    def generator(self, stream: int, place: int) -> torch.Generator:
        """A record's own source of chance."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + place) * 8 + stream)


def random(material: Material) -> list[torch.Tensor]:
    """Directions of chance (normal vectors), each as long as own latents are on average."""
    length = torch.cat([own.flatten(0, 1) for own in material.own]).double().norm(dim=-1).mean()
    found = []
    for place, own in enumerate(material.own):
        drawn = torch.randn(own.shape, dtype=torch.float64, generator=material.generator(0, place))
        found.append((drawn / drawn.norm(dim=-1, keepdim=True) * length).to(own.dtype))
    return found


def matched(material: Material) -> list[torch.Tensor]:
    """Normal vectors with the mean and the covariance that own latents have at the same slot.

    Each slot has a distribution of its own, estimated over all blocks of all records.

    Raises:
        UserError: too few blocks.
    """
    blocks = torch.cat(material.own)
    if len(blocks) < LEAST:
        raise UserError(
            f"--latents matched: {len(blocks)} latent block(s) give no covariance, at least {LEAST} are needed; give "
            "more records, or leave matched out"
        )
    slots = [Gaussian.of(blocks[:, slot]) for slot in range(blocks.shape[1])]
    found = []
    for place, own in enumerate(material.own):
        generator = material.generator(1, place)
        found.append(torch.stack([slot.draw(len(own), generator) for slot in slots], dim=1).to(own.dtype))
    return found


def choose_partners(records: Sequence[Record], seed: int) -> list[int]:
    """Choose for each record another one of its level, each record once (a random cycle in every level).

    Raises:
        UserError: a level has one record.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for place, record in enumerate(records):
        members[level_of(record)].append(place)
    found = [0] * len(records)
    for level, places in sorted(members.items()):
        if len(places) == 1:
            raise UserError(
                f"--latents swap: the record on line {records[places[0]].line} is the only one of level {level}, so "
                "there is no other to swap with; give more records of that level, or leave swap out"
            )
        stdlib_random.Random(f"{seed}/swap/{level}").shuffle(places)
        for one, other in zip(places, places[1:] + places[:1], strict=True):
            found[one] = other
    return found


def swap(material: Material) -> list[torch.Tensor]:
    """Another record's own latents, of the same level; all blocks, since the answer may have more than the record."""
    found = []
    for own, other in zip(material.own, material.partners, strict=True):
        given = material.own[other]
        # Its last block again, where the other record has fewer.
        found.append(given[torch.arange(max(len(own), len(given))).clamp(max=len(given) - 1)])
    return found


# Conditions whose vectors are known before a record is decoded.
KNOWN: dict[str, Callable[[Material], list[torch.Tensor]]] = {
    "zero": lambda material: [torch.zeros_like(own) for own in material.own],
    "random": random,
    "matched": matched,
    "swap": swap,
    # The helper images' compressed features, which stage 1 feeds.
    "oracle": lambda material: material.targets,
    # The slots as ordinary tokens.
    "text": lambda material: [material.pad.expand_as(own).clone() for own in material.own],
}


# -------------------------------------------------------------------------------- into the decoding (generate.Latents)


class Given:
    """Feeds known vectors, block by block; a block beyond the last known one gets that one's again.

    Args:
        vectors: (R, k, H) of each row of the batch.
    """

    def __init__(self, vectors: Sequence[torch.Tensor]):
        most = max(len(one) for one in vectors)
        # (N, most, k, H)
        self.vectors = torch.stack([one[torch.arange(most).clamp(max=len(one) - 1)] for one in vectors])
        self.block = torch.full((len(vectors),), -1)

    def __call__(self, slots: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """See generate.Latents."""
        at = slots.cpu()
        self.block += at == 0
        rows = torch.arange(len(at))
        fed = self.vectors[rows, self.block.clamp(0, self.vectors.shape[1] - 1), at.clamp(min=0)]
        return fed.to(own.device, own.dtype)


class First:
    """Feeds the state of a latent block's first slot at all of its slots."""

    def __init__(self) -> None:
        self.first: torch.Tensor | None = None

    def __call__(self, slots: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """See generate.Latents."""
        kept = own if self.first is None else self.first
        self.first = torch.where((slots == 0)[:, None], own, kept)
        return self.first


def forbid(choose: Chooser, tokens: LatentTokens) -> Chooser:
    """Make a chooser that never chooses a latent token."""

    def other(logits: torch.Tensor, step: int) -> torch.Tensor:
        barred = torch.tensor([tokens.pad, tokens.start, tokens.end], device=logits.device)
        return choose(logits.index_fill(-1, barred, float("-inf")), step)

    return other
