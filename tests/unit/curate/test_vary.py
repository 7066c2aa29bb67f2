"""`data vary`: the files as a user gets them, read back with plain json and PIL, held against what they come from."""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.commands import Call, caller

from mirage_ds.curate.check import check_file
from mirage_ds.curate.spec import KINDS
from mirage_ds.curate.vary import MAKERS, derange
from mirage_ds.tasks import get_task
from mirage_ds.tasks.build import build

PLANNING, REASONING = "vsp-spatial-planning", "vsp-spatial-reasoning"
STAGES = dict.fromkeys(KINDS, "stage1") | dict.fromkeys(("helper-input", "helper-rows", "helper-text"), "sft")
FORMAT = ("text_input", "text_output", "image_input", "image_output")
Row = dict[str, Any]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(monkeypatch, capsys, "data", "vary")


@pytest.fixture
def refused(call: Call, tmp_path: Path) -> Callable[..., str]:
    """Run what is to be refused; return the sentence. Nothing is written."""

    def run(kind: str, file: Path, *arguments: object) -> str:
        out = tmp_path / "refused"
        code, said, error = call(kind, file, "--out", out, *arguments)
        assert (code, said) == (2, "")
        assert re.fullmatch(r"error: [^\n]+\n", error)
        assert not out.exists()
        assert not list(tmp_path.glob(".*partial*"))
        return error[7:-1]

    return run


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Records of both tasks on small boards, with rationales."""
    out = tmp_path_factory.mktemp("built")
    found = {}
    for task in (PLANNING, REASONING):
        settings = get_task(task).build_settings(out=out / task, count=24, levels=[3, 4], answer="cot", cell_size=16)
        found[task] = build(task, settings).file
    return found


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Rows of many shapes: several images and helpers, marks or none, other modes and sizes, a blank line."""
    folder = tmp_path / "odd"
    (folder / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)

    def image(name: str, mode: str, width: int, height: int) -> str:
        bands = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode if mode in ("L", "RGBA") else "RGB"]
        made = Image.fromarray(rng.integers(0, 255, (height, width, *bands), np.uint8))
        (made.convert("P") if mode == "P" else made).save(folder / name)
        return name

    helpers = [
        image("a.png", "RGB", 40, 60), image("b.png", "L", 56, 28), image("deep/c.png", "RGBA", 30, 30),
        image("d.png", "P", 31, 33), image("e.jpg", "RGB", 64, 48), image("f.png", "RGB", 20, 20),
        image("g.png", "RGB", 24, 20),
    ]  # fmt: skip
    first, second = image("in1.png", "RGB", 84, 28), image("in2.png", "L", 28, 56)
    rows: list[Row] = [
        dict(text_input="<image> and <image>?", text_output="So <output_image>it is 3.", image_input=[first, second],
             image_output=helpers[0], level="x", note={"deep": [1, 2.5, None]}),
        dict(text_input="No mark?", text_output="4", image_input=first, image_output=[helpers[1]], level="x"),
        dict(text_input="Blind?", text_output="<output_image>5", image_output=str(folder / helpers[2]), level="x"),
        dict(text_input="<image>?", text_output="a<output_image> b <output_image>c", image_input=second,
             image_output=[helpers[3], helpers[4]], level="x", half="\ud800"),
        dict(text_input="<image>?", text_output="6<output_image>", image_input=second, image_output=helpers[5],
             map_desc=[[1, 2], [0, 0]]),
        dict(text_input="é <image>", text_output="7", image_input=first, image_output=helpers[6], level=2),
        dict(text_input="<image>?", text_output="<output_image>d<output_image>", image_input=first, level="x",
             image_output=[helpers[0], helpers[5]]),
    ]  # fmt: skip
    return write(folder / "odd.jsonl", rows[0], "", *rows[1:])


