"""The facts of one host, as one JSON object. Standard library alone: its text is sent to hosts, see transport.py.

What cannot be found out is a fact too: its section is missing, and `errors` says why.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

Request = dict[str, Any]

# Lines of ours begin with it; a login script may print lines of its own.
SIGN = "\x1emirage-doctor "
GPU_FIELDS = "index,name,uuid,driver_version,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
COMPILERS = frozenset(("ninja", "nvcc", "cicc", "ptxas", "cc1plus", "c++", "g++"))
# The write test ends here, however slow the disk.
WRITE_LIMIT_S = 3.0
CHUNK_BYTES = 8 << 20


def say(**values: Any) -> None:
    """Send one line to who asked, at once."""
    sys.stdout.write(f"{SIGN}{json.dumps(values)}\n")
    sys.stdout.flush()


def run(*command: str, limit_s: float = 8.0) -> subprocess.CompletedProcess[str]:
    """Run a program and keep what it says."""
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=limit_s, check=False)


def addresses(name: str) -> list[str]:
    """Return where a name leads to from here."""
    with suppress(OSError):
        return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)})
    return []


def place(request: Request) -> dict[str, Any]:
    """Who and where: names and addresses as the ranks will look them up."""
    name, fabrics = socket.gethostname(), Path("/sys/class/infiniband")
    return {
        "hostname": name,
        "own_addresses": addresses(name),
        # What DeepSpeed takes the first host's address from.
        "addresses": run("hostname", "-I").stdout.split() if shutil.which("hostname") else [],
        "master_addresses": addresses(request["master"]),
        "infiniband": sorted(os.listdir(fabrics)) if fabrics.is_dir() else [],
    }


def python(request: Request) -> dict[str, Any]:
    """The interpreter and the versions of what training imports."""
    found: dict[str, str | None] = dict.fromkeys(request["packages"])
    for name in found:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {"version": platform.python_version(), "path": sys.executable, "packages": found}


def code(_: Request) -> dict[str, Any]:
    """Where `mirage_ds` would be imported from, the hash of its source, its git commit."""
    spec = importlib.util.find_spec("mirage_ds")
    if spec is None or spec.origin is None:
        return {"folder": None}
    folder = Path(spec.origin).resolve().parent
    content = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        content.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes() + b"\0")
    facts: dict[str, Any] = {"folder": str(folder), "hash": content.hexdigest(), "commit": None, "changed": False}
    if shutil.which("git"):
        head = run("git", "-C", str(folder), "rev-parse", "HEAD")
        if head.returncode == 0:
            status = run("git", "-C", str(folder), "status", "--porcelain", "--", str(folder))
            facts |= {"commit": head.stdout.strip(), "changed": bool(status.stdout.strip())}
    return facts


def gpus(_: Request) -> dict[str, Any]:
    """What nvidia-smi says, where it is installed; memory in MiB."""
    if not shutil.which("nvidia-smi"):
        return {"there": Path("/dev/nvidiactl").exists(), "gpus": []}
    form = "--format=csv,noheader,nounits"
    seen = run("nvidia-smi", f"--query-gpu={GPU_FIELDS}", form)
    if seen.returncode:
        words = (seen.stdout + seen.stderr).strip().splitlines() or [f"exit code {seen.returncode}"]
        return {"there": True, "gpus": [], "fault": words[0]}
    holders = run("nvidia-smi", "--query-compute-apps=gpu_uuid,pid", form).stdout.splitlines()
    pairs = [[part.strip() for part in line.split(",")] for line in holders if "," in line]
    found = []
    for line in seen.stdout.splitlines():
        index, name, uuid, driver, total, used, faults = (part.strip() for part in line.split(","))
        facts = {"index": int(index), "name": name, "driver": driver, "total_mib": int(total), "used_mib": int(used)}
        # "[N/A]" where the GPU has no ECC memory.
        facts["ecc_faults"] = int(faults) if faults.isdecimal() else 0
        found.append({**facts, "pids": [int(pid) for holder, pid in pairs if holder == uuid]})
    return {"there": True, "gpus": found}


def limits(_: Request) -> dict[str, Any]:
    """Soft ulimits (None: unlimited), in files, bytes and processes, and the bytes of /dev/shm."""
    names = ("nofile", "memlock", "nproc")
    soft = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[0] for name in names}
    shm = os.statvfs("/dev/shm")
    return {
        "ulimits": {name: None if value == resource.RLIM_INFINITY else value for name, value in soft.items()},
        "shm_bytes": shm.f_frsize * shm.f_bavail,
    }


def cache_home() -> Path:
    """Return where programs keep what they can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def locks(_: Request) -> dict[str, Any]:
    """Lock files of torch's compiled extensions, with their age, and the compilers at work."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache_home() / "torch_extensions")
    found = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    running = set()
    for name in Path("/proc").glob("[0-9]*/comm"):
        # It may have ended since.
        with suppress(OSError):
            running.add(name.read_text(errors="replace").strip())
    return {
        "locks": [{"path": str(lock), "age_s": time.time() - lock.stat().st_mtime} for lock in sorted(found)],
        "compilers": sorted(running & COMPILERS),
    }


def variables(request: Request) -> dict[str, str]:
    """The wanted variables that a rank would find; never a secret's value."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if re.match(request["wanted"], name) and not re.search(request["secret"], name)
    }


