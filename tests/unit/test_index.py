"""The index on disk: what it gives equals the encoder's own, it is made once, and nothing stale or broken is used."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from mirage_ds.data import indexing
from mirage_ds.data.encode import Encoder
from mirage_ds.data.features import image_key
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.index import (
    COLUMNS,
    FAULT_SCHEMA,
    EncodedRows,
    layout_check,
)
from mirage_ds.data.indexing import Maker, open_index
from mirage_ds.data.joining import ABANDONED_S, Writer
from mirage_ds.data.loader import Index, Loader, Rows, build_index, usable
from mirage_ds.data.pack import Planner
from mirage_ds.data.parts import Parts, schemas
from mirage_ds.data.record import Fault, Record
from mirage_ds.data.record_files import record_of, scan
from mirage_ds.data.sample import Layout, Sample
from mirage_ds.errors import UserError

Make = Callable[..., Encoder]


@pytest.fixture
def rows(mixed: Path, tmp_path: Path) -> Path:
    """The mixed rows, and three more: several images, several runs, special tokens spelt out."""
    shutil.copytree(mixed.parent, tmp_path / "data")
    file = tmp_path / "data" / mixed.name
    more = [
        {
            "text_input": "<image> or <image>? Say <|im_end|>.",
            "text_output": "<output_image>a <output_image>b <|latent_pad|>",
            "image_input": ["in0.png", "in1.png"],
            "image_output": ["out2.png", "out3.png"],
        },
        {"text_input": "ä ✓", "text_output": "ö", "other": {"n": [1.5, None]}},
        {"text_input": "q", "text_output": "a", "image_output": "out1.png", "image_input": "in0.png"},
    ]
    file.write_text(file.read_text() + "\n" + "".join(json.dumps(row) + "\n" for row in more))
    return file


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


@pytest.mark.parametrize("stage", ["sft", "stage1", "stage2"])
def test_a_sample_from_the_index_is_the_encoders_on_every_field(
    stage: str, rows: Path, cache: Path, encoder_for: Make
) -> None:
    encoder = encoder_for(stage, 2, beside=rows)
    index = build_index(rows, encoder, 10_000, 0, cache_dir=cache, max_bad_share=1)
    records = scan(rows)[0]
    assert len(index.rows) == len(records) == 15
    helped = [row for row, record in enumerate(records) if record.image_output]
    assert index.row_ids.tolist() == (helped if stage == "stage1" else list(range(15)))
    given = Rows(index.rows, encoder, {})
    for place, row in enumerate(index.row_ids.tolist()):
        made, wanted = given[row], encoder.encode(records[row], row)
        assert isinstance(made, Sample)
        assert [name for name in Sample._fields if not same(getattr(made, name), getattr(wanted, name))] == []
        measure = encoder.measure(records[row])
        counts = (index.tokens[place], index.labels[place], index.runs[place])
        assert counts == (measure.tokens, measure.labels, measure.runs)
        assert index.patches[place] == len(wanted.pixel_values) + len(wanted.helper_pixel_values)
    # What scorers and the log ask for: the record as the user wrote it.
    assert [record_of(row) for row in index.rows] == records
    assert index.rows["line"].tolist() == [record.line for record in records]


class Counted:
    """Counts the rows laid out and the images opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.rows = self.images = 0
        lay_out, opened = Encoder.lay_out, Image.open

        def counted(encoder: Encoder, record: Record) -> Any:
            self.rows += 1
            return lay_out(encoder, record)

        def looked(*arguments: Any, **more: Any) -> Any:
            self.images += 1
            return opened(*arguments, **more)

        monkeypatch.setattr(Encoder, "lay_out", counted)
        monkeypatch.setattr(Image, "open", looked)

    def since(self) -> tuple[int, int]:
        found = self.rows, self.images
        self.rows = self.images = 0
        return found