def write(path: Path, *rows: Row | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def images(row: Row, key: str, folder: Path) -> list[Path]:
    found = row.get(key, [])
    return [Path(os.path.realpath(folder / path)) for path in ([found] if isinstance(found, str) else found)]


def varied(call: Call, kind: str, file: Path, out: Path, *arguments: object) -> list[Row]:
    """Run the command; what holds for every kind is checked here."""
    code, said, error = call(kind, file, "--out", out, *arguments)
    assert (code, error) == (0, "")
    out = out.resolve()
    rows = lines(out / "data.jsonl")
    assert said.startswith(f"{out / 'data.jsonl'}: {len(rows)} records")
    for row in rows:
        for key in ("image_input", "image_output"):
            paths = row.get(key, "x")
            assert not any(Path(path).is_absolute() for path in ([paths] if isinstance(paths, str) else paths))
            assert all(path.is_file() for path in images(row, key, out))
    # The pictures there are those that are named, and no others.
    named = {path for row in rows for key in ("image_input", "image_output") for path in images(row, key, out)}
    new = set((out / "images").rglob("*.png"))
    assert new == {path for path in named if path.is_relative_to(out)}
    assert said.split(" records")[1] == (f", {len(new)} new pictures\n" if new else "\n")
    count, faults = check_file(out / "data.jsonl", STAGES[kind], None, None, 1)
    assert (count, faults) == (len(rows), [])
    given = lines(file)[: len(rows)]
    if kind == "helper-rows":
        given = [row for row in lines(file) for _ in range(2)][: len(rows)]
    assert [others(row) for row in rows] == [others(row) | {"variant": kind} for row in given]
    return rows


def others(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in FORMAT}


def same(row: Row, given: Row, *keys: str, out: Path, file: Path) -> None:
    """Hold fields of a row against those of the row it comes from; images by where they are."""
    for key in keys:
        if key.startswith("text"):
            assert row[key] == given[key]
        else:
            assert images(row, key, out) == images(given, key, file.parent)


@pytest.fixture(params=["odd", PLANNING, REASONING])
def file(request: pytest.FixtureRequest, odd: Path, built: dict[str, Path]) -> Path:
    return odd if request.param == "odd" else built[request.param]


def test_every_kind_is_made() -> None:
    assert tuple(MAKERS) == KINDS


def test_helper_input(call: Call, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    for row, old in zip(varied(call, "helper-input", file, out), lines(file), strict=True):
        check_helper_input(row, old, out, file)


def check_helper_input(row: Row, old: Row, out: Path, file: Path) -> None:
    helpers = images(old, "image_output", file.parent)
    assert images(row, "image_input", out) == images(old, "image_input", file.parent) + helpers
    assert "image_output" not in row
    assert row["text_output"] == "".join(old["text_output"].split("<output_image>"))
    marks = "<image>" * len(helpers) if "<image>" in old["text_input"] else ""
    assert row["text_input"] == old["text_input"] + marks


def test_helper_rows(call: Call, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    rows, given = varied(call, "helper-rows", file, out), lines(file)
    assert len(rows) == 2 * len(given)
    for without, seeing, old in zip(rows[::2], rows[1::2], given, strict=True):
        same(without, old, "text_input", "image_input", out=out, file=file)
        assert without["text_output"] == "".join(old["text_output"].split("<output_image>"))
        assert "image_output" not in without
        check_helper_input(seeing, old, out, file)


def test_helper_text_of_planning(call: Call, built: dict[str, Path], tmp_path: Path) -> None:
    delta = {"LEFT": (0, -1), "DOWN": (1, 0), "RIGHT": (0, 1), "UP": (-1, 0)}
    file, out = built[PLANNING], tmp_path / "o"
    for row, old in zip(varied(call, "helper-text", file, out), lines(file), strict=True):
        same(row, old, "text_input", "image_input", out=out, file=file)
        assert "image_output" not in row
        at = next((r, c) for r, line in enumerate(old["map_desc"]) for c, cell in enumerate(line) if cell == 1)
        words = f"({at[0]},{at[1]})"
        for move in old["path"]:
            at = at[0] + delta[move][0], at[1] + delta[move][1]
            words += f" ({at[0]},{at[1]})"
        before, after = old["text_output"].split("<output_image>")
        assert row["text_output"] == f"{before} {words} {after}"
        # The words are what the picture shows: red lies on the centres of these cells alone.
        with Image.open(images(old, "image_output", file.parent)[0]) as image:
            drawn = np.argwhere((np.array(image.convert("RGB"))[8::16, 8::16] == (255, 0, 0)).all(-1))
        assert {(r, c) for r, c in drawn.tolist()} == {(int(r), int(c)) for r, c in re.findall(r"\((\d),(\d)\)", words)}


def test_helper_text_of_reasoning(call: Call, built: dict[str, Path], tmp_path: Path) -> None:
    file, out = built[REASONING], tmp_path / "o"
    names = set()
    for row, old in zip(varied(call, "helper-text", file, out), lines(file), strict=True):
        # The rationale, which has its own tests, says where the step before the helper led.
        before, after = old["text_output"].split("<output_image>")
        place = re.findall(r"\[\(\d,\d\),\w+\]", before)[-1]
        facing = "" if "Hole" in place else f", facing {old['plan'][old['helper_step'] - 1]}"
        assert row["text_output"] == f"{before} The player is at {place}{facing}. {after}"
        r, c, name = re.fullmatch(r"\[\((\d),(\d)\),(\w+)\]", place).groups()
        assert f"_r{r}c{c}_" in str(old["image_output"])
        names.add(name)
        same(row, old, "text_input", "image_input", out=out, file=file)
    assert {"Ice", "Hole", "Target"} <= names


def test_helper_text_stands_first_without_a_mark(call: Call, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "h.png")
    board = {"map_desc": [[1, 0], [0, 2]], "image_output": "h.png", "text_input": "?"}
    answers = ["\\boxed{RIGHT, DOWN}", "So\n<output_image>\n\\boxed{R,D}", "<output_image>, \\boxed{right down}"]
    file = write(tmp_path / "a.jsonl", *(board | {"text_output": text, "task": PLANNING} for text in answers))
    words = "(0,0) (0,1) (1,1)"
    assert [row["text_output"] for row in varied(call, "helper-text", file, tmp_path / "o")] == [
        f"{words} \\boxed{{RIGHT, DOWN}}",
        f"So\n{words}\n\\boxed{{R,D}}",
        f"{words} , \\boxed{{right down}}",
    ]
    bare = write(tmp_path / "b.jsonl", board | {"text_output": answers[0]})
    assert varied(call, "helper-text", bare, tmp_path / "p", "--task", PLANNING)[0]["text_output"].startswith(words)


def contents(row: Row, folder: Path) -> tuple[bytes, ...]:
    return tuple(path.read_bytes() for path in images(row, "image_output", folder))


def test_helper_swap(call: Call, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    rows, given = varied(call, "helper-swap", file, out), lines(file)

    def group(row: Row) -> tuple[str, int]:
        return str(row.get("level", len(row.get("map_desc", [])))), len(images(row, "image_output", out))

    for row, old in zip(rows, given, strict=True):
        same(row, old, "text_input", "text_output", "image_input", out=out, file=file)
        assert contents(row, out) != contents(old, file.parent)
    # In every level the helpers are those that were there, each as often as it was.
    assert Counter((group(row), tuple(images(row, "image_output", out))) for row in rows) == Counter(
        (group(row), tuple(images(row, "image_output", file.parent))) for row in given
    )


def test_helper_swap_depends_on_the_seed(call: Call, built: dict[str, Path], tmp_path: Path) -> None:
    found = {}
    for seed in (0, 1, 2):
        rows = varied(call, "helper-swap", built[PLANNING], tmp_path / str(seed), "--seed", seed)
        found[tuple(str(row["image_output"]) for row in rows)] = seed
    assert len(found) == 3


@given(labels=st.lists(st.integers(0, 6), max_size=24), seed=st.integers())
def test_derange(labels: list[int], seed: int) -> None:
    found = derange(labels, random.Random(seed))
    if max(Counter(labels).values(), default=0) > len(labels) / 2:
        assert found is None
        return
    assert sorted(found) == list(range(len(labels)))
    assert all(labels[place] != labels[other] for place, other in enumerate(found))


@given(count=st.integers(2, 40), seed=st.integers())
def test_derange_of_different_labels_is_one_cycle(count: int, seed: int) -> None:
    found = derange(range(count), random.Random(seed))
    at, seen = 0, set()
    while at not in seen:
        seen.add(at)
        at = found[at]
    assert len(seen) == count


def test_helper_noise(call: Call, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    seen = []
    for row, old in zip(varied(call, "helper-noise", file, out), lines(file), strict=True):
        same(row, old, "text_input", "text_output", "image_input", out=out, file=file)
        helpers = images(row, "image_output", out), images(old, "image_output", file.parent)
        for new, former in zip(*helpers, strict=True):
            with Image.open(new) as made, Image.open(former) as true:
                assert made.size == true.size
                assert made.mode == "RGB"
                values = np.array(made).astype(int)
            # Uniform from 0 to 255: mean and spread, ends, and no likeness between neighbours.
            assert abs(values.mean() - 127.5) < 6 * 73.9 / values.size**0.5
            assert abs(values.std() - 73.9) < 8
            assert (values.min(), values.max()) < (9, 256)
            assert values.max() > 246
            pairs = np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]
            assert abs(pairs) < 6 / values.size**0.5
            seen.append(values.tobytes())
    assert len(set(seen)) == len(seen)


def test_no_image(call: Call, built: dict[str, Path], odd: Path, tmp_path: Path) -> None:
    seeing = write(odd.parent / "seeing.jsonl", *(row for row in lines(odd) if "image_input" in row))
    for file, out in ((built[PLANNING], tmp_path / "p"), (seeing, tmp_path / "s")):
        for row, old in zip(varied(call, "no-image", file, out), lines(file), strict=True):
            same(row, old, "text_input", "text_output", "image_output", out=out, file=file)
            inputs = images(row, "image_input", out), images(old, "image_input", file.parent)
            for new, former in zip(*inputs, strict=True):
                with Image.open(new) as made, Image.open(former) as true:
                    assert made.size == true.size
                    assert made.getcolors() == [(made.width * made.height, (128, 128, 128))]


def test_no_image_needs_no_helper(call: Call, odd: Path, tmp_path: Path) -> None:
    file = write(odd.parent / "bare.jsonl", {"text_input": "?", "text_output": "a", "image_input": "in1.png"})
    assert call("no-image", file, "--out", tmp_path / "o")[0] == 0
    assert "image_output" not in lines(tmp_path / "o/data.jsonl")[0]


@pytest.mark.parametrize("question", [None, "Where is it, then?"])
def test_helper_only(call: Call, file: Path, tmp_path: Path, question: str | None) -> None:
    out = tmp_path / "o"
    arguments = ["--question", question] if question else []
    for row, old in zip(varied(call, "helper-only", file, out, *arguments), lines(file), strict=True):
        assert row["text_input"] == (question or "Read the path.")
        assert "image_input" not in row
        same(row, old, "text_output", "image_output", out=out, file=file)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_bytes(call: Call, built: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Also the records of --most alone are those that the whole file gives, but for a swap's partners."""

    def files(name: str, *arguments: object) -> dict[str, bytes]:
        out = tmp_path / name
        varied(call, kind, built[PLANNING], out, *arguments)
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    one, two, other = files("a", "--seed", 7), files("b", "--seed", 7), files("c", "--seed", 8)
    assert one == two
    assert (one != other) == (kind in ("helper-swap", "helper-noise"))
    few = files("d", "--seed", 7, "--most", 10)["data.jsonl"].splitlines()
    assert len(few) == (20 if kind == "helper-rows" else 10)
    if kind != "helper-swap":
        assert few == one["data.jsonl"].splitlines()[: len(few)]


def test_names_links_and_existing_files(call: Call, odd: Path, tmp_path: Path) -> None:
    """Two files in one folder, beside the records, and in a folder behind a link."""
    for name in ("one", "two"):
        assert call("helper-noise", odd, "--out", odd.parent, "--name", name, "--most", 1)[0] == 0
    one, two = lines(odd.parent / "one.jsonl"), lines(odd.parent / "two.jsonl")
    assert one == two
    assert one[0]["image_input"] == ["in1.png", "in2.png"]
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far/away")
    (tmp_path / "pictures").symlink_to(odd.parent / "deep")
    row = {"text_input": "?", "text_output": "a", "image_output": "pictures/../a.png"}
    varied(call, "helper-only", write(tmp_path / "r.jsonl", row), tmp_path / "link/out")
    # Where the system finds it, that is behind the link.
    place = tmp_path / "far/away/out" / lines(tmp_path / "link/out/data.jsonl")[0]["image_output"]
    assert place.resolve() == (odd.parent / "a.png").resolve()


def test_variants_of_variants(call: Call, built: dict[str, Path], tmp_path: Path, refused: Callable[..., str]) -> None:
    first = tmp_path / "a/data.jsonl"
    varied(call, "helper-swap", built[PLANNING], first.parent)
    assert call("no-image", first, "--out", tmp_path / "b")[0] == 0
    assert {row["variant"] for row in lines(tmp_path / "b/data.jsonl")} == {"helper-swap+no-image"}
    assert refused("helper-text", tmp_path / "b/data.jsonl") == (
        f"{tmp_path / 'b/data.jsonl'}, line 1, variant: helper-swap+no-image: its helper is not its own; "
        "take the records it was made from"
    )


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "no-image"])
def test_a_row_without_a_helper_is_named(kind: str, odd: Path, refused: Callable[..., str]) -> None:
    rows = lines(odd)
    file = write(odd.parent / "bare.jsonl", rows[1], rows[1], {"text_input": "?", "text_output": "a", "level": "x"})
    assert refused(kind, file) == (
        f"{file}, line 3, image_output: {kind} needs a helper image; add its path, or leave the row out"
    )


def test_no_image_names_a_row_without_one(odd: Path, refused: Callable[..., str]) -> None:
    # The blank line counts.
    assert refused("no-image", odd) == (
        f"{odd}, line 4, image_input: no-image needs an input image; add its path, or leave the row out"
    )


def test_refused_swaps(odd: Path, refused: Callable[..., str]) -> None:
    rows = lines(odd)
    one = [rows[1], rows[4], rows[0]]
    file = write(odd.parent / "one.jsonl", *one)
    end = "so there is no other for each; give more records of them, or leave it out"
    assert refused("helper-swap", file) == (
        f"{file}: helper-swap: the record on line 2 is the only one of level 2, {end}"
    )
    file = write(odd.parent / "two.jsonl", rows[0], rows[1], rows[3])
    assert refused("helper-swap", file) == (
        f"{file}: helper-swap: the record on line 3 is the only one of level x with 2 helpers, {end}"
    )
    # The same picture under another name is no other helper.
    (odd.parent / "copy.png").write_bytes((odd.parent / "a.png").read_bytes())
    file = write(odd.parent / "same.jsonl", rows[0], rows[1], rows[0] | {"image_output": "copy.png"})
    assert refused("helper-swap", file) == (
        f"{file}: helper-swap: 2 of the 3 records of level x have one helper, {end}"
    )
    del rows[1]["level"]
    file = write(odd.parent / "none.jsonl", rows[0], rows[1])
    assert refused("helper-swap", file) == (
        f"{file}: helper-swap: the record on line 2 is the only one of the file, {end}"
    )


def test_refused_words(odd: Path, built: dict[str, Path], refused: Callable[..., str]) -> None:
    rows = lines(odd)

    def said(row: Row, *arguments: object) -> str:
        file = write(odd.parent / "w.jsonl", row)
        return refused("helper-text", file, *arguments).removeprefix(f"{file}, line 1")

    helper = rows[1]
    assert said(helper) == ", task: missing; add its name, or give --task"
    assert said(helper | {"task": "sat"}) == (
        ": task sat has no words for its helper; write its helper_text, or vary in another way"
    )
    assert said(helper, "--task", "comt").startswith(": task comt has no words for its helper;")
    assert said(helper | {"task": "own:Task"}) == (
        ", task: 'own:Task' is code, which data must not choose; give it with --task"
    )
    assert said(helper | {"task": "sta"}).startswith(", task: unknown task 'sta' (did you mean 'sat'?)")
    assert said(rows[3] | {"task": PLANNING}) == (
        ", image_output: helper-text needs exactly one helper image; leave the row out"
    )
    planned = helper | {"task": PLANNING}
    assert said(planned) == f", map_desc: missing; add it: {PLANNING} tells its helper by it"
    assert said(planned | {"map_desc": 3}).startswith(": the record: map_desc is not a list of rows, it is 3;")
    board = {"map_desc": [[1, 0], [0, 2]]}
    for path in ({}, {"path": 3}, {"path": ["x"]}):
        assert said(planned | board | path) == (
            ": the record has no move in its answer; box the path that its helper draws"
        )
    reasoned = helper | {"task": REASONING} | board
    assert said(reasoned) == f", plan: missing; add it: {REASONING} tells its helper by it"
    assert said(reasoned | {"plan": ["DOWN"]}) == f", helper_step: missing; add it: {REASONING} tells its helper by it"
    for plan, at in ((["DOWN"], 2), (["DOWN"], 0), (["DOWN"], True), (["D"], 1), ("DOWN", 1), ([], 0), (["DOWN"], "1")):
        assert said(reasoned | {"plan": plan, "helper_step": at}) == (
            ": the record's helper_step is no step of its plan, a list of moves; fix them"
        )


def test_refused_flags_and_targets(call: Call, odd: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    for kind in KINDS:
        if kind != "helper-only":
            said = refused(kind, odd, "--question", "x")
            assert said == f"--question goes with helper-only, not with {kind}; leave it out"
        if kind != "helper-text":
            said = refused(kind, odd, "--task", PLANNING)
            assert said == f"--task goes with helper-text, not with {kind}; leave it out"
    for question in ("a <image>?", "", "  "):
        assert refused("helper-only", odd, "--question", question) == (
            f"--question is {question!r}; give a text without <image>, there is no image"
        )
    assert refused("helper-only", odd, "--question", "caf\udce9") == (
        "--question: not UTF-8 text; type it in a UTF-8 terminal"
    )
    assert refused("helper-only", odd, "--most", 0).startswith("--most is 0: ")
    assert refused("helper-only", odd, "--name", "a/b").startswith("--name is 'a/b': ")
    assert "'helper' is not one of 'helper_input', " in refused("helper", odd)
    assert call("helper-only", odd) == (2, "", "error: --out is required\n")
    taken = tmp_path / "taken"
    assert call("helper_only", odd, "--out", taken)[0] == 0
    before = (taken / "data.jsonl").read_bytes()
    assert call("helper-noise", odd, "--out", taken) == (
        2, "", f"error: {taken / 'data.jsonl'} exists; remove it, or choose another --out or --name\n",
    )  # fmt: skip
    assert [path.name for path in taken.rglob("*")] == ["data.jsonl"]
    assert (taken / "data.jsonl").read_bytes() == before
    assert call("helper-noise", odd, "--out", odd) == (2, "", f"error: --out {odd}: is a file; give a folder\n")


def test_refused_files(odd: Path, tmp_path: Path, refused: Callable[..., str], call: Call) -> None:
    assert refused("helper-only", tmp_path / "no.jsonl") == f"{tmp_path / 'no.jsonl'}: no such file of records"
    rows = lines(odd)
    gone = write(odd.parent / "gone.jsonl", rows[0], rows[1] | {"image_output": "gone.png"})
    for kind in KINDS:
        if kind not in ("helper-text", "no-image"):
            assert refused(kind, gone).startswith(f"{gone}, line 2, image_output: no image 'gone.png': looked for")
    (odd.parent / "torn.png").write_bytes(b"no picture")
    for kind, key in (("helper-noise", "image_output"), ("no-image", "image_input")):
        torn = write(odd.parent / f"{kind}.jsonl", rows[0], rows[1] | {key: "torn.png"})
        said = refused(kind, torn)
        assert said.startswith(f"{torn}, line 2, {key}: image ")
        assert said.endswith("; replace the file")
    broken = write(odd.parent / "broken.jsonl", rows[0], rows[0], "{", rows[0])
    said = refused("helper-only", broken)
    assert said.startswith(f"{broken}: line 3, json: not valid JSON (")
    assert said.endswith("); write one object a line")
    # Lines after those that are taken do not matter.
    assert call("helper-only", broken, "--out", tmp_path / "two", "--most", 2)[0] == 0
    assert len(lines(tmp_path / "two/data.jsonl")) == 2


def test_a_second_place_for_images(call: Call, odd: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "else/r.jsonl", *(row for row in lines(odd) if "half" not in row))
    assert call("helper-input", file, "--out", tmp_path / "o")[0] == 2
    assert len(varied(call, "helper-input", file, tmp_path / "o", "--image_root", odd.parent)) == 6


def test_nothing_half_written(call: Call, odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(self: Image.Image, *arguments: Any, **_: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    out = tmp_path / "o"
    assert call("helper-noise", odd, "--out", out) == (
        2, "", f"error: --out {out}: cannot be written (No space left on device); name another folder\n",
    )  # fmt: skip
    assert len(calls) >= 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd"]
