"""How fast the hosts talk: one rank a slot is started as the trainer's are, and measures. Imports no torch by itself.

Every rank is a process of its own under a guard, as behind launch/*.sh: the guards end all ranks when one fails or does
not come, and say which. `measure` asks the hosts, `start` runs on each of them, `measure_rank` in each rank.
"""

import json
import math
import os
import re
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import click

from mirage_ds.cluster.doctor.probe import say
from mirage_ds.cluster.doctor.transport import Answer, Reach, ask_all, faults
from mirage_ds.cluster.guard.watch import Child
from mirage_ds.cluster.hosts import Host
from mirage_ds.engine.place import Place
from mirage_ds.run.process import run_rank

# What runs on each host: there the package has to be, as for training.
SOURCE = """
import json, os, sys
request = json.loads(sys.stdin.readline())
os.chdir(request["cwd"])
from mirage_ds.cluster.doctor.bandwidth import say, start
say(started=True)
sys.exit(start(request))
"""
BASE_LIMIT_S, LIMIT_PER_ROUND_S = 90.0, 2.0
# How long guards wait for each other, in seconds: see guard.wire.Bounds.
BOUNDS = {"gather": 15, "silence": 8, "grace": 1}
# A collective takes seconds at most, and the ranks import torch before the first one.
JOIN_S = 45.0
# Runs of each measurement after the first; one that took SLOW_S is enough.
ITERATIONS = 3
SLOW_S = 0.3
# Enough that latency does not count, little enough for seconds: elements of 4 bytes.
CPU_ELEMENTS, GPU_ELEMENTS = 4 << 20, 64 << 20
# A host is slow when its best rate is below this share of the hosts' median.
SLOW_SHARE = 0.5
# What the guards say of a rank that did not come (guard.wire, guard.judge).
UNREACHED, ABSENT = "was not reached within", "did not start within"
# Two hosts, and bytes a second in each direction between them.
Pair = tuple[str, str, float]


@dataclass
class Bandwidth:
    """What the ranks measured.

    Attributes:
        faults: host → what went wrong there and how to fix it; nothing was measured then.
        all_reduce: bus bandwidth over all ranks, bytes a second: 2 (W − 1) / W · bytes / time. 0 of one rank alone.
        all_gather: the same for all-gather, (W − 1) / W · gathered bytes / time.
        pairs: each two hosts.
    """

    faults: dict[str, tuple[str, str]] = field(default_factory=dict)
    all_reduce: float = 0.0
    all_gather: float = 0.0
    pairs: list[Pair] = field(default_factory=list)


# On the launching machine


def measure(hosts: Sequence[Host], reach: Reach, master_addr: str, master_port: int, cwd: str) -> Bandwidth:
    """Start one rank a slot on every host, as launch/*.sh would, and measure.

    It ends within a minute and a half and two seconds a round. The guards take the port behind `master_port`.
    """
    slots = [host.slots for host in hosts]
    request = {"slots": slots, "master_addr": master_addr, "master_port": master_port, "cwd": cwd}
    limit_s = BASE_LIMIT_S + LIMIT_PER_ROUND_S * len(hosts)
    answers = ask_all([host.name for host in hosts], reach, SOURCE, request, limit_s, together=True)
    return judge(hosts, answers, master_addr)


def judge(hosts: Sequence[Host], answers: Sequence[Answer], address: str) -> Bandwidth:
    """Make rates of the ranks' seconds; `address` is rank 0's."""
    if faults := _faults(hosts, answers, address):
        return Bandwidth(faults)
    ranks = [line for answer in answers for line in answer.lines if "rank" in line]
    world, size = len(ranks), ranks[0]["bytes"]
    slowest: dict[tuple[int, int], float] = {}
    for line in ranks:
        for a, b, seconds in line["pairs"]:
            slowest[a, b] = max(seconds, slowest.get((a, b), 0.0))
    return Bandwidth(
        all_reduce=2 * (world - 1) / world * size / max(line["all_reduce_s"] for line in ranks),
        all_gather=(world - 1) / world * size / max(line["all_gather_s"] for line in ranks),
        pairs=[
            (hosts[a].name, hosts[b].name, min(hosts[a].slots, hosts[b].slots) * size / seconds)
            for (a, b), seconds in slowest.items()
        ],
    )


def _faults(hosts: Sequence[Host], answers: Sequence[Answer], address: str) -> dict[str, tuple[str, str]]:
    """Return host → (what, mend) of those hosts whose ranks began it: the others end because of them."""
    # The guard of rank 0 knows all who did not come; another one may have given up first.
    failed = sorted((one for one in answers if one.fault), key=lambda one: (ABSENT not in one.fault, one.ended_s))
    if not failed:
        return {}
    first = failed[0]
    host_of = [host.name for host in hosts for _ in range(host.slots)]
    named = re.search(rf"rank(?:\(s\))? (\d[\d, ]*)(?:.* {ABSENT}| on )", first.fault)
    names = [host_of[int(rank)] for rank in re.findall(r"\d+", named[1])] if named else [first.host]
    unreached = {one.host: one.fault for one in failed if UNREACHED in one.fault}
    absent = ABSENT in first.fault
    begun = {name: unreached.get(name, first.fault) for name in names} if absent or not unreached else unreached
    mends = faults()["ranks"]
    meeting = mends["meeting"].format(address=address, first=hosts[0].name)
    return {name: (fault, meeting if absent or unreached else mends["joining"]) for name, fault in begun.items()}


