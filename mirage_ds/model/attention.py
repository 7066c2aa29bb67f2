"""Attention over packed rows: one function, three back ends.

Tq query tokens, Tk key tokens, Hq query heads, Hkv key heads (grouped-query attention), D head width, N samples.

Causal with the mask aligned bottom-right: a sample's last query sees its last key. In every pass of the recurrent
stage but the first, queries are fewer than keys, and a top-left mask would be silently wrong. The vision tower's
samples are its windows and images; there every query sees every key.
"""

import importlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from itertools import accumulate, chain
from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mirage_ds.errors import UserError, reason

# The name under which transformers' AttentionInterface finds `packed_attention`.
INTERFACE_NAME = "mirage_packed"
# Under which it finds `segment_attention`, a back end's name behind it. "flash" makes transformers' towers call it once
# a layer and say where segments end; otherwise they would call it for each segment.
SEGMENTS_NAME = "mirage_flash_segments_"
FLASH_INSTALL = 'pip install --no-build-isolation "mirage-ds[flash]"'


class Ends(NamedTuple):
    """Where the samples of a packed batch end.

    Attributes:
        cu_q, cu_k: (N + 1,) int32 cumulative numbers of queries and of keys, on the device of what they divide.
        max_q, max_k: longest sample's queries and keys.
        causal: a query sees no key behind it.
    """

    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    causal: bool = True


# (q, k, v, ends, scale) → what varlen_attention returns.
Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Ends, float], torch.Tensor]


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: Ends, scale: float) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, *ends[:4], softmax_scale=scale, causal=ends.causal)


def _torch_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: Ends, scale: float) -> torch.Tensor:
    # The operator below torch.nn.attention.varlen, whose own function takes other arguments in each release of torch.
    # Causal, and a window of (−1, 0) says so again; like flash-attn's, the kernel aligns it bottom-right.
    dropout, debug = 0.0, False
    window = dict(window_size_left=-1, window_size_right=0 if ends.causal else -1)
    return torch.ops.aten._flash_attention_forward(
        q, k, v, *ends[:4], dropout, ends.causal, debug, scale=scale, **window
    )[0]


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: Ends, scale: float) -> torch.Tensor:
    # Samples of equal lengths together: one dense T × T mask over the packed row costs more than the loop, and in the
    # passes of one token the calls cost more than the work.
    query_lengths, key_lengths = ends.cu_q.diff().tolist(), ends.cu_k.diff().tolist()
    parts = q.split(query_lengths), k.split(key_lengths), v.split(key_lengths)
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, lengths in enumerate(zip(query_lengths, key_lengths, strict=True)):
        alike[lengths].append(number)
    outputs: list[torch.Tensor] = [q] * len(query_lengths)
    for (queries, keys), members in alike.items():
        mask = None
        if ends.causal and queries not in (1, keys):
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        # (n, Hq, queries, D) and (n, Hkv, keys, D)
        one_q, one_k, one_v = (torch.stack([part[number] for number in members]).transpose(1, 2) for part in parts)
        causal = ends.causal and queries == keys and queries > 1
        output = functional.scaled_dot_product_attention(
            one_q, one_k, one_v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
        )
        for number, one in zip(members, output.transpose(1, 2), strict=True):
            outputs[number] = one
    return torch.cat(outputs)


BACKENDS: dict[str, Backend] = {"flash": _flash, "torch_varlen": _torch_varlen, "sdpa": _sdpa}
# Those that kernel_fault is about.
KERNELS = ("flash", "torch_varlen")


@cache
def flash_fault() -> str | None:
    """Return why flash-attn cannot be used, None where it can.

    Only an import tells: a wheel that was built for another torch is found as well.
    """
    try:
        importlib.import_module("flash_attn")
    except ImportError as error:
        # It may be installed and lack one of its own: the name tells.
        missing = isinstance(error, ModuleNotFoundError) and error.name == "flash_attn"
        return "flash-attn is not installed" if missing else f"flash-attn cannot be imported ({reason(error)})"
    return None


