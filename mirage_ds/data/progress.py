"""How far a work is: a bar on a terminal; in a pipe or a file, a line every half minute."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY_S = 30.0
# (done, total), the total None where nobody knows it yet
Advance = Callable[[int, int | None], None]
Item = TypeVar("Item")


def clock(seconds: float) -> str:
    """Return a time as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


class Lines:
    """Says on stderr how far a work is, if EVERY_S seconds have passed since it last did, or since the work began."""

    def __init__(self, title: str):
        self.title = title
        self.began = self.said = time.monotonic()

    def __call__(self, done: int, total: int | None) -> None:
        """Take note of how much is done."""
        now = time.monotonic()
        if now - self.said < EVERY_S:
            return
        self.said = now
        left = f" of {total}, {clock((now - self.began) / max(done, 1) * (total - done))} left" if total else ""
        print(f"{self.title}: {done}{left}", file=sys.stderr, flush=True)  # noqa: T201  # a log without a terminal


@contextmanager
def progress_bar(title: str) -> Iterator[Advance]:
    """Yield a function (done, total) that shows how far the work is, while it lasts."""
    console = next((one for one in (Console(), Console(stderr=True)) if one.is_terminal or one.is_jupyter), None)
    if console is None:
        yield Lines(title)
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        row = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)


def track(items: Iterable[Item], title: str, total: int | None = None, quiet: bool = False) -> Iterator[Item]:
    """Yield the items, and show how many of them have been worked through.

    Args:
        total: how many there are, where `items` does not say it.
        quiet: show nothing.
    """
    if quiet:
        yield from items
        return
    total = len(items) if total is None and isinstance(items, Sized) else total
    with progress_bar(title) as advance:
        advance(0, total)
        for done, item in enumerate(items, 1):
            yield item
            advance(done, total)
