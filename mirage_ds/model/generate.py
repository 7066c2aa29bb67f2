"""Decoding: batched, with a cache, and the latent state kept per row.

N rows, P prompt tokens of the packed batch, S keys of the longest row, V vocabulary, H hidden, L layers, Hq query
heads, Hkv key heads, D head width, k latents of a latent block.

After an emitted `<|latent_start|>` a row's final-norm hidden states are fed back as its next inputs, and it emits
`<|latent_pad|>`, until it emits `<|latent_end|>` or the end is forced. The hidden state of the last pad is not fed:
the end token's embedding is. Each row enters and leaves its latent blocks by itself, any number of times. What is fed
at a block's k slots can be replaced (Latents).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from mirage_ds.data.batch import Batch
from mirage_ds.data.encode import LATENT_TOKENS, Encoder
from mirage_ds.data.pack import neighbours
from mirage_ds.errors import UserError
from mirage_ds.model.attention import Ends, Packed
from mirage_ds.model.forward import MirageModel
from mirage_ds.model.images import place_images

# (logits (N, V), step) → (N,) token ids.
Chooser = Callable[[torch.Tensor, int], torch.Tensor]


class NotFinite(UserError):
    """Logits that no token can be chosen from.

    Attributes:
        row: the record's place in its file, from 0.
    """

    def __init__(self, row: int):
        super().__init__(
            f"the logits of record {row + 1} are not finite: a weight is NaN, or a number became too large for its "
            "dtype; take an earlier checkpoint, or copy the model again"
        )
        self.row = row

    def __reduce__(self) -> tuple[type[NotFinite], tuple[int]]:
        # Ranks send it to each other.
        return NotFinite, (self.row,)


def finite(logits: torch.Tensor) -> torch.Tensor:
    """Tell whether all of a row's logits (N, V) are finite: (N,). Their sum is, in one walk and no second (N, V)."""
    return logits.sum(dim=-1, dtype=torch.float32).isfinite()


def check_finite(logits: torch.Tensor, rows: Sequence[int] | torch.Tensor) -> None:
    """Refuse logits (N, V) that are not finite; NotFinite names the first of the N rows that has some."""
    found = finite(logits).tolist()
    if not all(found):
        raise NotFinite(int(rows[found.index(False)]))


# Says what is fed at the slots of latent blocks, where that is not the rows' own hidden states: (slots, own) → (N, H),
# not used for rows outside a block. `slots` (N,) is the slot that each row comes to, counted from 0 in each of its
# blocks, −1 outside; `own` (N, H) are the rows' final-norm hidden states, which are fed otherwise. It is made for one
# batch, and may remember what it has seen of each row.
Latents = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def pause(model: MirageModel, pad: int) -> Latents:
    """Feed every slot the embedding of `<|latent_pad|>`: slots are ordinary tokens, as --slots pause trains them.

    Args:
        model: plain, not sharded.
    """
    embedding = model.language_model.embed_tokens.weight[pad]
    return lambda slots, own: embedding.to(own.dtype).expand_as(own)


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


@dataclass(frozen=True)
class Limits:
    """How long rows and latent blocks may become.

    Attributes:
        new_tokens: tokens a row may emit.
        longest_run: latents after which the end of a block is forced; the public code has 8.
        fixed_run: latents of every block whatever the model emits, or None to let it decide.
        prefill_tokens: prompts of a batch run together up to so many tokens; a longer one runs alone.
    """

    new_tokens: int = 1024
    longest_run: int = 8
    fixed_run: int | None = None
    prefill_tokens: int = 8192


@dataclass
class Generated:
    """What one row emitted.

    Attributes:
        ids: emitted tokens, the stop token included.
        fed: for each token after which the row went on, "E" where its embedding was fed and "H" where the hidden state
            was.
        inputs, hidden: (H,) input embedding and final-norm hidden state of each forward, the prompt's last position
            first; kept only with `trace`.
    """

    ids: list[int] = field(default_factory=list)
    fed: str = ""
    inputs: list[torch.Tensor] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)

    def blocks(self) -> list[tuple[int, int]]:
        """List the latent blocks whose states were fed, as (place of the first latent among `ids`, latents)."""
        return [(found.start(), len(found[0])) for found in re.finditer("H+", self.fed)]


def greedy(logits: torch.Tensor, step: int) -> torch.Tensor:
    """Choose the likeliest token of each row."""
    del step
    return logits.argmax(dim=-1)