def slow(pairs: Sequence[Pair]) -> tuple[dict[str, float], float]:
    """Find what is slow: hosts, and pairs ("a, b") of hosts that are not slow themselves; the median to compare with.

    A host counts by its best rate, since one slow host makes the pairs of all others with it slow too.
    """
    names = dict.fromkeys(name for a, b, _ in pairs for name in (a, b))
    best = {name: max(rate for a, b, rate in pairs if name in (a, b)) for name in names}
    median = statistics.median(best.values())
    hosts = {name: rate for name, rate in best.items() if rate < SLOW_SHARE * median}
    links = {f"{a}, {b}": rate for a, b, rate in pairs if rate < SLOW_SHARE * median and not {a, b} & hosts.keys()}
    return hosts | links, median


# On each host


def start(request: dict[str, Any]) -> int:
    """Start this host's ranks and wait for them; return their exit code.

    Nothing stays behind: the ranks end with this process, and that with who asked for it.
    """
    # Whatever hangs here.
    signal.alarm(math.ceil(request["limit_s"]) + 2)
    slots, number, port = request["slots"], request["number"], request["master_port"]
    bounds = [f"--{name}={seconds}" for name, seconds in BOUNDS.items()]
    guard = [sys.executable, "-m", "mirage_ds.cluster.guard", f"--port={port + 1}", "--job=doctor", *bounds]
    words = [*guard, "mirage_ds.cluster.doctor.bandwidth", json.dumps(slots)]
    first, size = sum(slots[:number]), sum(slots)
    places = [Place(first + slot, size, slot, request["master_addr"], port) for slot in range(slots[number])]
    ranks = [Child(words, {**os.environ, **place.variables()}) for place in places]

    def leave_with_asker() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=leave_with_asker, daemon=True).start()
    # The guards end together, whatever happens to one of them.
    for rank in ranks:
        rank.process.wait()
        rank.finish_output()
    return next((code for rank in ranks if (code := rank.returned())), 0)


# In each rank


def counterparts(slots: list[int], rank: int) -> list[tuple[int, int, int | None]]:
    """Return for each round the two hosts that exchange, and with which rank this one does: None where it rests.

    There are as many rounds as hosts. In each those two meet whose numbers add up to the round's, modulo their count:
    so each host meets each other once, and one a round. All slots of two hosts exchange at once, each with its like, so
    that every network interface takes part.
    """
    own, slot = [(number, slot) for number, count in enumerate(slots) for slot in range(count)][rank]
    found: list[tuple[int, int, int | None]] = []
    for turn in range(len(slots)):
        other = (turn - own) % len(slots)
        meets = other != own and slot < slots[other]
        found.append((min(own, other), max(own, other), sum(slots[:other]) + slot if meets else None))
    return found


def measure_rank(slots: list[int]) -> dict[str, Any]:
    """Join all ranks and measure; seconds that this rank took for each collective and each exchange of two hosts."""
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
        """The fastest of some runs, fewer where they are slow, after one that makes connections."""
        work()
        best, taken = math.inf, 0.0
        for _ in range(ITERATIONS):
            # All begin together, and know how long the slowest took.
            dist.all_reduce(together.fill_(taken), dist.ReduceOp.MAX)
            if together.item() > SLOW_S:
                break
            begin = time.perf_counter()
            work()
            # Also waits for the GPU.
            payload[0].item()
            taken = time.perf_counter() - begin
            best = min(best, taken)
        return best

    def exchange(other: int | None) -> None:
        # Every rank goes through every round, so that pairs of different rounds never share a wire.
        if other is None:
            return
        both = [dist.P2POp(dist.isend, payload, other), dist.P2POp(dist.irecv, arriving, other)]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    found: dict[str, Any] = {
        "rank": world.rank,
        "bytes": 4 * count,
        "all_reduce_s": seconds(lambda: dist.all_reduce(payload)),
        "all_gather_s": seconds(lambda: dist.all_gather(gathered, part)),
        "pairs": [],
    }
    for a, b, other in counterparts(slots, world.rank):
        taken = seconds(partial(exchange, other))
        if other is not None:
            found["pairs"].append((a, b, taken))
    world.waiting.part()
    dist.destroy_process_group()
    return found


@click.command()
@click.argument("slots")
def command(slots: str) -> None:
    """Be one rank, and say what it measured."""
    say(**measure_rank(json.loads(slots)))


if __name__ == "__main__":
    run_rank(command)
