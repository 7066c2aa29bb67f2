"""What the checks work on and what they find."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mirage_ds.cluster.doctor.bandwidth import Bandwidth
from mirage_ds.cluster.doctor.transport import Answer
from mirage_ds.cluster.hosts import Host

Status = Literal["pass", "warn", "fail"]
# How ranks get to the hosts: `deepspeed --hostfile`, srun, or not at all.
Launcher = Literal["pdsh", "slurm", "local"]
# What probe.py says of one host: section → facts.
Facts = dict[str, Any]
# Hosts that have no say in a finding: the launching machine's own files.
HERE = "here"


class Finding(NamedTuple):
    """One row of the report.

    Attributes:
        check: the check's name, as --only takes it.
        host: the host it is about, or what it is about instead.
        says: what was seen.
        mend: how to mend it; empty for a pass.
    """

    check: str
    host: str
    status: Status
    says: str
    mend: str = ""


class Bad(NamedTuple):
    """A finding that is no pass, before it has its check's name."""

    host: str
    status: Status
    says: str
    mend: str


def fail(host: str, says: str, mend: str) -> Bad:
    """Say that the run would break."""
    return Bad(host, "fail", says, mend)


def warn(host: str, says: str, mend: str) -> Bad:
    """Say that the run would go, slower or otherwise than meant."""
    return Bad(host, "warn", says, mend)


@dataclass(frozen=True)
class Plan:
    """What is to be run, as the doctor was told.

    Attributes:
        models: flag → model folder or hub id.
        files: flag → file that every host reads.
        run_folder: --save_model_path.
        deepspeed: the DeepSpeed JSON, where one was given.
        keep_checkpoints: how many stay on the disk.
        master_addr: as the launcher is told; None where it finds out.
    """

    launcher: Launcher = "local"
    models: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    run_folder: Path | None = None
    deepspeed: Path | None = None
    keep_checkpoints: int = 2
    master_port: int = 29500
    master_addr: str | None = None


@dataclass(frozen=True)
class Here:
    """The launching machine.

    Attributes:
        variables: what ranks should have of this environment.
        env_files: DeepSpeed's environment files: path → text.
        pdsh: whether pdsh is installed.
        model_faults: flag → what is wrong with its folder, where this machine has it.
    """

    variables: Mapping[str, str] = field(default_factory=dict)
    env_files: Mapping[Path, str] = field(default_factory=dict)
    pdsh: bool = True
    model_faults: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """Everything that is known: what the checks are functions of.

    Attributes:
        answers: host → how asking it went.
        facts: host → what its probe says, of the hosts that answered, in the order of `hosts`.
        bandwidth: None where it was not measured.
        unmeasured: why it was not, where it should have been.
    """

    plan: Plan
    here: Here
    hosts: tuple[Host, ...]
    answers: Mapping[str, Answer]
    facts: Mapping[str, Facts]
    bandwidth: Bandwidth | None = None
    unmeasured: str = ""

    def section(self, name: str) -> dict[str, Facts]:
        """Return host → one section of its facts, of those hosts that have it."""
        return {host: facts[name] for host, facts in self.facts.items() if name in facts}

    def on_cpu(self, host: str) -> bool:
        """Whether the ranks of a host are told to do without GPUs."""
        return self.section("variables").get(host, {}).get("DS_ACCELERATOR") == "cpu"


# A check's verdict: what a pass says, None where it does not apply; and what is not right.
Verdict = tuple[str | None, list[Bad]]


def unlike(values: Mapping[str, Any]) -> Iterable[tuple[str, Any, Any]]:
    """Yield (host, its value, the first host's value) of each host that differs from the first."""
    first = next(iter(values.values()), None)
    return ((host, value, first) for host, value in values.items() if value != first)


def size(count: float) -> str:
    """Write bytes for people, in powers of ten as disks and networks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
