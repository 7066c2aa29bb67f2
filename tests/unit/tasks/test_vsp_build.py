"""Builds: the files as a user gets them, read back with plain json and PIL."""

import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mirage_ds.config.flags import build_model
from mirage_ds.config.mixture import apportion
from mirage_ds.errors import UserError
from mirage_ds.tasks import maps, render, task_name
from mirage_ds.tasks.board_task import BuildSpec
from mirage_ds.tasks.build import build, print_report
from mirage_ds.tasks.draft import BuildReport

FIXTURES = Path(__file__).parents[2] / "fixtures"
ROWS = FIXTURES / "vsp_planning_rows.jsonl"
PLANNING, REASONING = "vsp-spatial-planning", "vsp-spatial-reasoning"
DELTA = {"LEFT": (0, -1), "DOWN": (1, 0), "RIGHT": (0, 1), "UP": (-1, 0)}
NAMES = {"Start": 1, "Target": 2, "Hole": -1, "Ice": 0}


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(task, out, **values):
    return build(task, build_model(BuildSpec, {"out": out, **values}))


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def walk(board, plan):
    """The cells walked, on plain lists, with no code of the package."""
    side = len(board)
    at = next((r, c) for r in range(side) for c in range(side) if board[r][c] == 1)
    cells = [at]
    for move in plan:
        if board[at[0]][at[1]] == -1:
            break
        row, column = at[0] + DELTA[move][0], at[1] + DELTA[move][1]
        at = (row, column) if 0 <= row < side and 0 <= column < side else at
        cells.append(at)
    return cells


def check_files(out, rows):
    named = {row[key] for row in rows for key in ("image_input", "image_output")}
    found = {str(path.relative_to(out)) for path in (out / "images").rglob("*.png")}
    assert named == found
    return found


def check_sentences(text, board, plan):
    """Parse every sentence of a rationale and hold it against the board; return how many stand before the helper."""
    before, after = text.split("<output_image>")
    pattern = re.compile(
        r"Moving (\w+) from \((\d+),(\d+)\) "
        r"(leads to|has no effect at the edge of the map, so I stay at) \[\((\d+),(\d+)\),(\w+)\]\."
    )
    told = pattern.findall(text)
    cells = walk(board, plan)
    assert len(told) == len(cells) - 1
    for (move, r0, c0, verb, r1, c1, name), start, end, planned in zip(told, cells, cells[1:], plan, strict=False):
        assert move == planned
        assert ((int(r0), int(c0)), (int(r1), int(c1))) == (start, end)
        assert NAMES[name] == board[end[0]][end[1]]
        assert (verb == "leads to") == (start != end)
    rest = pattern.sub("", text)
    assert "Moving" not in rest
    for part in (before, after.split("The answer is")[0]):
        assert part == "" or re.fullmatch(r"<think> [^<]*\. </think>", part)
    return len(pattern.findall(before))


def test_public_rows_keep_every_answer(tmp_path):
    report = run(PLANNING, tmp_path / "o", maps=ROWS)
    given, made = lines(ROWS), lines(tmp_path / "o" / "data.jsonl")
    assert (report.records, report.duplicates, report.excluded, report.notes) == (40, 0, 0, {})
    assert report.levels == {3: 10, 4: 10, 5: 10, 6: 10}
    for old, new in zip(given, made, strict=True):
        for key in ("text_input", "text_output", "map_id", "map_desc"):
            assert new[key] == old[key]
        assert new["level"] == len(old["map_desc"])
        assert "split" not in new
    check_files(tmp_path / "o", made)


