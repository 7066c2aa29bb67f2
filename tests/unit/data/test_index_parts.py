"""The index of records, made in parts: what a start looks at, and what becomes of one that was killed."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from support.indices import BREAK, Counted, Make, every, open_index, selected
from support.records import write_jsonl

from mirage_ds.data import make_index
from mirage_ds.data.images import ImageFinder, image_key
from mirage_ds.data.index import NUMBERS, Index
from mirage_ds.data.index_part import Parts, packed, part_schema, read_part, write_part
from mirage_ds.data.loader import Rows
from mirage_ds.data.make_index import Maker, write_index
from mirage_ds.data.record_files import scan
from mirage_ds.data.selection import Selection, usable
from mirage_ds.errors import UserError


def test_images_are_compared_when_asked(rows: Path, cache: Path, encoder_for: Make) -> None:
    encoder = encoder_for("stage2", 2, beside=rows)

    def start(check_images: bool = True) -> Selection:
        opened = open_index(rows, encoder, ["image_input"], cache, check_images=check_images)
        return usable(opened, rows, 10_000, 0)

    image = rows.parent / "in4.png"
    before = start()
    content = image.read_bytes()
    # As large as before; only its time tells.
    image.write_bytes(content[:-20] + bytes(20))
    assert start(check_images=False).rows.digest == before.rows.digest
    after = start()
    place = int(after.rows.images["image_input"].starts[4])
    own, old = (tuple(index.rows.images["image_input"].keys[place].tolist()) for index in (after, before))
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


def test_an_index_that_cannot_be_read_back_is_a_sentence(
    rows: Path, cache: Path, encoder_for: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that loses what was written: said before anybody trains on it."""

    def loses(file: Path) -> None:
        if file.name == "rows.bin":
            os.truncate(file, 10)

    monkeypatch.setattr(make_index, "sync", loses)
    with pytest.raises(UserError, match="cannot be read back as it was written; look at the disk"):
        open_index(rows, encoder_for("stage2", 2, beside=rows), [], cache)
    assert not [left for left in (cache / "index").iterdir() if left.suffix != ".parts"]


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
    assert tuple(after.images["image_input"].keys[0].tolist()) == image_key(rows.parent / "in0.png")
    assert after["tokens"][0] != before["tokens"][0]


@pytest.mark.parametrize(("where", "gone"), [("input", False), ("input", True), ("helper", False), ("helper", True)])
def test_an_image_that_changed_after_a_start_is_an_error_when_it_is_read(
    where: str, gone: bool, rows: Path, cache: Path, encoder_for: Make
) -> None:
    encoder = encoder_for("stage1", 2, beside=rows)
    start = partial(selected, rows, encoder, 10_000, 0, cache_dir=cache, max_bad_share=1)
    start()
    image = rows.parent / f"{'in' if where == 'input' else 'out'}4.png"
    image.unlink()
    if not gone:
        Image.new("RGB", (280, 280)).save(image)
    index = start()
    field = f"image_{'input' if where == 'input' else 'output'}"
    what = "no image " if gone else "an image changed its size .*; start the run again$"
    with pytest.raises(UserError, match=f"^record on line 5, {field}: {what}") as caught:
        Rows(index.rows, encoder, {})[4]
    assert not caught.value.everywhere
    # Which then looks at it.
    assert start().rows.digest != index.rows.digest


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


def _bytes_of(rows: Index) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in rows.place.iterdir()}


@pytest.mark.parametrize("hurt", ["", "cut", "one bit", "empty"])
def test_an_index_that_was_killed_goes_on_and_equals_one_made_in_one_go(
    hurt: str, rows: Path, cache: Path, encoder_for: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    (rows.parent / "in6.png").rename(rows.parent / "kept.png")
    encoder = encoder_for("stage2", 2, beside=rows)
    monkeypatch.setattr("mirage_ds.data.sources.PIECE_BYTES", 100)
    monkeypatch.setattr(make_index, "processes", lambda *_: 0)
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
    monkeypatch.setattr(make_index, "processes", lambda work, sharers: min(workers, work))
    parts = open_index(rows, encoder, ["image_input"], cache / "parts")
    assert every(parts) == every(whole)
    for name in NUMBERS.names:
        assert np.array_equal(parts[name], whole[name]), name
    for one, other in zip(parts.images["image_input"], whole.images["image_input"], strict=True):
        assert np.array_equal(one, other)
    faults = [*parts.all_faults()]
    assert faults == [*whole.all_faults()]
    assert [fault.line for fault in faults if fault.field == "json"] == [fault.line for fault in scan(rows)[1]]
    assert faults[0].what.startswith("no image 'in6.png'")


def test_a_records_file_that_changes_while_it_is_read_is_refused(
    rows: Path, cache: Path, encoder_for: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_for("stage2", 2, beside=rows)
    before = rows.read_bytes()
    whole = open_index(rows, encoder, [], cache / "whole")
    for place, name in ((Parts, "encode"), (Parts, "read")):
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


def test_joining_keeps_nothing_of_the_texts(tmp_path: Path) -> None:
    one = dict.fromkeys(NUMBERS.names, 3) | packed([1, 2, 3], "[]", "a" * 10_000)
    one |= {"file": 0, "image_input": [{"key": [0, 0], "size": 1}]}
    one["pictures"] = [{"path": "i.png", "place": 0, "bytes": 1, "mtime_ns": 1}]
    write_part(tmp_path / "part", pa.Table.from_pylist([one] * 200, part_schema(["image_input"])))
    (tmp_path / "index").mkdir()
    held = []

    def parts() -> Iterator[pa.Table]:
        for _ in range(20):
            part = read_part(tmp_path / "part")
            assert part is not None
            yield part
            held.append(tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes())

    tracemalloc.start()
    finder = ImageFinder((tmp_path, tmp_path))
    write_index(tmp_path / "index", parts(), ["image_input"], finder, "source", tmp_path / "pictures")
    tracemalloc.stop()
    # A part has 2 MB of texts; the numbers of its rows take 11 kB.
    assert max(held) - held[0] < 3e6


@pytest.mark.parametrize("good", [1, 3])
@pytest.mark.parametrize("where", [0, 1], ids=["first", "in the middle"])
def test_a_file_without_any_record_moves_no_image(
    good: int, where: int, tmp_path: Path, cache: Path, encoder_for: Make
) -> None:
    """A piece never spans files, so that this one is a part without rows."""
    folder = tmp_path / "records"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (56, 28 * (number + 1))).save(folder / f"{number}.png")
    rows = [
        {"text_input": "<image>?", "text_output": "!", "image_input": f"{number}.png"} for number in range(good + 1)
    ]
    for number, part in enumerate([rows[:where], [{"prompt": "x"}], rows[where:]]):
        if part:
            write_jsonl(folder / f"{number}.jsonl", part)
    encoder = encoder_for("sft", 2, beside=folder / "0.jsonl")
    opened = open_index(folder, encoder, ["image_input"], cache)
    with pytest.raises(UserError, match=r"\.jsonl line 1, answer: missing"):
        usable(opened, folder, 10_000, 0)
    found = opened.images["image_input"]
    sound = np.flatnonzero(opened["tokens"])
    assert len(opened) == len(sound) + 1 == len(rows) + 1
    assert [found.of([row]).tolist() for row in sound] == [[place] for place in range(len(rows))]
