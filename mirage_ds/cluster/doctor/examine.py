"""Ask the hosts, measure between them, and put everything that is known together for the checks."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mirage_ds.cluster.doctor.bandwidth import Bandwidth, measure
from mirage_ds.cluster.doctor.check_gpus import CUDA_PACKAGES, NCCL_PACKAGES
from mirage_ds.cluster.doctor.finding import Here, Launcher, Plan, Seen
from mirage_ds.cluster.doctor.job import Job, find_job
from mirage_ds.cluster.doctor.spec import DoctorSpec
from mirage_ds.cluster.doctor.transport import ask_all, source_of
from mirage_ds.cluster.environment import NAMES, PREFIXES, SECRET, is_wanted
from mirage_ds.cluster.hosts import Host
from mirage_ds.config.mixture import parse_part
from mirage_ds.engine.installed import PACKAGES
from mirage_ds.errors import UserError

WRITE_BYTES = 64 << 20
# cli.py sets it for itself.
OWN = "TOKENIZERS_PARALLELISM"


def _plan(spec: DoctorSpec, launcher: Launcher = "local") -> Plan:
    files = {"--eval_data_path": spec.eval_data_path, "--deepspeed": spec.deepspeed}
    named = spec.data_path if isinstance(spec.data_path, tuple) else [path for path in [spec.data_path] if path]
    if len(named) == 1:
        files["--data_path"] = named[0]
    else:
        # Weights are the training's business.
        files |= {f"--data_path {at + 1}": parse_part(str(path)).file for at, path in enumerate(named)}
    models = {"--load_model_path": spec.load_model_path, "--model": spec.model}
    return Plan(
        launcher=launcher,
        models={flag: str(name) for flag, name in models.items() if name is not None},
        files={flag: path for flag, path in files.items() if path is not None},
        run_folder=spec.save_model_path,
        deepspeed=spec.deepspeed,
        keep_checkpoints=spec.keep_checkpoints,
        master_port=spec.master_port,
        master_addr=spec.master_addr,
    )


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
    plan = _plan(spec)
    return {
        "number": number,
        "cwd": os.getcwd(),
        "token": token,
        "master": spec.master_addr or job.hosts[0].address,
        "port": spec.master_port,
        "packages": [*PACKAGES, *CUDA_PACKAGES, *NCCL_PACKAGES],
        "names": sorted(NAMES),
        "prefixes": PREFIXES,
        "secret": SECRET.pattern,
        "models": plan.models,
        "cache_dir": spec.cache_dir and str(spec.cache_dir),
        "files": {flag: str(path) for flag, path in plan.files.items()},
        "records": [flag for flag in plan.files if "data_path" in flag],
        "image_root": spec.image_root and str(spec.image_root),
        "run_folder": plan.run_folder and str(plan.run_folder),
        "write_bytes": WRITE_BYTES if spec.wants("disk") else 0,
    }


def _model_faults(spec: DoctorSpec) -> dict[str, str]:
    """Check the folder that gives the weights as the run would: that takes more than a host's Python may have."""
    named = [(flag, Path(name)) for flag, name in _plan(spec).models.items()]
    if not named or not spec.wants("model") or not named[0][1].is_dir():
        return {}
    from mirage_ds.model.folder import resolve_folder
    from mirage_ds.model.load import check_folder

    flag, folder = named[0]
    try:
        resolve_folder(str(folder), flag, None)
        check_folder(folder, [other for _, other in named[1:] if other.is_dir()])
    except UserError as error:
        return {flag: str(error)}
    return {}


def _bandwidth(spec: DoctorSpec, job: Job, seen: Seen) -> tuple[Bandwidth | None, str]:
    """Return what was measured, or why nothing was."""
    if not spec.bandwidth or not spec.wants("bandwidth", "nccl") or sum(host.slots for host in seen.hosts) < 2:
        return None, ""
    places, port = seen.section("place"), seen.section("port")
    silent = [host.name for host in seen.hosts if host.name not in places]
    if silent:
        return None, f"not measured: {', '.join(silent)} cannot be asked"
    torchless = [host for host, facts in seen.section("python").items() if facts["packages"]["torch"] is None]
    if torchless:
        return None, f"not measured: no torch on {', '.join(torchless)}"
    gpus = seen.section("gpus")
    enough = [len(gpus.get(host.name, {}).get("gpus", ())) >= host.slots for host in seen.hosts]
    on_cpu = all(seen.on_cpu(host.name) for host in seen.hosts)
    if any(enough) and not all(enough) and not on_cpu:
        return None, "not measured: some hosts have fewer GPUs than slots"
    backend = "nccl" if all(enough) and not on_cpu else "gloo"
    first = seen.hosts[0].name
    address = (
        spec.master_addr
        or {
            "pdsh": next(iter(places[first]["addresses"]), first),
            "slurm": first,
            "local": "127.0.0.1",
        }[seen.plan.launcher]
    )
    own = port.get(first, {})
    free = own.get("free", spec.master_port) if own.get("fault") else spec.master_port
    return measure(seen.hosts, job.reach, address, free, backend, os.getcwd()), ""


def examine(spec: DoctorSpec, environment: Mapping[str, str]) -> Seen:
    """Ask every host and measure between them.

    Raises:
        UserError: the hosts cannot even be named.
    """
    job = find_job(spec.hostfile, spec.slurm, environment)
    names = [host.name for host in job.hosts]
    with _token_in(spec.save_model_path) as token:
        requests = [_request(spec, job, token, number) for number in range(len(names))]
        answers = ask_all(names, job.reach, source_of("probe.py"), requests, spec.timeout_s)
    facts = {answer.host: line["facts"] for answer in answers for line in answer.lines if "facts" in line}
    hosts = tuple(
        # One rank a GPU where nobody says otherwise.
        host if host.slots else Host(host.name, len(facts.get(host.name, {}).get("gpus", {}).get("gpus", ())) or 1)
        for host in job.hosts
    )
    seen = Seen(
        plan=_plan(spec, job.launcher),
        here=Here(
            variables={name: value for name, value in environment.items() if is_wanted(name) and name != OWN},
            env_files=job.env_files,
            pdsh=shutil.which("pdsh") is not None,
            model_faults=_model_faults(spec),
        ),
        hosts=hosts,
        answers={answer.host: answer for answer in answers},
        facts=facts,
    )
    bandwidth, unmeasured = _bandwidth(spec, job, seen)
    return replace(seen, bandwidth=bandwidth, unmeasured=unmeasured)
