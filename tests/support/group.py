"""A group of ranks that lives as long as a test file: gloo on this machine, functions sent by name over pipes.

Ranks are forks of a copy of the test process as it was when its tests were collected: all is imported, nothing has run.
An import anew costs seven CPU-seconds.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import importlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil

from mirage_ds.cluster.here import free_ports

TIMEOUT_S = 60
# Once one rank has failed, the others get this long before they are taken to wait for it.
GRACE_S = 3


# After this share of the time a rank says on its standard error where it stands.
DUMP_SHARE = 0.6


# What ranks use and a test file need not have imported.
IMPORTED = (
    "deepspeed",
    "networkx",
    "pandas",
    "peft",
    # DeepSpeed's first engine imports both.
    "torch._dynamo.repro.after_dynamo",
    "torch._inductor.compile_fx",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
    "mirage_ds.train",
)


def _serve(pipe: Connection, rank: int, size: int, port: int, environment: dict[str, str]) -> None:
    """One rank: join the group, then run what is sent until the pipe is closed."""
    place = dict(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ |= environment | {key: str(value) for key, value in place.items()}
    warnings.filterwarnings("ignore", category=FutureWarning)
    from mirage_ds.engine.setup import join

    world = join()
    with contextlib.suppress(EOFError):
        while True:
            function, args, kwargs, timeout_s = pipe.recv()
            faulthandler.dump_traceback_later(timeout_s * DUMP_SHARE)
            try:
                answer = (True, function(world, *args, **kwargs))
            except BaseException:  # noqa: BLE001  # also SystemExit: the test is told, whatever it was
                answer = (False, traceback.format_exc())
            faulthandler.cancel_dump_traceback_later()
            pipe.send(answer)
            # DeepSpeed collects garbage in every start and step. What a call leaves behind is none: 6,000 objects of
            # each engine, in the next one's way three times.
            gc.collect()
            gc.freeze()


class Template:
    """A copy of this process that waits; ranks are copies of it."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        if not os.fork():
            with _ends():
                self.socket.close()
                self._wait(theirs)
        theirs.close()

    def rank(self) -> tuple[psutil.Process, Connection]:
        """Start a rank that writes where this process does now."""
        ours, theirs = multiprocessing.Pipe()
        socket.send_fds(self.socket, [b"."], [theirs.fileno(), 1, 2])
        theirs.close()
        return psutil.Process(int(self.socket.recv(20))), ours

    def _wait(self, asked: socket.socket) -> None:
        """Fork a rank whenever one is asked for, until nobody can ask any more."""
        for name in IMPORTED:
            importlib.import_module(name)
        gc.collect()
        gc.freeze()
        # Nobody waits for a rank's exit status.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while files := socket.recv_fds(asked, 1, 3)[1]:
            if child := os.fork():
                asked.send(str(child).encode())
                for file in files:
                    os.close(file)
                continue
            with _ends():
                asked.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                # pytest's own ends with the test in which it began.
                logging.getLogger().handlers.clear()
                for number, name in ((1, "stdout"), (2, "stderr")):
                    os.dup2(files[number], number)
                    setattr(sys, name, os.fdopen(number, "w", 1, closefd=False))
                _told(Connection(files[0]))


@contextlib.contextmanager
def _ends() -> Iterator[None]:
    """End this copy of the process with what is done in it: what is after it, and atexit, are the original's."""
    try:
        yield
    except BaseException:  # noqa: BLE001  # no exception may leave it either
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(0)


@functools.cache
def template() -> Template:
    """Return this process's template; the earlier it is called, the cleaner it is."""
    return Template()


def _fresh_rank() -> tuple[psutil.Process, Connection]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_told, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    assert process.pid is not None
    return psutil.Process(process.pid), ours


def _told(pipe: Connection) -> None:
    """Be the rank that one is told to be."""
    with contextlib.suppress(EOFError):
        _serve(pipe, *pipe.recv())


class GroupFailure(AssertionError):
    """A rank raised, ended or hung; the group has been killed."""


class Group:
    """`size` processes in one process group; `run` calls a module-level function on all of them.

    After a failure the ranks no longer agree on what comes next, so the group is killed and the next call starts anew.
    """

    def __init__(self, size: int = 2, fresh: bool = False):
        """`fresh`: ranks import all themselves, under the environment of their start, as one on a GPU must."""
        self.size, self.fresh = size, fresh
        self.ranks: list[tuple[psutil.Process, Connection]] = []

    def start(self) -> None:
        port = free_ports()
        for rank in range(self.size):
            process, pipe = _fresh_rank() if self.fresh else template().rank()
            pipe.send((rank, self.size, port, dict(os.environ)))
            self.ranks.append((process, pipe))

    def stop(self) -> None:
        for process, pipe in self.ranks:
            pipe.close()
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                process.wait()
        self.ranks = []

    def memory(self) -> int:
        """Return the resident bytes of the largest rank; 0 where none runs."""
        return max((process.memory_info().rss for process, _ in self.ranks), default=0)

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S, **kwargs: Any) -> list[Any]:
        """Call `function(world, *args, **kwargs)` on every rank; return the results in the order of ranks.

        Raises:
            GroupFailure: names the ranks that raised (with tracebacks), ended or gave no answer in time.
        """
        if not self.ranks:
            self.start()
        for _, pipe in self.ranks:
            pipe.send((function, args, kwargs, timeout_s))
        answers: dict[int, Any] = {}
        faults: dict[int, str] = {}
        end = time.monotonic() + timeout_s
        while len(answers) + len(faults) < self.size:
            pipes = {pipe: rank for rank, (_, pipe) in enumerate(self.ranks) if rank not in {*answers, *faults}}
            ready = wait(list(pipes), timeout=max(0, end - time.monotonic()))
            if not ready:
                faults |= {rank: f"no answer within {timeout_s} s: it hangs" for rank in pipes.values()}
            for pipe in ready:
                rank = pipes[pipe]
                try:
                    good, answer = pipe.recv()
                except (EOFError, OSError):
                    good, answer = False, "its process has ended"
                (answers if good else faults)[rank] = answer
                if not good:
                    end = min(end, time.monotonic() + GRACE_S)
        if faults:
            self.stop()
            raise GroupFailure("".join(f"\nrank {rank}: {faults[rank]}" for rank in sorted(faults)))
        return [answers[rank] for rank in range(self.size)]
