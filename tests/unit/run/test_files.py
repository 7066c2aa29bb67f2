"""Outputs: one that cannot be written is refused before the work; what is not ours is neither deleted nor replaced."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pytest

from mirage_ds.cli import cli
from mirage_ds.errors import UserError
from mirage_ds.files import (
    Output,
    check_log,
    check_output,
    delete_model,
    move_others,
    users_error,
    whole_folder,
    write_atomically,
)
from mirage_ds.run.folder import check, claim, delete_checkpoints


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@contextmanager
def small_disk(most: int) -> Iterator[None]:
    """No file above so many bytes; Python makes EFBIG of it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def without_rights() -> Iterator[None]:
    """Root may write anywhere."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone" / "deeper")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "folder", "said"),
    [
        ("folder", False, "is a folder; give a file"),
        ("pipe", False, "is a device or a pipe"),
        ("file/x.json", False, "cannot be written (Not a directory)"),
        ("file/deeper/x.json", False, "cannot be written (Not a directory)"),
        ("dangling/x.json", False, "cannot be written"),
        (300 * "x", False, "cannot be written (File name too long)"),
        ("caf\udce9.json", False, "not UTF-8 text"),
        ("file", True, "is a file; give a folder"),
        ("file/x", True, "cannot be written (Not a directory)"),
        ("caf\udce9", True, "not UTF-8 text"),
        ("/proc/none/x", True, "cannot be written"),
    ],
)
def test_what_cannot_be_written_is_refused(name: str, folder: bool, said: str, place: Path) -> None:
    before = everything(place)
    with pytest.raises(UserError) as refused:
        check_output(place / name, "--out", folder)
    assert str(refused.value).startswith("--out ")
    assert said in str(refused.value)
    assert everything(place) == before
    if not folder and name != "pipe":
        with pytest.raises(UserError):
            check_log(place / name, "--log_file")


def test_no_rights_and_no_room_are_refused(place: Path) -> None:
    for path in (place, *place.parents):
        # pytest's own folders are for root alone.
        if path.owner() == "root" and path.is_relative_to("/tmp/pytest-of-root"):
            path.chmod(0o755)
    (place / "folder").chmod(0o555)
    with without_rights():
        for name, folder in (("folder/x.json", False), ("folder/new/x.json", False), ("folder", True)):
            with pytest.raises(UserError, match="Permission denied"):
                check_output(place / name, "--out", folder)
    (place / "folder").chmod(0o755)
    with small_disk(1024):
        for name, folder in (("folder/x.json", False), ("new", True)):
            with pytest.raises(UserError, match="File too large"):
                check_output(place / name, "--out", folder)
    assert everything(place) == ["dangling", "file", "folder", "pipe"]


def test_what_can_be_written_leaves_no_trace(place: Path) -> None:
    before = everything(place)
    for name in ("file", "new", "folder/new", "a/b/c.json"):
        check_output(place / name, "--out")
        check_log(place / name, "--log_file")
    for name in ("folder", "a/b"):
        check_output(place / name, "--out", folder=True)
    assert everything(place) == before
    assert (place / "file").read_text() == "mine"
    check_log(Path("/dev/null"), "--log_file")


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("compare", ["--out", "--markdown"]),
        ("init", ["--out"]),
        ("export", ["target"]),
        ("data show", ["--out"]),
        ("ablate report", ["--out"]),
        ("ablate export", ["file"]),
    ],
)
def test_commands_try_their_outputs_before_they_begin(command: str, flags: list[str]) -> None:
    found: click.Command = cli
    for word in command.split():
        assert isinstance(found, click.Group)
        found = found.commands[word]
    types = {param.opts[0]: param.type for param in found.params}
    assert [type(types[flag]) for flag in flags] == [Output] * len(flags)


@pytest.mark.parametrize(
    "words",
    [
        ["init", "--preset", "nano", "--out", "file"],
        ["controls", "m", "--data_path", "d", "--markdown", "folder"],
        ["controls", "m", "--data_path", "d", "--out", "folder"],
        ["inspect", "m", "--data_path", "d", "--out", "file"],
        ["generate", "m", "--prompt", "?", "--save_latents", "file/x.safetensors"],
        ["evaluate", "m", "--data_path", "d", "--out", "folder"],
        ["evaluate", "m", "--data_path", "d", "--latents", "own,zero", "--out", "folder"],
        ["data", "mix", "rows.jsonl", "--out", "file/x"],
        ["data", "vary", "no-image", "rows.jsonl", "--out", "file/x"],
        ["data", "import", "swift", "rows.jsonl", "--out", "file/x"],
        ["data", "build", "vsp-spatial-planning", "--out", "file/x"],
        ["data", "rationalize", "rows.jsonl", "--out", "file/x", "--model", "m"],
    ],
    ids=lambda words: " ".join(words[:3]),
)
def test_an_output_comes_before_everything_else(words: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither model nor records are there: had the work begun, these would be what is said."""
    monkeypatch.chdir(place)
    before = everything(place)
    with pytest.raises(UserError, match=r"(is a file; give a folder|is a folder; give a file|Not a directory)"):
        cli.main(words, standalone_mode=False)
    assert everything(place) == before


