"""COMT's two forms, made small: several latent blocks in one answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mirage_ds.config.flags import build_model
from mirage_ds.data.record_files import scan
from mirage_ds.errors import UserError
from mirage_ds.evaluate.scoring import Prediction, score
from mirage_ds.tasks.build import convert
from mirage_ds.tasks.comt import ComtSettings
from mirage_ds.tasks.draft import BuildReport


def picture(folder: Path, name: str, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 40, 3), np.uint8)).save(folder / name)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(n: int, kind: str, **values: Any) -> dict[str, Any]:
    return {
        "id": f"{kind}-{n}",
        "question": f"What is angle {n}?",
        "option": ["A. 30", "B. 60", "C. 90", "D. 120"],
        "image": [f"[IMAGE{i}:{kind}-{n}-{i}]" for i in range(3)],
        "rationale": f"Draw it. [IMAGE1:{kind}-{n}-1]\nThen extend it (IMAGE2), so it is 90.",
        "answer": "C",
        "type": kind,
        "annotations": "…",
    } | values


def run(source: Path, out: Path, **values: Any) -> tuple[BuildReport, list[dict[str, Any]]]:
    report = convert("comt", source, build_model(ComtSettings, {"out": out, **values}))
    return report, [json.loads(line) for line in (out / "data.jsonl").read_text().splitlines()]


@pytest.fixture
def comt(tmp_path: Path) -> Path:
    """Two types; the same image names lie in both types' folders."""
    folder = tmp_path / "comt"
    rows = []
    for t, kind in enumerate(("creation", "deletion")):
        for n in range(4):
            for i in range(3):
                picture(folder / "images" / kind, f"{kind}-{n}-{i}.png", 100 * t + 10 * n + i)
            rows.append(row(n, kind))
    picture(folder / "images/selection/original", "creation-0-0.png", 999)
    write(folder / "data.jsonl", rows)
    return folder


def pixels(path: Path) -> bytes:
    return np.array(Image.open(path)).tobytes()


def test_the_geometry_subset_with_two_runs_an_answer(comt: Path, tmp_path: Path) -> None:
    report, made = run(comt, tmp_path / "o")
    assert (report.records, report.excluded, report.levels, report.classes) == (4, 4, {"creation": 4}, {"C": 4})
    for n, new in enumerate(made):
        assert new["text_output"] == (
            "Draw it. <output_image>\nThen extend it <output_image>, so it is 90.\nThe answer is \\boxed{C}."
        )
        assert new["text_input"] == (
            f"<image>\nWhat is angle {n}?\n(A) 30\n(B) 60\n(C) 90\n(D) 120\n"
            "Put the letter of the right option in \\boxed{}."
        )
        places = [new["image_input"], *new["image_output"]]
        for i, path in enumerate(places):
            assert pixels(tmp_path / "o" / path) == pixels(comt / f"images/creation/creation-{n}-{i}.png")
        assert (new["id"], new["level"], new["task"]) == (f"creation-{n}", "creation", "comt")
    records = scan(tmp_path / "o/data.jsonl")[0]
    assert [record.runs for record in records] == [2] * 4
    answers = [Prediction(text, [], []) for text in ("\\boxed{C}", "\\boxed{90}", "\\boxed{A}", "C")]
    found = score(records, answers, "comt")["all"]
    assert (found["correct"], found["invalid"]) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("change", "question", "answer", "images", "helpers"),
    [
        # Images that the question marks stand where it marks them; named again in the rationale they are no latents.
        (
            {"question": "In [IMAGE0] and <IMAGE2:creation-0-2>?", "rationale": "From [IMAGE0] follows [IMAGE1]."},
            "In <image> and <image>?",
            "From image 1 follows <output_image>.",
            [0, 2],
            [1],
        ),
        # A bracket that belongs to the sentence stays.
        ({"rationale": "So (see IMAGE1 and IMAGE2: it is)"}, None,
         "So (see <output_image> and <output_image>: it is)", [0], [1, 2]),
        # No mark in the rationale: no latents.
        ({"rationale": "Just so."}, None, "Just so.", [0, 1, 2], []),
        # All marked: a question without an image.
        ({"rationale": "IMAGE0 IMAGE1 IMAGE2"}, None, "<output_image> <output_image> <output_image>", [], [0, 1, 2]),
        # The same picture twice.
        ({"rationale": "[IMAGE1][IMAGE1]", "image": ["IMAGE0:creation-0-0", "IMAGE1:creation-0-1"]}, None,
         "<output_image><output_image>", [0], [1, 1]),
    ],
)  # fmt: skip
def test_where_images_stand(
    comt: Path, tmp_path: Path, change: dict[str, Any], question: str | None, answer: str, images: list, helpers: list
) -> None:
    write(comt / "data.jsonl", [row(0, "creation", **change)])
    _, (new,) = run(comt, tmp_path / "o")
    assert new["text_output"] == f"{answer}\nThe answer is \\boxed{{C}}."
    first = new["text_input"].split("\n(A)")[0]
    assert first == (question or "<image>" * len(images) + "\n" * bool(images) + "What is angle 0?")
    for key, wanted in (("image_input", images), ("image_output", helpers)):
        paths = new.get(key, [])
        found = [pixels(tmp_path / "o" / path) for path in (paths if isinstance(paths, list) else [paths])]
        assert found == [pixels(comt / f"images/creation/creation-0-{i}.png") for i in wanted]