def _why_taken(port: int) -> str | None:
    """Say why nobody can listen on a port; None where it is free."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6).close()
    except OSError as error:
        return os.strerror(error.errno or 0)
    return None


def ports(request: Request) -> dict[str, Any]:
    """On the first host: why the ranks' port or the next one, the guards', cannot be had; and two that can."""
    if request["number"]:
        return {}
    wanted: int = request["master_port"]
    faults = {port: why for port in (wanted, wanted + 1) if (why := _why_taken(port))}
    pairs = (port for port in (wanted, *range(20000, 65000, 2)) if not _why_taken(port) and not _why_taken(port + 1))
    return {"faults": faults, "free": next(pairs)}


def folder(request: Request) -> dict[str, Any]:
    """The run folder: whether it is the asker's own, its free space, how fast a synced file is written to it."""
    if not request["run_folder"]:
        return {}
    path = Path(request["run_folder"])
    if not path.is_dir():
        return {"there": False}
    space = os.statvfs(path)
    facts: dict[str, Any] = {"there": True, "free_bytes": space.f_frsize * space.f_bavail}
    facts["shared"] = bool(request["sign"]) and Path(request["sign"]).is_dir()
    block, written, begin = os.urandom(CHUNK_BYTES), 0, time.monotonic()
    try:
        # It has no name, so that nothing stays when this process is ended.
        with tempfile.TemporaryFile(dir=path, buffering=0) as file:
            while written < request["write_bytes"] and time.monotonic() - begin < WRITE_LIMIT_S:
                written += file.write(block)
                os.fdatasync(file.fileno())
        facts["write_bytes_s"] = written / (time.monotonic() - begin)
    except OSError as error:
        facts["fault"] = error.strerror
    return facts


def hub_folder(name: str, cache: str | None) -> Path:
    """Return where the hub's client keeps a model of this name."""
    home = Path(os.environ.get("HF_HOME") or cache_home() / "huggingface")
    root = Path(cache or os.environ.get("HF_HUB_CACHE") or home / "hub")
    return root / f"models--{name.replace('/', '--')}"


def weights_in(folder: Path, files: dict[str, int]) -> tuple[int, str | None]:
    """Count the weights in a folder, from the headers of its safetensors; say what of them is missing or cut off."""
    index, count = folder / "model.safetensors.index.json", 0
    try:
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
        for name in sorted(named - files.keys()):
            return 0, f"{name} is named by {index.name} and is not there"
        for name in (name for name in files if name.endswith(".safetensors")):
            with (folder / name).open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(size, files[name])))
            header.pop("__metadata__", None)
            if 8 + size + max((one["data_offsets"][1] for one in header.values()), default=0) != files[name]:
                return 0, f"{name} is cut off, or damaged"
            count += sum(math.prod(one["shape"]) for one in header.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return 0, f"its weights cannot be read ({type(error).__name__}: {error})"
    return count, None if count else "no weights (*.safetensors) in it"


def models(request: Request) -> dict[str, Any]:
    """Each model that the run starts from: its files and weights, or its place in the hub's cache."""
    found = {}
    for flag, name in request["models"].items():
        path = Path(name)
        if path.is_dir():
            files = {file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.is_file()}
            weights, fault = weights_in(path, files)
            found[flag] = {"files": files, "weights": weights, "fault": fault}
        else:
            cache = hub_folder(name, request["cache_dir"])
            kept = any(cache.glob("snapshots/*/config.json"))
            found[flag] = {"fault": "no such folder", "hub": str(cache), "kept": kept}
    return found


def data(request: Request) -> dict[str, Any]:
    """Of each flag: the bytes of its files together, and what of them, or of the first record's images, is missing."""
    found: dict[str, Any] = {}
    for flag, names in request["files"].items():
        count, fault = 0, None
        try:
            for name in names:
                with open(name, "rb") as file:
                    count += os.fstat(file.fileno()).st_size
            for places in request["images"].get(flag, ()):
                if not any(os.access(place, os.R_OK) for place in places):
                    fault = f"the first record's image {places[0]} cannot be read"
        except OSError as error:
            fault = f"{error.filename}: {error.strerror}"
        found[flag] = {"files": {"together": count}, "fault": fault}
    return found


SECTIONS: list[Callable[[Request], dict[str, Any]]]
SECTIONS = [place, python, code, gpus, limits, locks, variables, ports, models, data, folder]


def probe(request: Request) -> dict[str, Any]:
    """Return all facts: section → what its function says."""
    facts: dict[str, Any] = {"errors": {}}
    for section in SECTIONS:
        try:
            facts[section.__name__] = section(request)
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            facts["errors"][section.__name__] = str(error)
    return facts


def main() -> None:
    """Answer the request that stands on standard input."""
    say(time=time.time())
    request = json.loads(sys.stdin.readline())
    # Whatever hangs here, a dead network disk say, nothing stays behind.
    signal.alarm(math.ceil(request["limit_s"]) + 2)
    try:
        os.chdir(request["cwd"])
        facts = probe(request)
    except OSError as error:
        facts = {"cwd": error.strerror}
    say(facts=facts)


if __name__ == "__main__":
    main()