def test_a_full_disk_in_the_middle_is_one_sentence_with_nothing_left(tmp_path: Path) -> None:
    def fill_folder() -> None:
        with whole_folder(tmp_path / "new") as work:
            write_atomically(work / "x", bytes(2048))

    for fill in (lambda: write_atomically(tmp_path / "x", bytes(2048)), fill_folder):
        with pytest.raises(OSError, match="File too large") as caught, small_disk(1024):
            fill()
        said = users_error(caught.value) or ""
        assert said.startswith(str(tmp_path))
        assert "make room there" in said
        assert everything(tmp_path) == []
    assert users_error(FileNotFoundError(errno.ENOENT, "no such file")) is None


# ---------------------------------------------------------------------------------------------------- the run folder

OURS = json.dumps({"mirage": {"stage": "sft"}})
BEGAN = {"run/config.yaml": ""}
SAVING = BEGAN | {"run/events.jsonl": '{"event": "model save begins"}\n'}
DONE = SAVING | {"config.json": OURS, "model.safetensors": "", "tokenizer_config.json": ""}
GOES_ON = {"run/checkpoints/latest": "global_step1", "run/checkpoints/global_step1/x": ""}


def make(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}], ids=str)
@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"model_best_backup.safetensors": ""}, "model_best_backup.safetensors"),
        ({"tokenizer_config.json": "{}"}, "tokenizer_config.json"),
        ({"model-00001-of-00002.safetensors": ""}, "model-00001-of-00002.safetensors"),
        ({"pytorch_model.bin": ""}, "pytorch_model.bin"),
        ({"weights.gguf": ""}, "weights.gguf"),
        # The base itself.
        ({"config.json": '{"model_type": "qwen2_vl"}', "model.safetensors": ""}, "config.json"),
        ({"config.json": "[]"}, "config.json"),
        # A run that has not come to its end has saved no model.
        (BEGAN | {"model.safetensors": ""}, "model.safetensors"),
        ({"run/notes.txt": ""}, "run"),
        ({"run/checkpoints/latest": ""}, "run"),
        ({"run": ""}, "run"),
        ({"best/model.safetensors": ""}, "best"),
        ({"best/best.json": ""}, "best"),
        (BEGAN | {"best/model.safetensors": ""}, "best"),
        ({"adapter/adapter_config.json": ""}, "adapter"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_run_has_written_is_refused_and_left(
    files: dict[str, str], named: str, flags: dict[str, bool], tmp_path: Path
) -> None:
    make(tmp_path, files)
    before = everything(tmp_path)
    for refuse in (check, claim):
        with pytest.raises(UserError, match=f"holds {named}, which no run has written"):
            refuse(tmp_path, **{"overwrite": False} | flags)
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("files", "flags"),
    [
        ({}, {}),
        ({"notes.txt": "", "logs/rank0.log": "", "README.md": "mine", "base/model.safetensors": ""}, {}),
        (DONE, {"overwrite": True}),
        (DONE | GOES_ON, {"resume": True}),
        # Killed in the middle of a save: config.json is written last.
        (SAVING | GOES_ON | {"model.safetensors": ""}, {"resume": True}),
        (SAVING | {"model.safetensors": ""}, {"overwrite": True}),
        (BEGAN, {"resume": True}),
        # A checkpoint that was brought here.
        ({"run/checkpoints/global_step1/mirage_state.json": ""}, {"resume": True}),
    ],
)
def test_an_empty_folder_and_an_earlier_run_are_taken(
    files: dict[str, str], flags: dict[str, bool], tmp_path: Path
) -> None:
    make(tmp_path, files)
    claim(tmp_path, **{"overwrite": False} | flags)


