"""What the checks work on and what they find."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.filesize import decimal

from mirage_ds.cluster.doctor.bandwidth import Bandwidth
from mirage_ds.cluster.doctor.spec import DoctorSpec
from mirage_ds.cluster.doctor.transport import Answer, Reach
from mirage_ds.cluster.hosts import Host
from mirage_ds.errors import UserError
from mirage_ds.run.beforehand import FirstLook

# What probe.py says of one host: section → facts.
Facts = dict[str, Any]
# The "host" of findings about the launching machine's own files.
HERE = "here"
# Hosts that differ in more differ altogether.
MOST_DIFFERENCES = 8


class Finding(NamedTuple):
    """One row of the report.

    Attributes:
        check: the check's name, as --only takes it.
        host: the host it is about, or what it is about instead.
        says: what was seen.
        mend: how to fix it; empty for a pass.
    """

    check: str
    host: str
    status: Literal["pass", "warn", "fail"]
    says: str
    mend: str = ""


@dataclass
class Seen:
    """The job's hosts and everything that is known of them: what the checks are functions of.

    Attributes:
        launcher: how ranks get to the hosts: `deepspeed --hostfile`, srun, or not at all.
        hosts: in the order of ranks; slots are 0 where only the host can say how many GPUs it has.
        env_files: DeepSpeed's environment files on the launching machine → lines that stop the launch.
        variables: of the launching machine, what ranks should have too.
        records: flag → what hosts need of a source of records, or why training would refuse it on this machine.
        answers: host → how asking it went.
        facts: host → what its probe says, of the hosts that answered, in the order of `hosts`.
        bandwidth: None where it was not measured; unmeasured: why, where it should have been.
    """

    spec: DoctorSpec
    launcher: Literal["pdsh", "slurm", "local"]
    hosts: tuple[Host, ...]
    reach: Reach
    env_files: Mapping[Path, list[str]] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    records: Mapping[str, FirstLook | UserError] = field(default_factory=dict)
    answers: Mapping[str, Answer] = field(default_factory=dict)
    facts: Mapping[str, Facts] = field(default_factory=dict)
    bandwidth: Bandwidth | None = None
    unmeasured: str = ""

    def section(self, name: str) -> dict[str, Facts]:
        """Return host → one section of its facts, of those hosts that have it."""
        return {host: facts[name] for host, facts in self.facts.items() if name in facts}

    def fact(self, host: str, section: str, name: str) -> Any:
        """Return one fact of a host; None where it is not known."""
        return self.facts.get(host, {}).get(section, {}).get(name)

    def slots(self, host: str) -> int:
        """Return the ranks of a host."""
        return next(one.slots for one in self.hosts if one.name == host)

    def gpus(self, host: str) -> int:
        """Return the number of a host's GPUs."""
        return len(self.fact(host, "gpus", "gpus") or ())

    def on_cpu(self, host: str) -> bool:
        """Whether the ranks of a host are told to do without GPUs."""
        return bool(self.fact(host, "variables", "DS_ACCELERATOR") == "cpu")


def fail(host: str, says: str, mend: str) -> Finding:
    """Say that the run would break."""
    return Finding("", host, "fail", says, mend)


def warn(host: str, says: str, mend: str) -> Finding:
    """Say that the run would go, slower or otherwise than meant."""
    return Finding("", host, "warn", says, mend)


def well(says: str, host: str = "") -> Finding:
    """Say what a pass says: of one host, or else of all that answered. It counts where nothing else is found."""
    return Finding("", host, "pass", says)


def refused(error: object, mend: str = "") -> Finding:
    """Say in the run's own words what it would refuse; `mend` is for what does not say itself how to fix it."""
    says, _, own = str(error).rpartition("; ")
    return fail(HERE, says, own) if says else fail(HERE, own, mend)


def unlike(tables: Mapping[str, Mapping[str, Any]], mend: str, fatal: bool = True, what: str = "") -> Iterator[Finding]:
    """Name each host whose table (name → value) is not the first host's, and what differs; `what` stands before it."""
    first_host, first = next(iter(tables.items()), ("", {}))
    for host, own in tables.items():
        names = [name for name in {**first, **own} if first.get(name) != own.get(name)]
        pairs = [f"{name} {own.get(name, 'missing')} (on {first_host} {first.get(name, 'missing')})" for name in names]
        if names:
            yield (fail if fatal else warn)(host, f"{what}{', '.join(pairs[:MOST_DIFFERENCES])}", mend)


def size(count: float) -> str:
    """Write bytes for people, in powers of ten as disks and networks are sold."""
    return decimal(round(count))
