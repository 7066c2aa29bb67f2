"""How fast the hosts talk: what is asked of the ranks, and what their answers mean. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mirage_ds.cluster.doctor.transport import Answer, Reach, ask_all, source_of
from mirage_ds.cluster.hosts import Host

# A host is slow when its best rate is below this share of the hosts' median.
SLOW_SHARE = 0.5
BYTES_PER_ELEMENT = 4
# Enough that latency does not count, little enough for seconds.
ELEMENTS = {"gloo": 4 << 20, "nccl": 64 << 20}
BASE_LIMIT_S, LIMIT_PER_ROUND_S = 60.0, 2.0


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


def requests(hosts: Sequence[Host], master_addr: str, master_port: int, backend: str, cwd: str) -> list[dict[str, Any]]:
    """Return what each host is asked: its ranks, and for each round every rank's counterpart.

    All slots of two hosts exchange at once, each with its like, so that a host's every network card takes part.
    """
    first = [sum(host.slots for host in hosts[:number]) for number in range(len(hosts))]
    counterparts = []
    for pairs in rounds(len(hosts)):
        meets: dict[str, int] = {}
        for a, b in pairs:
            for slot in range(min(hosts[a].slots, hosts[b].slots)):
                meets |= {str(first[a] + slot): first[b] + slot, str(first[b] + slot): first[a] + slot}
        counterparts.append(meets)
    shared = {
        "world_size": sum(host.slots for host in hosts),
        "master_addr": master_addr,
        "master_port": master_port,
        "backend": backend,
        "elements": ELEMENTS[backend],
        "rounds": counterparts,
        "cwd": cwd,
    }
    return [
        {**shared, "ranks": list(range(begin, begin + host.slots))} for begin, host in zip(first, hosts, strict=True)
    ]


@dataclass
class Bandwidth:
    """What the ranks measured.

    Attributes:
        faults: host → what went wrong there and how to mend it; nothing was measured then.
        all_reduce: bus bandwidth over all ranks, bytes a second: 2 (W − 1) / W · bytes / time.
        all_gather: the same for all-gather, (W − 1) / W · gathered bytes / time.
        pairs: bytes a second in each direction between two hosts.
        nccl: host → the NCCL that its ranks ran.
    """

    faults: dict[str, tuple[str, str]] = field(default_factory=dict)
    all_reduce: float = 0.0
    all_gather: float = 0.0
    pairs: dict[tuple[str, str], float] = field(default_factory=dict)
    nccl: dict[str, str] = field(default_factory=dict)


MEND_MEETING = (
    "let the hosts reach {address} on any port: look at firewalls and at which address `hostname -I` gives first on "
    "{first} (--master_addr chooses another)"
)
MEND_JOINING = (
    "NCCL_SOCKET_IFNAME (on the CPU GLOO_SOCKET_IFNAME) has to name the interface that the hosts share; NCCL_DEBUG=INFO"
    " says which one is taken"
)


def _unmet(hosts: Sequence[Host], answers: Sequence[Answer], asked: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return host → why its ranks did not meet rank 0; empty when all did."""
    host_of = {rank: host.name for host, request in zip(hosts, asked, strict=True) for rank in request["ranks"]}
    lines = [line for answer in answers for line in answer.lines if line.get("stage") == "meeting"]
    words = {host_of[line["rank"]]: line["fault"] for line in lines if "fault" in line}
    waited = next((line for line in lines if "missing" in line), None)
    if waited is None:
        return words
    silent = f"did not come within {waited['within_s']:g} s"
    return {host_of[rank]: words.get(host_of[rank], silent) for rank in waited["missing"]}


def _faults(
    hosts: Sequence[Host], answers: Sequence[Answer], asked: Sequence[dict[str, Any]]
) -> dict[str, tuple[str, str]]:
    """Return host → (what, mend), of those hosts that failed first: the others fail, or are ended, because of them."""
    address = f"{asked[0]['master_addr']}:{asked[0]['master_port']}"
    failed = sorted((answer for answer in answers if answer.fault), key=lambda answer: answer.ended_s)
    mend = MEND_MEETING.format(address=asked[0]["master_addr"], first=hosts[0].name)
    unmet = _unmet(hosts, answers, asked)
    if unmet:
        return {host: (f"does not reach {address}: {why}", mend) for host, why in unmet.items()}
    late = [answer for answer in failed if "no answer within" in answer.fault]
    found = {}
    for answer in late if failed[:1] == late[:1] else failed[:1]:
        stages = [line["stage"] for line in answer.lines]
        joining = "met" in stages and "joined" not in stages
        where = "joining the ranks" if joining else "measuring" if "joined" in stages else "starting"
        found[answer.host] = (f"while {where}: {answer.fault}", MEND_JOINING if joining else answer.mend)
    return found


def judge(hosts: Sequence[Host], answers: Sequence[Answer], asked: Sequence[dict[str, Any]]) -> Bandwidth:
    """Make rates of the ranks' seconds."""
    result = Bandwidth(faults=_faults(hosts, answers, asked))
    if result.faults:
        return result
    ranks = {line["rank"]: line for answer in answers for line in answer.lines if line["stage"] == "measured"}
    world, size = asked[0]["world_size"], asked[0]["elements"] * BYTES_PER_ELEMENT
    result.all_reduce = 2 * (world - 1) / world * size / max(line["all_reduce_s"] for line in ranks.values())
    gathered = size // world * world
    result.all_gather = (world - 1) / world * gathered / max(line["all_gather_s"] for line in ranks.values())
    first = {host.name: request["ranks"][0] for host, request in zip(hosts, asked, strict=True)}
    for number, pairs in enumerate(rounds(len(hosts))):
        for a, b in ((hosts[i], hosts[j]) for i, j in pairs):
            slots = min(a.slots, b.slots)
            both = [first[host.name] + slot for host in (a, b) for slot in range(slots)]
            slowest = max(ranks[rank]["pairs"][str(number)] for rank in both)
            result.pairs[a.name, b.name] = slots * size / slowest
    result.nccl = {host.name: ranks[first[host.name]]["nccl"] for host in hosts if ranks[first[host.name]]["nccl"]}
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


def measure(
    hosts: Sequence[Host], reach: Reach, master_addr: str, master_port: int, backend: str, cwd: str
) -> Bandwidth:
    """Start one rank a slot on every host and measure; it ends within a minute and two seconds a round."""
    asked = requests(hosts, master_addr, master_port, backend, cwd)
    limit_s = BASE_LIMIT_S + LIMIT_PER_ROUND_S * len(hosts)
    names = [host.name for host in hosts]
    return judge(hosts, ask_all(names, reach, source_of("rank.py"), asked, limit_s, together=True), asked)