def test_types(comt: Path, tmp_path: Path) -> None:
    assert run(comt, tmp_path / "a", types="all")[0].levels == {"creation": 4, "deletion": 4}
    assert run(comt, tmp_path / "b", types="Deletion")[0].levels == {"deletion": 4}
    assert run(comt, tmp_path / "c", types="all", count=3)[0].records == 3
    with pytest.raises(UserError) as error:
        run(comt, tmp_path / "o", types="geometry")
    assert str(error.value) == "--types geometry: no row is of one of them; the data has creation (4), deletion (4)"


def test_a_picture_lies_in_one_split(tmp_path: Path) -> None:
    folder = tmp_path / "comt"
    rows = []
    for n in range(40):
        picture(folder / "images/creation", f"creation-{n}-0.png", n % 20)  # each picture under two names
        picture(folder / "images/creation", f"creation-{n}-1.png", 100 + n)
        rows.append(row(n, "creation", image=[f"[IMAGE{i}:creation-{n}-{i}]" for i in (0, 1)], rationale="[IMAGE1]"))
    write(folder / "data.jsonl", rows)
    split = {}
    for name in ("train", "test"):
        report, made = run(folder, tmp_path / name, split=name)
        assert report.records + report.excluded == 40
        split[name] = [{new["image_input"] for new in made}, {new["id"] for new in made}]
    assert not split["train"][0] & split["test"][0]
    assert len(split["train"][1] | split["test"][1]) == 40
    assert 1 <= len(split["test"][0]) <= 9
    assert len(split["test"][1]) == 2 * len(split["test"][0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rationale": "[IMAGE7]"}, "its rationale marks IMAGE7, which its list of images lacks"),
        ({"image": ["[IMAGE0:creation-9-9]"], "rationale": "no"}, "image 'creation-9-9' is not below images/"),
        ({"image": ["creation-0-0"]}, "image 'creation-0-0' is not of the form [IMAGE0:ID]"),
        ({"question": "[IMAGE0]?", "rationale": "no"}, "IMAGE1 is marked neither in its question nor in its rationale"),
        ({"answer": "E"}, "answer 'E' is none of its 4 options"),
        ({"rationale": "[IMAGE1][IMAGE2] \\boxed{A}"}, "its text ends with \\boxed{A}, its answer is C"),
        ({"rationale": "<output_image>"}, "its answer has 1 <output_image> marks for 0 images"),
        ({"question": "Is <output_image> so?"}, "its question spells <output_image>, or its answer <image>"),
        ({"option": "A"}, "option is 'A', not a list of two texts"),
    ],
)
def test_a_bad_row_is_named_or_left_out(comt: Path, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    file = write(comt / "data.jsonl", [row(1, "creation"), row(0, "creation", **change)])
    for values in ({}, {"split": "train"}):
        with pytest.raises(UserError) as error:
            run(comt, tmp_path / "o", **values)
        assert str(error.value).startswith(f"{file}, line 2: {says}")
    report, made = run(comt, tmp_path / "o", skip_bad_records=True)
    assert [new["id"] for new in made] == ["creation-1"]
    assert report.notes == {"bad rows left out": 1}


# ----------------------------------------------------------------------------------------------------------- packed


def packed(folder: Path) -> list[dict[str, Any]]:
    for name in range(4):
        picture(folder / "pics", f"{name}.png", name)
    plan = [
        {"type": "text", "content": "First. "},
        {"type": "latent", "helper_image": "pics/1.png"},
        {"type": "text", "content": "Second. "},
        {"type": "latent", "helper_image": "pics/2.png"},
        {"type": "text", "content": "So \\boxed{B}."},
    ]
    one = {"text_input": "<image> Which? (A) 1 (B) 2 (C) 3 (D) 4", "image_input": "pics/0.png", "sequence_plan": plan}
    ends = [*plan[:-1], {"type": "text", "content": "So B."}]
    return [one, one | {"sequence_plan": ends, "answer": "B", "type": "creation", "image_input": ["pics/3.png"]}]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_packed_rows(tmp_path: Path, form: str) -> None:
    rows = packed(tmp_path)
    if form == "jsonl":
        source = write(tmp_path / "packed.jsonl", rows)
    else:
        source = tmp_path / "train.parquet"
        flat = [
            r | {"image_input": [r["image_input"]] if isinstance(r["image_input"], str) else r["image_input"]}
            for r in rows
        ]
        pq.write_table(pa.Table.from_pylist([dict.fromkeys(flat[1]) | one for one in flat]), source)
    report, made = run(source, tmp_path / "o")
    assert report.classes == {"B": 2}
    plain = "First. <output_image>Second. <output_image>So "
    assert [new["text_output"] for new in made] == [f"{plain}\\boxed{{B}}.", f"{plain}B.\nThe answer is \\boxed{{B}}."]
    for new, image in zip(made, (0, 3), strict=True):
        assert new["text_input"].startswith("<image> Which? (A) 1")
        found = [new["image_input"], *new["image_output"]]
        assert [pixels(tmp_path / "o" / path) for path in found] == [
            pixels(tmp_path / f"pics/{name}.png") for name in (image, 1, 2)
        ]
    records = scan(tmp_path / "o/data.jsonl")[0]
    found = score(records, [Prediction("\\boxed{(B)}", [], []), Prediction("\\boxed{2}", [], [])], "comt")["all"]
    assert (found["correct"], found["invalid"]) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"type": "image"}, "a part of its sequence_plan is of type 'image', not text or latent"),
        ({"type": "latent", "helper_image": "pics/9.png"}, "helper_image"),
        ({"type": "latent"}, "helper_image is None, not an image"),
        ({"type": "text", "content": "x<output_image>"}, "its answer has 3 <output_image> marks for 2 images"),
        ({"type": "text"}, "content is None, not a text"),
    ],
)
def test_bad_packed_rows(tmp_path: Path, part: dict[str, Any], says: str) -> None:
    first = packed(tmp_path)[0]
    source = write(tmp_path / "packed.jsonl", [first | {"sequence_plan": [part, *first["sequence_plan"]]}])
    with pytest.raises(UserError) as error:
        run(source, tmp_path / "o")
    assert f"{source}, line 1: {says}" in str(error.value)


def test_what_is_no_comt(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("{}\n{\n")
    with pytest.raises(UserError, match=r"x\.jsonl, line 2, json: not valid JSON \(.*\); write one object a line"):
        run(tmp_path / "x.jsonl", tmp_path / "o")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "y.parquet")
    with pytest.raises(UserError, match=r"has no column sequence_plan, only a; name the data set that has"):
        run(tmp_path / "y.parquet", tmp_path / "o")