def test_planning_helper_draws_the_answers_own_path(tmp_path):
    """Rows whose answers are the other shortest path, a detour and a wrong way; the last one is replaced."""
    board = [[1, 0, 0], [0, -1, 0], [0, 0, 2]]
    plans = ["RIGHT, RIGHT, DOWN, DOWN", "DOWN, DOWN, RIGHT, RIGHT", "U, D, D, R, R", "RIGHT, DOWN, DOWN, RIGHT"]
    source = write(
        tmp_path / "m.jsonl", *({"map_desc": board, "text_output": f"\\boxed{{{p}}}", "id": p} for p in plans)
    )
    report = run(PLANNING, tmp_path / "o", maps=source)
    made = lines(tmp_path / "o" / "data.jsonl")
    assert report.notes == {"wrong answers replaced": 1}
    assert [row["path"] for row in made[:3]] == [
        ["RIGHT", "RIGHT", "DOWN", "DOWN"],
        ["DOWN", "DOWN", "RIGHT", "RIGHT"],
        ["UP", "DOWN", "DOWN", "RIGHT", "RIGHT"],
    ]
    assert made[3]["path"] == ["RIGHT", "RIGHT", "DOWN", "DOWN"]
    assert [row["id"] for row in made] == plans  # other keys are kept
    for row in made:
        assert row["text_output"] == f"\\boxed{{{', '.join(row['path'])}}}"
        start = Image.open(tmp_path / "o" / row["image_input"]).convert("RGB")
        helper = Image.open(tmp_path / "o" / row["image_output"]).convert("RGB")
        changed = (np.array(start) != np.array(helper)).any(-1)
        cells = walk(board, row["path"])
        for r in range(3):
            for c in range(3):
                assert changed[r * 64 + 32, c * 64 + 32] == ((r, c) in cells)
    # Rows 1 and 4 say the same: counted, kept, one picture for both.
    assert report.duplicates == 1
    assert report.duplicates_kept
    assert report.images == len(check_files(tmp_path / "o", made)) == 4
    report = run(PLANNING, tmp_path / "p", maps=source, drop_duplicates=True)
    assert (report.records, report.duplicates, report.duplicates_kept) == (3, 1, False)


def test_reasoning_records(tmp_path):
    report = run(REASONING, tmp_path / "o", count=60, answer="cot", seed=4)
    made = lines(tmp_path / "o" / "data.jsonl")
    assert report.levels == {3: 6, 4: 12, 5: 18, 6: 24} == dict(Counter(row["level"] for row in made))
    assert report.classes == {"A": 20, "B": 20, "C": 20}
    assert len({(str(row["map_desc"]), str(row["plan"])) for row in made}) == 60
    steps = set()
    for row in made:
        board, plan = row["map_desc"], row["plan"]
        cells = walk(board, plan)
        letter = {2: "A", -1: "B"}.get(board[cells[-1][0]][cells[-1][1]], "C")
        assert row["text_output"].endswith(f"The answer is \\boxed{{{letter}}}.")
        assert f"\nFull Action Plan: {', '.join(plan)}\n" in row["text_input"]
        split = check_sentences(row["text_output"], board, plan)
        assert split == row["helper_step"]
        steps.add((split, len(plan)))
        expected = render.render(board, cells[split], plan[split - 1])
        helper = Image.open(tmp_path / "o" / row["image_output"])
        assert helper.mode == "RGB"
        assert np.array_equal(np.array(helper), np.array(expected))
        start = Image.open(tmp_path / "o" / row["image_input"])
        assert np.array_equal(np.array(start), np.array(render.render(board)))
        assert (row["split"], row["seed"], row["task"]) == ("train", 4, REASONING)
        assert row["map_id"] == int(maps.map_hash(board)[:12], 16)
    assert len(steps) > 10
    assert any(split == length for split, length in steps)  # then no second <think> block, as in the public rows
    check_files(tmp_path / "o", made)


def test_prompts_are_the_public_ones_word_for_word(tmp_path):
    public = lines(FIXTURES / "vsp_reasoning_rows.jsonl")
    plans = [re.search(r"Full Action Plan: (.*)\n", row["text_input"]).group(1).split(", ") for row in public]
    board = [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, -1, 2]]
    source = write(tmp_path / "m.jsonl", *({"map_desc": board, "plan": plan} for plan in plans))
    run(REASONING, tmp_path / "cot", maps=source, answer="cot")
    made = lines(tmp_path / "cot" / "data.jsonl")
    assert [row["text_input"] for row in made] == [row["text_input"] for row in public]
    run(REASONING, tmp_path / "direct", maps=source)
    for row, cot in zip(lines(tmp_path / "direct" / "data.jsonl"), made, strict=True):
        assert re.fullmatch(r"\\boxed\{[ABC]\}", row["text_output"])
        think = re.search(r" You FIRST .*? tags\.", cot["text_input"]).group(0)
        assert row["text_input"] == cot["text_input"].replace(think, "")
        assert row["plan"] == cot["plan"]
    for task in (PLANNING, REASONING):
        out = tmp_path / f"short-{task}"
        run(task, out, prompt="short", count=4)
        for row in lines(out / "data.jsonl"):
            assert row["text_input"].startswith("<image>")
            assert row["text_input"].count("<image>") == 1
            assert len(row["text_input"]) < 180
            assert "\n" not in row["text_input"]


