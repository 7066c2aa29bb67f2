"""What is fed at the slots of latent blocks, condition by condition.

N rows of a batch, R latent blocks of a row, k latents a block, H hidden.

`own`, `first` and `off` follow from the model as it runs; the others feed vectors that are known beforehand, made here
from the own latents of all records. Those are the states that the model feeds back when it is given the record's text
up to each block (teach.own), so every record has them, whatever it answers.

Where a block's latents are made together (--latent_passes), what is replaced is the slots' inputs in the last pass.
With 0 passes these are learned, and the same for all records: swap changes nothing.
"""

import random as stdlib_random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from mirage_ds.data.record import Record
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import Decoder
from mirage_ds.model.choose import Turn
from mirage_ds.model.slots import Latents, LatentTokens, Limits, Slot
from mirage_ds.tasks import level_of

# Two vectors lie alike on both sides of their mean, so that nothing says how far the estimate may be off.
LEAST = 3


def fixed_slots(decoder: Decoder, limits: Limits) -> int:
    """Return the slots of every latent block; UserError where their number is open."""
    if not limits.fixed_run:
        what = "conditions are compared at the same number of slots, at least 1"
        unknown = f"{decoder.folder} does not say how many it was trained with"
        raise UserError(f"--run_length: {what}, and {unknown}; give the number")
    return limits.fixed_run


class Gaussian:
    """A normal distribution estimated from n vectors, fewer than they are wide (H).

    Its covariance is (1 − share) · Xᵀ X / n + share · variance · I, never written out as (H, H).

    Attributes:
        mean: (H,) float64; deviations: X (n, H) float64, the vectors less their mean.
        share: of the covariance that is shrunk to a multiple of the identity.
        variance: mean variance of a coordinate.
    """

    def __init__(self, vectors: torch.Tensor):
        """Estimate from vectors (n, H), n ≥ LEAST, with the shrinkage of Ledoit and Wolf.

        J. Multivariate Analysis 88 (2004): the share whose expected squared error is least for any distribution. With
        the sample mean in place of the true one, and covariances divided by n.
        """
        self.mean = vectors.double().mean(0)
        self.deviations = vectors.double() - self.mean
        n, width = self.deviations.shape
        # Everything follows from the (n, n) inner products: ‖Xᵀ X‖ = ‖X Xᵀ‖.
        inner = self.deviations @ self.deviations.T
        self.variance = float(inner.trace()) / (n * width)
        square = float(inner.square().sum()) / n**2
        # ‖S − m I‖², and the mean over vectors of ‖x xᵀ − S‖² divided by n: how far S may be from the truth.
        spread = square - width * self.variance**2
        error = (float(inner.diagonal().square().sum()) / n - square) / n
        self.share = min(1.0, error / spread) if spread > 0 else 0.0

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
        what = f"{len(blocks)} latent block(s) give no covariance, at least {LEAST} are needed"
        raise UserError(f"--latents matched: {what}; give more records, or leave matched out")
    slots = [Gaussian(blocks[:, slot]) for slot in range(blocks.shape[1])]
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
            alone = f"the record on line {records[places[0]].line} is the only one of level {level}"
            how = "so there is no other to swap with; give more records of that level, or leave swap out"
            raise UserError(f"--latents swap: {alone}, {how}")
        stdlib_random.Random(f"{seed}/swap/{level}").shuffle(places)
        for one, other in zip(places, places[1:] + places[:1], strict=True):
            found[one] = other
    return found


def swap(material: Material) -> list[torch.Tensor]:
    """Another record's own latents, of the same level; all blocks, since the answer may have more than the record."""
    pairs = [(own, material.own[other]) for own, other in zip(material.own, material.partners, strict=True)]
    # Its last block again, where the other record has fewer.
    return [given[torch.arange(max(len(own), len(given))).clamp(max=len(given) - 1)] for own, given in pairs]


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


# ----------------------------------------------------------------------------------- into the decoding (slots.Latents)


class Given:
    """Feeds known vectors, block by block; a block beyond the last known one gets that one's again.

    Args:
        vectors: (R, k, H) of each row that is decoded, by its number.
    """

    def __init__(self, vectors: Sequence[torch.Tensor] | Mapping[int, torch.Tensor]):
        self.vectors = vectors

    def __call__(self, slots: Sequence[Slot], own: torch.Tensor) -> torch.Tensor:
        """See slots.Latents."""
        fed = [self.vectors[row][min(block, len(self.vectors[row]) - 1), slot] for row, block, slot in slots]
        return torch.stack(fed).to(own)


class First:
    """Feeds the state of a latent block's first slot at all of its slots.

    Args:
        first: where it is kept, by the row's number.
    """

    def __init__(self, first: dict[int, torch.Tensor] | None = None):
        self.first = {} if first is None else first

    def __call__(self, slots: Sequence[Slot], own: torch.Tensor) -> torch.Tensor:
        """See slots.Latents."""
        self.first |= {one.row: state for one, state in zip(slots, own, strict=True) if not one.slot}
        return torch.stack([self.first[one.row] for one in slots])


class Together:
    """Conditions side by side: of each prompt's answers, the c-th is decoded under the c-th condition.

    Args:
        latents: of each condition, None where the rows' own states are fed.
        off: the condition whose answers never have a latent token, if there is one.
    """

    def __init__(self, latents: Sequence[Latents | None], off: int | None, tokens: LatentTokens):
        self.latents, self.off, self.tokens = latents, off, tokens

    def __call__(self, slots: Sequence[Slot], own: torch.Tensor) -> torch.Tensor:
        """See slots.Latents."""
        fed = own.clone()
        for number, feed in enumerate(self.latents):
            at = [place for place, one in enumerate(slots) if one.row % len(self.latents) == number]
            if feed is not None and at:
                mine = [slots[place]._replace(row=slots[place].row // len(self.latents)) for place in at]
                fed[at] = feed(mine, own[at])
        return fed

    def choose(self, logits: torch.Tensor, turns: Sequence[Turn]) -> torch.Tensor:
        """See choose.Chooser: the likeliest token that the row's condition lets it have."""
        barred = [at for at, turn in enumerate(turns) if turn.row % len(self.latents) == self.off]
        logits[torch.tensor(barred, dtype=torch.long)[:, None], torch.tensor(self.tokens[:3])] = -torch.inf
        return logits.argmax(-1)
