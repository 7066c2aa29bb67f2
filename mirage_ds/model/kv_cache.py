"""Keys and values of the rows that decode, in blocks that rows of one prompt share; attention of one token a row, or k.

n rows, P blocks of the cache, B tokens a block, b blocks that a product reads, m rows of each at most, w blocks
of the longest row, L layers, Hq query heads, Hkv key heads, g = Hq / Hkv, D head width.

A row's table lists its blocks in the order of its tokens. A row reserves the blocks of its longest possible answer when
it enters, so it never has to leave before its end. Blocks are taken as they are needed, those at the cache's beginning
first: most of the time the blocks in use are all of them up to the last, and are read where they lie.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mirage_ds.model.attention import KERNELS, Ends, head_width_of, kernel_fault, varlen_attention
from mirage_ds.model.forward import MirageModel
from mirage_ds.model.latents import KeysValues

# B: what kernels for pages ask for; and the block that costs least on a CPU (measured: 64 of 32 to 256). A part of the
# cache that is in use to the share DENSE is read as it lies, its free blocks in vain.
PAGE, BLOCK, DENSE = 256, 64, 0.75


def kernel_of(model: MirageModel) -> str | None:
    """Return the kernel that attends over blocks, a key of attention.KERNELS; None where none takes the model."""
    width, name = head_width_of(model.language_model.config), model.how.attention
    return None if name not in KERNELS or kernel_fault(model.head.weight.dtype, width) else name


def tokens_of_block(model: MirageModel) -> int:
    """Return B."""
    return PAGE if kernel_of(model) else BLOCK


def bytes_of_block(model: MirageModel) -> int:
    """Bytes of one block's keys and values in all layers."""
    config: Any = model.language_model.config
    width = config.num_key_value_heads * head_width_of(config)
    return 2 * tokens_of_block(model) * width * config.num_hidden_layers * model.head.weight.element_size()


def on_device(values: Any, device: torch.device) -> torch.Tensor:
    """Copy numbers to a device without waiting for it."""
    made = torch.as_tensor(values)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made


