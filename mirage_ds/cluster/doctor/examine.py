"""Find the hosts, ask them, measure between them, and put everything together for the checks."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from mirage_ds.cluster.doctor import transport
from mirage_ds.cluster.doctor.bandwidth import measure
from mirage_ds.cluster.doctor.check_run import NCCL_PACKAGES
from mirage_ds.cluster.doctor.finding import Seen
from mirage_ds.cluster.doctor.spec import DoctorSpec
from mirage_ds.cluster.environment import DEFAULT_NAME, SECRET, WANTED, env_files, is_wanted, parse, read
from mirage_ds.cluster.hosts import Host, read_hosts
from mirage_ds.config.columns import parse_columns
from mirage_ds.engine.versions import PACKAGES
from mirage_ds.errors import UserError
from mirage_ds.run.beforehand import FirstLook, first_look

WRITE_BYTES = 64 << 20
# PATH of another machine need not be ours; cli.py sets the others for itself.
OWN = ("PATH", "TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY", "TORCH_CPP_LOG_LEVEL")


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
    # Slurm writes 2, 2, 2, 1 as "2(x3),1".
    tasks = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_TASKS_PER_NODE", ""))
    slots = [int(each) for each, times in tasks for _ in range(int(times or 1))]
    return tuple(map(Host, names, slots if len(slots) == len(names) else [0] * len(names)))


def find_job(spec: DoctorSpec, environment: Mapping[str, str]) -> Seen:
    """Return the job's hosts and how to reach them: a hostfile over ssh, a Slurm job by srun, or this machine.

    Raises:
        UserError: a faulty hostfile, no Slurm job, or both asked for.
    """
    if spec.hostfile and spec.slurm:
        raise UserError("--hostfile and --slurm both say which hosts: give one of them")
    if spec.slurm:
        return Seen(spec, "slurm", slurm_hosts(environment), transport.slurm)
    if not spec.hostfile:
        return Seen(spec, "local", (Host("localhost", 0),), transport.local)
    if not shutil.which("ssh"):
        raise UserError("--hostfile: ssh is not on PATH; install the OpenSSH client")
    names = [environment.get("DS_ENV_FILE", DEFAULT_NAME)]
    found = {file: parse(read(file)) for file in env_files(names, Path.home(), Path.cwd())}
    lines = {name: text for values, _ in found.values() for name, text in values.items()}
    # DeepSpeed asks torch whether the launching machine has GPUs.
    gpus = environment.get("DS_ACCELERATOR") != "cpu" and shutil.which("nvidia-smi") is not None
    return Seen(
        spec,
        "pdsh",
        read_hosts(spec.hostfile),
        transport.ssh(transport.exports(environment, os.getcwd(), gpus, lines)),
        env_files={file: faults for file, (_, faults) in found.items()},
        variables={name: value for name, value in environment.items() if is_wanted(name) and name not in OWN},
    )


def _sign_in(folder: Path | None) -> AbstractContextManager[str]:
    """Make a folder with a name of its own in a folder for a while: hosts that see it share that one."""
    try:
        return TemporaryDirectory(prefix=".mirage-doctor-", dir=folder, ignore_cleanup_errors=True)
    except OSError:
        # The hosts say so.
        return nullcontext("")


def _look(spec: DoctorSpec) -> dict[str, FirstLook | UserError]:
    """Read the first record of each source as training would."""
    found: dict[str, FirstLook | UserError] = {}
    for flag, path in spec.files().items():
        if "data_path" in flag and spec.wants("data"):
            try:
                found[flag] = first_look(path, parse_columns(spec.columns), spec.image_root, spec.stage)
            except UserError as error:
                found[flag] = error
    return found


def _ask(seen: Seen) -> None:
    """Ask every host what there is."""
    spec, run_folder = seen.spec, seen.spec.save_model_path
    # A folder that is not there yet will be made: the disk is that of the nearest one.
    nearest = run_folder and next(path for path in (run_folder, *run_folder.parents) if path.exists())
    seen.records = _look(spec)
    looks = {flag: look for flag, look in seen.records.items() if isinstance(look, FirstLook)}
    # Where the records cannot be read here, what the hosts have of them is nothing to compare.
    others = {flag: (path,) for flag, path in spec.files().items() if flag not in seen.records}
    request = spec.model_dump(mode="json") | {
        "cwd": os.getcwd(),
        "master": spec.master_addr or seen.hosts[0].address,
        "packages": [*PACKAGES, *NCCL_PACKAGES],
        "wanted": WANTED.pattern,
        "secret": SECRET.pattern,
        "models": spec.models(),
        "files": others | {flag: look.files for flag, look in looks.items()},
        "images": {flag: look.images for flag, look in looks.items()},
        "run_folder": nearest,
        "write_bytes": WRITE_BYTES if spec.wants("disk") else 0,
    }
    source = (files("mirage_ds.cluster.doctor") / "probe.py").read_text(encoding="utf-8")
    with _sign_in(nearest) as sign:
        request["sign"] = sign
        answers = transport.ask_all([host.name for host in seen.hosts], seen.reach, source, request, spec.timeout_s)
    seen.answers = {answer.host: answer for answer in answers}
    seen.facts = {answer.host: line["facts"] for answer in answers for line in answer.lines if "facts" in line}


def _measure(seen: Seen) -> None:
    """Measure between the hosts, or say why not."""
    spec, first = seen.spec, seen.hosts[0].name
    on_cpu = all(seen.on_cpu(host.name) for host in seen.hosts)
    with_gpus = [host for host in seen.hosts if seen.gpus(host.name) >= host.slots]
    alone = sum(host.slots for host in seen.hosts) < 2 and (on_cpu or not with_gpus)
    if alone or not spec.bandwidth or not spec.wants("bandwidth"):
        return
    if silent := [host.name for host in seen.hosts if host.name not in seen.section("place")]:
        seen.unmeasured = f"not measured: {', '.join(silent)} cannot be asked"
    elif 0 < len(with_gpus) < len(seen.hosts) and not on_cpu:
        seen.unmeasured = "not measured: some hosts have fewer GPUs than slots"
    else:
        found = {"pdsh": [*seen.fact(first, "place", "addresses"), first][0], "slurm": first, "local": "127.0.0.1"}
        port = seen.fact(first, "ports", "free") or spec.master_port
        seen.bandwidth = measure(seen.hosts, seen.reach, spec.master_addr or found[seen.launcher], port, os.getcwd())


def examine(spec: DoctorSpec, environment: Mapping[str, str]) -> Seen:
    """Ask every host and measure between them.

    Raises:
        UserError: the hosts cannot even be named.
    """
    seen = find_job(spec, environment)
    _ask(seen)
    # One rank a GPU where nobody says otherwise.
    seen.hosts = tuple(host._replace(slots=host.slots or seen.gpus(host.name) or 1) for host in seen.hosts)
    _measure(seen)
    return seen
