"""Decoding: rows enter and leave at any token, and the latent state is kept per row.

n rows that decode at the moment, T prompt tokens that are read together, V vocabulary, H hidden, k latents of a latent
block.

After an emitted `<|latent_start|>` a row's final-norm hidden states are fed back as its next inputs, and it emits
`<|latent_pad|>`, until it emits `<|latent_end|>` or the end is forced. The hidden state of the last pad is not fed:
the end token's embedding is. Each row enters and leaves its latent blocks by itself, any number of times. What is fed
at a block's k slots can be replaced (Latents).

Of a model with LatentInputs a row takes a block's k slots at once: they run together T + 1 times, in a forward of the
rows that open a block, and the last slot then once more among all rows.

A prompt is read once, however many answers it gets; an answer waits until a row ends that leaves it room. The host
waits for the device once a token, for the tokens of all rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

from mirage_ds.data.batch import Batch
from mirage_ds.data.pack import neighbours
from mirage_ds.data.sample import picture_places
from mirage_ds.errors import UserError
from mirage_ds.model.attention import Ends, Packed
from mirage_ds.model.choose import Chooser, NotFinite, Turn, finite, greedy, project
from mirage_ds.model.forward import MirageModel
from mirage_ds.model.images import place_images
from mirage_ds.model.kv_cache import BlockCache, RunStep, on_device
from mirage_ds.model.rows import Generated, Prompt, Row
from mirage_ds.model.slots import Latents, LatentTokens, Limits, Slot


class Prompts(NamedTuple):
    """What is answered.

    Attributes:
        lengths: tokens of each prompt; rows: the records' places in their file, which errors name.
        read: [first, end) of the prompts → packed, one pass, with image features attached (FrozenTower.attach). Each is
            read once, in order, when it enters.
        answers: how many each prompt gets; those of the first prompt have the numbers 0, 1, …
        off: which of a prompt's answers is without latents: with Limits.bottleneck it sees no image from its beginning.
    """

    lengths: Sequence[int]
    rows: Sequence[int]
    read: Callable[[int, int], Batch]
    answers: int = 1
    off: int | None = None


class Loop:
    """The rows at the moment, and the prompts that wait.

    Args:
        limits: a prompt has its own new_tokens.
        read: the numbers of prompts, as `add` was told → packed, one pass, as Prompts.read returns it.
        trace: keep each step's inputs and hidden states.
        off: tells of an answer's number whether it is one that Prompts.off is about.
    """

    def __init__(
        self,
        model: MirageModel,
        limits: Limits,
        read: Callable[[Sequence[int]], Batch],
        trace: bool = False,
        record: bool = False,
        noise: Latents | None = None,
        off: Callable[[int], bool] = lambda number: False,
    ):
        self.model, self.limits, self.read, self.trace = model, limits, read, trace
        self.record, self.noise, self.off = record, noise, off
        # Slots that a block takes at once.
        self.together = 1
        if model.latent_inputs is not None:
            self.together = len(model.latent_inputs.weight)
            self.limits = replace(limits, fixed_run=self.together)
        self.text: Any = model.language_model
        self.cache = BlockCache(model, limits.cache_gb)
        self.waiting: deque[Prompt] = deque()
        self.live: list[Row] = []
        self.hidden = model.head.weight.new_empty(0, model.head.weight.shape[1])
        self.positions = torch.empty(0, dtype=torch.long, device=self.hidden.device)

    def add(self, number: int, length: int, answers: int, new_tokens: int) -> None:
        """Let a prompt wait.

        Args:
            number: of its first answer; the others have the numbers behind it.

        Raises:
            UserError: --cache_gb never has room for it.
        """
        self.waiting.append(Prompt(number, length, answers, self.cache, new_tokens))

    def drop(self, numbers: Collection[int]) -> None:
        """Let answers leave before their end, or never begin: then all of a prompt's that have not begun."""
        for prompt in [one for one in self.waiting if one.number + one.begun in numbers]:
            self.waiting.remove(prompt)
            self._end(prompt, prompt.answers - prompt.begun)
        for row in self.live:
            if row.number in numbers:
                self._leave(row)
        going = [at for at, row in enumerate(self.live) if row.number not in numbers]
        if len(going) < len(self.live):
            places = on_device(going, self.hidden.device).long()
            self.hidden, self.positions = self.hidden[places], self.positions[places]
            self.live = [self.live[at] for at in going]

    def enter(self, most: int | None = None) -> None:
        """Let answers begin while there is room for them.

        Args:
            most: prompt tokens that are read now; a longer prompt is read alone.
        """
        begin: list[tuple[Prompt, int]] = []
        fresh: list[Prompt] = []
        while self.waiting and (self.limits.rows is None or len(self.live) + len(begin) < self.limits.rows):
            prompt = self.waiting[0]
            needed = prompt.own + (0 if prompt.begun else prompt.shared)
            tokens = sum(one.length for one in fresh) + prompt.length
            late = most is not None and fresh and not prompt.begun and tokens > most
            if late or not self.cache.fits(needed):
                break
            self.cache.reserved += needed
            fresh += [] if prompt.begun else [prompt]
            begin.append((prompt, prompt.number + prompt.begun))
            prompt.begun += 1
            if prompt.begun == prompt.answers:
                self.waiting.popleft()
        if begin:
            self.cache.grow()
            for first, end in neighbours([one.length for one in fresh], self.limits.prefill_tokens):
                self._read(fresh[first:end])
            self.live += [self._begin(prompt, number) for prompt, number in begin]
            self.hidden = torch.cat([self.hidden, torch.stack([prompt.hidden for prompt, _ in begin])])
            self.positions = torch.cat([self.positions, torch.stack([prompt.position for prompt, _ in begin])])

    def _read(self, prompts: Sequence[Prompt]) -> None:
        """Run prompts that stand one behind the other."""
        batch, text, lengths = self.read([one.number for one in prompts]), self.text, []
        for one in prompts:
            one.table = self.cache.take(self.cache.blocks(one.length))
            lengths.append(one.length)
        assert batch.image_features is not None
        x, deep = place_images(text.embed_tokens(batch.input_ids), batch.image_features, batch.image_positions)
        last, x = on_device([end - 1 for end in accumulate(lengths)], x.device), x[None]
        places = self.cache.places([one.table for one in prompts], lengths)
        ends = Ends(batch.cu_seqlens, batch.cu_seqlens, max(lengths), max(lengths))
        rotary = text.rotary_emb(x, batch.position_ids[:, None])
        every = torch.arange(x.shape[1], device=x.device)
        for number, layer in enumerate(text.layers):
            packed = Packed([], [], None, ends, self.model.how.attention)
            x = layer(x, position_embeddings=rotary, packed=packed)
            if deep is not None:
                x = deep.add(number, x[0], every)[None]
            self.cache.write(number, *packed.made.pop(), places)
        hidden = text.norm(x[0].index_select(0, last))
        # Text goes on at one past the largest position of its row, on all three axes.
        positions = [part.max() + 1 for part in batch.position_ids.split(lengths, dim=1)]
        tokens = batch.input_ids[last]
        for one, state, token, position in zip(prompts, hidden, tokens, positions, strict=True):
            one.hidden, one.last, one.position = state, token, position
        if self.limits.bottleneck:
            pictures, begins = picture_places(batch.image_positions.cpu().numpy()), np.cumsum([0, *lengths])
            parts = np.split(pictures, np.searchsorted(pictures, begins[1:-1]))
            for one, begin, part in zip(prompts, begins, parts, strict=False):
                one.pictures = part - begin

    def _begin(self, prompt: Prompt, number: int) -> Row:
        """Begin an answer to a prompt that has been read."""
        table = prompt.table
        if prompt.answers > 1:
            # The last block is not full: each answer goes on in a copy.
            full, rest = divmod(prompt.length, self.cache.size)
            self.cache.hold(table[:full])
            table = table[:full] + ([self.cache.copy(table[full])] if rest else [])
        row = Row(number, prompt, table, prompt.length, closed=self.off(number))
        if self.trace:
            row.made.inputs.append(self.text.embed_tokens(prompt.last))
            row.made.hidden.append(prompt.hidden)
        return row

    def _leave(self, row: Row) -> None:
        """Give back what an answer had."""
        self.cache.drop(row.table)
        self.cache.reserved -= row.prompt.own
        self._end(row.prompt, 1)

    def _end(self, prompt: Prompt, answers: int) -> None:
        """Give back what a prompt's answers share, once all have ended."""
        prompt.ended += answers
        if prompt.ended == prompt.answers > 1 and prompt.begun:
            self.cache.drop(prompt.table)
            self.cache.reserved -= prompt.shared

    def step(self, tokens: LatentTokens, choose: Chooser, latents: Latents | None) -> list[Row]:
        """Choose a token of each row and go on; return the rows that have ended, broken ones among them."""
        logits = project(self.hidden, self.model.head.weight)
        usable = finite(logits)
        # On a GPU without looking: the host would wait.
        if logits.is_cuda or not usable.all():
            logits.masked_fill_(~usable[:, None], 0)
        chosen = choose(logits, [Turn(row.number, len(row.made.ids)) for row in self.live])
        # Here the host waits.
        told = torch.stack([chosen, usable.to(chosen)]).tolist()
        how = tokens, self.limits, self.together
        slots = [row.take(token, *how) for row, token in zip(self.live, told[0], strict=True)]
        for row, fine in zip(self.live, told[1], strict=True):
            row.broken = not fine
        going = [at for at, row in enumerate(self.live) if not row.over(tokens)]
        found = [row for at, row in enumerate(self.live) if at not in going]
        for row in found:
            self._leave(row)
        x = self._inputs(going, slots, latents)
        self.live = [self.live[place] for place in going]
        if found:
            self.positions = self.positions[on_device(going, x.device).long()]
        self.hidden = self._forward(x) if going else x
        return found

    def _inputs(self, going: list[int], slots: list[Slot | None], latents: Latents | None) -> torch.Tensor:
        """Input embeddings of the rows that go on, which stand at these places: (n, H)."""
        device = self.hidden.device
        x: torch.Tensor = self.text.embed_tokens(on_device([self.live[at].made.ids[-1] for at in going], device).long())
        feeding = [at for at, place in enumerate(going) if slots[place]]
        if feeding:
            at, own = on_device([feeding, [going[one] for one in feeding]], device)
            states, there = self.hidden.index_select(0, own), [slot for place in going if (slot := slots[place])]
            rows = [self.live[going[one]] for one in feeding]
            if self.model.latent_inputs is not None:
                fed = self._together(rows, there, states, own, latents)
            else:
                fed = self.model.feed(states, None if self.noise is None else self.noise(there, states))
                fed = fed[:, None] if latents is None else latents(there, fed)[:, None]
            fed = fed.to(x.dtype)
            x = x.index_copy(0, at, fed[:, -1])
            for row, state in zip(rows if self.record else (), fed, strict=False):
                row.made.latents += state.unbind()
        for place in going:
            self.live[place].made.fed += "H" * self.together if slots[place] else "E"
        return x

    def _together(
        self, rows: list[Row], there: list[Slot], before: torch.Tensor, own: torch.Tensor, latents: Latents | None
    ) -> torch.Tensor:
        """Run the k slots of rows that open a block, T times to make their inputs and once to keep their keys.

        Args:
            there: the first slots; before: (m, H) states before them; own: (m,) places of the rows.

        Returns:
            (m, k, H) what the slots are fed at last. All but the last of them count as taken.
        """
        inputs, k = self.model.latent_inputs, self.together
        assert inputs is not None
        for row in rows:
            row.table += self.cache.take(self.cache.blocks(row.length + k) - len(row.table))
        given = [row.table for row in rows], [row.length for row in rows]
        step = RunStep(self.cache, *given, k, self.model.how.attention)
        positions = (self.positions[own][:, None] + torch.arange(k, device=own.device)).flatten()
        x = inputs.weight.repeat(len(rows), 1)
        for _ in range(min(inputs.passes, k)):
            states = self._walk(x, positions, step).unflatten(0, (-1, k))
            x = torch.cat([before[:, None], states[:, :-1]], dim=1).flatten(0, 1)
        if latents is not None:
            x = latents([one._replace(slot=slot) for one in there for slot in range(k)], x).to(before.dtype)
        states, fed = (one.unflatten(0, (-1, k)) for one in (self._walk(x, positions, step), x))
        self.positions = self.positions.index_add(0, own, torch.full_like(own, k - 1))
        for place, row in enumerate(rows):
            row.length += k - 1
            if self.trace:
                row.made.inputs += fed[place, :-1].clone().unbind()
                row.made.hidden += states[place, :-1].clone().unbind()
        return fed

    def _walk(self, x: torch.Tensor, positions: torch.Tensor, step: Any) -> torch.Tensor:
        """Run tokens x (n, H) at their positions (n,) through all layers → final-norm hidden states (n, H)."""
        # The rows stand side by side where a sequence stands in training: each attends to its own keys alone.
        x = x[None]
        rotary = self.text.rotary_emb(x, positions.expand(3, 1, -1))
        for number, layer in enumerate(self.text.layers):
            step.layer = number
            x = layer(x, position_embeddings=rotary, packed=step)
        hidden: torch.Tensor = self.text.norm(x)[0]
        return hidden

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run one token a row, x (n, H), through all layers → final-norm hidden states (n, H)."""
        full = [row for row in self.live if row.length == len(row.table) * self.cache.size]
        for row, block in zip(full, self.cache.take(len(full)), strict=True):
            row.table.append(block)
        rows = self.live
        step = self.cache.step([one.table for one in rows], [one.length for one in rows], [one.unseen for one in rows])
        hidden = self._walk(x, self.positions, step)
        self.positions = self.positions + 1
        for place, row in enumerate(self.live):
            row.length += 1
            if self.trace:
                row.made.inputs.append(x[place].clone())
                row.made.hidden.append(hidden[place].clone())
        return hidden


def _prompts(
    cache: BlockCache, lengths: Sequence[int], rows: Sequence[int], limits: Limits, answers: int
) -> list[Prompt]:
    """Make records' prompts; a record without room is named."""
    found = []
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        try:
            found.append(Prompt(place * answers, length, answers, cache, limits.new_tokens))
        except UserError as error:
            raise UserError(f"record {row + 1}: {error}") from None
    return found