def test_it_is_made_once_for_each_setting(
    rows: Path, cache: Path, encoder_for: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    one = open_index(rows, encoder_for("stage2", 2, beside=rows), ["image_input"], cache)
    # Seven input images; each is opened once, however many rows show it.
    assert counted.since() == (15, 7)
    again = open_index(rows, encoder_for("stage2", 2, beside=rows), ["image_input"], cache)
    assert counted.since() == (0, 0)
    assert (again.place, again.digest) == (one.place, one.digest)
    others = [
        open_index(rows, encoder_for("stage2", 3, beside=rows), ["image_input"], cache),
        open_index(rows, encoder_for("sft", 2, beside=rows), ["image_input"], cache),
        open_index(rows, encoder_for("stage2", 2, beside=rows, pixels=(None, 4000)), ["image_input"], cache),
        open_index(rows, encoder_for("stage2", 2, beside=rows), [], cache),
    ]
    assert counted.since()[0] == 4 * 15
    assert len({index.place for index in [one, *others]}) == 5
    # Content is what counts, not the time.
    os.utime(rows, (1, 1))
    open_index(rows, encoder_for("stage2", 2, beside=rows), ["image_input"], cache)
    assert counted.since() == (0, 0)
    rows.write_text(rows.read_text().replace("Question", "Riddle", 1))
    open_index(rows, encoder_for("stage2", 2, beside=rows), ["image_input"], cache)
    assert counted.since()[0] == 15
    assert not [left for left in (cache / "index").iterdir() if left.name.startswith(".")]


def test_the_working_directory_decides_only_where_it_did(
    rows: Path, cache: Path, encoder_for: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encoder = encoder_for("stage2", 2, beside=rows)
    elsewhere = replace(encoder, finder=ImageFinder((*encoder.finder.folders[:-1], tmp_path)))
    open_index(rows, encoder, [], cache)
    counted = Counted(monkeypatch)
    open_index(rows, elsewhere, [], cache)
    assert counted.since() == (0, 0)
    # Now an image lies in the working directory alone.
    (rows.parent / "in0.png").rename(tmp_path / "in0.png")
    assert open_index(rows, elsewhere, [], cache, check_images=True).faults == 0
    assert open_index(rows, encoder, [], cache).faults == 3


BREAK: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) * 3 // 4],
    "one bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
}


@pytest.mark.parametrize("how", [*BREAK, "gone"])
@pytest.mark.parametrize("name", ["index.json", "tokens.bin", "image_input.keys.bin", "faults.arrow", "rows.arrow"])
def test_a_damaged_index_is_made_anew(name: str, how: str, mixed: Path, cache: Path, encoder_for: Make) -> None:
    encoder = encoder_for("stage2", 2, beside=mixed)
    whole = open_index(mixed, encoder, ["image_input"], cache)
    file = whole.place / name
    before = {part.name: part.read_bytes() for part in whole.place.iterdir()}
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(BREAK[how](before[name]))
    if (name, how) == ("rows.arrow", "one bit"):
        # The rows themselves are not read at a start.
        return
    again = open_index(mixed, encoder, ["image_input"], cache)
    assert again.digest == whole.digest
    assert {part.name: part.read_bytes() for part in again.place.iterdir()} == before


def test_a_row_that_rots_is_a_sentence_and_the_next_start_mends_it(mixed: Path, cache: Path, encoder_for: Make) -> None:
    encoder = encoder_for("stage2", 2, beside=mixed)
    index = build_index(mixed, encoder, 10_000, 0, cache_dir=cache)
    wanted = Rows(index.rows, encoder, {})[7]
    assert isinstance(wanted, Sample)
    file = index.rows.place / "rows.arrow"
    content = bytearray(file.read_bytes())
    content[content.index(wanted.input_ids.numpy().astype(np.int32).tobytes()) + 9] ^= 4
    file.write_bytes(content)
    planner = Planner(index.tokens, index.row_ids, 12, 1, 10_000, None, 0)
    for workers in (2, 0):
        # Neither a start nor a worker takes it for whole.
        rotten = build_index(mixed, encoder, 10_000, 0, cache_dir=cache) if workers else index
        ((_, batches),) = Loader(rotten.rows, encoder, planner, 0, 3, workers).steps(0, 1)
        with pytest.raises(UserError, match=r"the index of the records is damaged .*; start again") as caught:
            list(batches)
        assert not caught.value.everywhere
    mended = build_index(mixed, encoder, 10_000, 0, cache_dir=cache)
    made = Rows(mended.rows, encoder, {})[7]
    assert isinstance(made, Sample)
    assert torch.equal(made.input_ids, wanted.input_ids)


def test_a_process_that_opens_another_index_at_its_place_says_so(rows: Path, cache: Path, encoder_for: Make) -> None:
    encoder = encoder_for("stage2", 2, beside=rows)
    index = open_index(rows, encoder, [], cache)
    travelling = pickle.dumps(index)
    assert pickle.loads(travelling)[3] == index[3]
    Image.new("RGB", (84, 140)).save(rows.parent / "in0.png")
    assert open_index(rows, encoder, [], cache, check_images=True).place == index.place
    with pytest.raises(UserError, match="damaged or another one"):
        pickle.loads(travelling)


