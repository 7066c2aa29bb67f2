"""The ranks of the bandwidth test on one host: they start as the trainer's do, then measure. See bandwidth.py.

Every rank is a process of its own under a guard, as behind launch/*.sh: the guards end all ranks when one fails or does
not come, and say which. Nothing stays behind: all of them end with `start`, and that with who asked for it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

# How long guards wait for each other, in seconds: see guard.wire.Bounds.
BOUNDS = {"gather": 15, "silence": 8, "grace": 1}
# The guards end one after another; one that could not even listen leaves the others waiting.
FAREWELL_S = 5.0
# A collective takes seconds at most, and the ranks import torch before the first one.
JOIN_S = 45.0
# Runs of each measurement after the first; one that took SLOW_S is enough.
ITERATIONS = 3
SLOW_S = 0.3
# Enough that latency does not count, little enough for seconds: elements of 4 bytes.
CPU_ELEMENTS, GPU_ELEMENTS = 4 << 20, 64 << 20


def start(request: dict[str, Any]) -> int:
    """Start this host's ranks and wait for them; return their exit code."""
    from mirage_ds.cluster.guard.child import Child, adopt_orphans, end_all
    from mirage_ds.engine.place import Place

    # Whatever hangs here, nothing stays behind.
    signal.alarm(math.ceil(request["limit_s"]) + 2)
    adopt_orphans()
    own_slots, port = request["slots"][request["number"]], request["master_port"]
    first, size = sum(request["slots"][: request["number"]]), sum(request["slots"])
    guard = [sys.executable, "-m", "mirage_ds.cluster.guard", "--port", str(port + 1), "--job", "doctor"]
    guard += [f"--{name}={seconds}" for name, seconds in BOUNDS.items()]
    guard += ["mirage_ds.cluster.doctor.rank", json.dumps(request["slots"])]
    places = [Place(first + slot, size, slot, request["master_addr"], port) for slot in range(own_slots)]
    ranks = [Child(guard, {**os.environ, **place.variables()}) for place in places]

    def leave_with_asker() -> None:
        sys.stdin.read()
        end_all()
        os._exit(1)

    threading.Thread(target=leave_with_asker, daemon=True).start()
    codes: list[int | None] = [None]
    end = math.inf
    while None in codes and time.monotonic() < end:
        time.sleep(0.05)
        codes = [rank.returned() for rank in ranks]
        if any(codes):
            end = min(end, time.monotonic() + FAREWELL_S)
    end_all()
    for rank in ranks:
        rank.finish_output()
    return next((code for code in codes if code), 0)


def counterparts(slots: list[int], rank: int) -> list[int | None]:
    """Return the rank with which a rank exchanges in each round, None where it rests.

    All slots of two hosts exchange at once, each with its like, so that every network interface takes part.
    """
    from mirage_ds.cluster.doctor.bandwidth import rounds

    begins = [sum(slots[:number]) for number in range(len(slots))]
    own = max(number for number, begin in enumerate(begins) if begin <= rank)
    slot = rank - begins[own]
    found: list[int | None] = []
    for pairs in rounds(len(slots)):
        other = next((a if b == own else b for a, b in pairs if own in (a, b)), own)
        found.append(begins[other] + slot if other != own and slot < slots[other] else None)
    return found


def measure(slots: list[int]) -> dict[str, Any]:
    """Join all ranks and measure; seconds that this rank took for each collective and, by round, each exchange."""
    import torch
    import torch.distributed as dist

    from mirage_ds.engine.setup import join

    world = join(JOIN_S)
    count = CPU_ELEMENTS if world.device.type == "cpu" else GPU_ELEMENTS
    payload, together = torch.ones(count, device=world.device), torch.ones(1, device=world.device)
    part = torch.ones(count // world.size, device=world.device)
    gathered = [torch.empty_like(part) for _ in range(world.size)]
    arriving = torch.empty_like(payload)

    def seconds(work: Callable[[], object]) -> float:
        """The fastest of some runs, fewer where they are slow; all ranks begin each together."""
        best = math.inf
        for number in range(1 + ITERATIONS):
            dist.all_reduce(together.fill_(1.0))
            # Also waits for the GPU.
            together.item()
            begin = time.perf_counter()
            work()
            payload[0].item()
            taken = time.perf_counter() - begin
            # The first run also makes connections.
            best = min(best, taken) if number else best
            dist.all_reduce(together.fill_(taken), dist.ReduceOp.MAX)
            if number and together.item() > SLOW_S:
                break
        return best

    def exchange(other: int | None) -> None:
        # Every rank goes through every round, so that pairs of different rounds never share a wire.
        if other is None:
            return
        both = [dist.P2POp(dist.isend, payload, other), dist.P2POp(dist.irecv, arriving, other)]
        for work in dist.batch_isend_irecv(both):
            work.wait()
        arriving[0].item()

    found: dict[str, Any] = {
        "rank": world.rank,
        "bytes": 4 * count,
        "all_reduce_s": seconds(lambda: dist.all_reduce(payload)),
        "all_gather_s": seconds(lambda: dist.all_gather(gathered, part)),
        "pairs": {},
    }
    for number, other in enumerate(counterparts(slots, world.rank)):
        taken = seconds(partial(exchange, other))
        if other is not None:
            found["pairs"][number] = taken
    world.waiting.part()
    dist.destroy_process_group()
    return found


def main() -> None:
    """Be one rank, and say what it measured; a user's error is one sentence and exit code 2."""
    import click

    from mirage_ds.cluster.doctor.probe import say
    from mirage_ds.run.process import run_rank

    @click.command()
    @click.argument("slots")
    def command(slots: str) -> None:
        say(**measure(json.loads(slots)))

    run_rank(command)


if __name__ == "__main__":
    main()
