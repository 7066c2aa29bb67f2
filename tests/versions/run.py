"""The same numbers with other people's versions: `python tests/versions/run.py [NAME …]`, or `lock` to renew the locks.

A lock names every package of an environment. An environment lies outside the clone, under the hash of its lock, and is
built where it is missing; one that no lock asks for is deleted. CUDA libraries without which torch imports are left
out: everything runs on the CPU.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
REPO = HERE.parents[1]
PARITY = REPO / "../shared/parity"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mirage-ds/versions"


class Wanted(NamedTuple):
    """What an environment is made of: a Python, uv's way to choose versions, and those that are given."""

    python: str
    resolution: str
    pins: Sequence[str] = ()


WANTED = {
    "oldest": Wanted("3.11", "lowest-direct", ("click==8.1.0",)),
    "middle": Wanted("3.12", "highest", ("torch==2.11.0", "transformers==5.17.0")),
    "newest": Wanted("3.13", "highest"),
}
TOOLS = ("pytest>=8.4", "pytest-xdist>=3.6", "hypothesis>=6.130", "ninja>=1.11")
# torch imports without them; nvrtc is linked since 2.15.
LEFT_OUT = (
    *("mirage-ds", "triton", "cuda-bindings", "cuda-pathfinder", "cuda-toolkit", "nvidia-cuda-cccl"),
    *("nvidia-nvtx", "nvidia-nvtx-cu12", "nvidia-cusolver", "nvidia-cusolver-cu12", "nvidia-cuda-nvrtc-cu12"),
)
SHOWN = ("torch", "transformers", "deepspeed", "peft", "datasets", "pyarrow", "pydantic", "click", "numpy")
# Forward, tower, decoding, LoRA and export against plain transformers, of every stage and family; what is encoded.
ALONE = [
    "tests/unit/model/test_forward.py",
    "tests/unit/model/test_generate.py",
    "tests/unit/model/test_latent_generate.py",
    "tests/unit/model/test_lora.py",
    "tests/unit/model/test_attention.py",
    "tests/unit/model/test_vision.py",
    "tests/unit/data/test_encode.py",
    "tests/unit/engine/test_export.py",
    "tests/unit/engine/test_private.py",
    "tests/unit/engine/test_versions.py",
]
# Then two ranks: ZeRO-3 against one process, the other families, a run that is resumed and exported.
ZERO3 = [
    *("each_rank_loads_half", "four_micro_steps", "ranks_without_image and stage2-True", "other_zero_stages"),
    "checkpoint_writes",
]
RESUME = ["resumed_run_equals", "exported_checkpoint"]
TOGETHER = ["tests/dist/test_zero3.py", "tests/dist/test_families.py", "tests/dist/test_resume.py"]


def uv(*arguments: str | Path, **options: str) -> None:
    environment = os.environ | {"UV_CACHE_DIR": str(CACHE / "uv")} | options
    subprocess.run([sys.executable, "-m", "uv", *map(str, arguments)], check=True, env=environment)


def interpreter(release: str) -> Path:
    """Find a Python that runs; pyenv's commands on PATH may be there and not run."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = [shutil.which(f"python{release}"), *sorted((pyenv / "versions").glob(f"{release}.*/bin/python"))]
    for one in filter(None, found):
        if subprocess.run([one, "-c", ""], capture_output=True, check=False).returncode == 0:
            return Path(one)
    sys.exit(f"no Python {release} on PATH or in {pyenv}; install it")


def lock(name: str) -> None:
    wanted = WANTED[name]
    asked = HERE / f".{name}.in"
    asked.write_text("\n".join([f"mirage-ds[lora] @ {REPO.as_uri()}", *TOOLS, *wanted.pins]) + "\n")
    try:
        uv(
            *("pip", "compile", "--quiet", "--upgrade", "--no-header", "--no-annotate", asked),
            *("--output-file", HERE / f"{name}.txt"),
            *("--python-version", wanted.python, "--resolution", wanted.resolution),
            *(f"--no-emit-package={package}" for package in LEFT_OUT),
        )
    finally:
        asked.unlink()


def place_of(name: str) -> Path:
    text = WANTED[name].python + (HERE / f"{name}.txt").read_text()
    return CACHE / hashlib.sha256(text.encode()).hexdigest()[:16]


def build(name: str) -> Path:
    """Return an environment's Python, built where it is missing or half."""
    place = place_of(name)
    whole = place / "whole"
    if not whole.exists():
        shutil.rmtree(place, ignore_errors=True)
        begun = time.monotonic()
        uv("venv", "--quiet", "--python", interpreter(WANTED[name].python), place)
        python = place / "bin/python"
        # Compiled: a test that starts ranks waits a minute for them, and they write no bytecode.
        install = ("pip", "install", "--quiet", "--no-deps", "--compile-bytecode", "--python", python)
        uv(*install, "--requirement", HERE / f"{name}.txt")
        whole.touch()
        print(f"{name}: built in {time.monotonic() - begun:.0f} s", flush=True)
    return place / "bin/python"


def forget() -> None:
    """Delete uv's cache, whose files the environments share, and environments of other locks."""
    kept = {place_of(name) for name in WANTED}
    for place in CACHE.iterdir():
        if place not in kept:
            shutil.rmtree(place)


def run(name: str, python: Path) -> bool:
    settings = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = os.environ | settings | {"PYTHONPATH": str(REPO), "PATH": f"{python.parent}:{os.environ['PATH']}"}
    print_versions = (
        "import sys; from importlib.metadata import version; "
        f"print('{name}: python', sys.version.split()[0], *(f'{{x}} {{version(x)}}' for x in {SHOWN}))"
    )
    pytest = ["-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", "--numprocesses", "2", "--dist", "loadfile"]
    some = " or ".join([*ZERO3, "test_families", *RESUME, "unit"])
    commands = [["-c", print_versions], [*pytest, *TOGETHER, *ALONE, "-k", some]]
    if (PARITY / "index.json").is_file():
        commands.append(["tests/parity/check.py", str(PARITY)])
    begun = time.monotonic()
    # All at once: one process starts, or waits for its last test, while others compute.
    started = [subprocess.Popen([python, *command], cwd=REPO, env=environment) for command in commands]
    right = not any([process.wait() for process in started])
    print(f"{name}: {'right' if right else 'WRONG'} after {time.monotonic() - begun:.0f} s", flush=True)
    return right


def main(names: Sequence[str]) -> int:
    if list(names) == ["lock"]:
        for name in WANTED:
            lock(name)
        return 0
    CACHE.mkdir(parents=True, exist_ok=True)
    pythons = {name: build(name) for name in names or WANTED}
    forget()
    return 0 if all([run(name, python) for name, python in pythons.items()]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
