"""Where records may come from: every form gives the same rows, and a fault names its file and line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.indices import every, open_index, selected

from mirage_ds.curate.check import check_file
from mirage_ds.data import sources
from mirage_ds.data.encode import Encoder
from mirage_ds.data.folders import find_files
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.index import Index
from mirage_ds.data.loader import Rows
from mirage_ds.data.record import Fault
from mirage_ds.data.record_files import scan
from mirage_ds.data.sample import Sample
from mirage_ds.data.sources import content_hash, data_hash
from mirage_ds.errors import UserError
from mirage_ds.run.records import skipped_lines, usable_rows

Make = Callable[..., Encoder]


@pytest.fixture
def folder(mixed: Path, tmp_path: Path) -> Path:
    """The mixed rows with their pictures, in a folder of their own."""
    shutil.copytree(mixed.parent, tmp_path / "data")
    return tmp_path / "data"


def lines_of(folder: Path) -> list[str]:
    return (folder / "mixed.jsonl").read_text().splitlines(keepends=True)


def values_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines_of(folder)]


def embedded(folder: Path, path: str | None) -> dict[str, Any] | None:
    return path and {"bytes": (folder / path).read_bytes(), "path": path}  # type: ignore[return-value]


def split(folder: Path) -> Path:
    lines = lines_of(folder)
    made = folder / "split"
    for name in ("c.jsonl", "a.jsonl", "b.jsonl"):
        made.mkdir(exist_ok=True)
        at = 4 * "abc".index(name[0])
        (made / name).write_text("".join(lines[at : at + 4]))
    (made / "notes.txt").write_text("no records")
    for image in folder.glob("*.png"):
        shutil.copy(image, made)
    return made


def pattern(folder: Path) -> Path:
    """Each file in a folder of its own, with the images of its rows alone, under the same names."""
    lines = lines_of(folder)
    for number in range(3):
        own = folder / f"shard{number}"
        own.mkdir()
        (own / "rows.jsonl").write_text("".join(lines[4 * number : 4 * number + 4]))
        for image in folder.glob("*.png"):
            if 4 * number <= int(image.stem.strip("inout")) < 4 * number + 4:
                shutil.move(image, own)
    return folder / "shard*" / "rows.jsonl"


def parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(values_of(folder)), folder / "rows.parquet", row_group_size=5)
    return folder / "rows.parquet"


def images(folder: Path) -> Path:
    """As `datasets` writes its Image feature: the pictures stand inside, and no image file is left."""
    rows = [
        {**row, "image_input": embedded(folder, row.get("image_input")), "image_output": row.get("image_output")}
        for row in values_of(folder)
    ]
    features = datasets.Features(
        text_input=datasets.Value("string"),
        text_output=datasets.Value("string"),
        image_input=datasets.Image(),
        image_output=datasets.Value("string"),
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "images.parquet")
    for image in folder.glob("in*.png"):
        image.unlink()
    return folder / "images.parquet"


def lists(folder: Path) -> Path:
    """Lists of pictures, of which some are named and some stand inside."""
    rows = values_of(folder)
    for number, row in enumerate(rows):
        path = row.get("image_output")
        inside = {"bytes": None, "path": path} if number % 3 else embedded(folder, path)
        row["image_output"] = [inside] if path else []
        row.setdefault("image_input", None)
    pq.write_table(pa.Table.from_pylist(rows), folder / "lists.parquet")
    return folder / "lists.parquet"


def both(folder: Path) -> Path:
    made = split(folder)
    (made / "b.jsonl").unlink()
    pq.write_table(pa.Table.from_pylist(values_of(folder)[4:8]), made / "b.parquet")
    return made


@pytest.mark.parametrize("confine", [False, True], ids=["", "confined"])
@pytest.mark.parametrize("form", [split, pattern, parquet, images, lists, both])
def test_every_form_gives_the_samples_of_the_json_lines(
    form: Callable[[Path], Path],
    confine: bool,
    folder: Path,
    mixed: Path,
    encoder_for: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sources, "PIECE_ROWS", 2)
    monkeypatch.setattr(sources, "BATCH_ROWS", 3)
    plain = encoder_for("stage2", 2, beside=mixed)
    wanted = [plain.encode(record, row) for row, record in enumerate(scan(mixed)[0])]
    source = form(folder)
    finder = ImageFinder.beside(source, None, confine)
    encoder = Encoder(plain.tokenizer, plain.images, plain.helpers, finder, "stage2", 2)
    index = selected(source, encoder, 10_000, 0, cache_dir=tmp_path / "cache")
    assert index.row_ids.tolist() == list(range(12))
    rows = Rows(index.rows, encoder, {})
    for row, sample in enumerate(wanted):
        made = rows[row]
        assert isinstance(made, Sample)
        assert made.input_ids.equal(sample.input_ids)
        assert made.pixel_values.equal(sample.pixel_values)
        assert made.runs == sample.runs
    texts = [(record.text_input, record.text_output) for record in every(index.rows)]
    assert texts == [(record.text_input, record.text_output) for record in scan(mixed)[0]]
    lines = index.rows["line"].tolist()
    assert lines == (list(range(1, 13)) if len(index.rows.files) == 1 else [1, 2, 3, 4] * 3)


def test_stage1_takes_its_targets_from_pictures_that_stand_inside(
    folder: Path, mixed: Path, encoder_for: Make, tmp_path: Path
) -> None:
    source = lists(folder)
    for image in [*folder.glob("out0.png"), *folder.glob("out9.png")]:
        image.unlink()
    encoder = encoder_for("stage1", 2, beside=source)
    index = selected(source, encoder, 10_000, 0, ["image_output"], 0.5, tmp_path / "cache")
    assert index.row_ids.tolist() == [0, 1, 4, 5, 8, 9]
    direct = selected(mixed, encoder_for("stage1", 2, beside=mixed), 10_000, 0, ["image_output"], 0.5)
    assert index.rows.images["image_output"].keys.tolist() == direct.rows.images["image_output"].keys.tolist()
    assert index.patches.tolist() == direct.patches.tolist()


def test_a_fault_names_file_and_line(folder: Path, encoder_for: Make, tmp_path: Path) -> None:
    source = both(folder)
    bad = {"text_input": 3, "text_output": "a"}
    (source / "c.jsonl").write_text("\n{broken\n" + (source / "c.jsonl").read_text())
    pq.write_table(
        pa.Table.from_pylist([{"text_input": "q", "text_output": " "}, {"text_input": "q", "text_output": "a"}]),
        source / "d.parquet",
    )
    (source / "e.jsonl").write_text(json.dumps(bad) + "\n")
    (source / "in6.png").unlink()
    encoder = encoder_for("stage2", 2, beside=source)
    with pytest.raises(UserError) as caught:
        selected(source, encoder, 10_000, 0, cache_dir=tmp_path / "cache")
    said = str(caught.value)
    assert said.startswith(f"{source}: {source}/b.parquet line 3, image_input: no image 'in6.png'")
    assert said.endswith(f"(and 3 more: `mirage-ds data check {source}` lists them)")
    index = selected(source, encoder, 10_000, 0, max_bad_share=0.5, cache_dir=tmp_path / "cache")
    wanted = [("b.parquet", 3), ("c.jsonl", 2), ("d.parquet", 1), ("e.jsonl", 1)]
    assert [(Path(fault.file).name, fault.line) for fault in index.skipped] == wanted
    # Rows count records over all files: 12 and three faulty ones, the second of d.
    assert index.row_ids.tolist() == [row for row in range(15) if row not in (6, 8, 13)]
    assert usable_rows(index).startswith("12 (4 skipped, lines ")  # type: ignore[union-attr]
    listed = [json.loads(line) for line in skipped_lines([(source, fault) for fault in index.skipped]).splitlines()]
    assert [(Path(row["file"]).name, row["line"]) for row in listed] == wanted
    count, found = check_file(source, "stage2", None, None, 2)
    assert (count, [(Path(fault.file).name, fault.line) for fault in found]) == (16, wanted)


def test_a_single_file_is_not_repeated_in_its_faults(folder: Path) -> None:
    (folder / "mixed.jsonl").write_text("{")
    assert check_file(folder / "mixed.jsonl", "sft", None, None, 2)[1][0].file == ""


def test_files_are_taken_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.parquet", "a.jsonl", "c.json", "b-10.jsonl", "b-2.jsonl"):
        (tmp_path / name).write_text("")
    (tmp_path / "z.jsonl").mkdir()
    found = ["a.jsonl", "a.parquet", "b-10.jsonl", "b-2.jsonl", "b.jsonl"]
    assert [file.name for file in find_files(tmp_path)] == found
    assert [file.name for file in find_files(tmp_path / "*[ab].jsonl")] == ["a.jsonl", "b.jsonl"]
    assert find_files(tmp_path / "c.json") == (tmp_path / "c.json",)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gone.jsonl", "gone.jsonl: no such file of records"),
        ("gone*.jsonl", "gone.*: no file has such a name"),
        ("empty", "empty: no .* file in this folder"),
        ("none", "none: holds no record"),
        ("broken.parquet", r"broken.parquet: cannot be read as Parquet \(.*\); write it anew"),
        ("cut.parquet", r"cut.parquet: cannot be read as Parquet \(.*\); write it anew"),
    ],
)
def test_a_source_without_records_is_a_sentence(name: str, sentence: str, tmp_path: Path, encoder_for: Make) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "none").mkdir()
    (tmp_path / "none/a.jsonl").write_text("\n")
    (tmp_path / "broken.parquet").write_text("no Parquet")
    pq.write_table(pa.table({"text_input": ["q" * 100] * 99, "text_output": ["a"] * 99}), tmp_path / "cut.parquet")
    content = bytearray((tmp_path / "cut.parquet").read_bytes())
    content[4:40] = bytes(36)
    (tmp_path / "cut.parquet").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        open_index(tmp_path / name, encoder_for("sft", 2, beside=tmp_path / name), [], tmp_path / "cache")


def test_pictures_inside_are_written_once_and_again_where_they_are_lost(
    folder: Path, encoder_for: Make, tmp_path: Path
) -> None:
    source = images(folder)
    # Two rows show the same picture.
    table = pq.read_table(source)
    pq.write_table(pa.concat_tables([table, table]), source)
    encoder = encoder_for("stage2", 2, beside=source)

    def start() -> Index:
        return open_index(source, encoder, ["image_input"], tmp_path / "cache")

    before = start()
    written = sorted(file for file in (tmp_path / "cache/pictures").rglob("*") if file.is_file())
    assert len(written) == 6
    shown = {before.record(row).image_input for row in (0, 12)}
    assert len(shown) == 1
    assert {Path(path) for (path,) in shown} <= set(written)
    stamp = written[0].stat().st_mtime_ns
    assert start().digest == before.digest
    written[1].unlink()
    lost = next(row for row in range(12) if str(written[1]) in before.record(row).image_input)
    with pytest.raises(UserError, match=rf"^record on line {lost + 1}, .*; start the run again, which writes it anew$"):
        Rows(start(), encoder, {})[lost]
    after = start()
    assert after.digest == before.digest
    assert written[1].exists()
    assert written[0].stat().st_mtime_ns == stamp
    Image.open(after.record(0).image_input[0]).load()
    # All of them are missed unasked.
    shutil.rmtree(tmp_path / "cache/pictures")
    assert start().digest == before.digest
    assert all(file.exists() for file in written)


def test_a_parquet_row_that_is_no_record_is_a_fault(tmp_path: Path, encoder_for: Make) -> None:
    rows = [
        {"text_input": "q", "text_output": "a", "image_input": {"bytes": b"no picture", "path": None}},
        {"text_input": None, "text_output": "a", "image_input": None},
        {"text_input": "q", "text_output": "a", "image_input": {"bytes": None, "path": "gone.png"}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    pq.write_table(
        pa.table({"text_input": ["q"], "text_output": ["a"], "image_input": [b"raw"]}), tmp_path / "s.parquet"
    )
    encoder = encoder_for("sft", 2, beside=tmp_path / "rows.parquet")
    found = [*open_index(tmp_path, encoder, [], tmp_path / "cache").all_faults()]
    assert [(Path(fault.file).stem, fault.line, fault.field) for fault in found] == [
        ("rows", 1, "image_input"),
        ("rows", 2, "text_input"),
        ("rows", 3, "image_input"),
        ("s", 1, "image_input"),
    ]
    assert "cannot be decoded" in found[0].what
    assert found[1].what == "missing"
    assert found[2].what.startswith("no image 'gone.png'")
    assert "cannot be decoded" in found[3].what


# ------------------------------------------------------------------------------------------------------------- hashes


def test_a_hash_is_that_of_the_content_and_is_remembered_while_the_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    file.write_bytes(b"one")
    os.utime(file, (1, 1))
    read: list[int] = []
    digest = hashlib.file_digest

    def counted(*arguments: Any) -> Any:
        read.append(1)
        return digest(*arguments)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    for _ in range(3):
        assert content_hash(file, cache) == hashlib.sha256(b"one").hexdigest()
    assert len(read) == 1
    file.write_bytes(b"two")
    assert content_hash(file, cache) == hashlib.sha256(b"two").hexdigest()
    # Written just now: it may be written again within a tick of the clock, so that is not remembered.
    stamp = file.stat().st_mtime_ns
    file.write_bytes(b"six")
    os.utime(file, ns=(stamp, stamp))
    assert content_hash(file, cache) == hashlib.sha256(b"six").hexdigest()
    (note,) = (cache / "hashes").iterdir()
    note.write_text("{")
    assert content_hash(file, cache) == hashlib.sha256(b"six").hexdigest()


def test_the_hash_of_several_files_is_over_their_hashes() -> None:
    assert data_hash(["ab"]) == "ab"
    assert data_hash(["ab", "cd"]) == hashlib.sha256(b"ab cd").hexdigest()


def test_a_fault_says_its_file_where_there_is_one() -> None:
    assert str(Fault(3, "json", "what", "how")) == "line 3, json: what; how"
    assert str(Fault(3, "json", "what", "how", "/d/a.jsonl")) == "/d/a.jsonl line 3, json: what; how"
