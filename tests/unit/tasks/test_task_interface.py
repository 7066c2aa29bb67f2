"""The interface: names, own tasks, and the whole own task of docs/tasks.md as a user runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.commands import caller

from mirage_ds.data.record import Record
from mirage_ds.data.record_files import scan
from mirage_ds.errors import UserError
from mirage_ds.evaluate.scoring import Prediction, score, task_of
from mirage_ds.tasks import TASKS, get_task, task_name
from mirage_ds.tasks.build import build
from mirage_ds.tasks.task import Task

PAGE = Path(__file__).parents[3] / "docs/tasks.md"
FUNCTION, BLOCK = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
HEAD = "from mirage_ds.tasks.task import Settings, Task\n"
SCORES = """
    def prompt(self, row, settings): return "?"
    def parse(self, text, row): return text or None
    def score_record(self, text, record): return {"correct": 1.0}
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Write a module into the working directory; its name is new for each test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = re.sub(r"\W", "_", f"own_{request.node.name}")

    def write(text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        return name

    yield write
    sys.modules.pop(name, None)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setenv("COLUMNS", "300")
    return caller(monkeypatch, capsys)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_pages_own_task_as_a_user_runs_it(tmp_path: Path, module: Callable, call: Callable) -> None:
    assert len(BLOCK.splitlines()) < 40
    name = f"{module(BLOCK)}:Dots"
    code, out, error = call("data", "build", name, "--out", "o", "--count", "12")
    assert (code, error) == (0, "")
    assert re.search(r"records\s*│\s*12\b", out)
    rows = lines(tmp_path / "o/data.jsonl")
    assert len(rows) == 12
    assert len({row["dots"] for row in rows}) > 3
    for row in rows:
        assert (row["task"], row["text_input"].count("<image>")) == (name, 1)
        assert row["text_output"] == f"<output_image>There are \\boxed{{{row['dots']}}}."
        # The dots are 16 px apart, so each covers the middle of its own cell.
        red = np.array(Image.open(tmp_path / "o" / row["image_input"]))[6::16, 6::16]
        blue = np.array(Image.open(tmp_path / "o" / row["image_output"]))[6::16, 6::16]
        assert (red == (255, 0, 0)).all(-1).sum() == row["dots"] == (blue == (0, 0, 255)).all(-1).sum()
    # As `evaluate --task` and evaluation while training use it.
    records = scan(tmp_path / "o/data.jsonl")[0]
    assert task_of(records, Path("f"), name) == name
    answers = [Prediction(f"\\boxed{{{row['dots']}}}", [], []) for row in rows[:9]]
    answers += [Prediction("\\boxed{99}", [], []), Prediction("99", [], []), Prediction("", [], [])]
    found = score(records, answers, name)["all"]
    assert next(iter(found)) == "correct"
    assert (found["correct"], found["invalid"]) == (9 / 12, 2 / 12)
    code, _, error = call("data", "build", name, "--out", "o", "--count", "12")
    assert code == 2
    assert "data.jsonl exists; remove it" in error


def test_an_installed_command_finds_a_module_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "dots.py").write_text(BLOCK)
    code = "import sys; sys.path.remove(''); from mirage_ds.tasks import get_task; print(get_task('dots:Dots'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "dots.Dots object" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("text", "attribute", "says"),
    [
        (None, "Dots", r"nowhere cannot be imported \(.*No module named 'nowhere'\); fix it, install it"),
        ("import nothing_such\n", "Dots", r"\(.*No module named 'nothing_such', /.*own_\w+\.py line 1\)"),
        ("def (\n", "Dots", r"cannot be imported \(SyntaxError: invalid syntax \(own_.*\.py, line 1\)\)"),
        (HEAD + "class Dots(Task):" + SCORES, "Dot", r"has no Dot \(did you mean 'Dots'\?\); name what scores in it"),
        ("class Dots: pass\n", "Dots", r"Dots' is no subclass of mirage_ds\.tasks\.task\.Task; make it one"),
        ("Dots = {}\n", "Dots", r"Dots' is \{\}, neither a function nor a class; write def score\(answer, record\)"),
        ("def f(a, b): return 1\n", "g", r"own_\w+ \(/.*own_\w+\.py\) has no g; name what scores in it"),
        ("x = 1\ny = x / 0\n", "f", r"imported \(ZeroDivisionError: division by zero, .*own_\w+\.py line 2\); fix"),
        (
            HEAD + "class Dots(Task):\n    def prompt(self, row, settings): return ''\n",
            "Dots",
            r"Dots' has no parse; write it, see `mirage-ds docs tasks`",
        ),
    ],
)
def test_what_is_wrong_with_an_own_task_is_one_sentence(
    module: Callable, call: Callable, text: str | None, attribute: str, says: str
) -> None:
    name = f"{'nowhere' if text is None else module(text)}:{attribute}"
    with pytest.raises(UserError, match=says) as error:
        get_task(name)
    assert "\n" not in str(error.value)
    # Scoring says the same as building.
    record = Record(1, "?", "x", (), (), {})
    with pytest.raises(UserError, match=says):
        score([record], [Prediction("x", [], [])], task_name(name))
    code, _, said = call("data", "build", name, "--out", "o")
    assert code == 2
    assert said == f"error: {error.value}\n"


