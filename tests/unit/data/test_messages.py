"""Conversations as records: `messages` with items, turns before the question, other trainers' layouts."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from mirage_ds.cli import cli
from mirage_ds.config.columns import Columns
from mirage_ds.curate.check import check_file
from mirage_ds.curate.spec import ImportSpec
from mirage_ds.data.encode import Encoder
from mirage_ds.data.layouts import read_row
from mirage_ds.data.messages import HELPER_MARK, IMAGE_MARK, MessageError
from mirage_ds.data.record import RecordError, from_json, make_record, to_json
from mirage_ds.data.record_files import scan
from mirage_ds.data.sample import IGNORE
from mirage_ds.errors import UserError
from mirage_ds.tasks.draft import Picture
from mirage_ds.tasks.write import ROWS_AT_A_TIME, Row, write_rows


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def image(path: str) -> dict:
    return {"type": "image", "image": path}


def latent(path: str | None = None) -> dict:
    return {"type": "latent", **({"image": path} if path else {})}


def say(role: str, *content: Any) -> dict:
    return {"role": role, "content": content[0] if len(content) == 1 and isinstance(content[0], str) else list(content)}


LONG = [
    say("system", "You plan."),
    say("user", text("Here "), image("w56x84.png"), text(" and "), image("w84x84.png"), text(": which is larger?")),
    say("assistant", "The second."),
    say("user", text("And of "), image("w112x112.png"), text("?")),
    say("assistant", text("I look. "), latent("w140x56.png"), text("\\boxed{third}")),
]


def test_a_conversation_becomes_the_records_own_keys() -> None:
    assert read_row({"messages": LONG})[0] == {
        "text_input": "And of <image>?",
        "text_output": "I look. <output_image>\\boxed{third}",
        "image_input": ["w56x84.png", "w84x84.png", "w112x112.png"],
        "image_output": ["w140x56.png"],
        "turns_before": [
            {"role": "system", "content": "You plan."},
            {"role": "user", "content": "Here <image> and <image>: which is larger?"},
            {"role": "assistant", "content": "The second."},
        ],
    }
    record = make_record({"messages": LONG, "level": 3}, 1)
    assert record.extra.keys() == {"turns_before", "level"}
    assert record.marks == 3
    assert from_json(to_json(record)) == record
    # A latent run without a helper, as stage 2 trains it; and a question alone.
    assert make_record({"messages": [say("user", "?"), say("assistant", latent(), text("a"))]}, 1).runs == 1
    assert make_record({"messages": [say("user", "?")]}, 1, answers=False).text_output == ""


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "question: missing"),
        ([say("user", "?")], "do not end with a question and its answer"),
        ([say("assistant", "a")], "do not end with a question"),
        ([say("system", "s"), say("assistant", "a")], "do not end with a question"),
        ([say("user", "a"), say("user", "b"), say("assistant", "c")], "they end with a user message"),
        ([say("user", "a"), say("system", "s"), say("user", "b"), say("assistant", "c")], "messages 2: its role is"),
        ([say("assistant", "a"), say("user", "b"), say("assistant", "c")], "assistant where user is due"),
        ([say("tool", "a"), say("assistant", "c")], "messages 1: expected a message"),
        ([say("user", "a <image>"), say("assistant", "c")], "images: 1 <image> mark(s) without a picture"),
        ([say("user", "a <output_image>"), say("assistant", "c")], "messages 1: a user message holds <output_image>"),
        ([say("user", "a"), say("assistant", image("x.png"))], "empty answer"),
        ([say("user", latent("x.png")), say("assistant", "c")], "a user message holds latents"),
        ([say("user", "a"), say("assistant", latent(), text("b")), say("user", "c"), say("assistant", "d")],
         "messages 2: holds latents; only the last answer"),
        ([say("user", {"type": "video"}), say("assistant", "c")], "there are text, image and latent items"),
        ([say("user", {"type": "image"}), say("assistant", "c")], "1 <image> mark(s) without a picture"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_said(messages: list, said: str) -> None:
    with pytest.raises(RecordError) as error:
        make_record({"messages": messages}, 7)
    assert said in str(error.value)
    assert str(error.value).startswith("line 7, ")


def test_marks_count_over_all_turns() -> None:
    row = {"text_input": "?", "text_output": "a", "image_input": ["x.png", "y.png"]}
    before = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(RecordError, match=r"1 <image> mark\(s\) for 2 image"):
        make_record(row | {"turns_before": before}, 1)
    assert make_record(row | {"turns_before": before, "image_input": "x.png"}, 1).marks == 1
    with pytest.raises(RecordError, match="turns_before: they end with a user message"):
        make_record(row | {"turns_before": before[:1]}, 1)
    with pytest.raises(RecordError, match="half a surrogate"):
        make_record(row | {"turns_before": [{"role": "system", "content": "\ud800"}]}, 1)


def test_the_row_is_the_templates_whole_conversation(encoder_for: Callable[..., Encoder], pictures: Path) -> None:
    """Against the tokenizer's own template over the whole conversation, the run and the images put in by hand."""
    encoder = encoder_for("stage2", 2)
    sample = encoder.encode(make_record({"messages": LONG}, 1), 0)
    spelt = {
        "image": "<|vision_start|><|image_pad|><|vision_end|>",
        "latent": "<|latent_start|><|latent_pad|><|latent_pad|><|latent_end|>",
    }
    turns = [
        {"role": one["role"], "content": one["content"] if isinstance(one["content"], str)
         else "".join(item.get("text", spelt.get(item["type"])) for item in one["content"])}
        for one in LONG
    ]  # fmt: skip
    whole = encoder.tokenizer.apply_chat_template(turns, tokenize=False)
    sizes = [int(t * h * w) // 4 for t, h, w in sample.image_grid_thw.tolist()]
    assert len(sizes) == 3
    parts = whole.split("<|image_pad|>")
    expanded = parts[0] + "".join("<|image_pad|>" * n + part for n, part in zip(sizes, parts[1:], strict=True))
    ids = encoder.tokenizer(expanded, add_special_tokens=False)["input_ids"]
    assert sample.input_ids.tolist() == ids
    # Only the last answer is learnt.
    learnt = sample.input_ids[sample.labels != IGNORE]
    assert encoder.tokenizer.decode(learnt, skip_special_tokens=True).strip() == "I look. \\boxed{third}"


def test_special_tokens_in_earlier_turns_are_text(encoder_for: Callable[..., Encoder]) -> None:
    encoder = encoder_for("sft", 2)
    rows = [
        [say("system", said), say("user", "?"), say("assistant", "a")] for said in ("stop <|im_end|> here", "stop here")
    ]
    samples = [encoder.encode(make_record({"messages": row}, 1), 0) for row in rows]
    ends = [(sample.input_ids == encoder.id_of("<|im_end|>")).sum() for sample in samples]
    assert ends[0] == ends[1] == 3
    assert len(samples[0].input_ids) > len(samples[1].input_ids)


# ------------------------------------------------------------------------------------------- other trainers' layouts

TURNS = [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
RECORD = {"text_input": "<image>Q", "text_output": "A", "image_input": ["x.png"], "turns_before": TURNS, "id": 3}


@pytest.mark.parametrize(
    ("layout", "row"),
    [
        ("swift", {"messages": [*TURNS, say("user", "<image>Q"), say("assistant", "A")]}),
        ("swift", {"query": "<image>Q", "response": "A", "system": "S", "history": [["a", "b"]]}),
        ("llama-factory", {"system": "S", "conversations": [
            {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
            {"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]}),
        ("llama-factory", {
            "instruction": "<image>Q", "input": "", "output": "A", "system": "S", "history": [["a", "b"]]}),
        ("trl", {"messages": [*TURNS, say("user", {"type": "image"}, text("Q")), say("assistant", text("A"))]}),
        ("trl", {"prompt": [*TURNS, say("user", {"type": "image"}, text("Q"))], "completion": [say("assistant", "A")]}),
    ],
)  # fmt: skip
def test_layouts_are_one_record(layout: str, row: dict) -> None:
    for columns in (Columns(), Columns(layout=layout)):
        assert read_row({**row, "images": ["x.png"], "id": 3}, columns)[0] == RECORD


def test_smaller_rows() -> None:
    assert read_row({"instruction": "Q", "input": "more", "output": "A"})[0] == {
        "text_input": "Q\nmore",
        "text_output": "A",
    }
    row = {"query": "Q", "response": "<output_image>A", "h": {"path": "h.png"}, "image": "i"}
    found = read_row(row, Columns(helper=("h",)))[0]
    assert found == {
        "text_input": "Q",
        "text_output": "<output_image>A",
        "image_input": ["i"],
        "image_output": ["h.png"],
    }
    for row, said in (
        ({}, "query: expected a string"),
        ({"query": "Q", "response": 1}, "response: expected a string, found 1"),
        ({"messages": [{"role": "user", "content": "Q"}]}, "do not end with a question and its answer"),
        ({"messages": [{"role": "tool", "content": "Q"}]}, "messages 1: expected a message"),
        ({"query": "Q", "response": "A", "history": [["a"]]}, "history 1: found"),
        ({"messages": "x"}, "messages: expected a list"),
    ):
        with pytest.raises(MessageError, match=said):
            read_row(row, Columns(layout="swift"))


def run(*arguments: object) -> None:
    cli.main(["data", "import", *map(str, arguments)], standalone_mode=False)


def test_a_file_is_imported_with_its_pictures_where_they_are(pictures: Path, tmp_path: Path, capsys) -> None:
    rows = [{"query": "<image>Q", "response": f"A{n}", "images": ["w56x84.png"], "helper_images": ["w84x84.png"]}
            for n in range(3)]  # fmt: skip
    for name, content in (
        ("rows.json", json.dumps(rows)),
        ("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
    ):
        (pictures / name).write_text(content)
        out = tmp_path / name.replace(".", "_")
        run("swift", pictures / name, "--out", out, "--most", 2)
        assert "2 records" in capsys.readouterr().out
        records, faults = scan(out / "data.jsonl")
        assert not faults
        assert [record.text_output for record in records] == ["A0", "A1"]
        count, faults = check_file(out / "data.jsonl", "stage1", None, None, 1, False)
        assert (count, faults) == (2, [])


def test_a_parquet_files_pictures_are_written(tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.effect_noise((56, 56), 60).convert("RGB").save(content, "JPEG")
    stored = {"bytes": content.getvalue(), "path": None}
    prompt = [{"role": "user", "content": "Q"}]
    rows = [{"prompt": prompt, "completion": [{"role": "assistant", "content": "A"}], "images": [stored]}]
    features = datasets.Features(
        prompt=[{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        completion=[{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        images=datasets.List(datasets.Image()),
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    run("trl", tmp_path / "rows.parquet", "--out", tmp_path / "out")
    (record,), _ = scan(tmp_path / "out/data.jsonl")
    (path,) = record.image_input
    assert (tmp_path / "out" / path).read_bytes() == content.getvalue()
    assert path.endswith(".jpg")


def test_only_some_rows_and_pictures_are_held_at_a_time(tmp_path: Path) -> None:
    taken = written = most = 0

    def content(number: int) -> bytes:
        nonlocal written
        written += 1
        return b"%d" % number

    def rows() -> Iterator[Row]:
        nonlocal taken, most
        for number in range(3 * ROWS_AT_A_TIME + 7):
            taken += 1
            most = max(most, taken - written)
            yield Row("Q", "A", (Picture(f"{number}.img", partial(content, number)),), (), {})

    found = write_rows(rows(), ImportSpec(out=tmp_path / "out"))
    assert (found.records, found.images, written) == (taken, taken, taken)
    assert most <= ROWS_AT_A_TIME + 1
    records, _ = scan(found.file)
    assert [record.image_input for record in records] == [(f"images/{number}.img",) for number in range(taken)]


def test_a_row_that_is_wrong_late_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    good = json.dumps({"query": "Q", "response": "A"}) + "\n"
    source.write_text(good * (ROWS_AT_A_TIME + 1) + "{}\n")
    with pytest.raises(UserError, match=f"line {ROWS_AT_A_TIME + 2}, query: expected a string"):
        run("swift", source, "--out", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    source.write_text("\n")
    with pytest.raises(UserError, match="holds no row"):
        run("swift", source, "--out", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_what_cannot_be_imported_is_one_sentence_and_leaves_nothing(pictures: Path, tmp_path: Path) -> None:
    source = pictures / "bad.jsonl"
    for row, said in (
        ({"query": "Q"}, "bad.jsonl, line 1, response: expected a string"),
        ({"query": "<image>Q", "response": "A"}, r"line 1, images: 1 <image> mark\(s\) .* for 0 image"),
        ({"query": "Q", "response": "A", "images": ["no.png"]}, "line 1, image_input: no image 'no.png'"),
        ([1], "line 1, json: expected an object"),
    ):
        source.write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match=said):
            run("swift", source, "--out", tmp_path / "out")
    source.write_text("{")
    with pytest.raises(UserError, match="line 1, json: not valid JSON"):
        run("swift", source, "--out", tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        run("swift", pictures / "none.json", "--out", tmp_path / "out")
    with pytest.raises(UserError, match="nobody/nothing: cannot be loaded"):
        run("swift", "nobody/nothing", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_vary_and_show_know_the_turns_before(pictures: Path, tmp_path: Path, capsys) -> None:
    file = pictures / "long.jsonl"
    file.write_text(json.dumps({"messages": LONG}) + "\n")
    for kind in ("helper-input", "helper-only", "no-image"):
        cli.main(["data", "vary", kind, str(file), "--out", str(tmp_path / kind)], standalone_mode=False)
        (record,), faults = scan(tmp_path / kind / "data.jsonl")
        assert not faults
        assert record.marks == len(record.image_input) == {"helper-input": 4, "helper-only": 0, "no-image": 3}[kind]
    capsys.readouterr()
    cli.main(["data", "show", str(file)], standalone_mode=False)
    said = capsys.readouterr().out
    assert "system: You plan." in said
    assert "assistant: The second." in said
    assert IMAGE_MARK not in said
    assert HELPER_MARK not in said


def test_a_question_without_an_image_gets_none_of_the_turns_before(encoder_for: Callable[..., Encoder]) -> None:
    row = [
        say("user", image("w56x84.png"), text("A?")),
        say("assistant", "a"),
        say("user", "B?"),
        say("assistant", "b"),
    ]
    encoder = encoder_for("sft", 2)
    sample = encoder.encode(make_record({"messages": row}, 1), 0)
    said = encoder.tokenizer.decode(sample.input_ids)
    assert said.count("<|vision_start|>") == 1
    assert said.index("<|vision_start|>") < said.index("A?") < said.index("B?")
