"""The index on disk: what it gives equals the encoder's own, it is made once, and nothing stale or broken is used."""

from __future__ import annotations

import errno
import os
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from support.indices import BREAK, Counted, Make, every, open_index, selected, two_a_block

from mirage_ds.data import make_index
from mirage_ds.data.encode import Encoder
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.index import NUMBERS, Index
from mirage_ds.data.index_part import faulty_row, packed, part_schema
from mirage_ds.data.loader import Loader, Rows
from mirage_ds.data.make_index import ABANDONED_S, write_index
from mirage_ds.data.pack import Planner
from mirage_ds.data.record import Fault, Record, to_json
from mirage_ds.data.record_files import scan
from mirage_ds.data.sample import Sample
from mirage_ds.data.selection import usable
from mirage_ds.errors import UserError


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


@pytest.mark.parametrize("stage", ["sft", "stage1", "stage2"])
def test_a_sample_from_the_index_is_the_encoders_on_every_field(
    stage: str, rows: Path, cache: Path, encoder_for: Make
) -> None:
    encoder = encoder_for(stage, 2, beside=rows)
    index = selected(rows, encoder, 10_000, 0, cache_dir=cache, max_bad_share=1)
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
    assert every(index.rows) == [records[row] for row in index.row_ids]
    assert index.rows["line"].tolist() == [record.line for record in records]


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


@pytest.mark.parametrize("how", [*BREAK, "gone"])
@pytest.mark.parametrize("name", ["index.json", "columns.arrow", "pictures.arrow", "rows.bin"])
def test_a_damaged_index_is_made_anew(name: str, how: str, rows: Path, cache: Path, encoder_for: Make) -> None:
    rows.write_text(rows.read_text() + "{\n")
    encoder = encoder_for("stage2", 2, beside=rows)
    whole = open_index(rows, encoder, ["image_input"], cache)
    file = whole.place / name
    before = {part.name: part.read_bytes() for part in whole.place.iterdir()}
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(BREAK[how](before[name]))
    if (name, how) == ("rows.bin", "one bit"):
        # The rows themselves are not read at a start.
        return
    again = open_index(rows, encoder, ["image_input"], cache)
    assert again.digest == whole.digest
    assert {part.name: part.read_bytes() for part in again.place.iterdir()} == before


def test_a_row_that_rots_is_a_sentence_and_the_next_start_mends_it(mixed: Path, cache: Path, encoder_for: Make) -> None:
    encoder = encoder_for("stage2", 2, beside=mixed)
    index = selected(mixed, encoder, 10_000, 0, cache_dir=cache)
    wanted = Rows(index.rows, encoder, {})[7]
    assert isinstance(wanted, Sample)
    file = index.rows.place / "rows.bin"
    content = bytearray(file.read_bytes())
    content[content.index(wanted.input_ids.numpy().astype(np.int32).tobytes()) + 9] ^= 4
    file.write_bytes(content)
    planner = Planner(index.tokens, index.row_ids, 12, 1, 10_000, None, 0)
    for workers in (2, 0):
        # Neither a start nor a worker takes it for whole.
        rotten = selected(mixed, encoder, 10_000, 0, cache_dir=cache) if workers else index
        ((_, batches),) = Loader(rotten.rows, encoder, planner, 0, two_a_block, workers).steps(0, 1)
        with pytest.raises(UserError, match=r"the index of the records is damaged .*; start again") as caught:
            list(batches)
        assert not caught.value.everywhere
    mended = selected(mixed, encoder, 10_000, 0, cache_dir=cache)
    made = Rows(mended.rows, encoder, {})[7]
    assert isinstance(made, Sample)
    assert torch.equal(made.input_ids, wanted.input_ids)


def test_a_process_that_opens_another_index_at_its_place_says_so(rows: Path, cache: Path, encoder_for: Make) -> None:
    encoder = encoder_for("stage2", 2, beside=rows)
    index = open_index(rows, encoder, [], cache)
    travelling = pickle.dumps(index)
    assert pickle.loads(travelling).record(3) == index.record(3)
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
    put = make_index.put

    def wait_for_all(*arguments: Any) -> Index:
        made.append(1)
        while len(made) < 3:
            time.sleep(0.001)
        return put(*arguments)

    monkeypatch.setattr(make_index, "put", wait_for_all)
    with ThreadPoolExecutor(3) as pool:
        opened = list(pool.map(lambda _: open_index(mixed, encoder, ["image_input"], cache), range(3)))
    assert len(made) == 3
    assert len({index.digest for index in opened}) == 1
    assert [left.name for left in (cache / "index").iterdir()] == [opened[0].place.name]
    assert [index.record(11) for index in opened] == [opened[0].record(11)] * 3


