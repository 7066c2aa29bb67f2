"""The record: every fault names line, field, what and how; images are found in three places; Arrow keeps the rows."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record import Fault, Record, RecordError, from_json, make_record, to_json
from mirage_ds.data.record_files import places, scan
from mirage_ds.errors import UserError

GOOD = {"text_input": "Where? <image>", "text_output": "<output_image> There.", "image_input": "a.png"}


def fault_of(text: str | dict[str, Any], line: int = 7) -> Fault:
    with pytest.raises(RecordError) as caught:
        make_record(text if isinstance(text, str) else json.dumps(text), line)
    fault = caught.value.fault
    assert fault.line == line
    assert fault.how
    assert str(caught.value) == f"line {line}, {fault.field}: {fault.what}; {fault.how}"
    return fault


def without(*names: str, **changed: Any) -> dict[str, Any]:
    return {key: value for key, value in (GOOD | changed).items() if key not in names}


@pytest.mark.parametrize(
    ("row", "field", "what"),
    [
        ('{"text_input": "x", ', "json", "not valid JSON"),
        ('{"text_input": "x"} {"text_output": "y"}', "json", "column 21"),
        ("[1, 2]", "json", "expected an object, found list"),
        ('"text"', "json", "expected an object, found str"),
        ("null", "json", "expected an object, found NoneType"),
        (without("text_input"), "text_input", "missing"),
        (without("text_output"), "text_output", "missing"),
        (without(text_input=3), "text_input", "expected a string, found 3"),
        (without(text_output=None), "text_output", "missing"),
        (without(text_output=["a"]), "text_output", "expected a string, found ['a']"),
        (without(image_input=3), "image_input", "expected a path or a list of paths, found 3"),
        (without(image_input=["a.png", None]), "image_input", "found None"),
        (without(image_input=[""]), "image_input", "found ''"),
        (without(image_output={"url": "a"}), "image_output", "expected a path or a list of paths"),
        (without(image_input=["a.png", "b.png"]), "text_input", "1 <image> mark(s) for 2 image(s)"),
        (without("image_input"), "text_input", "1 <image> mark(s) for 0 image(s)"),
        (without(text_input="<image><image>"), "text_input", "2 <image> mark(s) for 1 image(s)"),
        (without(image_output=["a", "b"]), "text_output", "1 <output_image> mark(s) for 2 helper image(s)"),
        (without(text_output="x", image_output=["a", "b"]), "text_output", "0 <output_image> mark(s) for 2"),
        (without(text_output="<output_image> a <output_image>", image_output="h"), "text_output", "2 <output_image>"),
        (without(text_output=""), "text_output", "empty answer"),
        (without(text_output=" \n\t"), "text_output", "empty answer"),
        (without(text_output=" <output_image>\n", image_output="h.png"), "text_output", "empty answer"),
        (without(text_output="so <image>"), "text_output", "holds <image>"),
        (without(text_input="<output_image> <image>"), "text_input", "holds <output_image>"),
        ({"jpg": "x", "txt": "A"}, "question", "missing (the row has ['jpg', 'txt'])"),
    ],
)
def test_a_faulty_row_names_its_line_its_field_and_what_is_wrong(row: Any, field: str, what: str) -> None:
    fault = fault_of(row)
    assert (fault.field, what in fault.what) == (field, True), fault


@pytest.mark.parametrize("name", ["text_input", "text_output"])
def test_half_a_surrogate_pair_is_a_fault_since_no_file_and_no_tokenizer_can_hold_it(name: str) -> None:
    assert (
        fault_of(json.dumps(without() | {name: "a \ud800 <image>" if name == "text_input" else "\ud800"})).field == name
    )


def test_a_good_row_is_taken_as_written_and_its_extra_keys_survive() -> None:
    extra = {"id": 3, "map_desc": [[1, 0], [0, 2]], "nested": {"ä": None}, "task": "vsp"}
    record = make_record(json.dumps(GOOD | {"image_output": ["h.png"]} | extra), 4)
    assert record == Record(4, GOOD["text_input"], GOOD["text_output"], ("a.png",), ("h.png",), extra)


@pytest.mark.parametrize(
    ("answer", "helpers", "runs"),
    [("x", None, 0), ("x", "h", 1), ("<output_image>x", None, 1), ("<output_image>x<output_image>", ["h", "i"], 2)],
)
def test_runs_are_the_marks_or_one_for_an_unmarked_helper(answer: str, helpers: Any, runs: int) -> None:
    assert make_record(json.dumps({"text_input": "q", "text_output": answer, "image_output": helpers}), 1).runs == runs


def test_absent_empty_and_null_images_are_all_none() -> None:
    for nothing in (None, "", []):
        row = {"text_input": "q", "text_output": "a", "image_input": nothing, "image_output": nothing}
        assert make_record(json.dumps(row), 1).image_input == ()
    assert make_record('{"text_input": "q", "text_output": "a"}', 1).image_output == ()


def test_a_question_alone_is_enough_to_decode_but_is_checked_like_any_other() -> None:
    bare = {"text_input": "q <image>", "image_input": "a.png"}
    assert make_record(json.dumps(bare), 2, answers=False) == Record(2, "q <image>", "", ("a.png",), ())
    with pytest.raises(RecordError, match="line 2, text_input: 1 <image> mark"):
        make_record(json.dumps(bare | {"image_input": []}), 2, answers=False)
    with pytest.raises(RecordError, match="line 2, text_output: expected a string, found 3"):
        make_record(json.dumps(bare | {"text_output": 3}), 2, answers=False)


def test_a_record_error_keeps_its_fault_across_processes() -> None:
    error = RecordError(Fault(3, "json", "what", "how"))
    assert pickle.loads(pickle.dumps(error)).fault == error.fault


def test_scan_counts_blank_lines_and_returns_good_rows_and_faults(tmp_path: Path) -> None:
    good = json.dumps({"text_input": "q", "text_output": "a"})
    file = tmp_path / "rows.jsonl"
    # U+2028 ends a line for str.splitlines, not for JSON lines.
    file.write_text(f'\n{good}\n  \n{{broken\n{good[:-1]}, "note": "a\u2028b"}}', encoding="utf-8")
    records, faults = scan(file)
    assert [record.line for record in records] == [2, 5]
    assert records[1].extra == {"note": "a\u2028b"}
    assert [(fault.line, fault.field) for fault in faults] == [(4, "json")]
    assert [place.line for place in places(file)] == [2, 4, 5]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "holds no record"),
        (b"\n \n\n", "holds no record"),
    ],
)
def test_an_unusable_file_is_one_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        scan(file)
    assert str(file) in str(caught.value)
    assert sentence in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
        scan(tmp_path / "gone.jsonl")


@pytest.fixture
def three_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ImageFinder, list[Path]]:
    """A finder, and its three folders in the order in which it is to look."""
    folders = [tmp_path / name for name in ("beside", "root", "cwd")]
    for folder in folders:
        folder.mkdir()
    monkeypatch.chdir(folders[2])
    return ImageFinder.beside(folders[0] / "rows.jsonl", folders[1]), folders


RECORD = Record(12, "q", "a", ("sub/i.png",), ())


def test_images_are_found_beside_the_file_then_under_the_root_then_in_the_working_directory(three_places: Any) -> None:
    finder, folders = three_places
    for folder in reversed(folders):
        (folder / "sub").mkdir()
        Image.new("RGB", (30, 40)).save(folder / "sub/i.png")
        assert finder.find(RECORD, "image_input", "sub/i.png") == folder / "sub/i.png"
    absolute = str(folders[1] / "sub/i.png")
    assert finder.find(RECORD, "image_input", absolute) == folders[1] / "sub/i.png"
    assert finder.size(RECORD, "image_input", "sub/i.png") == (40, 30)


def test_a_missing_image_names_every_place_once(three_places: Any) -> None:
    finder, folders = three_places
    with pytest.raises(RecordError) as caught:
        finder.find(RECORD, "image_output", "sub/i.png")
    fault = caught.value.fault
    assert (fault.line, fault.field) == (12, "image_output")
    assert fault.what == f"no image 'sub/i.png': looked for {', '.join(str(f / 'sub/i.png') for f in folders)}"
    assert "--image_root" in fault.how
    same = ImageFinder((folders[0], folders[0]))
    with pytest.raises(RecordError) as caught:
        same.find(RECORD, "image_input", "x.png")
    assert caught.value.fault.what.count(str(folders[0])) == 1


def test_a_relative_data_path_and_a_later_change_of_directory_find_the_same_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (30, 40)).save(tmp_path / "i.png")
    monkeypatch.chdir(tmp_path)
    finder = ImageFinder.beside(Path("rows.jsonl"), None)
    monkeypatch.chdir("/")
    assert finder.find(RECORD, "image_input", "i.png") == tmp_path / "i.png"


@pytest.mark.parametrize(
    "path", ["data:image/png;base64," + "A" * 5000, "a\0b.png", "."], ids=["longer than a path may be", "nul", "folder"]
)
def test_what_cannot_be_a_path_is_a_missing_image(tmp_path: Path, path: str) -> None:
    with pytest.raises(RecordError) as caught:
        ImageFinder((tmp_path,)).find(RECORD, "image_input", path)
    assert caught.value.fault.field == "image_input"


@pytest.mark.parametrize("how", ["truncated", "text", "empty"])
def test_an_image_that_does_not_decode_is_a_fault_that_names_the_file(tmp_path: Path, how: str) -> None:
    place = tmp_path / "i.png"
    Image.effect_noise((60, 60), 90).save(place)
    whole = place.read_bytes()
    place.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"no picture", "empty": b""}[how])
    with pytest.raises(RecordError) as caught:
        ImageFinder((tmp_path,)).load(RECORD, "image_input", "i.png")
    fault = caught.value.fault
    assert (fault.line, fault.field, fault.how) == (12, "image_input", "replace the file")
    assert fault.what.startswith(f"image {place} cannot be decoded (")


@pytest.mark.parametrize(("width", "height", "refused"), [(200, 1, False), (201, 1, True), (1, 201, True)])
def test_a_side_ratio_above_200_is_a_fault(tmp_path: Path, width: int, height: int, refused: bool) -> None:
    Image.new("RGB", (width, height)).save(tmp_path / "i.png")
    finder = ImageFinder((tmp_path,))
    if not refused:
        assert finder.size(RECORD, "image_input", "i.png") == (height, width)
        return
    with pytest.raises(RecordError) as caught:
        finder.size(RECORD, "image_input", "i.png")
    assert f"{width}×{height}" in caught.value.fault.what


def test_an_image_of_any_mode_arrives_as_rgb(tmp_path: Path) -> None:
    for mode, colour in (("L", 90), ("RGBA", (10, 20, 30, 255)), ("P", 3), ("CMYK", (0, 0, 0, 0))):
        name = f"{mode}.{'tiff' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (30, 40), colour).save(tmp_path / name)
        assert ImageFinder((tmp_path,)).load(RECORD, "image_input", name).mode == "RGB"


def test_arrow_returns_the_records_memory_mapped_in_file_order(tmp_path: Path) -> None:
    rows = [
        {"text_input": "q <image>", "text_output": "a\nb ✓", "image_input": "i.png", "image_output": "h.png", "n": 1},
        {
            "text_input": "<image><image>",
            "text_output": "c",
            "image_input": ["i.png", "j.png"],
            "n": {"deep": [1.5, None]},
        },
        {"text_input": "", "text_output": "<output_image>d<output_image>", "image_output": ["h", "k"], "other": "ä"},
        {"text_input": "t", "text_output": "e"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    expected = [
        Record(1, "q <image>", "a\nb ✓", ("i.png",), ("h.png",), {"n": 1}),
        Record(3, "<image><image>", "c", ("i.png", "j.png"), (), {"n": {"deep": [1.5, None]}}),
        Record(5, "", "<output_image>d<output_image>", (), ("h", "k"), {"other": "ä"}),
        Record(7, "t", "e", (), (), {}),
    ]
    assert scan(file)[0] == expected
    assert [from_json(to_json(record)) for record in expected] == expected


def test_commands_read_what_training_reads(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    row = {"text_input": ["q"], "text_output": ["a"]}
    for place in ("a/1.parquet", "a/2.jsonl", "b/3.parquet"):
        pq.write_table(pa.table(row), tmp_path / place)
    for place, lines in ((tmp_path / "a", [1, 2]), (tmp_path / "a/2.jsonl", [1])):
        records, faults = scan(place)
        assert ([record.line for record in records], faults) == (lines, [])
    with pytest.raises(UserError, match="of several folders, this command those of one"):
        scan(tmp_path / "*/*.parquet")
