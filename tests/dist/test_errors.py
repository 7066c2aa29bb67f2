"""A user's mistake ends every rank with exit code 2 and one sentence, and leaves the disk as it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mirage_ds.cluster.here import free_ports

BIN = Path(sys.executable).parent
LIMIT_S = 90


def outcome(arguments: list, folder: Path, ranks: int) -> tuple[int, str]:
    """Start the trainer as a user does; exit code and all it said."""
    command = [sys.executable, "-m", "mirage_ds.train", *map(str, arguments)]
    if ranks > 1:
        launcher = [BIN / "deepspeed", "--num_accelerators", ranks, "--master_port", free_ports()]
        command = [*map(str, launcher), "--module", "mirage_ds.train", *map(str, arguments)]
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    return done.returncode, done.stdout + done.stderr


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def refused(arguments: dict, tmp_path: Path, sentence: str, ranks: int = 1) -> None:
    """Exit code 2, the sentence once, no traceback; an existing --save_model_path is untouched, a new one not made."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    before = tree(out)
    settings = dict(save_model_path=out, cache_dir=tmp_path / "cache", num_workers=0, report_to="none") | arguments
    flags = [part for key, value in settings.items() for part in (f"--{key}", value)]
    code, said = outcome(flags, tmp_path, ranks)
    assert code == 2, said
    assert said.count("error: ") == 1, said
    assert said.count(sentence) == 1, said
    assert "Traceback" not in said
    assert tree(out) == before
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


@pytest.fixture
def rows(mixed: Path) -> list[dict]:
    """Rows of `mixed` with absolute image paths."""
    made = [json.loads(line) for line in mixed.read_text().splitlines()]
    for row in made:
        row.update({key: str(mixed.parent / row[key]) for key in ("image_input", "image_output") if key in row})
    return made


def records(tmp_path: Path, rows: list[dict]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_missing_image_by_the_launcher(nano: Path, rows: list, tmp_path: Path) -> None:
    rows[4]["image_input"] = "gone.png"
    data = records(tmp_path, rows)
    sentence = f"error: {data}: line 5, image_input: no image 'gone.png': looked for {tmp_path / 'gone.png'}"
    refused(dict(model=nano, stage="stage2", data_path=data), tmp_path, sentence, ranks=2)


@pytest.mark.slow
def test_json_typo_by_the_launcher(nano: Path, mixed: Path, tmp_path: Path) -> None:
    path = tmp_path / "typo.json"
    path.write_text('{"zero_optimisation": {"stage": 3}}')
    sentence = (
        f"error: {path}: DeepSpeed has no key 'zero_optimisation' and would ignore it "
        "(did you mean 'zero_optimization'?)"
    )
    refused(dict(model=nano, stage="sft", data_path=mixed, deepspeed=path), tmp_path, sentence, ranks=2)


def test_json_value_that_deepspeed_refuses(nano: Path, mixed: Path, tmp_path: Path) -> None:
    path = tmp_path / "banana.json"
    path.write_text('{"zero_optimization": {"stage": 3, "overlap_comm": "banana"}}')
    sentence = f"error: {path}: DeepSpeed refuses 'overlap_comm' (block Zero) with 'banana'"
    refused(dict(model=nano, stage="sft", data_path=mixed, deepspeed=path), tmp_path, sentence)


@pytest.mark.slow
def test_broken_weights_leave_the_run_folder_unclaimed(nano: Path, mixed: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(nano, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    sentence = f"error: {weights}: not a whole safetensors file"
    refused(dict(model=nano, load_model_path=broken, stage="sft", data_path=mixed), tmp_path, sentence)


@pytest.mark.slow
def test_stage1_record_without_helper(nano: Path, mixed: Path, tmp_path: Path) -> None:
    said = "image_output: stage1 needs a helper image in 6 of 12 records, e.g. lines 3, 4, 7; add its path, or name"
    refused(dict(model=nano, stage="stage1", data_path=mixed), tmp_path, f"error: {mixed}: {said}")


def test_a_name_of_tmpdir_that_sockets_cannot_have(
    nano: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data workers would lose their batches, and their rank would wait for ever."""
    place = tmp_path / ("x" * 75)
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    sentence = f"TMPDIR {place}: its name has {len(str(place))} bytes and may have 75; set TMPDIR to a shorter one"
    refused(dict(model=nano, stage="sft", data_path=mixed, num_workers=2), tmp_path, sentence)
