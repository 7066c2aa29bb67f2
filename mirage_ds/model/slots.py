"""Latent blocks in decoding: how long they may become, the tokens around them, what is fed at their slots.

In training `--slots` acts in data/encode.py.

m rows that come to a slot, H hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mirage_ds.data.encode import LATENT_TOKENS, Encoder
from mirage_ds.model.forward import MirageModel

# Bits that make of an answer's seed another one.
APART = 0x5DEECE66D


@dataclass(frozen=True)
class Limits:
    """How long rows and latent blocks may become, how many there are at a time, and what they see.

    Attributes:
        new_tokens: tokens a row may emit.
        longest_run: latents after which the end of a block is forced; the public code has 8.
        fixed_run: latents of every block whatever the model emits, or None to let it decide.
        prefill_tokens: prompts run together up to so many tokens; a longer one runs alone.
        rows: rows that decode at a time; all if None.
        cache_gb: keys and values of all rows, in GB of 10⁹ bytes; what `rows` rows may need if None.
        bottleneck: once a row has closed a latent block, its text does not see its images (data/encode.py).
    """

    new_tokens: int = 1024
    longest_run: int = 8
    fixed_run: int | None = None
    prefill_tokens: int = 8192
    rows: int | None = None
    cache_gb: float | None = None
    bottleneck: bool = False

    def closes(self, slot: int, wanted: bool) -> bool:
        """Tell whether a latent block with so many latents ends, where the model wants it to or not."""
        return slot >= self.longest_run or wanted if self.fixed_run is None else slot >= self.fixed_run


class Slot(NamedTuple):
    """A slot of a latent block that a row comes to.

    Attributes:
        row: number of the answer; block, slot: which of its blocks and which slot of that, all from 0.
    """

    row: int
    block: int
    slot: int


# Says what is fed at the slots of latent blocks, where that is not the rows' own latents: (slots, own) → (m, H). `own`
# (m, H) is what the m rows that come to a slot are fed otherwise (MirageModel.feed). It is made for one decoding, and
# may remember what it has seen of each row.
Latents = Callable[[Sequence[Slot], torch.Tensor], torch.Tensor]


def pause(model: MirageModel, pad: int) -> Latents:
    """Feed every slot the embedding of `<|latent_pad|>`: slots are ordinary tokens, as --slots pause trains them.

    Args:
        model: plain, not sharded.
    """
    embedding = model.language_model.embed_tokens.weight[pad]
    return lambda slots, own: embedding.to(own.dtype).expand_as(own)


def noise(seeds: Sequence[int]) -> Latents:
    """Draw ε, (m, H) standard normal numbers, for latents that are sampled: z = h + μ(h) + σ(h) ε (decode's `noise`).

    An answer has a generator of its own on the device of its states: nothing depends on who is beside it.

    Args:
        seeds: of the answers, by their numbers; the same as the chooser's give other draws.
    """
    generators: dict[int, torch.Generator] = {}

    def draw(row: int, like: torch.Tensor) -> torch.Tensor:
        if row not in generators:
            generators[row] = torch.Generator(like.device).manual_seed((seeds[row] ^ APART) % 2**63)
        return torch.randn(like.shape[1], generator=generators[row], device=like.device)

    return lambda slots, own: torch.stack([draw(slot.row, own) for slot in slots])


class LatentTokens(NamedTuple):
    """Ids of the three latent tokens, and of those that end an answer."""

    pad: int
    start: int
    end: int
    stops: tuple[int, ...]


def latent_tokens(encoder: Encoder) -> LatentTokens:
    """Look the ids up in the encoder's tokenizer."""
    pad, start, end = (encoder.id_of(token) for token in LATENT_TOKENS)
    return LatentTokens(pad, start, end, stops=(encoder.id_of("<|im_end|>"), encoder.id_of("<|endoftext|>")))
