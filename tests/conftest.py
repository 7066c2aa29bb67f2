"""Fixtures that every suite shares: a nano model and small record files, made once a session."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Before torch and DeepSpeed are imported anywhere. One thread: losses are compared to the fifth digit.
os.environ.update(
    DS_ACCELERATOR="cpu",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    # Kept features of the vision tower and Arrow files: the suite makes its own and leaves nothing behind.
    XDG_CACHE_HOME=tempfile.mkdtemp(prefix="mirage-tests-"),
    SDL_VIDEODRIVER="dummy",
)

import pytest
from support.models import make_nano
from support.pictures import noise
from support.records import write_jsonl

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_collection(session: pytest.Session) -> None:
    """In a worker of several, import a share of the test files first: each writes other byte code and reads the rest.

    Else all would rewrite the same file's asserts at the same time, where no byte code is kept yet.
    """
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if count > 1 and not sys.dont_write_bytecode:
        roots = [session.config.invocation_params.dir / name.split("::")[0] for name in session.config.args]
        for file in sorted(file for root in roots for file in root.rglob("test_*.py"))[number::count]:
            sys.path.insert(0, str(file.parent))
            # What is wrong with it is said where it is collected.
            with contextlib.suppress(Exception, pytest.skip.Exception):
                importlib.import_module(file.stem)


def pytest_collection_finish() -> None:
    """Spare the garbage collector what stays to the end: modules and tests, most of all objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random nano model whose tokenizer knows the samples' text."""
    return make_nano(tmp_path_factory.mktemp("models") / "nano")


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows of different lengths; of every four, one has no image, one no helper, one neither."""
    folder = tmp_path_factory.mktemp("mixed")
    for number in range(12):
        side = 56 + 28 * (number % 4)
        noise((side, 84), 40 + number, number).save(folder / f"in{number}.png")
        noise((84, side), 90 + number, number).save(folder / f"out{number}.png")
    rows = []
    for number in range(12):
        row = {
            "text_input": f"Here is the map: <image> Question {'again ' * (3 * number)}?",
            "image_input": f"in{number}.png",
        }
        row["text_output"] = f"First {'left ' * number}<output_image>then right.\\boxed{{A}}"
        row["image_output"] = f"out{number}.png"
        if number % 4 in (1, 3):
            row["text_input"] = row["text_input"].replace("<image>", "")
            del row["image_input"]
        if number % 4 in (2, 3):
            row["text_output"] = row["text_output"].replace("<output_image>", "")
            del row["image_output"]
        rows.append(row)
    return write_jsonl(folder / "mixed.jsonl", rows)
