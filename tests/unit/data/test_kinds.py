"""Files that are no JSON lines: each is read, or said in one sentence whose command converts it."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist

from mirage_ds.cli import cli
from mirage_ds.config.mixture import Mixture, Part
from mirage_ds.config.run import RunConfig
from mirage_ds.curate.check import check_file
from mirage_ds.data.encode import Encoder
from mirage_ds.data.folders import find_files, unread, unread_lines
from mirage_ds.data.record_files import read_piece, scan
from mirage_ds.data.sources import pieces
from mirage_ds.engine.setup import World
from mirage_ds.engine.waiting import Waiting
from mirage_ds.errors import UserError
from mirage_ds.run.records import index_records
from mirage_ds.run.settings import Run

ROWS = [{"text_input": f"q, {n} ä", "text_output": "a"} for n in range(3)]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
RAW = TEXT.encode()


def packed(make: Callable[[Path], None], suffix: str, folder: Path) -> bytes:
    place = folder / f"made{suffix}"
    make(place)
    content = place.read_bytes()
    place.unlink()
    return content


def tarred(place: Path) -> None:
    with tarfile.open(place, "w") as file:
        member = tarfile.TarInfo("rows.jsonl")
        member.size = len(RAW)
        file.addfile(member, io.BytesIO(RAW))


def zipped(place: Path) -> None:
    with zipfile.ZipFile(place, "w") as file:
        file.writestr("rows.jsonl", RAW)


def workbook(place: Path) -> None:
    with zipfile.ZipFile(place, "w") as file:
        file.writestr("[Content_Types].xml", "<Types/>")


def of_pandas(place: Path) -> None:
    """As openpyxl orders it, by which pandas writes."""
    with zipfile.ZipFile(place, "w") as file:
        file.writestr("docProps/app.xml", "<Properties/>")
        file.writestr("[Content_Types].xml", "<Types/>")


def with_data(place: Path) -> None:
    """As some programs order it that keep data of their own in a table."""
    with zipfile.ZipFile(place, "w") as file:
        file.writestr("customXml/item1.xml", "<x/>")
        file.writestr("[Content_Types].xml", "<Types/>")


def saved(place: Path) -> None:
    """As save_to_disk writes it."""
    folder = place.with_suffix("")
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    next(folder.glob("*.arrow")).rename(place)


def stored(program: str) -> Callable[[Path], None]:
    def store(place: Path) -> None:
        if not shutil.which(program):
            pytest.skip(f"there is no {program} here")
        place.write_bytes(subprocess.run([program, "-c"], input=RAW, capture_output=True, check=True).stdout)

    return store


# name of the file → its content, or what writes it; what is said of it.
OTHERS: dict[str, tuple[bytes | Callable[[Path], None], str]] = {
    "pretty.json": ("\n".join(json.dumps(row, indent=2) for row in ROWS).encode(), "JSON over several lines"),
    "lines.jsonl.gz": (gzip.compress(RAW), "compressed with gzip"),
    "gzip.jsonl": (gzip.compress(RAW), "compressed with gzip"),
    "lines.jsonl.bz2": (bz2.compress(RAW), "compressed with bzip2"),
    "lines.jsonl.xz": (lzma.compress(RAW), "compressed with xz"),
    "lines.jsonl.zst": (stored("zstd"), "compressed with zstd"),
    "lines.jsonl.lz4": (stored("lz4"), "compressed with lz4"),
    "lines.zip": (zipped, "a zip archive"),
    "lines.tar": (tarred, "a tar archive"),
    "book.xlsx": (workbook, "an Excel table"),
    "book.jsonl": (workbook, "an Excel table"),
    "frame.xlsx": (of_pandas, "an Excel table"),
    "data.xlsx": (with_data, "an Excel table"),
    "utf16.jsonl": (TEXT.encode("utf-16"), "UTF-16 text"),
    "utf16_big.jsonl": (TEXT.encode("utf-16-be"), "UTF-16 text"),
    "utf16_little.jsonl": (TEXT.encode("utf-16-le"), "UTF-16 text"),
    "utf32.jsonl": (TEXT.encode("utf-32"), "UTF-32 text"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS"),
    "page.jsonl": (b"<!DOCTYPE html>\n<html></html>\n", "an HTML page"),
    "pickle.jsonl": (b"\x80\x04\x95\x0f\0\0\0\0\0\0\0", "a binary file"),
}
# What has no converted file in its sentence.
WITHOUT = {
    "lines.zip",
    "lines.tar",
    "book.xlsx",
    "book.jsonl",
    "frame.xlsx",
    "data.xlsx",
    "pointer.jsonl",
    "page.jsonl",
    "pickle.jsonl",
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


@pytest.mark.parametrize("name", OTHERS)
def test_another_kind_is_one_sentence_and_its_command_converts_it(name: str, tmp_path: Path) -> None:
    made, what = OTHERS[name]
    folder = tmp_path / "my data"
    folder.mkdir()
    file = folder / name
    file.write_bytes(made if isinstance(made, bytes) else packed(made, file.suffix, folder))
    with pytest.raises(UserError) as caught:
        list(pieces([file]))
    said = str(caught.value)
    assert said.startswith(f"{file}: ")
    assert what in said
    assert "\n" not in said
    # Every command says the same.
    for read in (scan, lambda path: check_file(path, "sft", None, None, 2)):
        with pytest.raises(UserError) as caught:
            read(file)
        assert str(caught.value) == said
    if name in WITHOUT:
        return
    command = re.split(r"not records; (?:[\w -]+: )?", said)[1]
    if command.startswith("python"):
        exec(command.removeprefix('python -c "').removesuffix('"'), {})
    elif shutil.which(command.split()[0]):
        subprocess.run(command, shell=True, check=True)
    else:
        pytest.skip(f"{command}: no such program here")
    (converted,) = set(folder.glob("*_converted*"))
    found = [record for piece in pieces([converted]) for record in read_piece(piece, converted, tmp_path)]
    assert [record.text_input for record in found] == [row["text_input"] for row in ROWS]


@pytest.mark.parametrize(
    "name", ["UPPER.JSONL", "UPPER.PARQUET", "parquet.jsonl", "marked.jsonl", "lines.json", "lines"]
)
def test_what_is_json_lines_or_parquet_is_read_whatever_its_name(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if "parquet" in name.lower():
        pq.write_table(pa.Table.from_pylist(ROWS), file)
    else:
        file.write_bytes((b"\xef\xbb\xbf" if name.startswith("marked") else b"") + RAW)
    assert check_file(file, "sft", None, None, 2) == (3, [])
    if name.startswith("UPPER"):
        assert find_files(tmp_path) == (file,)


@pytest.mark.parametrize("broken", ["{", "[]", "[1, 2]", "a, b", "no JSON"])
def test_a_first_line_that_is_broken_does_not_make_another_kind(broken: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(" " * 20 + broken + "\n" + TEXT)
    count, faults = check_file(file, "sft", None, None, 2)
    assert (count, [fault.line for fault in faults]) == (4, [1])


# ------------------------------------------------------------------------------------------------------ a training run


@pytest.fixture
def world() -> Iterator[World]:
    import torch

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, 0, torch.device("cpu"), Waiting(None, 0, 1, 60.0))
    dist.destroy_process_group()


def test_a_run_says_the_first_fault_where_no_record_has_the_format(
    world: World, encoder_for: Callable[..., Encoder], tmp_path: Path
) -> None:
    files = {
        "sharegpt.jsonl": json.dumps({"conversations": []}).encode(),
        "broken.jsonl": b"{\n{\n",
        "latin.jsonl": b'{"text_input": "caf\xe9"}\n',
        "lists.jsonl": b"[]\n[]\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.Table.from_pylist([{"jpg": b"x", "txt": "A"}]), tmp_path / "web.parquet")
    for name in (*files, "web.parquet"):
        file = tmp_path / name
        config = RunConfig(model="m", save_model_path="s", stage="sft", data_path=file, cache_dir=tmp_path / "cache")
        for _ in ("made", "opened again"):
            with pytest.raises(UserError, match=re.escape(f"{file}: ") + r".*lines? 1, "):
                index_records(Run(config, world, asked=lambda: False), encoder_for("sft", 2, beside=file), file)
    # An empty file, one of blank lines, a folder.
    (tmp_path / "more").mkdir()
    nothing = "no *.jsonl or *.parquet file in this folder, nor JSON, CSV or Arrow files of one kind"
    for name, content, said in (
        ("empty.jsonl", b"", "holds no record"),
        ("blank.jsonl", b"\n \r\n\n", "holds no record"),
        ("more/notes.xlsx", b"a,b\n", f"{nothing}, but notes.xlsx; name the records"),
    ):
        file = tmp_path / name
        file.write_bytes(content)
        source = file.parent if "/" in name else file
        config = RunConfig(model="m", save_model_path="s", stage="sft", data_path=source, cache_dir=tmp_path / "cache")
        with pytest.raises(UserError, match=re.escape(f"{source}: {said}")):
            index_records(Run(config, world, asked=lambda: False), encoder_for("sft", 2, beside=file), source)


def test_what_a_folder_holds_besides_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    named = {
        **{"b.json": b"[{}]", "c.json": RAW, "d.csv": b"a,b", "e.JSONL.gz": b"", "f.arrow": b"", "g.tsv": b""},
        **{"h.ndjson": b"", "i.xlsx": b"", "j.feather": b""},
    }
    silent = ("a.jsonl", "a.parquet", "A.JSONL", "dataset_info.json", "state.json", "settings.json", "x.png", "x.txt")
    for name in silent:
        (tmp_path / name).write_bytes(b'{"features": {"text_input": 1}}')
    (tmp_path / "settings.json").write_text('{"lr": 1}')
    for name, content in named.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "k.parquet").mkdir()
    assert [file.name for file in unread(tmp_path)] == [*named, "k.parquet"]
    assert unread(tmp_path / "a.jsonl") == unread(tmp_path / "*") == []
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "A.JSONL").unlink()
    (tmp_path / "a.jsonl").write_bytes(RAW)
    cli.main(["data", "check", str(tmp_path), "--stage", "sft"], standalone_mode=False)
    said = f"{tmp_path}: b.json, c.json, d.csv, e.JSONL.gz, f.arrow and 5 more not read; of a folder *.jsonl and"
    assert said in capsys.readouterr().out
    (line,) = unread_lines(Mixture((Part(tmp_path / "a.jsonl", None), Part(tmp_path, None))))
    assert line.startswith(said)
