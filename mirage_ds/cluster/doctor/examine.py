"""Find the hosts, ask them, measure between them, and put everything together for the checks."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mirage_ds.cluster.doctor import transport
from mirage_ds.cluster.doctor.bandwidth import Bandwidth, measure
from mirage_ds.cluster.doctor.check_run import NCCL_PACKAGES
from mirage_ds.cluster.doctor.command import DoctorSpec
from mirage_ds.cluster.doctor.finding import Launcher, Seen
from mirage_ds.cluster.environment import DEFAULT_NAME, SECRET, WANTED, env_files, is_wanted, parse, read
from mirage_ds.cluster.hosts import Host, read_hosts
from mirage_ds.engine.installed import PACKAGES
from mirage_ds.errors import UserError

WRITE_BYTES = 64 << 20
# cli.py sets it for itself.
OWN = "TOKENIZERS_PARALLELISM"


class Job(NamedTuple):
    """Where ranks will run.

    Attributes:
        hosts: in the order of ranks; slots are 0 where only the host can say how many GPUs it has.
        env_files: DeepSpeed's environment files → lines that stop the launch.
    """

    launcher: Launcher
    hosts: tuple[Host, ...]
    reach: transport.Reach
    env_files: Mapping[Path, list[str]]


def _slots(tasks: str, count: int) -> list[int]:
    """Read Slurm's `2(x3),1`: 2, 2, 2, 1."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks)
    found = [int(slots) for slots, times in parts for _ in range(int(times or 1))]
    return found if len(found) == count else [0] * count


def slurm_hosts(environment: Mapping[str, str]) -> tuple[Host, ...]:
    """Return the nodes of the Slurm job that this runs in, with the job's tasks a node as slots.

    Raises:
        UserError: not in a job.
    """
    nodes = environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise UserError("--slurm: not inside a Slurm job; call it in the job's script, or after salloc")
    if not (shutil.which("scontrol") and shutil.which("srun")):
        raise UserError("--slurm: scontrol or srun is not on PATH; call it where Slurm's commands are installed")
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if listed.returncode:
        raise UserError(f"--slurm: scontrol cannot read SLURM_JOB_NODELIST={nodes} ({listed.stderr.strip()})")
    names = listed.stdout.split()
    tasks = environment.get("SLURM_NTASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "")
    slots = [int(tasks)] * len(names) if tasks.isdecimal() else _slots(tasks, len(names))
    return tuple(map(Host, names, slots))


def find_job(hostfile: Path | None, slurm: bool, environment: Mapping[str, str]) -> Job:
    """Return the job's hosts and how to reach them: a hostfile over ssh, a Slurm job by srun, or this machine.

    Raises:
        UserError: a faulty hostfile, no Slurm job, or both asked for.
    """
    if hostfile and slurm:
        raise UserError("--hostfile and --slurm both say which hosts: give one of them")
    if slurm:
        return Job("slurm", slurm_hosts(environment), transport.slurm, {})
    if not hostfile:
        return Job("local", (Host("localhost", 0),), transport.local, {})
    if not shutil.which("ssh"):
        raise UserError("--hostfile: ssh is not on PATH; install the OpenSSH client")
    hosts = read_hosts(hostfile)
    names = [environment.get("DS_ENV_FILE", DEFAULT_NAME)]
    found = {file: parse(read(file)) for file in env_files(names, Path.home(), Path.cwd())}
    lines = {name: text for values, _ in found.values() for name, text in values.items()}
    # DeepSpeed asks torch whether the launching machine has GPUs.
    gpus = environment.get("DS_ACCELERATOR") != "cpu" and shutil.which("nvidia-smi") is not None
    reach = transport.ssh(transport.exports(environment, os.getcwd(), gpus, lines))
    return Job("pdsh", hosts, reach, {file: faults for file, (_, faults) in found.items()})


@contextmanager
def _token_in(folder: Path | None) -> Iterator[str]:
    """Put a file with a name of its own into the run folder; folders made for it go with it."""
    token = f".mirage-doctor-{secrets.token_hex(4)}"
    if folder is None:
        yield token
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    # Where it cannot be made or written to, the hosts say so.
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / token).touch()
    try:
        yield token
    finally:
        with suppress(OSError):
            # Also what a host's write test left when it was ended.
            for file in folder.glob(f"{token}*"):
                file.unlink()
            for path in made:
                path.rmdir()