def test_settings_without_their_way(module: Callable, call: Callable) -> None:
    name = f"{module(HEAD + 'class Dots(Task):' + chr(10) + '    build_settings = Settings' + SCORES)}:Dots"
    said = f"error: task {name} has build_settings but no build; write it, see `mirage-ds docs tasks`\n"
    assert call("data", "build", name, "--out", "o") == (2, "", said)


def test_names() -> None:
    assert task_name(" BLINK_jigsaw ") == "blink-jigsaw"
    assert task_name("a.b_c:D_e") == "a.b_c:D_e"
    for name in ("a:", ":B", "a.:B", "a:B.c", "1a:B", "a/b:C", "scores.py:points"):
        with pytest.raises(UserError, match=r"is not of the form package\.module:name; .* like scores:points for"):
            task_name(name)
    for name in TASKS:
        task = get_task(name)
        assert isinstance(task, Task)
        assert name == "boxed" or task.build_settings or task.convert_settings


def test_a_task_that_only_scores_neither_builds_nor_converts(module: Callable, call: Callable) -> None:
    name = f"{module(HEAD + 'class Dots(Task):' + SCORES)}:Dots"
    assert score([Record(1, "?", "x", (), (), {})], [Prediction("x", [], [])], name)["all"]["correct"] == 1.0
    assert call("data", "build", name, "--out", "o")[2].endswith("has no `data build`; it only scores\n")
    assert (
        call("data", "build", "sat", "--out", "o")[2] == "error: task sat has no `data build`; it has `data convert`\n"
    )
    assert "vsp-spatial-planning has no `data convert`; it has `data build`" in call("data", "convert", PLANNING)[2]


PLANNING = "vsp-spatial-planning"


@pytest.mark.parametrize(
    ("draft", "says"),
    [
        (
            'Draft("x<output_image>", (P, P), (P, P))',
            r"a record with 1 <output_image> mark\(s\) for 2 helper image\(s\) in text_output",
        ),
        ('Draft("x", (P, P), (P, P))', r"with 0 <output_image> mark\(s\) for 2 helper image\(s\) in text_output"),
        ('Draft("x", (P,))', r"with 2 <image> mark\(s\) for 1 image\(s\) in text_input; write one"),
        ('Draft("x")', r"with 2 <image> mark\(s\) for 0 image\(s\) in text_input"),
        ('Draft(" ", (P, P))', r"reads no answer out of its own ' '; fix build or parse"),
    ],
)
def test_the_writer_refuses_what_no_trainer_could_read(tmp_path: Path, module: Callable, draft: str, says: str) -> None:
    text = (
        HEAD + "from PIL import Image\nfrom mirage_ds.tasks.draft import Draft, Picture\n"
        "P = Picture.of(Image.new('RGB', (9, 9)))\nclass Dots(Task):\n    build_settings = Settings"
        + SCORES.replace('"?"', '"<image><image>?"').replace("text or", "text.strip() or")
        + f"    def build(self, settings, report): return [{draft}]\n"
    )
    name = f"{module(text)}:Dots"
    with pytest.raises(UserError, match=says):
        build(name, get_task(name).build_settings(out=tmp_path / "o"))
    assert not (tmp_path / "o").exists()


