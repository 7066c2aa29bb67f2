"""`data mix`: which rows come, in what proportion and order, and where their images are."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.commands import Call, caller

from mirage_ds.config.mixture import Part, parse_part
from mirage_ds.curate.check import check_file
from mirage_ds.curate.mix import _counts, mix
from mirage_ds.curate.spec import MixSpec
from mirage_ds.errors import UserError

Row = dict[str, Any]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(monkeypatch, capsys, "data", "mix")


@pytest.fixture
def refused(call: Call, tmp_path: Path) -> Callable[..., str]:
    def run(*arguments: object) -> str:
        out = tmp_path / "refused"
        code, said, error = call(*arguments, "--out", out)
        assert (code, said) == (2, "")
        assert re.fullmatch(r"error: [^\n]+\n", error)
        assert not out.exists()
        return error[7:-1]

    return run


def lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def make(folder: Path, name: str, count: int, colour: int) -> Path:
    """Write a file of `count` rows, each with a number, its file's name, a task, and images of its colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, shade in (("in", colour), ("help", colour + 1)):
        Image.new("L", (28, 28), shade).save(folder / f"{kind}.png")
    rows = [
        {
            "text_input": f"<image>{n}?",
            "text_output": f"<output_image>{n}",
            "image_input": "in.png" if n % 2 else ["in.png"],
            "image_output": "help.png",
            "task": f"{name}:Task",
            "number": n,
            "from": name,
        }
        for n in range(count)
    ]
    (folder / f"{name}.jsonl").write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    return folder / f"{name}.jsonl"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [make(tmp_path / "x/y", "a", 40, 10), make(tmp_path / "z", "b", 10, 20), make(tmp_path / "z2", "c", 25, 30)]


def counts(rows: list[Row]) -> list[int]:
    return [sum(row["from"] == name for row in rows) for name in "abc"]


def check(out: Path, files: list[Path]) -> list[Row]:
    """Every row is one of its file's, at most once, in that file's order; its images are found and are its own."""
    rows = lines(out / "data.jsonl")
    given = {row["from"]: row for file in files for row in lines(file)}
    for name, row in given.items():
        numbers = [one["number"] for one in rows if one["from"] == name]
        assert numbers == sorted(set(numbers))
        for one in (one for one in rows if one["from"] == name):
            keys = set(one) - {"image_input", "image_output"}
            assert {key: one[key] for key in keys} == {
                "text_input": f"<image>{one['number']}?", "text_output": f"<output_image>{one['number']}",
                "task": row["task"], "from": name, "number": one["number"],
            }  # fmt: skip
            for key, shade in (("image_input", 0), ("image_output", 1)):
                assert not os.path.isabs(one[key])
                with Image.open(out / one[key]) as image:
                    assert image.getpixel((0, 0)) == {"a": 10, "b": 20, "c": 30}[name] + shade
    assert check_file(out / "data.jsonl", "stage1", None, None, 1) == (len(rows), [])
    return rows


def test_values_that_json_lacks(call: Call, refused: Callable[..., str], tmp_path: Path) -> None:
    row = {"text_input": "?", "text_output": "A", "when": [datetime(2020, 1, 1)], "n": 1}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert call(tmp_path / "a.parquet", "--out", tmp_path / "o")[0] == 0
    assert lines(tmp_path / "o/data.jsonl") == [row | {"when": ["2020-01-01 00:00:00"]}]
    pq.write_table(pa.Table.from_pylist([row | {"raw": b"12"}]), tmp_path / "b.parquet")
    assert refused(tmp_path / "b.parquet").endswith(
        "line 1, raw: bytes (b'12'), which JSON cannot hold; leave the column out"
    )


