"""Monet-SFT-125K, LVR's Visual-CoT rows and Zebra-CoT, small, with their authors' keys and marks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from mirage_ds.config.flags import build_model
from mirage_ds.curate.check import check_file
from mirage_ds.errors import UserError
from mirage_ds.tasks import get_task
from mirage_ds.tasks.build import convert
from mirage_ds.tasks.draft import BuildReport
from mirage_ds.tasks.published import PublishedSettings

LATENTS = "<abs_vis_token></abs_vis_token>"


def picture(seed: int, size: tuple[int, int] = (112, 84)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8))


def save(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(file)


def run(task: str, source: Path, out: Path, **values: Any) -> tuple[BuildReport, list[dict[str, Any]]]:
    report = convert(task, source, build_model(PublishedSettings, {"out": out, **values}))
    records = [json.loads(line) for line in (out / "data.jsonl").read_text().splitlines()]
    # Whatever comes out can be trained on in stage 1, where rows have helpers.
    stage = "stage1" if all("image_output" in record for record in records) else "sft"
    assert check_file(out / "data.jsonl", stage, None, None, 4, False)[1] == []
    return report, records


def shown(out: Path, record: dict[str, Any]) -> list[Any]:
    """All pictures of a record, input images first, as numbers."""
    names = [record.get(key, []) for key in ("image_input", "image_output")]
    flat = [name for own in names for name in ([own] if isinstance(own, str) else own)]
    return [np.array(Image.open(out / name).convert("RGB")).tolist() for name in flat]


def drawn(*seeds: int) -> list[Any]:
    return [np.array(picture(seed)).tolist() for seed in seeds]


# ---------------------------------------------------------------------------------------------------------------- Monet


def monet_row(n: int, **changes: Any) -> dict[str, Any]:
    """A row as the loader of the authors' src/task.py reads it."""
    folder = "Visual_CoT/images"
    answer = [
        {"type": "text", "text": f"I zoom in. {LATENTS}"},
        {"type": "image", "image": f"{folder}/{n}_1.png"},
        {"type": "text", "text": f"<observation>A red hat.</observation> Once more {LATENTS}"},
        {"type": "image", "image": f"{folder}/{n}_2.png"},
        {"type": "text", "text": "So it is \\boxed{red}."},
    ]
    question = f"Which colour has hat {n}?\nPut your final answer within \\boxed{{}}."
    turns = [
        {"role": "system", "content": [{"type": "text", "text": f"Put them in {LATENTS}."}]},
        {"role": "user", "content": [
            {"type": "image", "image": f"{folder}/{n}_0.png"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": changes.get("answer", answer)},
    ]  # fmt: skip
    return {"metadata": {"dataset_name": "Visual_CoT", "sample_id": n}, "data": turns}


@pytest.fixture
def monet(tmp_path: Path) -> Path:
    """Two subsets; image paths start at the folder that holds both."""
    root = tmp_path / "Monet-SFT-125K"
    for n in range(3):
        for part in range(3):
            save(root / f"Visual_CoT/images/{n}_{part}.png", 10 * n + part)
    (root / "Visual_CoT/train.json").write_text(json.dumps([monet_row(0), monet_row(1)]))
    (root / "CogCoM").mkdir()
    (root / "CogCoM/train.json").write_text(json.dumps([monet_row(2)]))
    return root


def test_monets_pictures_become_latent_blocks_where_they_stand(monet: Path, tmp_path: Path) -> None:
    report, records = run("monet-sft", monet / "Visual_CoT/train.json", tmp_path / "out")
    assert (report.records, report.levels) == (2, {"Visual_CoT": 2})
    first = records[0]
    assert first["text_input"] == "<image>Which colour has hat 0?\nPut your final answer within \\boxed{}."
    assert first["text_output"] == (
        "I zoom in. <output_image>A red hat. Once more <output_image>So it is \\boxed{red}."
    )
    assert (first["task"], first["level"], first["id"]) == ("monet-sft", "Visual_CoT", 0)
    assert shown(tmp_path / "out", first) == drawn(0, 1, 2)


def test_monets_folder_is_all_its_subsets_and_a_count_draws_of_all(monet: Path, tmp_path: Path) -> None:
    assert [row["id"] for row in run("monet-sft", monet, tmp_path / "all")[1]] == [2, 0, 1]
    assert len(run("monet-sft", monet, tmp_path / "some", count=2)[1]) == 2


# ------------------------------------------------------------------------------------------------------------------ LVR


def lvr_row(**changes: Any) -> dict[str, Any]:
    """The row of the authors' README, with another picture."""
    answer = "<lvr>\n<answer> The child on the swing is wearing dark blue denim shorts. </answer>"
    question = "<image>\nCan you describe the lower apparel of the child?\nProvide a short and direct response."
    row = {
        "dataset": "flickr30k",
        "split": "train",
        "question_id": 31593,
        "image": ["viscot/flickr30k/2618322793.png"],
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        "bboxes": [[0.25, 0.5, 0.75, 1.0]],
    }
    return row | changes


@pytest.mark.parametrize(
    ("box", "cut"),
    [
        ([0.25, 0.5, 0.75, 1.0], (28, 42, 84, 84)),
        # Outwards to whole pixels.
        ([0.251, 0.5, 0.749, 0.99], (28, 42, 84, 84)),
        # A token's size at least, inside the picture.
        ([0.5, 0.5, 0.51, 0.51], (43, 29, 71, 57)),
        ([0.99, 0.0, 1.0, 0.01], (84, 0, 112, 28)),
    ],
)
def test_lvrs_helper_is_the_part_in_the_box(box: list[float], cut: tuple[int, ...], tmp_path: Path) -> None:
    save(tmp_path / "images/viscot/flickr30k/2618322793.png", 7)
    (tmp_path / "rows.json").write_text(json.dumps([lvr_row(bboxes=[box])]))
    _, (row,) = run("lvr", tmp_path / "rows.json", tmp_path / "out", image_root=tmp_path / "images")
    assert row["text_output"].startswith("<output_image>\n<answer> The child")
    assert (row["level"], row["id"], row["bboxes"]) == ("flickr30k", 31593, [box])
    assert shown(tmp_path / "out", row)[1] == np.array(picture(7).crop(cut)).tolist()  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------- Zebra


def zebra_row(**changes: Any) -> dict[str, Any]:
    """A row of the data set's card: marks name the columns of pictures."""
    row = {
        "Question": "How many cubes?<image_start>[problem_image_1]<image_end>",
        "Text Reasoning Trace": "THOUGHT 0: Mark them.\n<image_start>[reasoning_image_1]<image_end>\nTHOUGHT 1: As in "
        "<image_start>[problem_image_1]<image_end>, two left.\n<image_start>[reasoning_image_2]<image_end>",
        "Final Answer": "2",
        "problem_image_1": picture(0),
        "reasoning_image_1": picture(1),
        "reasoning_image_2": picture(2),
        "reasoning_image_3": None,
    }
    return row | changes


def test_zebras_trace_is_the_answer_and_its_pictures_are_helpers(tmp_path: Path) -> None:
    folder = tmp_path / "Zebra-CoT/2D Visual Reasoning - Visual Search"
    folder.mkdir(parents=True)
    kinds = dict.fromkeys(("Question", "Text Reasoning Trace", "Final Answer"), datasets.Value("string"))
    kinds |= {name: datasets.Image() for name in zebra_row() if "_image_" in name}
    table = datasets.Dataset.from_list([zebra_row()], features=datasets.Features(kinds))
    table.to_parquet(folder / "train-00000-of-00001.parquet")
    report, (row,) = run("zebra-cot", tmp_path / "Zebra-CoT", tmp_path / "out")
    assert report.levels == {"2D Visual Reasoning - Visual Search": 1}
    assert row["text_input"] == "How many cubes?<image>"
    assert row["text_output"] == (
        "THOUGHT 0: Mark them.\n<output_image>\nTHOUGHT 1: As in problem image 1, two left.\n<output_image>\n"
        "The answer is \\boxed{2}."
    )
    assert shown(tmp_path / "out", row) == drawn(0, 1, 2)


def test_zebras_json_lines_name_their_pictures_by_paths(tmp_path: Path) -> None:
    for seed, name in enumerate(("problem_image_1", "reasoning_image_1", "reasoning_image_2")):
        save(tmp_path / f"data/{name}.png", seed)
    names = {name: f"{name}.png" for name in zebra_row() if "_image_" in name and not name.endswith("3")}
    row = zebra_row(**names, **{"reasoning_image_3": None, "Question": "How many?", "Final Answer": "\\boxed{2}"})
    (tmp_path / "data/train.jsonl").write_text(json.dumps(row) + "\n")
    _, (made,) = run("zebra-cot", tmp_path / "data/train.jsonl", tmp_path / "out")
    # A picture that the question does not mark stands first.
    assert made["text_input"] == "<image>How many?"
    assert made["text_output"].endswith("The answer is \\boxed{2}.")


# ----------------------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        (
            "monet-sft",
            monet_row(0, answer=[{"type": "text", "text": LATENTS}]),
            "its answer has 1 <output_image> marks for 0 images",
        ),
        ("monet-sft", monet_row(9), "image Visual_CoT/images/9_0.png is not below"),
        ("monet-sft", {"messages": []}, "data is None, not a list of objects"),
        ("monet-sft", monet_row(0, answer=[{"type": "video"}]), "{'type': 'video'} is no text and no image"),
        ("lvr", lvr_row(bboxes=[]), "its answer has 1 <output_image> marks for 0 images"),
        ("lvr", lvr_row(bboxes=[[10, 20, 30, 40]]), "a box of bboxes is [10, 20, 30, 40], not x0, y0, x1, y1 from"),
        ("lvr", lvr_row(bboxes=["a"]), "a box of bboxes is 'a', not x0, y0, x1, y1 from 0 to 1"),
        ("lvr", lvr_row(image=["a", "b"]), "image is ['a', 'b'], not one path"),
        ("lvr", lvr_row(conversations=[]), "conversations is [], not a list of objects"),
        ("lvr", lvr_row(conversations=[{"from": "gpt", "value": "x"}]), "its conversations are not one question"),
        ("zebra-cot", zebra_row(**dict.fromkeys(zebra_row(), "Visual_CoT/images/0_0.png")), None),
        ("zebra-cot", {"Question": "q", "Text Reasoning Trace": "t"}, "Final Answer is None, not a text"),
    ],
)
def test_a_bad_row_is_one_sentence_or_left_out(
    task: str, row: dict[str, Any], said: str | None, monet: Path, tmp_path: Path
) -> None:
    save(monet / "viscot/flickr30k/2618322793.png", 7)
    file = monet / "rows.json"
    file.write_text(json.dumps([row]))
    if said is None:
        assert len(run(task, file, tmp_path / "out")[1]) == 1
        return
    with pytest.raises(UserError) as caught:
        run(task, file, tmp_path / "out")
    assert str(caught.value).startswith(f"{file}, row 1: {said}")
    assert str(caught.value).endswith("or leave such rows out by --skip_bad_records")
    with pytest.raises(UserError, match="has made no record; what was left out: bad rows left out: 1"):
        run(task, file, tmp_path / "out", skip_bad_records=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "line 1, json: not valid JSON"),
        ("[1]", "line 1, json: expected an object, found list"),
        ('[{"id": 1}', "ends before the array's closing ]"),
        ('[{"id": NaN}]', "line 1, json: NaN is no JSON number"),
    ],
)
def test_a_file_that_is_no_array_is_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=rf"a\.json[:,] {re.escape(said)}"):
        run("lvr", tmp_path / "a.json", tmp_path / "out")


@pytest.mark.parametrize(
    ("own", "text", "correct", "invalid"),
    [
        ("so \\boxed{Red}", "it is \\boxed{ red }", 1, 0),
        ("so \\boxed{Red}", "it is red", 0, 1),
        ("<lvr> <answer> a hat </answer>", "<answer>A  hat</answer>", 1, 0),
        ("<lvr> <answer> a hat </answer>", "a hat", 0, 1),
        ("a hat", "A hat", 1, 0),
        ("a hat", "\\boxed{a hat}", 0, 0),
    ],
)
def test_an_answer_is_scored_as_the_records_own_is_written(own: str, text: str, correct: int, invalid: int) -> None:
    found = get_task("lvr").score_record(text, {"text_output": own})
    assert found == {"correct": correct, "invalid": invalid}
