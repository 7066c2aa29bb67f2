"""How fast the hosts talk: what is asked of the ranks, and what their answers mean. Imports no torch."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mirage_ds.cluster.doctor.transport import Answer, Reach, ask_all
from mirage_ds.cluster.hosts import Host

# What runs on each host: there the package has to be, as for training.
SOURCE = """
import json, os, sys
request = json.loads(sys.stdin.readline())
os.chdir(request["cwd"])
from mirage_ds.cluster.doctor.probe import say
from mirage_ds.cluster.doctor.rank import start
say(started=True)
sys.exit(start(request))
"""
# A host is slow when its best rate is below this share of the hosts' median.
SLOW_SHARE = 0.5
BASE_LIMIT_S, LIMIT_PER_ROUND_S = 90.0, 2.0
MEND_MEETING = (
    "let the hosts reach {address} on any port: look at firewalls and at which address `hostname -I` gives first on "
    "{first} (--master_addr chooses another)"
)
MEND_JOINING = (
    "read that line; where ranks wait for each other, NCCL_SOCKET_IFNAME (on the CPU GLOO_SOCKET_IFNAME) has to name "
    "the interface that the hosts share, and NCCL_DEBUG=INFO says which one is taken"
)
# What the guards say of a rank that did not come (guard.client, guard.hub).
UNREACHED, ABSENT = "was not reached within", r"rank\(s\) ([\d, ]+).* did not start within"


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


def judge(hosts: Sequence[Host], answers: Sequence[Answer], address: str) -> Bandwidth:
    """Make rates of the ranks' seconds; `address` is rank 0's."""
    result = Bandwidth(faults=_faults(hosts, answers, address))
    if result.faults:
        return result
    ranks = {line["rank"]: line for answer in answers for line in answer.lines if "rank" in line}
    world, size = len(ranks), ranks[0]["bytes"]
    result.all_reduce = 2 * (world - 1) / world * size / max(line["all_reduce_s"] for line in ranks.values())
    result.all_gather = (world - 1) / world * size / max(line["all_gather_s"] for line in ranks.values())
    first = [sum(host.slots for host in hosts[:number]) for number in range(len(hosts))]
    for number, pairs in enumerate(rounds(len(hosts))):
        for a, b in pairs:
            slots = min(hosts[a].slots, hosts[b].slots)
            both = [first[host] + slot for host in (a, b) for slot in range(slots)]
            slowest = max(ranks[rank]["pairs"][str(number)] for rank in both)
            result.pairs[hosts[a].name, hosts[b].name] = slots * size / slowest
    return result


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
