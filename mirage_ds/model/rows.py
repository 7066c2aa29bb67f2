"""A prompt and its answers while the decoder is at them (generate.Loop).

H hidden.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
import torch

from mirage_ds.errors import UserError
from mirage_ds.model.kv_cache import BlockCache
from mirage_ds.model.slots import LatentTokens, Limits, Slot


@dataclass
class Generated:
    """What one row emitted.

    Attributes:
        ids: emitted tokens, the stop token included.
        fed: for each token after which the row went on, "E" where its embedding was fed and "H" where the hidden state
            was.
        inputs, hidden: (H,) input embedding and final-norm hidden state of each forward, the prompt's last position
            first; kept only with `trace`.
        latents: (H,) what was fed at each slot, in the dtype of the weights; kept only with `record`. One for each "H"
            of `fed`: where new_tokens ends an answer at a pad, that pad was not fed, nor the others of a block whose
            slots are taken at once.
    """

    ids: list[int] = field(default_factory=list)
    fed: str = ""
    inputs: list[torch.Tensor] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)

    def blocks(self) -> list[tuple[int, int]]:
        """List the latent blocks whose states were fed, as (place of the first latent among `ids`, latents)."""
        return [(found.start(), len(found[0])) for found in re.finditer("H+", self.fed)]


class Prompt:
    """A prompt and what it needs.

    Attributes:
        number: that of its first answer; new_tokens: of each answer, at most; begun, ended: answers of it.
        shared, own: blocks that are reserved for all of its answers together, and for each of them.
        table: its blocks; pictures: places of its images' tokens, where text behind latents does not see them.
        hidden: (H,) final-norm state at its last token; last: () that token; position: () of the one after it.

    Raises:
        UserError: --cache_gb never has room for it.
    """

    hidden: torch.Tensor
    last: torch.Tensor
    position: torch.Tensor

    def __init__(self, number: int, length: int, answers: int, cache: BlockCache, new_tokens: int):
        self.number, self.length, self.answers, self.new_tokens = number, length, answers, new_tokens
        self.begun = self.ended = 0
        several = answers > 1
        self.shared = cache.blocks(length) if several else 0
        # Its full blocks serve all.
        self.own = cache.blocks(length + new_tokens) - (length // cache.size if several else 0)
        self.table: list[int] = []
        self.pictures = np.empty(0, dtype=np.int64)
        blocks = self.shared + self.own
        if cache.most is not None and blocks > cache.most:
            raise UserError(
                f"keys and values of its {length} prompt tokens and up to {new_tokens} of an answer take "
                f"{blocks * cache.bytes / 1e9:.3g} GB, and --cache_gb is {cache.gb:g}; raise it, or lower "
                "--max_new_tokens or --max_pixels"
            )


@dataclass
class Row:
    """An answer that is being written.

    Attributes:
        number: of the answer; table: its blocks; length: tokens in them.
        slot: of the open latent block, −1 outside; block: latent blocks before; closed: one has ended, empty or not.
        broken: it has ended because its logits were not finite.
    """

    number: int
    prompt: Prompt
    table: list[int]
    length: int
    made: Generated = field(default_factory=Generated)
    slot: int = -1
    block: int = 0
    closed: bool = False
    broken: bool = False

    @property
    def unseen(self) -> np.ndarray:
        """Places of the keys that the token which was fed last does not see."""
        blind = self.closed and self.made.fed[-1] == "E"
        return self.prompt.pictures if blind else self.prompt.pictures[:0]

    def take(self, token: int, tokens: LatentTokens, limits: Limits, together: int = 1) -> Slot | None:
        """Go on with the token that was chosen; return the slot where the hidden state is fed, if there is one.

        Args:
            together: slots that a block takes at once, as far as the answer may be so long.
        """
        fed, taken = None, 1
        if self.slot < 0:
            self.slot = 0 if token == tokens.start else -1
        elif limits.closes(self.slot, token == tokens.end):
            token, self.block, self.slot, self.closed = tokens.end, self.block + (self.slot > 0), -1, True
        else:
            token, fed, self.slot = tokens.pad, Slot(self.number, self.block, self.slot), self.slot + together
            taken = min(together, self.prompt.new_tokens - len(self.made.ids))
        self.made.ids += [token] * taken
        return fed

    def over(self, tokens: LatentTokens) -> bool:
        """Tell whether it has ended."""
        ids = self.made.ids
        return self.broken or ids[-1] in tokens.stops or len(ids) >= self.prompt.new_tokens
