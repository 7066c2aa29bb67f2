"""A group of ranks that lives as long as a test file: gloo on this machine, functions sent by name over pipes.

Ranks are forks of a server that has imported torch, transformers and DeepSpeed once: ten CPU-seconds a rank.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import secrets
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil

TIMEOUT_S = 60
# Once one rank has failed, the others get this long before they are taken to wait for it.
GRACE_S = 3


# After this share of the time a rank says on its standard error where it stands.
DUMP_SHARE = 0.6


CONTEXT = multiprocessing.get_context("forkserver")
# The server does not get pytest's sys.path, and says nothing of what it cannot import: packages only, no test modules.
CONTEXT.set_forkserver_preload(
    [
        "deepspeed",
        "networkx",
        "pandas",
        "peft",
        "pytest",
        # DeepSpeed's first engine imports both.
        "torch._dynamo.repro.after_dynamo",
        "torch._inductor.compile_fx",
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
        "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
        "mirage_ds.train",
    ]
)


def free_port() -> int:
    """Find a port that is free as the next one is, for guards; below those that the kernel hands to connections."""
    while True:
        port = 10000 + 2 * secrets.randbelow(11000)
        with socket.socket() as one, socket.socket() as other, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 1))
            return port


def _serve(rank: int, size: int, port: int, environment: dict[str, str], pipe: Connection) -> None:
    """One rank: join the group, then run what is sent until the pipe is closed."""
    # The last that the server imports; sent functions are imported after this.
    assert "mirage_ds.train" in sys.modules, "the server of ranks has not imported mirage_ds.train"
    # DeepSpeed collects garbage in every start and step. What was imported is none.
    gc.freeze()
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
            # Nor is what a call leaves behind: 6,000 objects of each engine, in the next one's way three times.
            gc.collect()
            gc.freeze()


class GroupFailure(AssertionError):
    """A rank raised, ended or hung; the group has been killed."""


class Group:
    """`size` processes in one process group; `run` calls a module-level function on all of them.

    After a failure the ranks no longer agree on what comes next, so the group is killed and the next call starts anew.
    """

    def __init__(self, size: int = 2):
        self.size = size
        self.ranks: list[tuple[Any, Connection]] = []

    def start(self) -> None:
        port = free_port()
        for rank in range(self.size):
            ours, theirs = CONTEXT.Pipe()
            place = (rank, self.size, port, dict(os.environ))
            process = CONTEXT.Process(target=_serve, args=(*place, theirs), daemon=True)
            process.start()
            theirs.close()
            self.ranks.append((process, ours))

    def stop(self) -> None:
        for process, pipe in self.ranks:
            pipe.close()
            process.kill()
            process.join()
        self.ranks = []

    def memory(self) -> int:
        """Return the resident bytes of the largest rank; 0 where none runs."""
        return max((psutil.Process(process.pid).memory_info().rss for process, _ in self.ranks), default=0)

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