def test_starting_over_deletes_what_the_run_has_written_and_nothing_else(tmp_path: Path) -> None:
    mine = {
        "model_best_backup.safetensors": "", "notes.txt": "", "best/notes.txt": "", "adapter/old.safetensors": "",
        "run/checkpoints/mine.pt": "", "run/tensorboard/mine.csv": "", "run/notes.txt": "",
    }  # fmt: skip
    theirs = {
        "best/best.json": "{}", "best/config.json": "{}", "best/model.safetensors": "", "best/tokenizer.json": "",
        "adapter/adapter_config.json": "", "adapter/adapter_model.safetensors": "",
        "run/checkpoints/.global_step2.partial/x": "", "run/tensorboard/events.out.tfevents.1.host": "",
        "run/sft/events.out.tfevents.1.host": "",
        "run/log.jsonl": "", "run/completions.jsonl": "",
    }  # fmt: skip
    make(tmp_path, DONE | GOES_ON | mine | theirs)
    claim(tmp_path, overwrite=True)
    left = {name for name in everything(tmp_path) if (tmp_path / name).is_file()}
    # The old model stays until the new one takes its place.
    assert left == set(mine) | {"run/config.yaml", "config.json", "model.safetensors", "tokenizer_config.json"}


def test_starting_over_does_not_delete_what_the_run_starts_from(tmp_path: Path) -> None:
    make(tmp_path, DONE | {"best/best.json": "{}", "best/config.json": OURS})
    for source in (tmp_path, tmp_path / "best", tmp_path / "run" / "checkpoints"):
        with pytest.raises(UserError, match="--overwrite would delete"):
            check(tmp_path, overwrite=True, sources=[source])
    check(tmp_path, overwrite=True, sources=[tmp_path / "base", tmp_path.parent])


def test_a_model_folder_gives_way_with_what_is_not_its_own_kept(tmp_path: Path) -> None:
    model = {"config.json": OURS, "model-00001-of-00002.safetensors": "", "adapter/adapter_config.json": ""}
    # A save of another version may write files that this one does not know.
    both = {"unheard_of.json": "new", "adapter/unheard_of.txt": "new"}
    old = make(tmp_path / "old", model | dict.fromkeys(both, "old") | {"notes.txt": "", "model-merged.safetensors": ""})
    new = make(tmp_path / "new", {"config.json": "new"} | both)
    move_others(old, new)
    assert everything(new) == sorted(["adapter", "config.json", "model-merged.safetensors", "notes.txt", *both])
    assert {(new / name).read_text() for name in (*both, "config.json")} == {"new"}
    assert not old.exists()
    whole = make(tmp_path / "whole", model)
    delete_model(whole)
    delete_model(tmp_path / "gone")
    assert not whole.exists()


def test_a_whole_run_leaves_no_folder_of_checkpoints(tmp_path: Path) -> None:
    make(tmp_path, GOES_ON)
    delete_checkpoints(tmp_path / "run" / "checkpoints")
    assert everything(tmp_path) == ["run"]