def test_builders_at_the_same_time_end_with_one_whole_index(
    mixed: Path, cache: Path, encoder_for: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_for("stage2", 2, beside=mixed)
    # All of them have written theirs before the first one is put in its place.
    made: list[int] = []
    put = indexing.put

    def wait_for_all(*arguments: Any) -> EncodedRows:
        made.append(1)
        while len(made) < 3:
            time.sleep(0.001)
        return put(*arguments)

    monkeypatch.setattr(indexing, "put", wait_for_all)
    with ThreadPoolExecutor(3) as pool:
        opened = list(pool.map(lambda _: open_index(mixed, encoder, ["image_input"], cache), range(3)))
    assert len(made) == 3
    assert len({index.digest for index in opened}) == 1
    assert [left.name for left in (cache / "index").iterdir()] == [opened[0].place.name]
    assert [index[11] for index in opened] == [opened[0][11]] * 3


def test_nobody_sees_half_an_index(
    mixed: Path, cache: Path, encoder_for: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_for("stage2", 2, beside=mixed)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            open_index(mixed, encoder, [], cache)
    # Its parts alone.
    assert [left.suffix for left in (cache / "index").iterdir()] == [".parts"]
    # What a process leaves that could not clean up is removed when it is old, and never used.
    for name, age in ((".abc.left", 2 * ABANDONED_S), (".abc.running", 0)):
        left = cache / "index" / name
        left.mkdir()
        os.utime(left, (left.stat().st_mtime - age,) * 2)
    assert len(open_index(mixed, encoder, [], cache)) == 12
    assert {left.name for left in (cache / "index").iterdir() if left.name.startswith(".")} == {".abc.running"}


def test_images_are_compared_when_asked(rows: Path, cache: Path, encoder_for: Make) -> None:
    encoder = encoder_for("stage2", 2, beside=rows)

    def start(check_images: bool = True) -> Index:
        opened = open_index(rows, encoder, ["image_input"], cache, check_images=check_images)
        return usable(opened, rows, 10_000, 0, ["image_input"])

    image = rows.parent / "in4.png"
    before = start()
    content = image.read_bytes()
    # As large as before; only its time tells.
    image.write_bytes(content[:-20] + bytes(20))
    assert start(check_images=False).rows.digest == before.rows.digest
    after = start()
    place = int(after.images["image_input"].starts[4])
    own, old = (tuple(index.images["image_input"].keys[place].tolist()) for index in (after, before))
    assert own == image_key(image) != old
    # Larger: the row has other tokens.
    Image.new("RGB", (280, 280)).save(image)
    assert start().tokens[4] > before.tokens[4]
    image.unlink()
    with pytest.raises(UserError, match=r"line 5, image_input: no image 'in4\.png'"):
        start()
    # The images of records with a fault are looked at unasked.
    image.write_bytes(content)
    assert start(check_images=False).rows.digest == before.rows.digest


def test_an_image_that_now_lies_in_an_earlier_place_is_noticed(
    rows: Path, cache: Path, encoder_for: Make, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (rows.parent / "in0.png").rename(root / "in0.png")
    encoder = replace(encoder_for("stage2", 2, beside=rows), finder=ImageFinder.beside(rows, root))
    before = open_index(rows, encoder, ["image_input"], cache)
    Image.new("RGB", (112, 112)).save(rows.parent / "in0.png")
    after = open_index(rows, encoder, ["image_input"], cache, check_images=True)
    assert tuple(after.images("image_input").keys[0].tolist()) == image_key(rows.parent / "in0.png")
    assert after["tokens"][0] != before["tokens"][0]


@pytest.mark.parametrize(("where", "gone"), [("input", False), ("input", True), ("helper", False), ("helper", True)])
def test_an_image_that_changed_after_a_start_is_an_error_when_it_is_read(
    where: str, gone: bool, rows: Path, cache: Path, encoder_for: Make
) -> None:
    encoder = encoder_for("stage1", 2, beside=rows)
    start = partial(build_index, rows, encoder, 10_000, 0, cache_dir=cache, max_bad_share=1)
    start()
    image = rows.parent / f"{'in' if where == 'input' else 'out'}4.png"
    image.unlink()
    if not gone:
        Image.new("RGB", (280, 280)).save(image)
    index = start()
    fault = Rows(index.rows, encoder, {})[4]
    assert isinstance(fault, Fault)
    field = f"image_{'input' if where == 'input' else 'output'}"
    said = (fault.line, fault.field, fault.what.startswith("no image" if gone else "an image changed its size"))
    assert said == (5, field, True)
    assert gone or fault.how.startswith("start again with --check_images")


def test_a_start_with_an_index_looks_at_no_image(
    rows: Path, cache: Path, encoder_for: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_for("stage2", 2, beside=rows)
    open_index(rows, encoder, ["image_input"], cache)
    looked: list[str] = []
    for name in ("stat", "lstat", "open"):
        monkeypatch.setattr(os, name, _noting(looked, getattr(os, name)))
    monkeypatch.setattr("io.open", _noting(looked, open))
    open_index(rows, encoder, ["image_input"], cache)
    assert looked
    assert not [name for name in looked if name.endswith(".png")]
    open_index(rows, encoder, ["image_input"], cache, check_images=True)
    assert len({name for name in looked if name.endswith(".png")}) == 7


def _noting(looked: list[str], call: Callable[..., Any]) -> Callable[..., Any]:
    def noted(path: Any, *words: Any, **more: Any) -> Any:
        looked.append(str(path))
        return call(path, *words, **more)

    return noted


def _bytes_of(rows: EncodedRows) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in rows.place.iterdir()}


@pytest.mark.parametrize("hurt", ["", "cut", "one bit", "empty"])
def test_an_index_that_was_killed_goes_on_and_equals_one_made_in_one_go(
    hurt: str, rows: Path, cache: Path, encoder_for: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    (rows.parent / "in6.png").rename(rows.parent / "kept.png")
    encoder = encoder_for("stage2", 2, beside=rows)
    monkeypatch.setattr("mirage_ds.data.sources.PIECE_BYTES", 100)
    monkeypatch.setattr(indexing, "processes", lambda *_: 0)
    whole = open_index(rows, encoder, ["image_input"], cache / "whole")
    assert whole.faults == 1
    made: list[int] = []
    encode = Parts.encode

    def killed(parts: Parts, number: int) -> Any:
        if len(made) == 6:
            raise KeyboardInterrupt
        made.append(number)
        return encode(parts, number)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "encode", killed)
        with pytest.raises(KeyboardInterrupt):
            open_index(rows, encoder, ["image_input"], cache)
    left = next((cache / "index").glob(".*.parts"))
    assert sorted(file.name for file in left.glob("[0-9]*")) == sorted(map(str, made))
    if hurt:
        (left / "3").write_bytes(BREAK[hurt]((left / "3").read_bytes()))
    counted = Counted(monkeypatch)
    again = open_index(rows, encoder, ["image_input"], cache)
    assert counted.since()[0] == 15 - len(made) + bool(hurt)
    assert _bytes_of(again) == _bytes_of(whole)
    assert not [*(cache / "index").glob(".*")]


def test_what_a_killed_index_found_faulty_is_looked_at_again(
    rows: Path, cache: Path, encoder_for: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    (rows.parent / "in6.png").rename(rows.parent / "kept.png")
    encoder = encoder_for("stage2", 2, beside=rows)
    with monkeypatch.context() as patch:
        patch.setattr(Maker, "join", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_index(rows, encoder, ["image_input"], cache)
    (rows.parent / "kept.png").rename(rows.parent / "in6.png")
    assert open_index(rows, encoder, ["image_input"], cache).faults == 0


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("workers", [0, 2])
def test_pieces_and_processes_change_nothing(
    workers: int, rows: Path, cache: Path, encoder_for: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows.write_bytes(b"\xef\xbb\xbf" + rows.read_bytes().replace(b"\n", b"\r\n") + b"{\r\r\n\xff\n")
    (rows.parent / "in6.png").unlink()
    encoder = encoder_for("stage2", 2, beside=rows)
    whole = open_index(rows, encoder, ["image_input"], cache / "whole")
    monkeypatch.setattr("mirage_ds.data.sources.PIECE_BYTES", 100)
    monkeypatch.setattr(indexing, "processes", lambda work, sharers: min(workers, work))
    parts = open_index(rows, encoder, ["image_input"], cache / "parts")
    assert [*parts] == [*whole]
    for name in COLUMNS:
        assert np.array_equal(parts[name], whole[name]), name
    for one, other in zip(parts.images("image_input"), whole.images("image_input"), strict=True):
        assert np.array_equal(one, other)
    faults = [*parts.all_faults()]
    assert faults == [*whole.all_faults()]
    assert [fault.line for fault in faults if fault.field == "json"] == [fault.line for fault in scan(rows)[1]]
    assert faults[0].what.startswith("no image 'in6.png'")


def test_an_error_in_a_process_keeps_its_words(
    rows: Path, cache: Path, encoder_for: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirage_ds.data.sources.PIECE_BYTES", 100)
    monkeypatch.setattr(indexing, "processes", lambda *_: 2)

    def refuse(*_: Any) -> None:
        raise UserError("use another tokenizer")

    monkeypatch.setattr(Encoder, "lay_out", refuse)
    with pytest.raises(UserError, match=r"^use another tokenizer$"):
        open_index(rows, encoder_for("stage2", 2, beside=rows), [], cache)


def test_a_records_file_that_changes_while_it_is_read_is_refused(
    rows: Path, cache: Path, encoder_for: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_for("stage2", 2, beside=rows)
    before = rows.read_bytes()
    whole = open_index(rows, encoder, [], cache / "whole")
    for place, name in ((Parts, "encode"), (Writer, "add")):
        work = getattr(place, name)

        def meddle(*given: Any, work: Callable[..., Any] = work) -> Any:
            rows.write_bytes(before.replace(b"Question", b"Puzzling", 1))
            return work(*given)

        with monkeypatch.context() as patch:
            patch.setattr(place, name, meddle)
            with pytest.raises(UserError, match=rf"{rows}: changed while it was read"):
                open_index(rows, encoder, [], cache)
        # What was made of it is not taken for the old one's.
        rows.write_bytes(before)
        assert _bytes_of(open_index(rows, encoder, [], cache)) == _bytes_of(whole)
        shutil.rmtree(cache / "index")


def test_a_cache_that_cannot_be_written_is_one_sentence(rows: Path, tmp_path: Path, encoder_for: Make) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"^{tmp_path}/file: cannot be written \(.*--cache_dir$"):
        open_index(rows, encoder_for("stage2", 2, beside=rows), [], tmp_path / "file")


# ---------------------------------------------------------------------------------------------------- a million of rows


def synthetic(folder: Path, count: int) -> EncodedRows:
    """An index of `count` rows of one image each, written directly."""
    folder.mkdir(parents=True)
    kinds = {"input_ids": [1, 2, 3], "answer_start": 1, "grids": [1, 2, 2], "helper_grids": []}
    stub = Record(1, "q", "a", ("i.png",), ())
    check = layout_check(Layout([1, 2, 3], 1, [(1, 2, 2)], []), stub)
    ones: dict[str, dict[str, Any]] = {
        "numbers": dict.fromkeys(COLUMNS, 3) | {"check": check, "file": 0, "image_input": 1},
        "rows": kinds | {"image_input": ["i.png"], "image_output": []},
        "records": dict(line=1, text_input="q", text_output="a", image_input=["i.png"], image_output=[], extra="{}"),
        "image_input": dict(high=0, low=0, size=1),
    }
    fault = dict(zip(FAULT_SCHEMA.names, (-1, 0, 9, "json", "w", "h"), strict=True))
    part = {name: schema.empty_table() for name, schema in schemas(["image_input"]).items()}
    for name, one in ones.items():
        table = pa.Table.from_pylist([one], schema=part[name].schema)
        part[name] = table.take(pa.array(np.zeros(count, dtype=np.int64))).combine_chunks()
    part["faults"] = pa.Table.from_pylist([fault], schema=FAULT_SCHEMA)
    with ExitStack() as stack:
        writer = Writer(folder, ["image_input"], stack)
        writer.add(part)
    writer.finish(ImageFinder((folder, folder)), "source")
    return EncodedRows(folder, [folder / "rows.jsonl"], folder / "pictures")


def test_nothing_of_a_row_is_kept_in_python(tmp_path: Path, encoder_for: Make) -> None:
    encoder = encoder_for("stage2", 2)
    travels, blocks = [], []
    for count in (1000, 100_000):
        synthetic(tmp_path / str(count), count)
        before = sys.getallocatedblocks()
        rows = EncodedRows(tmp_path / str(count), [tmp_path / "rows.jsonl"], tmp_path / "pictures")
        index = usable(rows, tmp_path / "rows.jsonl", 10, 0, ["image_input"], 0.5)
        planner = Planner(index.tokens, index.row_ids, 64, 1, 1000, None, 0, index.patches)
        loader = Loader(index.rows, encoder, planner, 0, 3, 0)
        travels.append(len(pickle.dumps(loader.rows)))
        blocks.append(sys.getallocatedblocks() - before)
        # Five numbers a row, none of more than 8 bytes.
        own = sum(getattr(index, name).nbytes for name in ("row_ids", "tokens", "labels", "runs", "patches"))
        assert own <= 40 * count
        assert index.skipped == (Fault(9, "json", "w", "h"),)
        for row in (0, 17, count - 1):
            record, layout = rows.encoded(row)
            assert (record.image_input, [*layout.input_ids]) == (("i.png",), [1, 2, 3])
    assert abs(travels[1] - travels[0]) < 100
    assert abs(blocks[1] - blocks[0]) < 500