def check_room(
    model: MirageModel, lengths: Sequence[int], rows: Sequence[int], limits: Limits, answers: int = 1
) -> None:
    """Refuse prompts of these lengths that --cache_gb never has room for; `rows` and `answers` as in Prompts.

    Raises:
        UserError: names the first record without room.
    """
    _prompts(BlockCache(model, limits.cache_gb), lengths, rows, limits, answers)


@torch.no_grad()
def decode(
    model: MirageModel,
    prompts: Prompts,
    tokens: LatentTokens,
    limits: Limits,
    choose: Chooser = greedy,
    trace: bool = False,
    latents: Latents | None = None,
    record: bool = False,
    noise: Latents | None = None,
) -> Iterator[tuple[int, Generated]]:
    """Answer prompts; what an answer is does not depend on the others.

    Args:
        model: not sharded (plain module); its head's weight gives the logits.
        choose: how a token follows from logits.
        trace: keep each step's inputs and hidden states.
        latents: what is fed at the slots of latent blocks; the rows' own (MirageModel.feed) if None.
        record: keep what was fed there.
        noise: draw the rows' own from LatentHeads with it (slots.noise), in place of their mean.

    Yields:
        (number of the answer, the answer), as they end.

    Raises:
        UserError: a row that --cache_gb never has room for, before anything is decoded.
        NotFinite: names the first row of those whose logits are not.
    """
    each = prompts.answers

    def read(numbers: Sequence[int]) -> Batch:
        return prompts.read(numbers[0] // each, numbers[-1] // each + 1)

    loop = Loop(model, limits, read, trace, record, noise, lambda number: number % each == prompts.off)
    loop.waiting += _prompts(loop.cache, prompts.lengths, prompts.rows, limits, each)
    while loop.live or loop.waiting:
        loop.enter()
        ended = loop.step(tokens, choose, latents)
        if broken := [int(prompts.rows[row.number // each]) for row in ended if row.broken]:
            raise NotFinite(min(broken))
        yield from ((row.number, row.made) for row in ended)


def generate(model: MirageModel, prompts: Prompts, *given: Any, **options: Any) -> list[Generated]:
    """Return what `decode` yields, in the order of the answers' numbers."""
    return [made for _, made in sorted(decode(model, prompts, *given, **options), key=lambda one: one[0])]