def test_a_question_is_asked_without_the_records_texts(tmp_path: Path, module: Callable) -> None:
    text = (
        HEAD + "from PIL import Image\nfrom mirage_ds.tasks.draft import Draft, Picture\n"
        "P = Picture.of(Image.new('RGB', (9, 9)))\nclass Dots(Task):\n    build_settings = Settings"
        + SCORES.replace('"?"', '" ".join(row)')
        + "    def build(self, settings, report): return [Draft('x', (P,), extra={'dots': 3})]\n"
    )
    name = f"{module(text)}:Dots"
    build(name, get_task(name).build_settings(out=tmp_path / "o"))
    (row,) = lines(tmp_path / "o/data.jsonl")
    assert (row["text_input"], row["text_output"]) == ("image_input dots task", "x")


def test_help_lists_the_tasks_and_each_has_its_own_flags(call: Callable) -> None:
    built, converted = call("data", "build", "--help")[1], call("data", "convert", "--help")[1]
    for name in ("vsp-spatial-planning", "vsp-spatial-reasoning", "blink-jigsaw"):
        assert name in built
    for name in ("blink-jigsaw", "sat", "comt"):
        assert name in converted
    assert "sat" not in re.findall(r"^  (\S+)", built, re.MULTILINE)
    assert "--photos" in call("data", "build", "blink-jigsaw", "--help")[1]
    told = call("data", "convert", "sat", "--help")[1]
    assert "SOURCE" in told
    assert "--question_types" in told
    assert "--photos" not in told
    assert call("data", "build", "sta", "--out", "o")[2].startswith("error: unknown task 'sta' (did you mean 'sat'?)")


FUNCTIONS = """
import numpy as np
from decimal import Decimal

def exact(answer, record): return answer == record["colour"]
def share(answer, record): return len(set(answer) & set(record["text_output"])) / len(set(record["text_output"]))
def ten(answer, record): return np.float32(10 * (answer == "red"))
def several(answer, record): return {"f1": Decimal(answer == "red"), "picked": np.bool_(bool(answer))}
class _Weighed:
    def __call__(self, answer, record, weight=2): return weight * len(record["image_input"])
weighed = _Weighed()
"""


def coloured(line: int, colour: str, **extra: Any) -> Record:
    return Record(line, "<image>Which?", f"It is {colour}.", ("a.png",), (), {"colour": colour, **extra})


@pytest.mark.parametrize(
    ("function", "first", "means"),
    [
        ("exact", "score", {"score": 2 / 3}),
        # Three of the nine letters of "It is red.", one of the ten of "It is blue.", and none.
        ("share", "score", {"score": (3 / 9 + 1 / 10 + 0) / 3}),
        ("ten", "score", {"score": 20 / 3}),
        ("several", "f1", {"f1": 2 / 3, "picked": 2 / 3}),
        ("weighed", "score", {"score": 2.0}),
    ],
)
def test_a_function_scores(module: Callable, function: str, first: str, means: dict[str, float]) -> None:
    name = f"{module(FUNCTIONS)}:{function}"
    records = [coloured(1, "red"), coloured(2, "blue", task="boxed"), coloured(3, "")]
    assert task_of(records, Path("f"), name) == name
    found = score(records, [Prediction("red", [], []), Prediction("red", [4], []), Prediction("", [], [])], name)["all"]
    assert next(iter(found)) == first
    assert {key: found[key] for key in means} == pytest.approx(means)
    assert found["low"] <= found[first] <= found["high"]


