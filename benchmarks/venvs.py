"""Environments outside the clone, each made from its list in benchmarks/environments the first time it is asked for.

    python -m benchmarks.venvs lmms-eval         # write its list anew: what is newest

torch is not on these lists: it is linked from this environment, so that all compute with the same kernels, and nothing
of CUDA is fetched. benchmarks/peers.py, tests/slow/test_public_harnesses.py and test_trl.py run in them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LISTS = Path(__file__).with_name("environments")
# Name → what is asked for.
WANTED = {
    "ms-swift": ("ms-swift", "qwen-vl-utils", "torchvision"),
    "llama-factory": ("llamafactory", "torchvision"),
    "trl": ("trl", "pillow", "torchvision"),
    # lmms-eval 0.7.3 imports both without asking for them: decord, and a module that filelock 4 has no more.
    "lmms-eval": ("lmms-eval>=0.7", "decord", "filelock<4", "torchvision"),
    # VLMEvalKit, as ModelScope packs it; nobody else does.
    "vlmevalkit": ("ms-vlmeval", "torchvision"),
}
# Linked from here; of CUDA; for sound.
LEFT_OUT = re.compile("(torch|torchaudio|triton|nvidia-.*|cuda-.*)==")


class LeftOut(Exception):
    """An environment cannot be had; says why."""


def cache() -> Path:
    """Return where they lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mirage-ds/peers"


def uv(*arguments: str | Path) -> None:
    """Run uv.

    Raises:
        LeftOut: it failed; with its last line.
    """
    ran = subprocess.run(
        [sys.executable, "-m", "uv", *map(str, arguments)], env=os.environ | {"UV_CACHE_DIR": str(cache() / "uv")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ran.returncode:
        raise LeftOut((ran.stderr.strip().splitlines() or ["uv failed"])[-1])


def lock(name: str) -> None:
    """Write the list of an environment: what is newest with this torch."""
    with tempfile.NamedTemporaryFile("w", suffix=".in") as asked:
        torch = importlib.metadata.version("torch").partition("+")[0]
        asked.write("\n".join([*WANTED[name], f"torch=={torch}"]) + "\n")
        asked.flush()
        path = LISTS / f"{name}.txt"
        uv("pip", "compile", "--quiet", "--upgrade", "--no-header", "--no-annotate", asked.name, "--output-file", path)
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines() if not LEFT_OUT.match(line)))


def build(name: str) -> Path:
    """Return the Python of an environment, built where it is missing or half.

    Raises:
        LeftOut: a package cannot be had.
    """
    place = cache() / hashlib.sha256((sys.version + (LISTS / f"{name}.txt").read_text()).encode()).hexdigest()[:16]
    python, whole = place / "bin/python", place / "whole"
    if not whole.exists():
        shutil.rmtree(place, ignore_errors=True)
        uv("venv", "--quiet", "--python", Path(sys.executable).resolve(), place)
        uv("pip", "install", "--quiet", "--no-deps", "--python", python, "--requirement", LISTS / f"{name}.txt")
        whole.touch()
    # Each time: the environment that it was linked from may be gone.
    (packages,) = place.glob("lib/python*/site-packages")
    torch = importlib.metadata.distribution("torch")
    for top in {file.parts[0] for file in torch.files or () if file.parts[0] != ".."}:
        here, there = packages / top, torch.locate_file(top)
        if here.is_symlink() and here.readlink() != there:
            here.unlink()
        if not here.exists():
            here.symlink_to(there)
    return python


if __name__ == "__main__":
    for asked_for in sys.argv[1:] or WANTED:
        lock(asked_for)
