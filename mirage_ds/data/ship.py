"""The way from a worker process to its rank, and a tree of tensors as one for it.

Each tensor on that way costs an open file and several system calls, and a Batch of the recurrent stage has some ten a
pass. In one piece the way takes the same time whatever the number of passes.
"""

import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch

from mirage_ds.errors import STOP_SIGNALS, UserError

# Tensors begin where any dtype may.
ALIGNMENT = 64


class Span(NamedTuple):
    """Where a tensor lies in the content."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, content: torch.Tensor) -> torch.Tensor:
        """Return the tensor, a view of the content."""
        shape = torch.Size(self.shape)
        stop = self.start + shape.numel() * self.dtype.itemsize
        return content[self.start : stop].view(self.dtype).view(shape)


@dataclass(frozen=True)
class Shipment:
    """The tensors of a (nested) named tuple, one behind the other.

    Attributes:
        content: (bytes,) uint8.
        tree: the tree with a Span for each tensor.
    """

    content: torch.Tensor
    tree: Any

    def pin_memory(self) -> Self:
        """Return it in memory that a GPU copies from directly; torch's DataLoader asks for this."""
        return replace(self, content=self.content.pin_memory())

    def unpack(self) -> Any:
        """Return the tree; its tensors are views of the content."""
        return mapped(self.tree, Span, lambda place: place.of(self.content))


def ship(tree: Any) -> Shipment:
    """Put a tree's tensors into one."""
    found: list[tuple[Span, torch.Tensor]] = []
    size = 0

    def place(tensor: torch.Tensor) -> Span:
        nonlocal size
        made = Span(size, tensor.dtype, tuple(tensor.shape))
        found.append((made, tensor))
        size += -(-tensor.numel() * tensor.itemsize // ALIGNMENT) * ALIGNMENT
        return made

    placed = mapped(tree, torch.Tensor, place)
    content = torch.empty(size, dtype=torch.uint8)
    for made, tensor in found:
        made.of(content).copy_(tensor)
    return Shipment(content, placed)


def mapped(item: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Change every leaf of a kind in a tree of tuples."""
    if isinstance(item, kind):
        return change(item)
    if not isinstance(item, tuple):
        return item
    parts = [mapped(part, kind, change) for part in item]
    return type(item)(*parts) if hasattr(item, "_fields") else tuple(parts)


def from_workers(
    make: Callable[[Any], Any], work: Iterable[Any], workers: int, prefetch: int = 2, pin: bool = False
) -> Iterator[Any]:
    """Yield what is made of each item of work, in their order.

    Args:
        make: runs in a worker process; what it returns travels best as a Shipment.
        workers: how many there are; with none this process makes all.
        prefetch: items that each of them has begun or finished.
        pin: a Shipment arrives in memory that a GPU copies from directly.

    Raises:
        UserError: as `make` raises it; only this process knows.
    """
    loader: Any = torch.utils.data.DataLoader(
        _Made(make),
        batch_size=None,
        sampler=work,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin,
        worker_init_fn=_ignore_signals,
    )
    for made in loader:
        if isinstance(made, UserError):
            raise made
        yield made


class _Made(torch.utils.data.Dataset):
    """Makes what is asked for. A UserError is returned: torch would raise it with a worker's traceback for words."""

    def __init__(self, make: Callable[[Any], Any]):
        self.make = make

    def __getitem__(self, work: Any) -> Any:
        try:
            return self.make(work)
        except UserError as error:
            return error


def _ignore_signals(_worker: int) -> None:
    """Let a worker outlive the signals that a scheduler sends to every process of a job.

    The rank that it works for finishes its step first, for which it needs the rows.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
