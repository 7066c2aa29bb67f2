"""Calls at the same time, at most so many, whose results come as they are ready.

concurrent.futures joins its threads when the interpreter ends, so whoever stops a command would wait for the slowest
request; these threads are daemons.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from queue import SimpleQueue
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def as_ready(
    call: Callable[[Given], Made], items: Iterable[Given], parallel: int, stop: threading.Event
) -> Iterator[tuple[Given, Made]]:
    """Yield (item, call(item)) in the order in which the calls end; an item is taken when a thread is free for it.

    Args:
        stop: set when nobody waits any longer, because the caller has left or a call has failed.

    Raises:
        Exception: what a call has raised.
    """
    todo: SimpleQueue[Given | None] = SimpleQueue()
    done: SimpleQueue[tuple[Given, Made | None, Exception | None]] = SimpleQueue()

    def work() -> None:
        while (item := todo.get()) is not None:
            try:
                done.put((item, call(item), None))
            except Exception as error:  # noqa: BLE001  # raised again where the results are read
                done.put((item, None, error))

    waiting = iter(items)
    threads = begun = 0
    try:
        for item in islice(waiting, parallel):
            threading.Thread(target=work, daemon=True).start()
            todo.put(item)
            threads = begun = begun + 1
        while begun:
            item, made, error = done.get()
            if error is not None:
                raise error
            begun -= 1
            for other in islice(waiting, 1):
                todo.put(other)
                begun += 1
            yield item, made  # type: ignore[misc]
    finally:
        stop.set()
        for _ in range(threads):
            todo.put(None)