def sampler(temperature: float, top_p: float, seeds: Sequence[int]) -> Chooser:
    """Make a chooser that samples from the smallest set of tokens that holds `top_p` of the probability.

    Args:
        seeds: one a row, so that a row's answer does not depend on the rows beside it.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(logits: torch.Tensor, step: int) -> torch.Tensor:
        del step
        probabilities, order = (logits.float() / temperature).softmax(-1).sort(dim=-1, descending=True)
        # The token that crosses top_p is still in; what comes after it is out.
        outside = probabilities.cumsum(-1) - probabilities >= top_p
        kept = probabilities.masked_fill(outside, 0).cpu()
        drawn = [torch.multinomial(row, 1, generator=one) for row, one in zip(kept, generators, strict=True)]
        return order.gather(1, torch.stack(drawn).to(order.device))[:, 0]

    return choose


class _Cache:
    """Keys and values of all rows, one padded tensor a layer: (N, Hkv, S, D)."""

    def __init__(self, lengths: Sequence[int], room: int, like: torch.Tensor, layers: int):
        _, heads, width = like.shape
        self.keys = [like.new_zeros(len(lengths), heads, room, width) for _ in range(layers)]
        self.values = [like.new_zeros(len(lengths), heads, room, width) for _ in range(layers)]
        self.lengths = torch.tensor(lengths, device=like.device)

    def fill(self, layer: int, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], first: int) -> None:
        """Take the keys and values of some rows' prompts, packed (T, Hkv, D), from row `first` on."""
        for store, packed in ((self.keys[layer], k), (self.values[layer], v)):
            for row, one in enumerate(packed.split(list(lengths)), first):
                store[row, :, : len(one)] = one.transpose(0, 1)


class _OneToken:
    """Attention of one new token a row to its row's keys: the Context of a decoding step."""

    def __init__(self, cache: _Cache, layer: int, longest: int):
        self.cache, self.layer, self.longest = cache, layer, longest

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Append k and v (N, Hkv, D) at each row's end, then attend with q (N, Hq, D) → (N, Hq, D)."""
        keys, values, at = self.cache.keys[self.layer], self.cache.values[self.layer], self.cache.lengths
        rows = torch.arange(len(at), device=at.device)
        keys[rows, :, at] = k
        values[rows, :, at] = v
        visible = torch.arange(self.longest, device=at.device)[None] <= at[:, None]
        # The query heads of a key head stand where queries stand: with enable_gqa and a mask, CUDA copies keys and
        # values for each of them, in float32.
        output = functional.scaled_dot_product_attention(
            q.unflatten(1, (keys.shape[1], -1)),
            keys[:, :, : self.longest],
            values[:, :, : self.longest],
            attn_mask=visible[:, None, None],
            scale=scale,
        )
        return output.flatten(1, 2)


def _prefill(
    model: MirageModel, batch: Batch, lengths: Sequence[int], room: int, budget: int
) -> tuple[_Cache, torch.Tensor, torch.Tensor]:
    """Run the packed prompts, `budget` tokens at a time.

    Returns:
        The cache, and of each row the last hidden state (N, H) and the next position (N,).
    """
    text, features = model.language_model, batch.image_features
    assert features is not None
    starts = [0, *accumulate(lengths)]
    images = torch.searchsorted(batch.image_positions, batch.cu_seqlens.long()).tolist()
    cache: _Cache | None = None
    last = []
    for first, end in neighbours(lengths, budget):
        here, seen = slice(starts[first], starts[end]), slice(images[first], images[end])
        x, deep = place_images(
            text.embed_tokens(batch.input_ids[here]), features[seen], batch.image_positions[seen] - here.start
        )
        x = x[None]
        own, cu_seqlens = lengths[first:end], batch.cu_seqlens[first : end + 1] - here.start
        ends = Ends(cu_seqlens, cu_seqlens, max(own), max(own))
        rotary = text.rotary_emb(x, batch.position_ids[:, None, here])
        tokens = torch.arange(x.shape[1], device=x.device)
        for number, layer in enumerate(text.layers):
            packed = Packed([], [], None, ends, model.how.attention)
            x = layer(x, position_embeddings=rotary, packed=packed)
            if deep is not None:
                x = deep.add(number, x[0], tokens)[None]
            cache = cache or _Cache(lengths, room, packed.made[0][0], len(text.layers))
            cache.fill(number, *packed.made.pop(), own, first)
        last.append(x[0].index_select(0, cu_seqlens[1:].long() - 1))
    assert cache is not None
    # Text goes on at one past the largest position of its row, on all three axes.
    highest = [part.max() + 1 for part in batch.position_ids.split(list(lengths), dim=1)]
    return cache, text.norm(torch.cat(last)), torch.stack(highest)