def test_planning_with_rationales(tmp_path):
    run(PLANNING, tmp_path / "o", count=30, answer="cot", ties="random")
    for row in lines(tmp_path / "o" / "data.jsonl"):
        board = row["map_desc"]
        assert check_sentences(row["text_output"], board, row["path"]) == 0
        assert row["text_output"].endswith(f"</think>The answer is \\boxed{{{', '.join(row['path'])}}}.")
        r, c, gr, gc = map(
            int,
            re.match(
                r"<think> I start at \[\((\d),(\d)\),Start\] and the goal is at \[\((\d),(\d)\)", row["text_output"]
            ).groups(),
        )
        assert (board[r][c], board[gr][gc]) == (1, 2)
        assert walk(board, row["path"])[-1] == (gr, gc)


def rotated(board):
    return [list(row) for row in zip(*board[::-1], strict=True)]


@pytest.mark.parametrize("form", ["rows", "hashes", "sha256sum", "mixed"])
def test_exclude_covers_the_symmetries(tmp_path, form):
    boards = [row["map_desc"] for row in lines(ROWS)]
    banned = [boards[3], rotated(boards[11]), [row[::-1] for row in rotated(boards[25])]]
    spelled = [json.dumps(board, separators=(",", ":")).encode() for board in banned]
    hashes = [hashlib.sha256(text).hexdigest() for text in spelled]
    rows = {
        "rows": [{"map_desc": board} for board in banned],
        "hashes": hashes,
        # U+2028 is a line's end to str.splitlines.
        "sha256sum": [f"{digest}  map\u2028{n}.json" for n, digest in enumerate(hashes)],
        "mixed": [hashes[0], {"map_desc": banned[1]}, "", hashes[2]],
    }[form]
    report = run(PLANNING, tmp_path / "o", maps=ROWS, exclude=write(tmp_path / "x", *rows))
    # A map among the forty may be a symmetry of another one.
    images = {json.dumps(image) for board in banned for image in maps.symmetries(maps.parse_board(board, "x"))}
    kept = [board for board in boards if json.dumps(board) not in images]
    assert len(kept) <= 37
    assert report.excluded == 40 - len(kept)
    assert [row["map_desc"] for row in lines(tmp_path / "o" / "data.jsonl")] == kept


def test_random_maps_meet_no_excluded_map(tmp_path):
    run(PLANNING, tmp_path / "a", count=60, levels="3", seed=1)
    report = run(PLANNING, tmp_path / "b", count=60, levels="3", seed=2, exclude=tmp_path / "a" / "data.jsonl")
    assert report.excluded > 0
    first, second = (
        {min(json.dumps(i) for i in maps.symmetries(row["map_desc"])) for row in lines(tmp_path / n / "data.jsonl")}
        for n in "ab"
    )
    assert not first & second


def test_splits_are_disjoint_up_to_symmetry(tmp_path):
    forms = {}
    for split, count, seed in (("train", 300, 1), ("dev", 25, 2), ("test", 25, 3)):
        run(PLANNING, tmp_path / split, split=split, count=count, seed=seed, levels="3,4", proportions="1,1")
        rows = lines(tmp_path / split / "data.jsonl")
        assert {row["split"] for row in rows} == {split}
        forms[split] = {
            min(
                str(np.rot90(image, k).tolist())
                for image in (np.array(row["map_desc"]), np.array(row["map_desc"]).T)
                for k in range(4)
            )
            for row in rows
        }
        assert len({str(row["map_desc"]) for row in rows}) == count
    assert not forms["train"] & forms["dev"]
    assert not forms["train"] & forms["test"]
    assert not forms["dev"] & forms["test"]


@pytest.mark.parametrize("task", [PLANNING, REASONING])
def test_the_same_seed_gives_the_same_bytes(tmp_path, task):
    def content(out, seed):
        run(task, out, count=20, seed=seed, answer="cot", ties="random")
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    first = content(tmp_path / "a", 7)
    assert first == content(tmp_path / "b", 7)
    assert first["data.jsonl"] != content(tmp_path / "c", 8)["data.jsonl"]


def test_two_files_share_a_folder_and_its_pictures(tmp_path):
    run(PLANNING, tmp_path, count=5, name="one")
    report = run(PLANNING, tmp_path, count=5, name="two", answer="cot")
    assert report.images == 0
    one, two = lines(tmp_path / "one.jsonl"), lines(tmp_path / "two.jsonl")
    assert [row["image_output"] for row in one] == [row["image_output"] for row in two]
    before = (tmp_path / "one.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"one\.jsonl exists; remove it, or choose another --out or --name"):
        run(PLANNING, tmp_path, count=5, name="one")
    assert (tmp_path / "one.jsonl").read_bytes() == before


def test_nothing_half_written(tmp_path, monkeypatch):
    def stop(done, total):
        assert total == 40  # an input and a helper picture a row
        if done == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr("mirage_ds.tasks.write.progress_bar", lambda title: nullcontext(stop))
    with pytest.raises(KeyboardInterrupt):
        build(PLANNING, BuildSpec(out=tmp_path / "o", count=20))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError):
        run(PLANNING, tmp_path / "o", count=2000, levels="3")
    assert list(tmp_path.iterdir()) == []


