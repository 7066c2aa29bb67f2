"""What the checks work on and what they find."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mirage_ds.cluster.doctor.bandwidth import Bandwidth
from mirage_ds.cluster.doctor.command import DoctorSpec
from mirage_ds.cluster.doctor.transport import Answer
from mirage_ds.cluster.hosts import Host

Status = Literal["pass", "warn", "fail"]
# How ranks get to the hosts: `deepspeed --hostfile`, srun, or not at all.
Launcher = Literal["pdsh", "slurm", "local"]
# What probe.py says of one host: section → facts.
Facts = dict[str, Any]
# (host, status, what is seen, how to fix it) of what is not right.
Bad = tuple[str, Status, str, str]
# A check's verdict: what a pass says, None where the check does not apply; and what is not right.
Verdict = tuple[str | None, list[Bad]]
# The "host" of findings about the launching machine's own files.
HERE = "here"


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
    status: Status
    says: str
    mend: str = ""


@dataclass(frozen=True)
class Seen:
    """Everything that is known: what the checks are functions of.

    Attributes:
        answers: host → how asking it went.
        facts: host → what its probe says, of the hosts that answered, in the order of `hosts`.
        variables: of the launching machine, what ranks should have too.
        env_files: DeepSpeed's environment files on the launching machine → lines that stop the launch.
        model_fault: what is wrong with the model's folder, where the launching machine has it.
        bandwidth: None where it was not measured; unmeasured: why, where it should have been.
    """

    spec: DoctorSpec
    launcher: Launcher
    hosts: tuple[Host, ...]
    answers: Mapping[str, Answer]
    facts: Mapping[str, Facts]
    variables: Mapping[str, str] = field(default_factory=dict)
    env_files: Mapping[Path, list[str]] = field(default_factory=dict)
    has_pdsh: bool = True
    model_fault: str = ""
    bandwidth: Bandwidth | None = None
    unmeasured: str = ""

    def section(self, name: str) -> dict[str, Facts]:
        """Return host → one section of its facts, of those hosts that have it."""
        return {host: facts[name] for host, facts in self.facts.items() if name in facts}

    def slots(self, host: str) -> int:
        """Return the ranks of a host."""
        return next(one.slots for one in self.hosts if one.name == host)

    def on_cpu(self, host: str) -> bool:
        """Whether the ranks of a host are told to do without GPUs."""
        return self.section("variables").get(host, {}).get("DS_ACCELERATOR") == "cpu"


def fail(host: str, says: str, mend: str) -> Bad:
    """Say that the run would break."""
    return host, "fail", says, mend


def warn(host: str, says: str, mend: str) -> Bad:
    """Say that the run would go, slower or otherwise than meant."""
    return host, "warn", says, mend


def unlike(values: Mapping[str, Any], what: str, mend: str, status: Callable[[str, str, str], Bad] = fail) -> list[Bad]:
    """Name each host whose value differs from the first host's."""
    first_host, first = next(iter(values.items()), ("", None))
    return [
        status(host, f"{what}{value or 'not set'}, on {first_host} {first or 'not set'}", mend)
        for host, value in values.items()
        if value != first
    ]


def size(count: float) -> str:
    """Write bytes for people, in powers of ten as disks and networks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