class BlockCache:
    """The cache of all layers.

    Args:
        gb: what it may take, in 10⁹ bytes; as much as rows reserve if None.

    Attributes:
        size: B; bytes: of a block; most: blocks that it may have, or None.
        keys, values: (P, Hkv, B, D) a layer.
        reserved: blocks that rows may need until their ends.
    """

    def __init__(self, model: MirageModel, gb: float | None = None):
        config: Any = model.language_model.config
        self.size, self.bytes, self.kernel = tokens_of_block(model), bytes_of_block(model), kernel_of(model)
        self.gb, self.most, self.reserved = gb, None if gb is None else int(gb * 1e9 / self.bytes), 0
        empty = model.head.weight.new_zeros(0, config.num_key_value_heads, self.size, head_width_of(config))
        self.keys = [empty] * config.num_hidden_layers
        self.values = [empty] * config.num_hidden_layers
        self._free: list[int] = []
        self._holders: list[int] = []

    def blocks(self, tokens: int) -> int:
        """Return how many blocks hold so many tokens."""
        return -(-tokens // self.size)

    def fits(self, blocks: int) -> bool:
        """Tell whether so many blocks more can be reserved."""
        return self.most is None or self.reserved + blocks <= self.most

    def grow(self) -> None:
        """Make room for all that is reserved."""
        have, missing = len(self._holders), self.reserved - len(self._holders)
        if missing > 0:
            for store in (self.keys, self.values):
                for layer, old in enumerate(store):
                    store[layer] = old.new_zeros(self.reserved, *old.shape[1:])
                    store[layer][:have] = old
            self._holders += [0] * missing
            self._free += range(have, self.reserved)
            heapq.heapify(self._free)

    def take(self, count: int) -> list[int]:
        """Take blocks out of those that are reserved; they are empty."""
        found = [heapq.heappop(self._free) for _ in range(count)]
        self.hold(found)
        # What a row left there may be NaN, which a masked place's weight of 0 does not silence.
        at = on_device(found, self.keys[0].device).long()
        for one in (*self.keys, *self.values) if found else ():
            one.index_fill_(0, at, 0)
        return found

    def hold(self, blocks: Sequence[int]) -> None:
        """Share blocks once more."""
        for block in blocks:
            self._holders[block] += 1

    def drop(self, blocks: Sequence[int]) -> None:
        """Leave blocks; those that nobody holds any more are free."""
        for block in blocks:
            self._holders[block] -= 1
            if not self._holders[block]:
                heapq.heappush(self._free, block)

    def copy(self, block: int) -> int:
        """Take a block with the content of another."""
        (made,) = self.take(1)
        for one in (*self.keys, *self.values):
            one[made] = one[block]
        return made

    def places(
        self, tables: Sequence[Sequence[int]], lengths: Sequence[int], unseen: Sequence[np.ndarray] | None = None
    ) -> torch.Tensor:
        """Return of all tokens of rows that begin their blocks, but for `unseen`, blocks and places in them: (2, T)."""
        tokens = [np.arange(length) for length in lengths]
        tokens = tokens if unseen is None else [np.delete(*one) for one in zip(tokens, unseen, strict=True)]
        blocks = [np.asarray(table)[at // self.size] for table, at in zip(tables, tokens, strict=True)]
        return on_device(np.stack([np.concatenate(blocks), np.concatenate(tokens) % self.size]), self.keys[0].device)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, at: torch.Tensor) -> KeysValues:
        """Keep keys and values (T, Hkv, D) at their places; return all of the layer."""
        keys, values, (block, inside) = self.keys[layer], self.values[layer], at
        keys[block, :, inside], values[block, :, inside] = k, v
        return keys, values

    def step(
        self, tables: Sequence[Sequence[int]], lengths: Sequence[int], unseen: Sequence[np.ndarray]
    ) -> _KernelStep | _BlockStep | _GatheredStep:
        """Prepare one new token a row: a Context of attention, of the layer that its `layer` says.

        Args:
            tables: of each row, with the block that the new token goes into; lengths: tokens before it.
            unseen: places of tokens before it that it does not see.
        """
        if any(map(len, unseen)):
            return _GatheredStep(self, tables, lengths, unseen)
        return (_KernelStep if self.kernel else _BlockStep)(self, tables, lengths)


class RunStep:
    """Several new tokens a row, which are kept anew each time: a Context of attention, of the layer that `layer` says.

    Args:
        tables: of each row, with the blocks that its new tokens go into; lengths: tokens before them; count: of them.
        backend: a key of attention.BACKENDS.
    """

    layer = 0

    def __init__(
        self, cache: BlockCache, tables: Sequence[Sequence[int]], lengths: Sequence[int], count: int, backend: str
    ):
        self.cache, self.backend, whole = cache, backend, [length + count for length in lengths]
        self.seen, device = cache.places(tables, whole), cache.keys[0].device
        new = np.cumsum(whole)[:, None] + np.arange(-count, 0)
        self.at = self.seen[:, on_device(new.flatten(), device)]
        cu_q, cu_k = (on_device(np.cumsum([0, *each]), device).int() for each in ([count] * len(whole), whole))
        self.ends = Ends(cu_q, cu_k, count, max(whole))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Keep k and v (n · count, Hkv, D), and attend with q (n · count, Hq, D) → the same shape."""
        block, inside = self.seen
        k, v = (one[block, :, inside] for one in self.cache.write(self.layer, k, v, self.at))
        return varlen_attention(q, k, v, self.ends, self.backend, scale)


def _padded(lists: Sequence[Sequence[int] | np.ndarray], fill: int) -> np.ndarray:
    """Write lists of unlike lengths as rows of one matrix."""
    found = np.full((len(lists), max(map(len, lists))), fill)
    for row, one in enumerate(lists):
        found[row, : len(one)] = one
    return found


class _KernelStep:
    """A varlen kernel takes the lengths, and each row's blocks where it can.

    Attributes:
        ends: of queries and keys; used: (n,) keys of each row; table: (n, w), both int32.
    """

    layer = 0

    def __init__(self, cache: BlockCache, tables: Sequence[Sequence[int]], lengths: Sequence[int]):
        self.cache, rows = cache, np.asarray(lengths)
        own = np.stack([[table[-1] for table in tables], rows % cache.size, rows + 1], axis=1)
        both = on_device(np.concatenate([own, _padded(tables, 0)], axis=1), cache.keys[0].device)
        self.at = both[:, :2].T
        self.used, self.table = both[:, 2].int(), both[:, 3:].int().contiguous()
        queries = torch.arange(len(rows) + 1, device=both.device, dtype=torch.int32)
        keys = torch.nn.functional.pad(self.used.cumsum(0, dtype=torch.int32), (1, 0))
        self.ends = Ends(queries, keys, 1, int(rows.max()) + 1)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Keep k and v (n, Hkv, D), and attend with q (n, Hq, D) → (n, Hq, D)."""
        keys, values = self.cache.write(self.layer, k, v, self.at)
        # Tokens before heads, as kernels ask for: a view.
        kernel = PAGED[str(self.cache.kernel)]
        return kernel(self, q.to(v.dtype), keys.transpose(1, 2), values.transpose(1, 2), scale)


def _flash(step: _KernelStep, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, *step.ends[:4], softmax_scale=scale, causal=True, block_table=step.table)


def _torch_varlen(step: _KernelStep, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    operator, ends = torch.ops.aten._flash_attention_forward, step.ends
    more, schema = dict[str, Any](seqused_k=step.used), str(operator.default._schema)
    if "block_table" in schema:
        more["block_table"] = step.table
        # Split keys of a table have left rows unwritten, NaN among them (pytorch issue 194167, torchtitan issue 3235).
        # ROCm's operator refuses the argument.
        if "num_splits" in schema and torch.version.hip is None:
            more["num_splits"] = 1
    else:
        # As of torch 2.11: the blocks of each row are copied to stand side by side.
        k, v = (one[step.table.flatten()].flatten(0, 1) for one in (k, v))
        ends = ends._replace(cu_k=ends.cu_q * (len(k) // len(q)))
    # Not causal: a single query sees all that is used.
    return operator(q, k, v, *ends[:4], 0.0, False, False, scale=scale, **more)[0]


# As attention.BACKENDS, with a query a row (n, Hq, D) over blocks (P, B, Hkv, D).
PAGED = {"flash": _flash, "torch_varlen": _torch_varlen}


class _GatheredStep:
    """Where rows do not see all of their keys: those that each sees are copied to stand side by side."""

    layer = 0

    def __init__(
        self, cache: BlockCache, tables: Sequence[Sequence[int]], lengths: Sequence[int], unseen: Sequence[np.ndarray]
    ):
        counts = [length + 1 - len(one) for length, one in zip(lengths, unseen, strict=True)]
        ends = np.cumsum([0, *counts])
        self.cache, self.seen = cache, cache.places(tables, [length + 1 for length in lengths], unseen)
        # A row's new token is its last.
        self.at = self.seen[:, on_device(ends[1:] - 1, self.seen.device)]
        queries = torch.arange(len(ends), device=self.seen.device, dtype=torch.int32)
        self.ends = Ends(queries, on_device(ends.astype(np.int32), queries.device), 1, max(counts))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Keep k and v (n, Hkv, D), and attend with q (n, Hq, D) → (n, Hq, D)."""
        (block, inside), backend = self.seen, self.cache.kernel or "sdpa"
        k, v = (one[block, :, inside] for one in self.cache.write(self.layer, k, v, self.at))
        return varlen_attention(q, k, v, self.ends, backend, scale)


class _BlockStep:
    """Plain products: each block gives its part of a row's softmax, and the parts are put together."""

    layer = 0

    def __init__(self, cache: BlockCache, tables: Sequence[Sequence[int]], lengths: Sequence[int]):
        table, rows, device = _padded(tables, -1), np.asarray(lengths), cache.keys[0].device
        row, held = np.nonzero(table >= 0)[0], table[table >= 0]
        # Rows that share a block stand one behind the other.
        order = np.argsort(held, kind="stable")
        among = np.empty_like(order)
        among[order] = np.arange(len(held)) - np.searchsorted(held[order], held[order])
        used, place = np.unique(held, return_inverse=True)
        dense, self.cache = len(used) >= DENSE * (used[-1] + 1), cache
        place, first = held if dense else place, among == 0
        # All blocks with one row each; then those that several share, with the others of their rows.
        asked, part = np.zeros((max(place) + 1, 1), dtype=np.int64), place.copy()
        asked[place[first], 0] = row[first]
        # A shared block is full: the last one of a row is its own.
        last, seen = np.searchsorted(row, np.arange(len(rows)), side="right") - 1, np.full(len(asked), cache.size)
        seen[place[last]] = rows % cache.size + 1
        unseen = (torch.arange(cache.size, device=device) >= on_device(seen, device)[:, None])[:, None, None]
        blocks = slice(0, used[-1] + 1) if dense else on_device(used, device)
        self.products: list[Any] = [(blocks, on_device(asked, device), unseen)]
        if not first.all():
            shared, place = np.unique(held[~first], return_inverse=True)
            others = np.zeros((len(shared), max(among)), dtype=np.int64)
            others[place, among[~first] - 1] = row[~first]
            part[~first] = len(asked) + place * max(among) + among[~first] - 1
            self.products.append((on_device(shared, device), on_device(others, device), None))
        self.at = on_device(np.stack([held[last], rows % cache.size]), device)
        self.absent = on_device(table < 0, device)[..., None, None, None]
        table[table >= 0] = part
        # In place of a block that a row lacks, its own first one: times 0, and another row's NaN would spread.
        self.parts = on_device(np.where(table < 0, table[:, :1], table), device)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Keep k and v (n, Hkv, D), and attend with q (n, Hq, D) → (n, Hq, D)."""
        keys, values = self.cache.write(self.layer, k, v, self.at)
        # At least float32, as kernels have it inside: rounded scores alone cost several times a kernel's error.
        exact = torch.promote_types(v.dtype, torch.float32)
        q = (q.to(exact) * scale).unflatten(1, (keys.shape[1], -1))
        made = [self._product(q, keys[at].to(exact), values[at].to(exact), *one) for at, *one in self.products]
        # (b · m, Hkv, g, …) → (n, w, Hkv, g, …)
        found = (torch.cat(one) if len(one) > 1 else one[0] for one in zip(*made, strict=True))
        top, total, whole = (one.index_select(0, self.parts.flatten()).unflatten(0, self.parts.shape) for one in found)
        tops = top.masked_fill_(self.absent, -torch.inf)
        factors = tops.sub_(tops.amax(1, keepdim=True)).exp_()
        return ((whole * factors).sum(1) / (total * factors).sum(1)).flatten(1, 2).to(v.dtype)

    def _product(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        asked: torch.Tensor,
        unseen: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """Attend to b blocks with m rows each, asked (b, m); return (b · m, Hkv, g, …) largest scores, sums, values."""
        # (b, m, Hkv, g, D) → (b, Hkv, m · g, D)
        queries = q.index_select(0, asked.flatten()).unflatten(0, asked.shape).transpose(1, 2).flatten(2, 3)
        scores = torch.matmul(queries, keys.transpose(-1, -2))
        if unseen is not None:
            scores.masked_fill_(unseen, -torch.inf)
        top = scores.amax(-1, keepdim=True)
        weights = scores.sub_(top).exp_()
        parts = (top, weights.sum(-1, keepdim=True), torch.matmul(weights, values))
        return [one.unflatten(2, (asked.shape[1], -1)).transpose(1, 2).flatten(0, 1) for one in parts]