def test_supply_runs_out(tmp_path, monkeypatch):
    monkeypatch.setattr("mirage_ds.tasks.board_task._PATIENCE", 4000)
    with pytest.raises(UserError) as error:
        run(PLANNING, tmp_path / "o", count=577, levels="3")
    message = str(error.value)
    found = int(re.match(r"level 3: found only (\d+) different records of the 577 asked for", message).group(1))
    boards = [[-1 if i == h else 1 if i == s else 2 if i == g else 0 for i in range(9)]
              for s in range(9) for g in range(9) for h in range(-1, 9) if len({s, g, h}) == 3]  # fmt: skip
    mine = [b for b in boards if maps.split_of((tuple(b[:3]), tuple(b[3:6]), tuple(b[6:]))) == "train"]
    assert len(boards) == 576
    assert found == len(mine)  # every board of the split was found
    assert "(split train, at most 1 hole(s) a board, 0 maps excluded); ask for fewer, raise --hole_rate" in message
    with pytest.raises(UserError, match=r"found only 39 usable rows of the 40 asked for \(1 excluded, 0 duplicates\)"):
        run(PLANNING, tmp_path / "o", maps=ROWS, count=40, exclude=write(tmp_path / "x", lines(ROWS)[39]))
    assert run(PLANNING, tmp_path / "o", maps=ROWS, count=12).records == 12


def test_class_b_needs_a_hole(tmp_path):
    source = write(tmp_path / "m.jsonl", *[{"map_desc": [[1, 0], [0, 2]]}] * 9)
    report = run(REASONING, tmp_path / "o", maps=source)
    assert report.records == 9
    assert set(report.classes) == {"A", "C"}


GOOD = {"map_desc": [[1, 0], [0, 2]]}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [GOOD, '{"map_desc": [[1'],
            "m.jsonl, line 2, json: not valid JSON (Expecting ',' delimiter at column 17); write one object a line",
        ),
        (
            [GOOD, "", {"id": 1}],
            "m.jsonl, line 3: map_desc is not a list of rows, it is None; give one list of cells",
        ),
        (["[1]"], "m.jsonl, line 1, json: expected an object, found list"),
        (
            [{"map_desc": [[1, -1], [-1, 2]]}],
            "m.jsonl, line 1: no path leads from the start to the goal of this map; fix",
        ),
        ([{"map_desc": [[1, 0], [2]]}], "m.jsonl, line 1: map_desc has 2 rows of 1 and 2 cells; give a square board"),
        ([], "m.jsonl: found only 0 usable rows"),
    ],
)
def test_bad_maps(tmp_path, rows, says):
    with pytest.raises(UserError) as error:
        run(PLANNING, tmp_path / "o", maps=write(tmp_path / "m.jsonl", *rows))
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "o").exists()


def test_maps_that_cannot_be_read(tmp_path):
    (tmp_path / "m.jsonl").symlink_to("/proc/self/mem")  # an I/O error for root too
    with pytest.raises(UserError, match=r"m\.jsonl: cannot be read \(Input/output error\); name a readable file"):
        run(PLANNING, tmp_path / "o", maps=tmp_path / "m.jsonl")


