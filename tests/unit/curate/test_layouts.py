"""What other trainers' rows hold is carried over or refused with its line; nulls of columns count as nothing."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mirage_ds.cli import cli
from mirage_ds.config.columns import LAYOUTS, Columns, Layout
from mirage_ds.curate.check import check_file
from mirage_ds.data.layouts import read_row
from mirage_ds.data.messages import MessageError
from mirage_ds.data.record import RecordError, make_record
from mirage_ds.data.record_files import read_piece, scan
from mirage_ds.data.sources import pieces
from mirage_ds.errors import UserError

HELPERS = "helper_images"


def say(role: str, content: Any, **more: Any) -> dict:
    return {"role": role, "content": content, **more}


def talk(question: Any, answer: Any, **more: Any) -> dict:
    return {"messages": [say("user", question), say("assistant", answer)], **more}


def sharegpt(*turns: tuple[str, Any], **more: Any) -> dict:
    return {"conversations": [{"from": who, "value": value} for who, value in turns], **more}


def swift(**more: Any) -> dict:
    return {"query": "Q", "response": "A", **more}


TOOL = {"type": "function", "function": {"name": "f"}}
PAIR = {"chosen": "A", "rejected": "B"}
ANY = LAYOUTS

# What no record can hold: layouts, the row, what is said.
REFUSED: list[tuple[tuple[Layout, ...], dict, str]] = [
    # Other media.
    (ANY, talk("<video>Q", "A", videos=["a.mp4"]), "videos: holds a video"),
    (ANY, talk("Q", "A", videos=["a.mp4"]), "videos: holds a video"),
    (ANY, talk("Q", "A", video="a.mp4"), "video: holds a video"),
    (ANY, talk("<video>Q", "A"), "'<video>' would be plain text here"),
    (ANY, talk("Q", "A", audios=["a.wav"]), "audios: holds sound"),
    (ANY, talk("<audio>Q", "A"), "'<audio>' would be plain text"),
    (ANY, talk([{"type": "video", "video": "a.mp4"}], "A"), "messages 1: no item"),
    (ANY, talk([{"type": "input_audio", "input_audio": {"data": "x"}}], "A"), "messages 1: no item"),
    (("llama-factory",), sharegpt(("human", "<video>Q"), ("gpt", "A"), videos=["a.mp4"]), "videos: holds a video"),
    # Boxes.
    (ANY, talk("<ref-object>Q", "<bbox>", objects={"ref": ["cat"], "bbox": [[1, 2]]}), "objects: holds boxes"),
    (ANY, talk("Q", "A", bbox=[[1, 2, 3, 4]]), "bbox: holds boxes"),
    (ANY, talk("Q", "at <bbox>"), "messages 2: '<bbox>' would be plain text"),
    (ANY, talk("Find <ref-object>", "A"), "messages 1: '<ref-object>' would be plain text"),
    (ANY, talk("Q", "<|box_start|>(1,2)<|box_end|>"), r"messages 2: '<\|box_start\|>' would be plain text"),
    (ANY, talk("<|vision_start|><|image_pad|>Q", "A"), r"messages 1: '<\|vision_start\|>' would be plain text"),
    # Bad answers.
    (ANY, talk("Q", "A", label=False), "label: is False: an example of a bad answer"),
    (ANY, talk("Q", "A", kto_tag=False), "kto_tag: is False"),
    (ANY, talk("Q", "A", label=0), "label: is 0"),
    (ANY, talk("Q", "A", labels=[True, False]), "labels: is"),
    (ANY, talk("Q", "A", rejected_response="B"), "rejected_response: holds a better and a worse answer"),
    (ANY, talk("Q", "A", rejected_messages=[say("user", "Q")]), "rejected_messages: holds"),
    (ANY, talk("Q", "A", negative_messages=[[say("user", "Q")]]), "negative_messages: holds"),
    (("trl",), {"prompt": "Q", **PAIR}, "chosen: holds a better and a worse answer"),
    (("trl",), {key: talk("Q", value)["messages"] for key, value in PAIR.items()}, "chosen: holds"),
    (("trl",), {"prompt": "Q", "completions": ["A", "B"], "labels": [True, True]}, "completions: holds several"),
    (("swift", "llama-factory"), {"instruction": "Q", **PAIR}, "chosen: holds"),
    (("llama-factory",), sharegpt(("human", "Q"), rejected={"from": "gpt", "value": "B"}), "rejected: holds"),
    # Answers that are not to be learnt, or count by a weight.
    *(
        (ANY, {"messages": [say("user", "Q"), say("assistant", "A", **mark)]}, "messages 2: its answer is marked")
        for mark in ({"loss": False}, {"loss": 0.0}, {"weight": 0}, {"train": False}, {"mask": True})
    ),
    (ANY, {"messages": [say("user", "Q"), say("assistant", "A", loss=0.5)]}, "messages 2: loss is 0.5"),
    # Tools, and whatever else a message has.
    (ANY, talk("Q", "A", tools="[{}]"), "tools: holds tools"),
    (ANY, talk("Q", "A", tools=[TOOL]), "tools: holds tools"),
    (ANY, talk("Q", "A", functions=[TOOL]), "functions: holds tools"),
    (ANY, {"messages": [say("user", "Q"), say("assistant", None, tool_calls=[TOOL])]}, "messages 2: tool_calls"),
    (ANY, {"messages": [say("user", "Q"), say("tool", "x"), say("assistant", "A")]}, "messages 2: expected a message"),
    (ANY, {"messages": [say("user", "Q"), say("assistant", "A", reasoning_content="R")]}, "2: reasoning_content"),
    (("llama-factory",), sharegpt(("human", "Q"), ("function_call", "{}"), ("observation", "{}"), ("gpt", "A")),
     "conversations 2: expected a message"),
    # Marks in the wrong place or number.
    (ANY, talk("<image>Q", "A"), r"images: 1 <image> mark\(s\) .* for 0 image"),
    (ANY, talk("<image>Q", "A", images=["map.png", "map.png"]), r"images: 1 <image> mark\(s\) .* for 2 image"),
    (ANY, talk([{"type": "image", "image": "map.png"}], "A", images=["map.png"]), r"images: 0 <image> mark"),
    (ANY, {"messages": [say("system", "<image>"), say("user", "Q"), say("assistant", "A")], "images": ["map.png"]},
     "messages 1: a system message holds an image"),
    # Pictures that would not be seen, or that are none.
    (ANY, talk("Q", "A", image="map.png", images=["map.png"]), "image: stands beside images"),
    (ANY, talk("Q", "A", chart="map.png"), "chart: holds a picture"),
    (ANY, talk("Q", "A", page={"bytes": b"x", "path": None}), "page: holds a picture"),
    (ANY, talk("Q", "A", image_path="map.png", photo="map.png"), "image: may be image_path or photo; say which by"),
    (ANY, talk("<image>Q", "A", images=["map.png"], seen={"bytes": b"x"}), "seen: holds a picture"),
    (ANY, talk("Q", "A", images=[3]), "images: no picture 3"),
    (ANY, talk("Q", "A", images=[["a.png", "b.png"]]), "images: no picture"),
    (ANY, talk([{"type": "image", "image": "map.png", "max_pixels": 9}], "A"), r"messages 1: max_pixels \(9\)"),
    # Two of what there can be one of.
    (("swift",), swift(text_input="OTHER", text_output="OTHER"), "text_input: is a key of a record"),
    (("swift",), swift(instruction="I", output="O"), "query: stands beside instruction"),
    (ANY, talk("Q", "A", conversations=[{"from": "human", "value": "Q"}]), "messages: stands beside conversations"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_a_record_cannot_hold_is_refused(number: int) -> None:
    layouts, row, said = REFUSED[number]
    for layout in layouts:
        with pytest.raises(MessageError, match=said) as error:
            read_row(row, Columns(layout=layout))
        assert error.value.how


def item(**values: Any) -> list[dict]:
    return [values, {"type": "text", "text": "Q"}]


SEEN = {"text_input": "<image>Q", "text_output": "A", "image_input": ["map.png"]}
PLAIN = {"text_input": "Q", "text_output": "A"}
BEFORE = {"turns_before": [say("user", "<image>a"), say("assistant", "b")]}
ROUNDS = [say("user", "a"), say("assistant", "b"), say("user", "Q"), say("assistant", "A")]

# What is carried over: layouts, the row, the record.
CARRIED: list[tuple[tuple[Layout, ...], dict, dict]] = [
    *(
        (ANY, talk(item(**picture), [{"type": "text", "text": "A"}]), SEEN)
        for picture in (
            {"type": "image", "image": "map.png"},
            {"type": "image", "path": "map.png"},
            {"type": "image", "url": "map.png"},
            {"type": "image", "image": {"bytes": None, "path": "map.png"}, "text": None},
            {"type": "image_url", "image_url": {"url": "map.png", "detail": "low"}},
            {"type": "image_url", "image_url": "map.png"},
            {"type": "input_image", "image_url": "map.png"},
            {"image": "map.png"},
        )
    ),
    (ANY, talk(item(type="image"), "A", images=["map.png"]), SEEN),
    (ANY, talk(item(type="image", image=None), "A", image="map.png"), SEEN),
    (ANY, talk("<image>Q", "A", images="map.png"), SEEN),
    (ANY, talk("<image>Q", "A", images=[{"bytes": None, "path": "map.png"}]), SEEN),
    (ANY, talk("<img>map.png</img>Q", "A"), SEEN),
    (ANY, talk(item(type="image", image=b"1"), "A"), SEEN | {"image_input": [{"bytes": b"1"}]}),
    (ANY, talk("<image>Q", "A", image=b"1"), SEEN | {"image_input": [{"bytes": b"1"}]}),
    (ANY, talk("<image>Q", "A", images=[{"bytes": b"1", "path": "x.png"}]), SEEN | {"image_input": [{"bytes": b"1"}]}),
    (ANY, talk([{"type": "text", "text": "a <image> b"}, {"type": "image", "image": "2.png"}, {"type": "image"}], "A",
               images=["1.png", "3.png"]),
     {"text_input": "a <image> b<image><image>", "text_output": "A", "image_input": ["1.png", "2.png", "3.png"]}),
    # A picture in the answer is its helper, wherever it is named.
    *((ANY, row, PLAIN | {"text_output": "<output_image> so A", "image_input": ["q.png"], "image_output": ["h.png"]})
      for row in (
        talk("Q", "<image> so A", images=["q.png", "h.png"]),
        talk("Q", "<output_image> so A", image="q.png", helper="h.png"),
        talk("Q", "<output_image> so A", image_path="q.png", helper_images=["h.png"]),
        talk("Q", "<img>h.png</img> so A", images=["q.png"]),
        talk("Q", [{"type": "image", "image": "h.png"}, {"type": "text", "text": " so A"}], images=["q.png"]),
        talk("Q", [{"type": "latent", "image": "h.png"}, {"type": "text", "text": " so A"}], images=["q.png"]),
        talk("Q", [{"type": "latent"}, {"type": "text", "text": " so A"}], images=["q.png"], helper="h.png"),
        talk("Q", [{"type": "image"}, {"type": "text", "text": " so A"}], images=["q.png", "h.png"]),
    )),
    (ANY, talk("Q", "A", photo={"bytes": b"x", "path": None}), PLAIN | {"image_input": [{"bytes": b"x"}]}),
    # Nothing, in every spelling.
    (ANY, talk("Q", "A", images=None, videos=[], audios="", tools=None, label=None, rejected_response=float("nan"),
               objects={"ref": [], "bbox": [], "image_id": None}, system=None), PLAIN),
    (ANY, talk("Q", "A", images=[None], image={"bytes": None, "path": None}), PLAIN),
    (ANY, {"messages": [say("user", "Q", loss=None, tool_calls=None), say("assistant", "A", loss=True, weight=1)]},
     PLAIN),
    # Good answers, and rounds before the question.
    (ANY, talk("Q", "A", label=True), PLAIN | {"label": True}),
    (ANY, {"messages": [say("user", "a"), say("assistant", "b", loss=False), *ROUNDS[2:]]},
     PLAIN | {"turns_before": ROUNDS[:2]}),
    (ANY, {"messages": ROUNDS, "images": ["map.png"]}, {**PLAIN, "image_input": ["map.png"], **BEFORE}),
    (ANY, {"messages": [say("user", item(type="image", image="1.png")), say("assistant", "b"),
                        say("user", "<image>Q"), say("assistant", "A")], "images": ["2.png"]},
     {"text_input": "<image>Q", "text_output": "A", "image_input": ["1.png", "2.png"],
      "turns_before": [say("user", "<image>Q"), say("assistant", "b")]}),
    (ANY, talk("Q", "A", system="S"), PLAIN | {"turns_before": [say("system", "S")]}),
    # The other forms of ms-swift and LLaMA-Factory.
    (("swift",), {"conversation": [{"human": "a", "assistant": "b"}, {"human": "Q", "assistant": "A"}]},
     PLAIN | {"turns_before": ROUNDS[:2]}),
    (("swift", "llama-factory"), sharegpt(("human", "Q"), ("gpt", "A")), PLAIN),
    (("swift", "llama-factory"), {"instruction": "Q", "output": "A"}, PLAIN),
    (("swift", "llama-factory"), {"instruction": "", "input": "Q", "output": "A"}, PLAIN),
    (("swift",), swift(messages=None, conversations=[], history=[]), PLAIN),
    # What a row has besides is kept, also another question beside its messages.
    (ANY, talk("Q", "A", id=3, prompt="P", source={"split": "train"}),
     PLAIN | {"id": 3, "prompt": "P", "source": {"split": "train"}}),
    (ANY, talk("<image>Q", "A", images=["map.png"], name="map.png"), SEEN | {"name": "map.png"}),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CARRIED)))
def test_what_a_record_can_hold_is_carried_over(number: int) -> None:
    layouts, row, record = CARRIED[number]
    for layout in layouts:
        made = read_row(row, Columns(layout=layout))[0]
        assert read_row(row)[0] == made
        assert made == record
        # It is a record.
        make_record(made | {"image_input": ["x"] * len(made.get("image_input", []))}, 1)


# --------------------------------------------------------------------------------------------------------- whole files


def run(*arguments: object) -> None:
    cli.main(["data", "import", *map(str, arguments)], standalone_mode=False)


def test_a_refused_row_is_named_with_its_line_and_nothing_is_written(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [talk("Q", "A"), talk("Q", "A", label=False)]
    for content, said in (
        ("".join(json.dumps(row) + "\n" for row in rows), "rows.jsonl, line 2, label: is False"),
        (json.dumps(rows, indent=2), "rows.jsonl, line 2, label: is False"),
        (json.dumps(rows[0]) + "\n" + '{"messages": "caf\xe9"}', "line 2, json: not UTF-8 text"),
        (json.dumps(rows[0], indent=1), "rows.jsonl: JSON over several lines, not records"),
    ):
        file.write_bytes(content.encode("latin-1"))
        with pytest.raises(UserError, match=said):
            run("swift", file, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Not --out, which is opened before it."""
    file = tmp_path / "rows.json"
    file.symlink_to("/proc/self/mem")  # an I/O error for root too
    with pytest.raises(UserError) as error:
        run("swift", file, "--out", tmp_path / "out")
    assert str(error.value) == f"{file}: cannot be read (Input/output error); name a readable file of records"
    assert not (tmp_path / "out").exists()