def test_whole_files_are_shuffled_into_one_another(call: Call, files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "o"
    assert call(*files, "--out", out) == (0, f"{out / 'data.jsonl'}: 75 records\n", "")
    rows = check(out, files)
    assert counts(rows) == [40, 10, 25]
    assert not (out / "images").exists()
    # No file stands in one piece: of 74 neighbours 47 are of two files on average, with a deviation of about 4.
    changes = sum(one["from"] != other["from"] for one, other in pairwise(rows))
    assert 30 < changes < 64


@pytest.mark.parametrize(
    ("weights", "count", "found"),
    [
        ((2, 1, 1), 40, [20, 10, 10]),
        ((1, 1, 1), None, [10, 10, 10]),
        ((4, 1, 2), None, [40, 10, 20]),
        ((5, 1, 1), None, [40, 8, 8]),
        ((3, 0.5, 1.6), None, [40, 7, 21]),
        ((0.7, 0.2, 0.1), None, [35, 10, 5]),  # 49.999… in floats
        ((1, 0.2, 0.8), 20, [10, 2, 8]),
        ((1, 1, 1), 10, [4, 3, 3]),
        ((None, None, None), 15, [8, 2, 5]),
        ((None, None, None), 75, [40, 10, 25]),
    ],
)
def test_proportions(
    call: Call, files: list[Path], tmp_path: Path, weights: Any, count: int | None, found: list[int]
) -> None:
    named = [file if weight is None else f"{file}:{weight}" for file, weight in zip(files, weights, strict=True)]
    assert call(*named, "--out", tmp_path / "o", *(["--count", count] if count else []))[0] == 0
    assert counts(check(tmp_path / "o", files)) == found


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.05, 20), min_size=4, max_size=4),
)
def test_without_a_count_as_many_as_the_shortest_allows(lengths: list[int], weights: list[float]) -> None:
    class Long:
        def __init__(self, count: int):
            self.file, self.records = Path("f"), [None] * count

    shares = weights[: len(lengths)]
    try:
        found = _counts([Long(count) for count in lengths], shares, None)
    except UserError:
        # A share of less than a row.
        most = min(length / share for length, share in zip(lengths, shares, strict=True))
        assert most * min(shares) < 1
        return
    assert all(0 < one <= length for one, length in zip(found, lengths, strict=True))
    total, whole = sum(found), sum(shares)
    assert all(abs(one - total * share / whole) < 1 for one, share in zip(found, shares, strict=True))
    # One row more, and exact shares would not fit into some file.
    assert any((total + 1) * share / whole > length - 1e-6 for share, length in zip(shares, lengths, strict=True))


def test_seeds(call: Call, files: list[Path], tmp_path: Path) -> None:
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert call(*files, "--out", tmp_path / name, "--seed", seed, "--count", 30)[0] == 0
        made.append((tmp_path / name / "data.jsonl").read_bytes())
    assert made[0] == made[1] != made[2]
    chosen = [{(row["from"], row["number"]) for row in lines(tmp_path / name / "data.jsonl")} for name in "ac"]
    assert chosen[0] != chosen[1]
    # Chosen from the whole file, not from its head.
    numbers = [row["number"] for row in lines(tmp_path / "a/data.jsonl") if row["from"] == "a"]
    assert len(numbers) == 16
    assert max(numbers) > 25


def test_a_mixture_of_one_file_and_of_mixtures(call: Call, files: list[Path], tmp_path: Path) -> None:
    assert call(files[0], files[1], "--out", tmp_path / "o")[0] == 0
    assert call(tmp_path / "o/data.jsonl", files[2], "--out", tmp_path / "p/q", "--name", "all")[0] == 0
    (tmp_path / "p/q/all.jsonl").rename(tmp_path / "p/q/data.jsonl")
    assert counts(check(tmp_path / "p/q", files)) == [40, 10, 25]
    assert {tuple(sorted(row)) for row in lines(tmp_path / "p/q/data.jsonl")} == {tuple(sorted(lines(files[0])[0]))}
    assert call(f"{files[1]}:5", "--out", tmp_path / "r")[0] == 0
    assert [row["number"] for row in check(tmp_path / "r", files)] == list(range(10))


