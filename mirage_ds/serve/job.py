"""What the engine and those who wait for it hand each other. H hidden."""

from __future__ import annotations

from asyncio import Queue
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from mirage_ds.data.sample import Sample
from mirage_ds.evaluate.spec import Sampling
from mirage_ds.serve.body import Refused


class Token(NamedTuple):
    """A token of an answer.

    Attributes:
        answer: which of its request's, from 0; ended: it is the last one.
        state: (H,) float32 on the CPU, what was fed at it, where that is kept and it is a latent.
    """

    answer: int
    id: int
    ended: bool
    state: torch.Tensor | None


@dataclass(eq=False)
class Job:
    """A request as the engine knows it.

    Attributes:
        sample: the prompt, let go once it has been read; length: its tokens.
        answers: how many; new_tokens: of each, at most; sampling: None for the likeliest tokens.
        first: number of its first answer among all.
        inbox: lists of Tokens, or the Refused that ends it.
    """

    sample: Sample | None
    length: int
    answers: int
    new_tokens: int
    sampling: Sampling | None
    seed: int
    first: int = -1
    inbox: Queue[list[Token] | Refused] = field(default_factory=Queue)

    async def tokens(self) -> list[Token]:
        """Wait for what has been decoded since; Refused where nothing more will be."""
        found = await self.inbox.get()
        if isinstance(found, Refused):
            raise found
        return found
