"""The interface: names, own tasks, and the whole own task of docs/tasks.md as a user runs it."""

from __future__ import annotations

import json
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
BLOCK = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
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
        ("import nothing_such\n", "Dots", r"cannot be imported \(.*No module named 'nothing_such'\)"),
        ("def (\n", "Dots", r"cannot be imported \(SyntaxError: invalid syntax \(own_.*\.py, line 1\)\)"),
        (HEAD + "class Dots(Task):" + SCORES, "Dot", r"has no Dot \(did you mean 'Dots'\?\); name its class"),
        ("class Dots: pass\n", "Dots", r"Dots' is no subclass of mirage_ds\.tasks\.task\.Task; make it one"),
        ("Dots = {}\n", "Dots", r"Dots' is no subclass"),
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
    for name in ("a:", ":B", "a.:B", "a:B.c", "1a:B", "a/b:C"):
        with pytest.raises(UserError, match=r"is not of the form package\.module:Name"):
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