def test_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "named:3").write_text("")
    for text, part in {
        "a.jsonl": Part(Path("a.jsonl"), None),
        "a.jsonl:0.25": Part(Path("a.jsonl"), 0.25),
        "C:x/a.jsonl": Part(Path("C:x/a.jsonl"), None),
        "C:x/a.jsonl:1e3": Part(Path("C:x/a.jsonl"), 1000.0),
        "named:3": Part(Path("named:3"), None),
        "named:3:2": Part(Path("named:3"), 2.0),
        ":3": Part(Path(":3"), None),
    }.items():
        assert parse_part(text) == part
    for weight in ("0", "-1", "nan", "inf", "1e300", "1e-300"):
        with pytest.raises(UserError) as error:
            parse_part(f"a.jsonl:{weight}")
        assert str(error.value) == f"a.jsonl:{weight}: the weight is '{weight}'; give a number from 1e-9 to 1e9"


def test_refusals(call: Call, files: list[Path], tmp_path: Path, refused: Callable[..., str]) -> None:
    a, b, c = files
    assert refused(f"{a}:1", f"{b}:1", "--count", 50) == (
        f"{b}: has 10 rows and would need 25 for its share of 50; give it more rows, or lower its weight or --count"
    )
    assert refused(f"{a}:3", f"{b}:1", f"{c}:2", "--count", 74).startswith(f"{b}: has 10 rows and would need 12 for")
    assert refused(a, b, "--count", 51) == (
        "--count 51: the files have 50 rows in all; ask for fewer or give more files"
    )
    assert refused(f"{a}:1", b, c) == (
        f"{b} has no weight while other files have; give every file one as FILE:WEIGHT, or none"
    )
    assert refused(a, tmp_path / "x/../x/y/a.jsonl") == (
        f"{tmp_path / 'x/../x/y/a.jsonl'} is named twice, and every row is taken at most once; name it once"
    )
    assert refused(f"{a}:1000", f"{b}:1", "--count", 20) == (
        f"{b}: gets no row in a mixture of 20; raise its weight or --count"
    )
    assert refused(f"{a}:1000", f"{b}:1") == f"{b}: gets no row in a mixture of 40; raise its weight or --count"
    assert refused(f"{a}:0", b).startswith(f"{a}:0: the weight is '0'; ")
    assert refused(tmp_path / "no.jsonl:2") == f"{tmp_path / 'no.jsonl'}: no such file of records"
    assert refused(a, "--count", 0).startswith("--count is 0: ")
    assert refused().startswith("Missing argument")
    assert "no *.jsonl or *.parquet file in this folder" in refused(tmp_path)
    broken = tmp_path / "z/broken.jsonl"
    broken.write_text(b.read_text() + '{"text_input": "?"}\n')
    assert refused(a, broken) == f"{broken}: line 12, text_output: missing; add it as a string"
    row = lines(b)[0] | {"image_output": "gone.png"}
    broken.write_text(json.dumps(row) + "\n")
    assert refused(a, broken).startswith(f"{broken}, line 1, image_output: no image 'gone.png': looked for ")
    with pytest.raises(UserError, match="exists; remove it"):
        mix([Part(a, None)], MixSpec(out=a.parent, name="a"))
    assert len(lines(a)) == 40


def test_the_rest_is_what_was_not_taken(files: list[Path], call: Call, tmp_path: Path) -> None:
    out, rest = tmp_path / "out", tmp_path / "deep/rest"
    code, said, _ = call(*files, "--count", 30, "--out", out, "--rest", rest)
    assert (code, len(said.splitlines())) == (0, 2)
    taken, left = check(out, files), check(rest, files)
    assert (len(taken), len(left)) == (30, 45)
    assert len({(one["from"], one["number"]) for one in taken + left}) == 75
    plain = tmp_path / "plain"
    call(*files, "--count", 30, "--out", plain)
    assert check(plain, files) == lines(plain / "data.jsonl")
    assert [(one["from"], one["number"]) for one in lines(plain / "data.jsonl")] == [
        (one["from"], one["number"]) for one in taken
    ]


def test_a_rest_that_cannot_be_is_refused(files: list[Path], refused: Callable[..., str], tmp_path: Path) -> None:
    assert refused(files[0], "--rest", tmp_path / "r") == (
        f"--rest {tmp_path / 'r'}: every row is taken; give a --count below 40"
    )
    assert "is --out too" in refused(files[0], "--count", 3, "--rest", tmp_path / "refused")
    assert not (tmp_path / "r").exists()