def kernel_fault(dtype: torch.dtype, head_width: int) -> str | None:
    """Return why no kernel for packed rows takes these tensors, None where it does: flash-attn's and torch's agree.

    Args:
        dtype: of the products, which is bfloat16 for float32 weights under torch_autocast.
        head_width: D.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16 and this model computes in {str(dtype).removeprefix('torch.')}"
    if head_width % 8 or head_width > 256:
        return f"takes head widths that are multiples of 8 up to 256 and this model's is {head_width}"
    return None


def choose_backend(name: str, device: torch.device, dtype: torch.dtype, head_width: int) -> str:
    """Resolve `auto` and refuse a back end that cannot run here.

    `auto` is flash where flash-attn can be imported, else torch's varlen kernel; SDPA on a CPU, and where no kernel
    takes the dtype or the head width.

    Args:
        dtype, head_width: see kernel_fault.

    Raises:
        UserError: names the back end and what to do.
    """
    if name == "sdpa":
        return name
    if device.type != "cuda":
        if name == "auto":
            return "sdpa"
        raise UserError(f"--attention {name} needs a CUDA GPU and this run is on {device.type}; use --attention sdpa")
    unfit = kernel_fault(dtype, head_width)
    if name == "auto":
        return "sdpa" if unfit else "torch_varlen" if flash_fault() else "flash"
    if unfit:
        raise UserError(f"--attention {name} {unfit}; use --attention sdpa")
    if name == "flash" and (fault := flash_fault()):
        raise UserError(f"--attention flash: {fault}; {FLASH_INSTALL}, or use --attention auto")
    return name


def head_width_of(text: Any) -> int:
    """Return D of a text model's configuration."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _fitting(backend: str, v: torch.Tensor) -> str:
    """Return the back end that takes values (Tk, Hkv, D): SDPA where a kernel does not.

    A run under torch_autocast decodes in float32 when it evaluates, outside of the autocast.
    """
    return "sdpa" if backend in KERNELS and kernel_fault(v.dtype, v.shape[-1]) else backend


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: Ends, backend: str = "sdpa", scale: float | None = None
) -> torch.Tensor:
    """Attend within each sample of a packed batch; causally, aligned bottom-right, unless `ends` says otherwise.

    Args:
        q: (Tq, Hq, D); k, v: (Tk, Hkv, D), Hq a multiple of Hkv.
        backend: a key of BACKENDS; SDPA stands in for a kernel that cannot take these tensors (kernel_fault).
        scale: factor on q · k; 1/√D if None.

    Returns:
        (Tq, Hq, D) in the dtype of v.
    """
    # Under torch_autocast rotary positions leave q and k in float32, and the varlen kernels take one dtype.
    q, k = q.to(v.dtype), k.to(v.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return BACKENDS[_fitting(backend, v)](q, k, v, ends, scale)


class Context(Protocol):
    """What a decoder layer's attention needs beyond q, k and v; travels to it through the layer's kwargs."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Attend with the new q (Tq, Hq, D) and k, v (Tq, Hkv, D), rotary positions applied → (Tq, Hq, D)."""


class Slopes:
    """Gradients of one layer's keys and values that each pass leaves to those before it.

    Autograd would slice and add them pass by pass; here a pass adds its own to one tensor for all.

    Args:
        lengths: T_i of each pass.
    """

    def __init__(self, lengths: Sequence[int]):
        self._begins = [0, *accumulate(lengths)]
        self._sums: list[torch.Tensor] = []

    def add(self, keys: torch.Tensor, number: int, *slopes: torch.Tensor) -> None:
        """Add what pass `number` leaves: (Tk, Hkv, D) for keys and for values, in the order of `keys`."""
        if not self._sums:
            self._sums = [slope.new_zeros(self._begins[number + 1], *slope.shape[1:]) for slope in slopes]
        for one, slope in zip(self._sums, slopes, strict=True):
            one.index_add_(0, keys, slope)

    def of(self, number: int) -> list[torch.Tensor]:
        """Return what has been left to pass `number`, for its keys and its values."""
        return [one[self._begins[number] : self._begins[number + 1]] for one in self._sums]

    def free(self) -> None:
        """Let go of them: the layer's backward is through."""
        self._sums = []


class _First(torch.autograd.Function):
    """Keys and values of the first pass: adds what later ones leave."""

    @staticmethod
    def forward(ctx: Any, k: torch.Tensor, v: torch.Tensor, slopes: Slopes) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.slopes = slopes
        return k.view_as(k), v.view_as(v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *own: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        whole = [one + left for one, left in zip(own, ctx.slopes.of(0), strict=True)]
        ctx.slopes.free()
        return *whole, None


class _Join(torch.autograd.Function):
    """Keys and values that a later pass sees."""

    @staticmethod
    def forward(
        ctx: Any, k: torch.Tensor, v: torch.Tensor, packed: "Packed", *past: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.left = packed.keys, packed.number, packed.slopes
        return packed.joined(k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *joined: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        keys, number, slopes = ctx.left
        slopes.add(keys, number, *joined)
        # Those of its own are among them, with what passes after it have left there. The edges to the past carry
        # nothing; they make its backward wait.
        return *slopes.of(number), None, *[None] * 2 * number


class _Attend(torch.autograd.Function):
    """_Join and attention of a thin pass: joins the keys once more in backward in place of keeping the joined ones."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: "Packed", scale: float, *past: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v, *past)
        # Not the whole of `packed`: what it holds of the graph would keep the graph alive.
        ctx.rest, ctx.scale = packed._replace(past=[], made=[]), scale
        joined_k, joined_v = packed.joined(k, v)
        return packed.over(q, joined_k, joined_v, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *flat = ctx.saved_tensors
        packed = ctx.rest._replace(past=list(zip(flat[::2], flat[1::2], strict=True)))
        joined_k, joined_v = packed.joined(k, v)
        leaves = [one.requires_grad_() for one in (q.detach(), joined_k, joined_v)]
        with torch.enable_grad():
            output = packed.over(leaves[0], joined_k, joined_v, ctx.scale)
        by_q, *joined = torch.autograd.grad(output, leaves, slope)
        packed.slopes.add(packed.keys, packed.number, *joined)
        return by_q, *packed.slopes.of(packed.number), None, None, *[None] * len(flat)


class Packed(NamedTuple):
    """One pass of training over packed rows.

    Attributes:
        past: ((T_i, Hkv, D) keys, values) of each earlier pass, in order.
        made: an empty list, which receives this pass's (keys, values).
        keys: order of the visible keys, None where it is the order in which they are made (a single pass).
        slopes: the layer's, where there are several passes and a backward will come.
        thin: attention is recomputed in backward.
    """

    past: list[tuple[torch.Tensor, torch.Tensor]]
    made: list[tuple[torch.Tensor, torch.Tensor]]
    keys: torch.Tensor | None
    ends: Ends
    backend: str
    slopes: Slopes | None = None
    thin: bool = False

    @property
    def number(self) -> int:
        """Passes before this one."""
        return len(self.past)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Attend to this pass's keys and those of all before it."""
        if self.slopes is not None and not self.past:
            k, v = _First.apply(k, v, self.slopes)
        self.made.append((k, v))
        if self.slopes is None or not self.past:
            return self.over(q, *self.joined(k, v), scale)
        past = tuple(chain.from_iterable(self.past))
        if self.thin:
            attended: torch.Tensor = _Attend.apply(q, k, v, self, scale, *past)
            return attended
        joined_k, joined_v = _Join.apply(k, v, self, *past)
        return self.over(q, joined_k, joined_v, scale)

    def joined(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the visible keys and values, of earlier passes and this one, in order."""
        if self.past:
            k = torch.cat([past[0] for past in self.past] + [k])
            v = torch.cat([past[1] for past in self.past] + [v])
        if self.keys is not None:
            k, v = k.index_select(0, self.keys), v.index_select(0, self.keys)
        return k, v

    def over(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Attend to joined keys and values."""
        return varlen_attention(q, k, v, self.ends, self.backend, scale)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    packed: Context,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Be the attention function that transformers' decoder layers call.

    Args:
        query: (1, Hq, Tq, D) and key, value: (1, Hkv, Tq, D), rotary positions applied.

    Returns:
        (1, Tq, Hq, D) and None, as the interface wants it.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return packed.attend(q, k, v, scaling)[None], None


@lru_cache(4)
def _segments(ends: torch.Tensor, on_host: bool) -> Ends:
    """Describe segments that end at `ends`; once for all layers of a call, which share the tensor: reading it waits."""
    host = ends.cpu()
    longest = int(host.diff().max())
    where = host if on_host else ends
    return Ends(where, where, longest, longest, causal=False)


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    backend: str,
    cu_seq_lens_q: torch.Tensor,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Be the attention function of transformers' vision towers: within windows and within images, one call for all.

    Args:
        query, key, value: (1, Hq, Tq, D), rotary positions applied; backend: as varlen_attention's.
        cu_seq_lens_q: (N + 1,) int32, where segments end.

    Returns:
        (1, Tq, Hq, D) and None, as the interface wants it.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    backend = _fitting(backend, v)
    return varlen_attention(q, k, v, _segments(cu_seq_lens_q, backend == "sdpa"), backend, scaling)[None], None


def register() -> None:
    """Make the attention functions known to transformers, under INTERFACE_NAME and SEGMENTS_NAME."""
    from transformers import AttentionInterface

    AttentionInterface.register(INTERFACE_NAME, packed_attention)
    for backend in BACKENDS:
        AttentionInterface.register(SEGMENTS_NAME + backend, partial(segment_attention, backend=backend))