def _request(spec: DoctorSpec, job: Job, token: str, number: int) -> dict[str, Any]:
    """Return what probe.py is asked on one host."""
    files = spec.files()
    return {
        "number": number,
        "cwd": os.getcwd(),
        "token": token,
        "master": spec.master_addr or job.hosts[0].address,
        "port": spec.master_port,
        "packages": [*PACKAGES, *NCCL_PACKAGES],
        "wanted": WANTED.pattern,
        "secret": SECRET.pattern,
        "models": spec.models(),
        "cache_dir": spec.cache_dir and str(spec.cache_dir),
        "files": {flag: str(path) for flag, path in files.items()},
        "records": [flag for flag in files if "data_path" in flag],
        "image_root": spec.image_root and str(spec.image_root),
        "run_folder": spec.save_model_path and str(spec.save_model_path),
        "write_bytes": WRITE_BYTES if spec.wants("disk") else 0,
    }


def model_fault(spec: DoctorSpec) -> str:
    """Check the folder that gives the weights as the run would: that takes more than a host's Python may have."""
    named = [(flag, Path(name)) for flag, name in spec.models().items()]
    if not named or not spec.wants("model") or not named[0][1].is_dir():
        return ""
    from mirage_ds.model.folder import resolve_folder
    from mirage_ds.model.load import check_folder

    flag, folder = named[0]
    try:
        resolve_folder(str(folder), flag, None)
        check_folder(folder, [other for _, other in named[1:] if other.is_dir()])
    except UserError as error:
        return str(error)
    return ""


def _bandwidth(seen: Seen, reach: transport.Reach) -> tuple[Bandwidth | None, str]:
    """Return what was measured, or why nothing was."""
    spec, gpus, places = seen.spec, seen.section("gpus"), seen.section("place")
    has_gpus = [len(gpus.get(host.name, {}).get("gpus", ())) >= host.slots for host in seen.hosts]
    on_cpu = all(seen.on_cpu(host.name) for host in seen.hosts)
    if not spec.bandwidth or not spec.wants("bandwidth"):
        return None, ""
    if sum(host.slots for host in seen.hosts) < 2 and (on_cpu or not any(has_gpus)):
        return None, ""
    silent = [host.name for host in seen.hosts if host.name not in places]
    if silent:
        return None, f"not measured: {', '.join(silent)} cannot be asked"
    if any(has_gpus) and not all(has_gpus) and not on_cpu:
        return None, "not measured: some hosts have fewer GPUs than slots"
    first = seen.hosts[0].name
    found = {"pdsh": next(iter(places[first]["addresses"]), first), "slurm": first, "local": "127.0.0.1"}
    own = seen.section("port").get(first, {})
    port = own.get("free", spec.master_port) if own.get("fault") else spec.master_port
    return measure(seen.hosts, reach, spec.master_addr or found[seen.launcher], port, os.getcwd()), ""


def examine(spec: DoctorSpec, environment: Mapping[str, str]) -> Seen:
    """Ask every host and measure between them.

    Raises:
        UserError: the hosts cannot even be named.
    """
    job = find_job(spec.hostfile, spec.slurm, environment)
    names = [host.name for host in job.hosts]
    with _token_in(spec.save_model_path) as token:
        requests = [_request(spec, job, token, number) for number in range(len(names))]
        answers = transport.ask_all(names, job.reach, transport.probe_source(), requests, spec.timeout_s)
    facts = {answer.host: line["facts"] for answer in answers for line in answer.lines if "facts" in line}
    hosts = tuple(
        # One rank a GPU where nobody says otherwise.
        host if host.slots else Host(host.name, len(facts.get(host.name, {}).get("gpus", {}).get("gpus", ())) or 1)
        for host in job.hosts
    )
    seen = Seen(
        spec=spec,
        launcher=job.launcher,
        hosts=hosts,
        answers={answer.host: answer for answer in answers},
        facts=facts,
        variables={name: value for name, value in environment.items() if is_wanted(name) and name != OWN},
        env_files=job.env_files,
        has_pdsh=shutil.which("pdsh") is not None,
        model_fault=model_fault(spec),
    )
    bandwidth, unmeasured = _bandwidth(seen, job.reach)
    return replace(seen, bandwidth=bandwidth, unmeasured=unmeasured)