def test_arrays_are_known_by_their_content(tmp_path: Path) -> None:
    content = json.dumps([swift(), swift()]).encode()
    for name, made in (("a.json", content), ("b.jsonl", content), ("c.json", b"\xef\xbb\xbf" + content)):
        (tmp_path / name).write_bytes(made)
        run("swift", tmp_path / name, "--out", tmp_path / f"out_{name}")
        assert len(scan(tmp_path / f"out_{name}/data.jsonl")[0]) == 2


def test_earlier_answers_and_a_helper_key_that_no_row_has_are_said(tmp_path: Path, capsys) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": ROUNDS}) + "\n" + json.dumps(talk("Q", "A")) + "\n")
    run("trl", file, "--out", tmp_path / "out")
    assert "of 1 record(s) with several answers the last is learnt" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--columns helper=helpers: .*rows.jsonl has no such column; it has messages"):
        run("trl", file, "--out", tmp_path / "other", "--helper_key", "helpers")
    assert not (tmp_path / "other").exists()


def png(shade: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (56, 56), (shade, 0, 0)).save(content, "PNG")
    return content.getvalue()


def table(rows: list[dict]) -> pa.Table:
    """All rows with all columns."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])


def as_parquet(table: pa.Table, folder: Path) -> Path:
    pq.write_table(table, folder / "rows.parquet")
    return folder / "rows.parquet"


def as_feather(table: pa.Table, folder: Path) -> Path:
    pyarrow.feather.write_feather(table, folder / "rows.feather")
    return folder / "rows.feather"


def as_stream(table: pa.Table, folder: Path) -> Path:
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return folder / "rows.arrow"


@pytest.mark.parametrize("write", [as_parquet, as_feather, as_stream])
def test_columns_that_are_null_in_a_row_are_absent_in_an_import(
    write: Callable[[pa.Table, Path], Path], tmp_path: Path
) -> None:
    """Every column is there in every row, every key in every item: what is null says nothing."""
    shown = {"type": "image", "text": None, "image": {"bytes": png(1), "path": None}}
    word = {"type": "text", "text": "Q", "image": None}
    answer = say("assistant", [{"type": "text", "text": "A", "image": None}])
    rows = [
        {"messages": [say("user", [shown, word]), answer], HELPERS: [{"bytes": png(2), "path": None}], "n": 1.0},
        {"messages": [say("user", [word]), answer], HELPERS: None, "videos": None, "label": None, "n": math.nan},
        {"messages": [say("user", [word]), answer], HELPERS: [None], "videos": [], "label": True, "n": None},
    ]
    for row in rows:
        row["messages"] = [{**turn, "loss": None} for turn in row["messages"]]
    run("trl", write(table(rows), tmp_path), "--out", tmp_path / "out")
    found, faults = scan(tmp_path / "out/data.jsonl")
    assert not faults
    assert [(len(record.image_input), len(record.image_output)) for record in found] == [(1, 1), (0, 0), (0, 0)]
    assert (tmp_path / "out" / found[0].image_input[0]).read_bytes() == png(1)
    assert [record.extra for record in found] == [{"n": 1.0}, {}, {"label": True}]


def records_of(file: Path, folder: Path) -> list:
    return [record for piece in pieces([file]) for record in read_piece(piece, file, folder)]


def test_columns_that_are_null_in_a_row_are_absent_in_a_run(tmp_path: Path) -> None:
    stored = {"bytes": png(3), "path": None}
    rows = [
        {"text_input": "<image>Q", "text_output": "A", "image_input": [stored], "image_output": "h.png", "task": "t"},
        {"text_input": "Q", "text_output": "A", "image_input": None, "image_output": None, "turns_before": None},
        {"text_input": "Q", "text_output": "A", "image_input": [], "image_output": "", "messages": []},
        {"text_input": "Q", "text_output": "A", "image_input": [None, None], "image_output": None, "task": None},
        {"messages": [say("user", [{"type": "image", "image": "map.png", "text": None}]),
                      say("assistant", [{"type": "text", "text": "A", "image": None}])]},
    ]  # fmt: skip
    pq.write_table(table(rows), tmp_path / "rows.parquet")
    found = records_of(tmp_path / "rows.parquet", tmp_path)
    assert [len(record.image_input) for record in found] == [1, 0, 0, 0, 1]
    assert [len(record.image_output) for record in found] == [1, 0, 0, 0, 0]
    assert Path(found[0].image_input[0]).read_bytes() == png(3)
    assert (found[4].text_input, found[4].image_input) == ("<image>", ("map.png",))
    assert [record.extra.get("task", "none") for record in found] == ["t", "none", "none", "none", "none"]
    # pandas writes NaN where a column has no strings at all; datasets writes null.
    bare = {"text_input": "Q", "text_output": "A"}
    frame = pandas.DataFrame([bare | {"image_output": float("nan"), "turns_before": None}] * 2)
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), tmp_path / "a.parquet")
    nan = pa.table({**{key: [value] for key, value in bare.items()}, "image_input": pa.array([float("nan")])})
    pq.write_table(nan, tmp_path / "b.parquet")
    datasets.Dataset.from_list([bare | {"image_input": None}]).to_parquet(tmp_path / "c.parquet")
    frame.to_json(tmp_path / "d.jsonl", orient="records", lines=True)
    for name, count in (("a.parquet", 2), ("b.parquet", 1), ("c.parquet", 1), ("d.jsonl", 2)):
        assert check_file(tmp_path / name, "sft", None, None, 2) == (count, []), name


def test_a_null_text_beside_messages_is_absent_in_json_lines_too() -> None:
    row = talk("Q", "A", text_input=None, text_output=None, turns_before=None, image_output=None)
    assert make_record(row, 1).text_input == "Q"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (talk("Q", "A", videos=["a.mp4"]), "videos: holds a video"),
        (talk("Q", "A", label=False), "label: is False"),
        (talk("Q", "A", rejected_response="B"), "rejected_response: holds"),
        (talk("Q", "A", tools=[TOOL]), "tools: holds tools"),
        ({"messages": [say("user", "Q"), say("assistant", "A", loss=False)]}, "messages 2: its answer is marked"),
        ({"messages": [say("user", "Q"), say("assistant", "A", tool_calls=[TOOL])]}, "messages 2: tool_calls"),
        (talk([{"type": "image", "image": "a.png", "min_pixels": 9}], "A"), "messages 1: min_pixels"),
    ],
)
def test_a_record_of_messages_refuses_the_same(row: dict, said: str) -> None:
    with pytest.raises(RecordError, match=said):
        make_record(row, 1)


def test_what_is_empty_beside_messages_is_no_fault() -> None:
    row = talk("Q", "A", images=[], videos=None, tools=[], label=None, rejected_response="", objects={"bbox": []})
    assert make_record(row, 1).text_output == "A"


def test_other_keys_of_a_record_mean_what_its_owner_means() -> None:
    extra = {"label": False, "videos": ["a.mp4"], "images": ["a.png"]}
    assert make_record({"text_input": "Q", "text_output": "A", **extra}, 1).extra == extra
    # Decoding looks at no answer.
    assert make_record({"messages": [say("user", "Q")], "label": 0}, 1, answers=False).text_input == "Q"
