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
from mirage_ds.cluster.doctor.transport import Answer, Reach, ask_all
from mirage_ds.cluster.guard.child import Child, adopt_orphans, end_all
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
MEND_MEETING = (
    "let the hosts reach {address} on any port: look at firewalls and at which address `hostname -I` gives first on "
    "{first} (--master_addr chooses another)"
)
MEND_JOINING = (
    "read that line; where ranks wait for each other, NCCL_SOCKET_IFNAME (on the CPU GLOO_SOCKET_IFNAME) has to name "
    "the interface that the hosts share, and NCCL_DEBUG=INFO says which one is taken"
)
# What the guards say of a rank that did not come (guard.wire, guard.judge).
UNREACHED, ABSENT = "was not reached within", r"rank\(s\) ([\d, ]+).* did not start within"


@dataclass
class Bandwidth:
    """What the ranks measured.

    Attributes:
        faults: host → what went wrong there and how to fix it; nothing was measured then.
        all_reduce: bus bandwidth over all ranks, bytes a second: 2 (W − 1) / W · bytes / time. 0 of one rank alone.
        all_gather: the same for all-gather, (W − 1) / W · gathered bytes / time.
        pairs: bytes a second in each direction between two hosts.
    """

    faults: dict[str, tuple[str, str]] = field(default_factory=dict)
    all_reduce: float = 0.0
    all_gather: float = 0.0
    pairs: dict[tuple[str, str], float] = field(default_factory=dict)


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Return rounds of disjoint pairs in which each of `count` hosts meets each other once (the circle method).

    N − 1 rounds of N / 2 pairs; for an odd N, N rounds in each of which another host rests.
    """
    circle: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    found = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        facing = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in facing if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


# On the launching machine


def measure(hosts: Sequence[Host], reach: Reach, master_addr: str, master_port: int, cwd: str) -> Bandwidth:
    """Start one rank a slot on every host, as launch/*.sh would, and measure.

    It ends within a minute and a half and two seconds a round. The guards take the port behind `master_port`.
    """
    slots = [host.slots for host in hosts]
    shared: dict[str, Any] = {"slots": slots, "master_addr": master_addr, "master_port": master_port, "cwd": cwd}
    asked = [{**shared, "number": number} for number in range(len(hosts))]
    limit_s = BASE_LIMIT_S + LIMIT_PER_ROUND_S * len(hosts)
    names = [host.name for host in hosts]
    return judge(hosts, ask_all(names, reach, SOURCE, asked, limit_s, together=True), master_addr)


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
        pairs={
            (hosts[a].name, hosts[b].name): min(hosts[a].slots, hosts[b].slots) * size / seconds
            for (a, b), seconds in slowest.items()
        },
    )


def _faults(hosts: Sequence[Host], answers: Sequence[Answer], address: str) -> dict[str, tuple[str, str]]:
    """Return host → (what, mend) of those hosts whose ranks began it: the others end because of them."""
    failed = {answer.host: answer.fault for answer in sorted(answers, key=lambda one: one.ended_s) if answer.fault}
    if not failed:
        return {}
    host_of = [host.name for host in hosts for _ in range(host.slots)]
    meeting = MEND_MEETING.format(address=address, first=hosts[0].name)
    # The guard of rank 0 knows all who did not come; another one may have given up first.
    for fault in failed.values():
        if absent := re.search(ABSENT, fault):
            names = dict.fromkeys(host_of[int(rank)] for rank in re.findall(r"\d+", absent[1]))
            return {name: (failed[name] if UNREACHED in failed.get(name, "") else fault, meeting) for name in names}
    unreached = {name: (fault, meeting) for name, fault in failed.items() if UNREACHED in fault}
    if unreached:
        return unreached
    first, fault = next(iter(failed.items()))
    named = re.search(r"rank (\d+) on ", fault)
    return {host_of[int(named[1])] if named else first: (fault, MEND_JOINING)}


def slow(pairs: dict[tuple[str, str], float]) -> tuple[dict[str, float], dict[tuple[str, str], float], float]:
    """Find what is slow: hosts, pairs of two hosts that are not slow themselves, and the median to compare with.

    A host counts by its best rate, since one slow host makes the pairs of all others with it slow too.
    """
    names = dict.fromkeys(name for pair in pairs for name in pair)
    best = {name: max(rate for pair, rate in pairs.items() if name in pair) for name in names}
    median = statistics.median(best.values())
    hosts = {name: rate for name, rate in best.items() if rate < SLOW_SHARE * median}
    links = {
        pair: rate for pair, rate in pairs.items() if rate < SLOW_SHARE * median and not any(n in hosts for n in pair)
    }
    return hosts, links, median


# On each host


def start(request: dict[str, Any]) -> int:
    """Start this host's ranks and wait for them; return their exit code.

    Nothing stays behind: the ranks end with this process, and that with who asked for it.
    """
    # Whatever hangs here.
    signal.alarm(math.ceil(request["limit_s"]) + 2)
    adopt_orphans()
    slots, number, port = request["slots"], request["number"], request["master_port"]
    guard = [sys.executable, "-m", "mirage_ds.cluster.guard", "--port", str(port + 1), "--job", "doctor"]
    guard += [f"--{name}={seconds}" for name, seconds in BOUNDS.items()]
    guard += ["mirage_ds.cluster.doctor.bandwidth", json.dumps(slots)]
    first, size = sum(slots[:number]), sum(slots)
    places = [Place(first + slot, size, slot, request["master_addr"], port) for slot in range(slots[number])]
    ranks = [Child(guard, {**os.environ, **place.variables()}) for place in places]

    def leave_with_asker() -> None:
        sys.stdin.read()
        end_all()
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

    All slots of two hosts exchange at once, each with its like, so that every network interface takes part.
    """
    begins = [sum(slots[:number]) for number in range(len(slots))]
    own = max(number for number, begin in enumerate(begins) if begin <= rank)
    slot = rank - begins[own]
    found: list[tuple[int, int, int | None]] = []
    for pairs in rounds(len(slots)):
        a, b = next((pair for pair in pairs if own in pair), (own, own))
        other = a if b == own else b
        found.append((a, b, begins[other] + slot if other != own and slot < slots[other] else None))
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
