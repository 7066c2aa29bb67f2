"""SAT's and SAT-v2's files as the Hub has them, made small."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mirage_ds.config.flags import build_model
from mirage_ds.data.record_files import scan
from mirage_ds.errors import UserError
from mirage_ds.evaluate.scoring import Prediction, score
from mirage_ds.tasks.build import convert, print_report
from mirage_ds.tasks.draft import BuildReport
from mirage_ds.tasks.sat import SatSettings

TYPES = ["obj_movement", "goal_aim", "ego_movement", "perspective"]
WITHOUT = "rows without a helper image (sft and evaluation only)"


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 40, 3), np.uint8))


def content(seed: int, form: str = "PNG") -> bytes:
    made = io.BytesIO()
    picture(seed).save(made, form)
    return made.getvalue()


def sat_rows(count: int, raw: bool = True) -> list[dict[str, Any]]:
    """Rows with one or two images; the right answer always first, as nothing forbids."""
    rows = []
    for n in range(count):
        stored = [content(2 * n + i, "JPEG" if n % 2 else "PNG") for i in range(1 + n % 2)]
        rows.append(
            {
                "image_bytes": stored if raw else [{"bytes": one, "path": None} for one in stored],
                "question": f"Where did it go ({n})?",
                "answers": [f"right {n}", f"left {n}", f"up {n}"][: 2 + n % 2],
                "question_type": TYPES[n % 4],
                "correct_answer": f"right {n}",
            }
        )
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    return path


def run(source: Path, out: Path, **values: Any) -> tuple[BuildReport, list[dict[str, Any]]]:
    report = convert("sat", source, build_model(SatSettings, {"out": out, **values}))
    return report, [json.loads(line) for line in (out / "data.jsonl").read_text().splitlines()]


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write(tmp_path / "SAT_train.parquet", sat_rows(80))


def test_rows_of_the_papers_types_become_records(train: Path, tmp_path: Path) -> None:
    report, made = run(train, tmp_path / "o")
    given = [row for row in sat_rows(80) if row["question_type"] in ("obj_movement", "goal_aim")]
    assert (report.records, report.excluded) == (40, 40)
    assert report.levels == {"obj-movement": 20, "goal-aim": 20}
    first = Counter()
    for old, new in zip(given, made, strict=True):
        assert new["text_output"] == f"\\boxed{{{old['correct_answer']}}}"
        assert sorted(new["options"]) == sorted(old["answers"])
        question, *options, last = (
            new["text_input"].removeprefix("<image>" * len(old["image_bytes"]) + "\n").split("\n")
        )
        assert question == old["question"]
        assert options == [f"({letter}) {text}" for letter, text in zip("ABC", new["options"], strict=False)]
        assert "text of the right option" in last
        paths = new["image_input"] if isinstance(new["image_input"], list) else [new["image_input"]]
        # The very bytes, whatever their format.
        assert [(tmp_path / "o" / path).read_bytes() for path in paths] == old["image_bytes"]
        assert {Path(path).suffix for path in paths} == {".jpg" if len(paths) == 2 else ".png"}
        assert (new["question_type"], new["task"]) == (old["question_type"], "sat")
        assert new["level"] == old["question_type"].replace("_", "-")
        first[new["options"].index(old["correct_answer"])] += 1
    # Right stood first in every row; now it stands anywhere.
    assert first[0] < 30
    assert first[1] > 8
    assert report.classes == {"ABC"[place]: count for place, count in first.items()}
    assert [row["row"] for row in made] == [str(n) for n in range(80) if n % 4 < 2]


def test_order_of_options_is_the_seeds(train: Path, tmp_path: Path) -> None:
    seeds = {"a": 1, "b": 1, "c": 2}
    orders = [[row["options"] for row in run(train, tmp_path / name, seed=seed)[1]] for name, seed in seeds.items()]
    assert orders[0] == orders[1] != orders[2]


def test_a_sample_is_drawn_by_the_seed(train: Path, tmp_path: Path) -> None:
    drawn = [[row["row"] for row in run(train, tmp_path / str(seed), count=10, seed=seed)[1]] for seed in (1, 2)]
    assert drawn[0] != drawn[1]
    assert all(len(set(rows)) == 10 and rows == sorted(rows, key=int) for rows in drawn)
    with pytest.raises(UserError, match="--count is 41, but there are only 40 rows to take"):
        run(train, tmp_path / "o", count=41)


def test_types_are_named_freely_and_listed_where_none_fits(train: Path, tmp_path: Path) -> None:
    assert run(train, tmp_path / "a", question_types="Ego Movement,PERSPECTIVE")[0].levels == {
        "ego-movement": 20,
        "perspective": 20,
    }
    assert run(train, tmp_path / "b", question_types="all")[0].records == 80
    with pytest.raises(UserError) as error:
        run(train, tmp_path / "o", question_types="counting,depth")
    assert str(error.value) == (
        "--question_types counting, depth: no row is of one of them; the data has "
        "obj_movement (20), goal_aim (20), ego_movement (20), perspective (20)"
    )


def test_helpers_come_from_the_users_folder(
    train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    helpers = tmp_path / "helpers"
    helpers.mkdir()
    for row in (0, 1, 5, 77, 2):  # 2 is of another type
        (helpers / f"{row:04}.png").write_bytes(content(900 + row))
    (helpers / "notes.txt").write_text("no image")
    report, made = run(train, tmp_path / "o", helpers=helpers)
    helped = {row["row"]: row["image_output"] for row in made if "image_output" in row}
    assert sorted(helped, key=int) == ["0", "1", "5", "77"]
    for row, path in helped.items():
        assert np.array_equal(np.array(Image.open(tmp_path / "o" / path)), np.array(picture(900 + int(row))))
    assert report.notes == {WITHOUT: 36}
    print_report(report)
    assert f"{WITHOUT} │    36 " in capsys.readouterr().out
    assert run(train, tmp_path / "none")[0].notes == {WITHOUT: 40}
    for name in ("7.png", "07.jpg"):
        (helpers / name).write_bytes(content(1))
    with pytest.raises(UserError, match=r"07\.jpg and 7\.png are for one row; keep one of them"):
        run(train, tmp_path / "p", helpers=helpers)


def test_helpers_that_fit_no_row_write_nothing(train: Path, tmp_path: Path) -> None:
    helpers = tmp_path / "helpers"
    helpers.mkdir()
    with pytest.raises(UserError, match="no image in it"):
        run(train, tmp_path / "o", helpers=helpers)
    (helpers / "row_0.png").write_bytes(content(1))
    with pytest.raises(UserError, match=r"no row has one of its 1 images \(row_0\.png, …\); the rows are called 0, 1"):
        run(train, tmp_path / "o", helpers=helpers)
    assert not (tmp_path / "o").exists()
    # By an id where the rows have one.
    named = write(tmp_path / "named.parquet", [row | {"id": f"row_{n}"} for n, row in enumerate(sat_rows(8))])
    report, made = run(named, tmp_path / "o", helpers=helpers)
    assert [row["row"] for row in made if "image_output" in row] == ["row_0"]
    assert report.notes == {WITHOUT: 3}


def test_the_second_version_and_other_ways_to_store_it(tmp_path: Path) -> None:
    rows = [{("images" if k == "image_bytes" else k): v for k, v in row.items()} for row in sat_rows(12, raw=False)]
    hub = tmp_path / "SAT-v2"
    (hub / "data").mkdir(parents=True)
    write(hub / "data/train-00000-of-00002.parquet", rows[:7])
    write(hub / "data/train-00001-of-00002.parquet", rows[7:])
    write(hub / "data/test-00000-of-00001.parquet", rows[:3])
    _, made = run(hub, tmp_path / "a", split="train", question_types="all")
    # Numbers go on through the files.
    assert [row["row"] for row in made] == [str(n) for n in range(12)]
    assert [row["question"] for row in made] == [row["question"] for row in rows]
    features = datasets.Features(
        images=datasets.List(datasets.Image()),
        question=datasets.Value("string"),
        answers=datasets.List(datasets.Value("string")),
        question_type=datasets.Value("string"),
        correct_answer=datasets.Value("string"),
    )
    stored = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"train": stored, "test": stored}).save_to_disk(tmp_path / "saved")
    _, again = run(tmp_path / "saved", tmp_path / "b", split="train", question_types="all")
    assert again == made
    # An Arrow file, where `datasets` writes streams.
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    assert run(tmp_path / "file.arrow", tmp_path / "d", question_types="all")[1] == made
    with pytest.raises(UserError, match="has the splits test, train; say which one"):
        run(tmp_path / "saved", tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"correct_answer": "down 4"}, "correct_answer 'down 4' stands 0 times among its answers"),
        ({"answers": ["right 4", "Right 4."]}, "correct_answer 'right 4' stands 2 times among its answers"),
        ({"answers": ["right 4"]}, "answers is ['right 4'], not a list of two texts or more"),
        ({"question": " "}, "question is ' ', not a text"),
        ({"image_bytes": []}, "image_bytes holds no image"),
        ({"image_bytes": [b"GIF89a no picture"]}, "image 1 cannot be decoded"),
        ({"question": "<image> and <image>"}, "its question has 2 <image> marks for 1 images"),
    ],
)
def test_a_bad_row_is_named_or_left_out(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    rows = sat_rows(9)
    rows[4] |= change
    file = write(tmp_path / "SAT_val.parquet", rows)
    with pytest.raises(UserError) as error:
        run(file, tmp_path / "o")
    assert str(error.value).startswith(f"{file}, row 5: {says}")
    assert str(error.value).endswith("fix it, or leave such rows out by --skip_bad_records")
    assert not (tmp_path / "o").exists()
    report, made = run(file, tmp_path / "o", skip_bad_records=True)
    assert [row["row"] for row in made] == ["0", "1", "5", "8"]
    assert report.notes["bad rows left out"] == 1


def test_repeated_rows_are_counted_and_kept(tmp_path: Path) -> None:
    rows = sat_rows(5)
    report, made = run(write(tmp_path / "SAT_val.parquet", [*rows, rows[0], rows[1]]), tmp_path / "o")
    assert (report.duplicates, report.duplicates_kept, len(made)) == (2, True, 5)


def test_answers_are_scored_for_each_type(train: Path, tmp_path: Path) -> None:
    run(train, tmp_path / "o", count=8)
    records = scan(tmp_path / "o/data.jsonl")[0]
    answers = [Prediction(record.text_output, [], []) for record in records]
    answers[0] = Prediction("\\boxed{nowhere}", [], [])
    found = score(records, answers, "sat")
    assert (found["all"]["correct"], found["all"]["invalid"]) == (7 / 8, 1 / 8)
    assert set(found["levels"]) <= {"obj-movement", "goal-aim"}