def _trace(rows: list[Generated], alive: list[bool], inputs: torch.Tensor, hidden: torch.Tensor) -> None:
    for row, lives, one, state in zip(rows, alive, inputs, hidden, strict=True):
        if lives:
            row.inputs.append(one.clone())
            row.hidden.append(state.clone())


@torch.no_grad()
def generate(
    model: MirageModel,
    batch: Batch,
    tokens: LatentTokens,
    limits: Limits,
    choose: Chooser = greedy,
    trace: bool = False,
    latents: Latents | None = None,
) -> list[Generated]:
    """Decode every row of a packed batch of prompts.

    Args:
        model: not sharded (plain module); its head's weight gives the logits.
        batch: prompts with image features attached (FrozenTower.attach), one pass.
        choose: how a token follows from logits.
        trace: keep each step's inputs and hidden states.
        latents: what is fed at the slots of latent blocks; the rows' own hidden states if None.

    Returns:
        One Generated a row, in the order of the batch.

    Raises:
        NotFinite: names the first row of those whose logits are not.
    """
    text: Any = model.language_model
    lengths = batch.cu_seqlens.diff().tolist()
    cache, hidden, position = _prefill(model, batch, lengths, max(lengths) + limits.new_tokens, limits.prefill_tokens)
    rows = [Generated() for _ in lengths]
    device = hidden.device
    alive = torch.ones(len(rows), dtype=torch.bool, device=device)
    broken = torch.zeros_like(alive)
    # Latents of the open block, −1 outside.
    block = torch.full((len(rows),), -1, device=device)
    longest = limits.fixed_run if limits.fixed_run is not None else limits.longest_run
    if trace:
        last = batch.input_ids[batch.cu_seqlens[1:].long() - 1]
        _trace(rows, [True] * len(rows), text.embed_tokens(last), hidden)
    for step in range(limits.new_tokens):
        logits = functional.linear(hidden, model.head.weight)
        # No host wait of its own: the loop's one look at the rows sees it.
        unusable = ~finite(logits)
        broken |= alive & unusable
        chosen = choose(logits.masked_fill_(unusable[:, None], 0), step)
        inside = block >= 0
        full = block >= longest
        leaves = inside & (full | ((chosen == tokens.end) & (limits.fixed_run is None)))
        stays = inside & ~leaves
        chosen = torch.where(leaves, tokens.end, torch.where(stays, tokens.pad, chosen))
        fed = hidden if latents is None else latents(torch.where(stays, block, -1), hidden)
        block = torch.where(stays, block + 1, torch.where(inside, -1, block))
        block = torch.where(~inside & (chosen == tokens.start), 0, block)
        x = torch.where(stays[:, None], fed, text.embed_tokens(chosen))
        for row, token, lives in zip(rows, chosen.tolist(), alive.tolist(), strict=True):
            if lives:
                row.ids.append(token)
        alive &= ~torch.isin(chosen, torch.tensor(tokens.stops, device=device))
        if step + 1 == limits.new_tokens or not (alive.any() & ~broken.any()):
            break
        living = alive.tolist()
        for row, feeds, lives in zip(rows, stays.tolist(), living, strict=True):
            row.fed += ("H" if feeds else "E") if lives else ""
        hidden = _one_step(text, x, position, cache)
        position = position + 1
        if trace:
            _trace(rows, living, x, hidden)
    if broken.any():
        raise NotFinite(int(batch.rows[broken].min()))
    return rows


def _one_step(text: Any, x: torch.Tensor, position: torch.Tensor, cache: _Cache) -> torch.Tensor:
    """Run one token a row, x (N, H) at its position (N,), through all layers → final-norm hidden states (N, H)."""
    # The rows stand side by side where a sequence stands in training: each attends to its own cache alone.
    x = x[None]
    rotary = text.rotary_emb(x, position.expand(3, 1, -1))
    longest = int(cache.lengths.max()) + 1
    for number, layer in enumerate(text.layers):
        x = layer(x, position_embeddings=rotary, packed=_OneToken(cache, number, longest))
    cache.lengths += 1
    return text.norm(x)[0]
