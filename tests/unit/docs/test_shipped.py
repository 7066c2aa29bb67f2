"""What a user without the repository is shown: pages, scripts and recipes that the package holds."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from support.commands import caller

from mirage_ds.cli import cli
from mirage_ds.files import pages, shipped
from mirage_ds.train import command as train

ROOT = Path(__file__).parents[3]
# Of a file in the repository; in a page's own name there is no ending.
IN_REPOSITORY = re.compile(r"\b(?:docs|data|examples|benchmarks|tests)/\w[\w./]*\.\w+")
PAGE = re.compile(r"mirage-ds docs (?!PAGE\b)([\w/]*\w)")
SCRIPT = re.compile(r"\blaunch/(?!README\b)([\w.]+\w)")


def in_code() -> Iterator[tuple[str, str]]:
    """(place, text) of what the package may print: its strings, without docstrings."""
    for file in sorted((ROOT / "mirage_ds").rglob("*.py")):
        tree = ast.parse(file.read_text())
        silent = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent:
                yield f"{file.relative_to(ROOT)}:{node.lineno}", node.value


def in_help(command: click.Command, words: str, above: click.Context | None = None) -> Iterator[tuple[str, str]]:
    """(command, its help) of a command and those under it."""
    # A command keeps the names of its help option, which come from here.
    context = click.Context(command, parent=above, **{**command.context_settings, "terminal_width": 10_000})
    yield words, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found
            yield from in_help(found, f"{words} {name}", context)


def faults(place: str, text: str) -> list[str]:
    said = [f"{place}: {name} is a file of the repository" for name in IN_REPOSITORY.findall(text)]
    said += [f"{place}: no page {name}" for name in PAGE.findall(text) if name not in pages()]
    return said + [f"{place}: no {name}" for name in SCRIPT.findall(text) if not (shipped() / "launch" / name).exists()]


def test_messages_and_help_name_only_what_the_package_holds() -> None:
    texts = [*in_code(), *in_help(cli, "mirage-ds"), *in_help(train, "train")]
    assert any(PAGE.search(text) for _, text in texts)
    assert any(SCRIPT.search(text) for _, text in texts)
    assert [fault for place, text in texts for fault in faults(place, text)] == []


@pytest.mark.parametrize("text", ["see docs/lora.md", "mirage-ds docs lor", "launch/mpi.py", "(data/README.md)"])
def test_a_wrong_name_is_found(text: str) -> None:
    assert faults("here", text)


@pytest.mark.parametrize("name", ["lora", "lora.md", "docs/lora.md"])
def test_a_page_is_shown_by_its_name(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = caller(monkeypatch, capsys, "docs")
    assert call(name)[:2] == (0, (ROOT / "docs/lora.md").read_text() + "\n")
    assert "lora " in call()[1]
    code, _, error = call("lor")
    assert (code, error) == (2, "error: no page 'lor' (did you mean 'lora'?); `mirage-ds docs` lists them\n")


def test_scripts_are_written_again_but_never_over_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = caller(monkeypatch, capsys)
    for _ in range(2):
        assert call("launch", "--write", tmp_path / "launch")[0] == 0
        for file in (ROOT / "launch").iterdir():
            written = tmp_path / "launch" / file.name
            assert written.read_bytes() == file.read_bytes()
            assert written.stat().st_mode == file.stat().st_mode
    (tmp_path / "launch/pod.sh").write_text("mine")
    (tmp_path / "launch/mpi.sh").unlink()
    code, _, error = call("examples", "--write", tmp_path)
    assert code == 2
    assert f"{tmp_path}/launch/pod.sh is there and is another file" in error
    assert not (tmp_path / "examples").exists()
    assert not (tmp_path / "launch/mpi.sh").exists()
    (tmp_path / "launch/pod.sh").unlink()
    assert call("examples", "--write", tmp_path)[0] == 0
    assert (tmp_path / "examples/7b/study.yaml").is_file()
    assert (tmp_path / "launch/pod.sh").is_file()


def test_lists_say_what_there_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    call = caller(monkeypatch, capsys)
    assert "slurm.sbatch" in call("launch")[1]
    listed = call("examples")[1].splitlines()
    assert "examples/first_hour/study.yaml" in listed
    assert not [line for line in listed if "__pycache__" in line]