def test_an_index_that_comes_and_goes_in_the_instant_of_putting_is_no_fault(
    mixed: Path, cache: Path, encoder_for: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, refused = Path.replace, []

    def busy_once(path: Path, target: Path) -> Path:
        if Path(target).parent.name == "index" and not Path(target).name.startswith(".") and not refused:
            refused.append(target)
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", busy_once)
    index = open_index(mixed, encoder_for("stage2", 2, beside=mixed), ["image_input"], cache)
    assert refused == [index.place]


def test_nobody_sees_half_an_index(
    mixed: Path, cache: Path, encoder_for: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_for("stage2", 2, beside=mixed)

    def killed(*given: Any) -> None:
        write_index(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(make_index, "write_index", killed)
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


def test_an_error_in_a_process_keeps_its_words(
    rows: Path, cache: Path, encoder_for: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirage_ds.data.sources.PIECE_BYTES", 100)
    monkeypatch.setattr(make_index, "processes", lambda *_: 2)

    def refuse(*_: Any) -> None:
        raise UserError("use another tokenizer")

    monkeypatch.setattr(Encoder, "lay_out", refuse)
    with pytest.raises(UserError, match=r"^use another tokenizer$"):
        open_index(rows, encoder_for("stage2", 2, beside=rows), [], cache)


def test_a_cache_that_cannot_be_written_is_one_sentence(rows: Path, tmp_path: Path, encoder_for: Make) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"^{tmp_path}/file: cannot be written \(.*--cache_dir$"):
        open_index(rows, encoder_for("stage2", 2, beside=rows), [], tmp_path / "file")


# ---------------------------------------------------------------------------------------------------- a million of rows


STUB, FAULT = Record(1, "q", "a", ("i.png",), ()), Fault(9, "json", "w", "h")


def synthetic(folder: Path, count: int) -> Index:
    """An index of `count` rows of one image each and a fault, written directly."""
    folder.mkdir(parents=True)
    one = dict.fromkeys(NUMBERS.names, 3) | packed([1, 2, 3], "[1, [[1, 2, 2]], [], null]", to_json(STUB))
    one |= {"file": 0, "image_input": [{"key": [0, 0], "size": 1}], "pictures": []}
    bad = faulty_row(FAULT, ["image_input"]) | {"file": 0, "pictures": []}
    both = pa.Table.from_pylist([one, bad], part_schema(["image_input"]))
    part = both.take(pa.array(np.repeat([0, 1], [count, 1])))
    write_index(folder, [part], ["image_input"], ImageFinder((folder, folder)), "source", folder / "pictures")
    return Index(folder, [folder / "rows.jsonl"], folder / "pictures")


def test_nothing_of_a_row_is_kept_in_python(tmp_path: Path, encoder_for: Make) -> None:
    encoder = encoder_for("stage2", 2)
    travels, blocks = [], []
    for count in (1000, 100_000):
        synthetic(tmp_path / str(count), count)
        before = sys.getallocatedblocks()
        rows = Index(tmp_path / str(count), [tmp_path / "rows.jsonl"], tmp_path / "pictures")
        index = usable(rows, tmp_path / "rows.jsonl", 10, 0, 0.5)
        planner = Planner(index.tokens, index.row_ids, 64, 1, 1000, None, 0, index.patches)
        loader = Loader(index.rows, encoder, planner, 0, two_a_block, 0)
        travels.append(len(pickle.dumps(loader.rows)))
        blocks.append(sys.getallocatedblocks() - before)
        # Six numbers a row, none of more than 8 bytes.
        own = sum(getattr(index, name).nbytes for name in ("row_ids", "tokens", "labels", "runs", "latents", "patches"))
        assert own <= 40 * count
        assert index.skipped == (FAULT,)
        for row in (0, 17, count - 1):
            record, layout = rows.encoded(row)
            assert (record, [*layout.input_ids]) == (STUB, [1, 2, 3])
    assert abs(travels[1] - travels[0]) < 100
    assert abs(blocks[1] - blocks[0]) < 500