def test_the_pages_own_function(module: Callable) -> None:
    name, record = f"{module(FUNCTION)}:near", Record(1, "?", "It is 30.", (), (), {"height": 31})
    assert task_of([record], Path("f"), name) == name
    answers = [Prediction(text, [], []) for text in ("about 29", "28", "none")]
    assert score([record] * 3, answers, name)["all"]["score"] == pytest.approx(1 / 3)


def test_a_function_sees_the_whole_record(module: Callable) -> None:
    text = "def f(answer, record):\n    record['seen'] = 1\n    return len(record) == 7 and 'seen' in record\n"
    record = Record(3, "<image>?", "x", ("a",), ("b",), {"id": 7, "level": "x"})
    assert score([record] * 2, [Prediction("", [], [])] * 2, f"{module(text)}:f")["all"]["score"] == 1
    assert sorted(record.extra) == ["id", "level"]


def test_a_function_that_takes_no_record_is_told_how_it_is_called(module: Callable) -> None:
    name = f"{module('def f(answer): return 1')}:f"
    with pytest.raises(UserError, match=r"f\(\) takes 1 positional .*\); .* as def score\(answer, record\) does"):
        task_of([coloured(2, "red")], Path("f"), name)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return None", r"record on line 2: task own_\w+:f returned None for the answer ''; return a finite"),
        ("return '0.5'", r"returned '0\.5' for the answer ''; return a finite number"),
        ("return float('nan')", r"returned nan for"),
        ("return {}", r"returned \{\} for"),
        ("return {'a': 'x'}", r"returned \{'a': 'x'\} for"),
        ("return {3: 1}", r"returned \{3: 1\} for"),
        ("return [1, 2]", r"returned \[1, 2\] for"),
        ("return float(answer)", r"line 2: task \S+ fails for the answer '' \(could not convert string to float: '', "
         r".*own_\w+\.py line 2\); a scorer must take any text"),
        ("return record['color']", r"fails for the answer '' \(KeyError: 'color', .*own_\w+\.py line 2\)"),
        ("return {'loss': 1}", r"task own_\w+:f returns loss, which is something else; rename it"),
        ("return {'count': 1}", r"returns count, which"),
        ("return {'effective_rank': 1}", r"returns effective_rank, which"),
        # Found before anything is decoded: the first record's own answer is scored too.
        ("return {'hit': 1} if answer else {'none': 1}", r"line 2: task \S+ returns hit, and none for line 2;"),
        ("return 1 if record['colour'] == 'red' else {'hit': 1}", r"on line 5: .* returns hit, and score for line 2"),
    ],
)  # fmt: skip
def test_what_a_function_returns_must_be_numbers(module: Callable, body: str, says: str) -> None:
    name = f"{module(f'def f(answer, record):{chr(10)}    {body}{chr(10)}')}:f"
    with pytest.raises(UserError, match=says) as error:
        task_of([coloured(2, "red"), coloured(5, "blue")], Path("f"), name)
    assert "\n" not in str(error.value)


def test_a_function_neither_builds_nor_has_words(module: Callable, call: Callable) -> None:
    name = f"{module(FUNCTIONS)}:exact"
    assert call("data", "build", name, "--out", "o")[2] == f"error: task {name} has no `data build`; it only scores\n"
    with pytest.raises(UserError, match=f"task {name} has no words for its helper"):
        get_task(name).helper_text({})
    with pytest.raises(UserError, match=f"task {name} builds no records"):
        get_task(name).prompt({}, None)


def test_a_module_here_is_found_before_one_of_its_name_elsewhere(tmp_path: Path) -> None:
    for folder, value in (("site", 0), ("here", 1)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "metrics.py").write_text(f"def score(answer, record): return {value}\n")
    code = (
        "import sys; sys.path.remove(''); from mirage_ds.tasks import get_task; before = list(sys.path);"
        "print(get_task('metrics:score').score_record('', {}), sys.path == [*before, sys.path[-1]], sys.path[-1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "here", capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[3]}{os.pathsep}{tmp_path / 'site'}"},
    )  # fmt: skip
    assert done.stdout == f"{{'score': 1.0}} True {tmp_path / 'here'}\n", done.stderr