def test_bad_exclude_files(tmp_path):
    for rows, says in [
        (["", "", "a" * 63], "x, line 3: neither a record with"),
        (["", "", '{"id": 1}'], "x, line 3: map_desc is not a list of rows, it is None"),
        (["", "a" * 64, '{"map_desc": [[1'], "x, line 3, json: not valid JSON (Expecting ',' delimiter at column 17)"),
        (["a" * 64, "b" * 63], "x, line 2: neither a record with 'map_desc' nor the SHA-256 of a map (64 hex digits)"),
        (['{"id": 1}'], "x, line 1: map_desc is not a list of rows, it is None"),
        (["\n"], "x: the file is empty"),
    ]:
        with pytest.raises(UserError) as error:
            run(PLANNING, tmp_path / "o", exclude=write(tmp_path / "x", *rows))
        assert says in str(error.value)
    with pytest.raises(UserError, match=r"nowhere: cannot be read \(.*No such file or directory"):
        run(PLANNING, tmp_path / "o", exclude=tmp_path / "nowhere")
    (tmp_path / "y").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match="y, line 1: neither a record with"):
        run(PLANNING, tmp_path / "o", exclude=tmp_path / "y")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"levels": "3,9"}, "--levels is [3, 9]; give different sides from 3 to 8"),
        ({"levels": "4,4"}, "--levels is [4, 4]; give different sides"),
        ({"levels": "three"}, "--levels is 'three'"),
        ({"proportions": "1,2"}, "--proportions is [1.0, 2.0]; give one share per level, 4 in all"),
        ({"proportions": "0,0,0,0"}, "give one share per level"),
        ({"maps": "m", "levels": "3"}, "--levels is about random boards and cannot go with --maps"),
        ({"maps": "m", "split": "dev"}, "--split is about random boards and cannot go with --maps"),
        ({"drop_duplicates": True}, "--drop_duplicates goes with --maps"),
        ({"hole_rate": 0.9}, "--hole_rate is 0.9: Input should be less than or equal to 0.5"),
        ({"name": "a/b"}, "--name is 'a/b'"),
        ({"count": 0}, "--count is 0"),
        ({"split": "eval"}, "--split is 'eval'"),
    ],
)
def test_bad_settings(tmp_path, values, says):
    with pytest.raises(UserError) as error:
        run(PLANNING, tmp_path / "o", **values)
    assert says in str(error.value)


def test_bad_names_and_targets(tmp_path):
    assert task_name("VSP_spatial_planning") == PLANNING
    with pytest.raises(UserError) as error:
        run("vsp-spatial-plan", tmp_path / "o")
    assert str(error.value) == (
        "unknown task 'vsp-spatial-plan' (did you mean 'vsp-spatial-planning'?); "
        "there are: vsp-spatial-planning, vsp-spatial-reasoning, vsp-transcription, vsp-path-reading, "
        "blink-jigsaw, sat, comt, monet-sft, lvr, zebra-cot, boxed, and your own as package.module:name"
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; give a folder"):
        run(PLANNING, tmp_path / "file")


def test_apportion():
    assert apportion(1000, [1, 2, 3, 4]) == [100, 200, 300, 400]
    assert apportion(7, [1, 1, 1]) == [3, 2, 2]
    rng = random.Random(0)
    for _ in range(200):
        shares = [rng.random() for _ in range(rng.randint(1, 6))]
        total = rng.randint(1, 50)
        counts = apportion(total, shares)
        assert sum(counts) == total
        assert all(abs(n - total * share / sum(shares)) < 1 for n, share in zip(counts, shares, strict=True))


def test_the_report_and_the_bar(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    report = BuildReport(
        PLANNING,
        Path("o/data.jsonl"),
        3,
        6,
        {4: 1, 3: 2},
        {"10 moves": 1, "2 moves": 2},
        5,
        False,
        7,
        {"wrong answers replaced": 1},
    )
    print_report(report)
    text = capsys.readouterr().out
    assert "vsp-spatial-planning: o/data.jsonl" in text
    cells = [tuple(re.split(r"\s*│\s*", line)[1:3]) for line in text.splitlines() if line.startswith("│")]
    assert cells == [
        ("records", "3"), ("images written", "6"), ("level 3", "2"), ("level 4", "1"), ("answer 2 moves", "2"),
        ("answer 10 moves", "1"), ("duplicates removed", "5"), ("excluded", "7"), ("wrong answers replaced", "1"),
    ]  # fmt: skip


def test_no_torch():
    code = (
        "import sys, mirage_ds.tasks.build;"
        "import mirage_ds.tasks.vsp_planning, mirage_ds.tasks.vsp_reasoning;"
        "sys.exit('torch' in sys.modules or 'gymnasium' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("task", "values"),
    [
        (REASONING, {"name": "sample", "count": 100, "answer": "cot"}),
        (PLANNING, {"name": "sample_planning", "count": 20}),
    ],
)
def test_the_shipped_samples_are_what_their_command_gives(tmp_path, task, values):
    data = Path(__file__).parents[3] / "data"
    run(task, tmp_path, exclude=data / "vsp_test_maps.sha256", **values)
    name = f"{values['name']}.jsonl"
    assert (tmp_path / name).read_bytes() == (data / name).read_bytes()
    for row in lines(data / name):
        for key in ("image_input", "image_output"):
            # Pixels, not bytes: another zlib may compress the same picture differently.
            shipped, made = Image.open(data / row[key]), Image.open(tmp_path / row[key])
            assert np.array_equal(np.array(shipped), np.array(made))
