"""Every command that the documentation shows is one that the real command lines take: names, flags, choices, values."""

from __future__ import annotations

import importlib
import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import BaseModel
from support.shell_lines import Shown, mentioned_in, shown_in

from mirage_ds.analysis.controls.spec import ControlsSpec
from mirage_ds.analysis.inspect.command import InspectSpec
from mirage_ds.cli import cli
from mirage_ds.config.flags import build_model, read_yaml
from mirage_ds.config.run import RunConfig
from mirage_ds.errors import UserError
from mirage_ds.evaluate.spec import EvaluateSpec, GenerateSpec
from mirage_ds.tasks import get_task

ROOT = Path(__file__).parents[3]
PAGES = sorted(
    [
        *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data/README.md", ROOT / "ds_configs/README.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "launch").glob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
    ]
)
# What is none of ours; that it is there is for the machine to say.
FOREIGN = {
    "cat",
    "cd",
    "cp",
    "exit",
    "export",
    "head",
    "kubectl",
    "lmms-eval",
    "ls",
    "mkdir",
    "sbatch",
    "tensorboard",
    "touch",
    "kill",
    "vlmeval",
}
# Commands that need what a page makes before, and the test that runs them with it.
RUN_ELSEWHERE = {
    "mirage-ds data build dots:Dots": (
        "tests/unit/tasks/test_task_interface.py::test_the_pages_own_task_as_a_user_runs_it"
    ),
    "python records.py": "tests/slow/test_first_hour.py::test_its_commands_lead_to_a_report",
}
# Settings that a page leaves to a file of the reader's, or to an ellipsis.
LEFT_OUT: dict[str, Any] = {"model": "m", "stage": "stage2", "data_path": "d", "save_model_path": "s"}


# Commands whose flags are a model: click alone misses what is required.
SPECS: dict[str, type[BaseModel]] = {
    "evaluate": EvaluateSpec,
    "generate": GenerateSpec,
    "controls": ControlsSpec,
    "inspect": InspectSpec,
}


class Wrong(Exception):
    """The command is none."""


def check(shown: Shown, seen: list[click.Context]) -> None:
    """Parse a command as the program that it names would.

    Args:
        seen: filled by the patched click.Command.invoke.

    Raises:
        Wrong: what the program would say.
    """
    first, *rest = shown.words
    if first == "mirage-ds":
        params = parse(cli, rest, shown, seen)
        if rest[:1] == ["data"] and rest[1] in ("build", "convert"):
            task = get_task(rest[2])
            settings = task.build_settings if rest[1] == "build" else task.convert_settings
            assert settings is not None
            take(settings, {name: value for name, value in params.items() if name != "source"}, None, "")
        if rest[0] in SPECS and not shown.partial:
            take_flags(SPECS[rest[0]], params)
    elif first == "python" and rest[0] == "-m":
        run_module(rest[1], rest[2:], shown, seen)
    elif first == "python" and rest[0].endswith(".py"):
        parse(program(ROOT / rest[0]), rest[1:], shown, seen)
    elif first == "deepspeed":
        module, arguments = through_deepspeed(rest)
        run_module(module, arguments, shown, seen)
    elif first.startswith("launch/") or (first == "sbatch" and any(word.startswith("launch/") for word in rest)):
        through_launch(shown, seen)
    elif first == "make":
        make_targets(rest)
    elif first == "pip":
        extras(rest)
    elif first.startswith("examples/"):
        if not (ROOT / first).is_file():
            raise Wrong(f"no file {first}")
    elif first not in FOREIGN and not (first == "python" and rest[0] == "-c"):
        raise Wrong(f"nobody checks {first}")


def parse(command: click.Command, words: list[str], shown: Shown, seen: list[click.Context]) -> dict[str, Any]:
    """Parse with a click command or group; return the options of the last sub-command."""
    try:
        command.main(words, prog_name=shown.words[0], standalone_mode=False)
    except click.MissingParameter as error:
        if not shown.partial:
            raise Wrong(error.format_message()) from None
        return {}
    except click.ClickException as error:
        raise Wrong(error.format_message()) from None
    except UserError as error:
        raise Wrong(str(error)) from None
    return seen[-1].params if seen else {}


def run_module(name: str, words: list[str], shown: Shown, seen: list[click.Context]) -> None:
    """Parse as `python -m name` would."""
    if name == "pytest":
        missing = [word for word in words if word.startswith("tests") and not (ROOT / word.split("::")[0]).exists()]
        if missing:
            raise Wrong(f"no {missing[0]}")
        return
    if name in FOREIGN:
        return
    if importlib.util.find_spec(name) is None:
        raise Wrong(f"no module {name}")
    if name == "mirage_ds.train":
        params = parse(importlib.import_module(name).command, words, shown, seen)
        take_settings(params, shown)
        return
    room = name.removeprefix("mirage_ds.")
    last = room.rpartition(".")[2]
    if last in ("evaluate", "replay"):
        command = getattr(importlib.import_module(f"{name}.command"), last)
    else:
        package = hasattr(importlib.import_module(name), "__path__")
        module = importlib.import_module(f"{name}.__main__" if package else name)
        command = getattr(module, "command", None) or module.main
    params = parse(command, words, shown, seen)
    if room == "evaluate" and not shown.partial:
        take_flags(EvaluateSpec, params)


def take_flags(spec: type[BaseModel], params: dict[str, Any]) -> None:
    """Make what a command makes of its flags."""
    take(spec, {name: value for name, value in params.items() if name in spec.model_fields}, None, "")


def take_settings(params: dict[str, Any], shown: Shown) -> None:
    """Make the RunConfig that a training command asks for."""
    flags = {name: value for name, value in params.items() if name != "yaml_file"}
    file = params.get("yaml_file")
    if file is not None and file.is_file():
        values = read_yaml(file)
    else:
        values = LEFT_OUT if shown.partial or file is not None else {}
    take(RunConfig, flags, values, str(file))


def take(model: type[BaseModel], flags: dict[str, Any], values: dict[str, Any] | None, source: str) -> None:
    """Make settings of flags."""
    try:
        build_model(model, flags, values, source=source)
    except UserError as error:
        raise Wrong(str(error)) from None


def through_deepspeed(words: list[str]) -> tuple[str, list[str]]:
    """Read the launcher's own flags with its own parser: the module that it starts, and the module's words."""
    from deepspeed.launcher.runner import parse_args

    try:
        parsed = parse_args(words)
    except SystemExit:
        raise Wrong("not what the deepspeed launcher takes") from None
    if not parsed.module:
        raise Wrong("deepspeed without --module")
    return parsed.user_script, parsed.user_args


def through_launch(shown: Shown, seen: list[click.Context]) -> None:
    """Read a launch script's words: a hostfile where it takes one, then the flags of what runs as a rank."""
    at = next(place for place, word in enumerate(shown.words) if word.startswith("launch/"))
    script, rest = shown.words[at], list(shown.words[at + 1 :])
    if not (ROOT / script).is_file():
        raise Wrong(f"no file {script}")
    if "HOSTFILE" in (ROOT / script).read_text().split("set -euo")[0]:
        if not rest or rest[0].startswith("-"):
            raise Wrong(f"{script} wants a hostfile first")
        rest = rest[1:]
    modules = [word.split("=", 1)[1] for word in shown.settings if word.startswith("MIRAGE_MODULE=")]
    run_module(modules[0] if modules else "mirage_ds.train", rest, shown, seen)


def program(file: Path) -> click.Command:
    """Load a script's click command, `main`."""
    if not file.is_file():
        raise Wrong(f"no file {file}")
    spec = importlib.util.spec_from_file_location(f"shown_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def make_targets(words: list[str]) -> None:
    """Refuse a target or a variable that the Makefile does not have."""
    text = (ROOT / "Makefile").read_text()
    for word in words:
        name = word.split("=")[0]
        pattern = rf"^{re.escape(name)} \?=" if "=" in word else rf"^{re.escape(name)}:"
        if not re.search(pattern, text, re.MULTILINE) and f"$({name})" not in text:
            raise Wrong(f"the Makefile has no {word}")


def extras(words: list[str]) -> None:
    """Refuse an extra that pyproject.toml does not have, and a constraints file that is not there."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        for asked in re.findall(r"^(?:mirage-ds|\.)\[(.*)\]$", word):
            unknown = set(asked.split(",")) - known.keys()
            if unknown:
                raise Wrong(f"no extra {unknown}")
        if word.endswith(".txt") and not (ROOT / word).is_file():
            raise Wrong(f"no file {word}")


def check_mention(shown: Shown) -> None:
    """Look whether a command named in running text is there, and has the flags that are named with it.

    Raises:
        Wrong: it is not.
    """
    first, *rest = shown.words
    if first == "make":
        make_targets(rest)
    elif first.startswith("launch/") and not (ROOT / first).is_file():
        raise Wrong(f"no file {first}")
    elif first == "python" and importlib.util.find_spec(rest[1]) is None:
        raise Wrong(f"no module {rest[1]}")
    elif first == "mirage-ds":
        command: click.Command = cli
        context = click.Context(cli)
        while (
            rest and isinstance(command, click.Group) and not rest[0].startswith("-") and rest[0] not in ("TASK", "…")
        ):
            below = command.get_command(context, rest[0])
            if below is None:
                raise Wrong(f"no command {rest[0]}")
            command, rest = below, rest[1:]
        groups = [command]
        if isinstance(command, click.Group):
            groups += [one for name in command.list_commands(context) if (one := command.get_command(context, name))]
        known = {flag for one in groups for option in one.params for flag in (*option.opts, *option.secondary_opts)}
        unknown = {word for word in rest if re.fullmatch(r"--?[\w-]+", word)} - known - {"--help"}
        if unknown:
            raise Wrong(f"no flag {unknown}")


COMMANDS = [one for page in PAGES for one in shown_in(page)]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[click.Context]:
    """Commands are parsed and not run; the contexts that would have been."""
    contexts: list[click.Context] = []
    monkeypatch.setattr(click.Command, "invoke", lambda self, context: contexts.append(context))
    monkeypatch.chdir(ROOT)
    # The examples import each other.
    monkeypatch.syspath_prepend(ROOT / "examples")
    return contexts


@pytest.mark.parametrize("shown", COMMANDS, ids=str)
def test_the_command_is_one(shown: Shown, seen: list[click.Context]) -> None:
    for begin, test in RUN_ELSEWHERE.items():
        if " ".join(shown.words).startswith(begin):
            file, name = test.split("::")
            assert f"def {name}(" in (ROOT / file).read_text()
            return
    try:
        check(shown, seen)
    except Wrong as error:
        pytest.fail(f"{shown}\n{error}", pytrace=False)


@pytest.mark.parametrize("shown", [one for page in PAGES for one in mentioned_in(page)], ids=str)
def test_the_command_in_the_text_is_one(shown: Shown) -> None:
    try:
        check_mention(shown)
    except Wrong as error:
        pytest.fail(f"{shown}\n{error}", pytrace=False)


@pytest.mark.parametrize(
    "words", ["mirage-ds data biuld TASK", "mirage-ds data build --tise random", "python -m mirage_ds.trian", "make x"]
)
def test_a_wrong_mention_is_found(words: str) -> None:
    with pytest.raises(Wrong):
        check_mention(Shown(Path("page.md"), 1, tuple(words.split())))


WRONG = {
    "mirage-ds data biuld vsp-spatial-planning --out x": "No such command",
    "mirage-ds data build vsp-spatial-planning --out x --cuont 3": "No such option",
    "mirage-ds data build vsp-spatial-planing --out x": "vsp-spatial-planing",
    "mirage-ds data build vsp-spatial-planning --count 3": "--out is required",
    "mirage-ds data build vsp-spatial-planning --out x --count none": "none",
    "mirage-ds evaluate runs/stage2": "--data_path",
    "mirage-ds evaluate m --data_path d --decoding gready": "gready",
    "mirage-ds plan --model qwen2.5-vl-7b --stage stage3": "stage3",
    "deepspeed --module mirage_ds.train --model m --stage stage1 --data_path d": "save_model_path",
    "deepspeed --module mirage_ds.train … --eval_data_path d --eval_evry 3": "No such option",
    "deepspeed --module mirage_ds.train … --latent_size none": "none",
    "deepspeed --nmu_gpus 8 --module mirage_ds.train --config run.yaml": "launcher",
    "deepspeed mirage_ds/train.py --config run.yaml": "--module",
    "launch/deepspeed.sh --config run.yaml": "hostfile",
    "launch/local.sh --config run.yaml --epochs few": "few",
    "launch/nowhere.sh --config run.yaml": "no file",
    "sbatch --nodes 4 launch/slurm.sbatch --config run.yaml --nodes 4": "No such option",
    "python -m benchmarks.step --preset bench-88m": "bench-88m",
    "python -m benchmarks.stpe": "no module",
    "python examples/demo.py --outt x": "No such option",
    "python -m pytest tests/nowhere": "no tests/nowhere",
    "make dmeo": "no dmeo",
    'pip install -e ".[vps]"': "no extra",
    "mirage_ds data check x": "nobody checks",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_is_found(line: str, tmp_path: Path, seen: list[click.Context]) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Text.\n\n```sh\n{line}    # comment\n```\n")
    (shown,) = shown_in(page)
    assert shown.line == 4
    with pytest.raises(Wrong, match=re.escape(WRONG[line])):
        check(shown, seen)


def test_lines_are_read_as_a_shell_reads_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "    mirage-ds compare a b\n\n```sh\nset=\"a b\"\nA=1 $set --x 'y z' \\\n    --more … … && job=$(sbatch c)\n"
        "```\n\n```console\n$ d | e    # no\noutput\n```\nSee `make f` and `g`.\n"
    )
    found = [(one.line, one.words, one.settings, one.partial) for one in shown_in(page)]
    assert found == [
        (5, ("sbatch", "c"), (), False),
        (5, ("a", "b", "--x", "y z", "--more", "VALUE"), ("A=1",), True),
        (10, ("d",), (), False),
        (10, ("e",), (), False),
        (1, ("mirage-ds", "compare", "a", "b"), (), False),
    ]
    assert [(one.line, one.words, one.partial) for one in mentioned_in(page)] == [(13, ("make", "f"), True)]


def test_every_page_with_commands_is_read() -> None:
    assert len(COMMANDS) > 100
    assert {page.name for page in PAGES} >= {"README.md", "launch.md", "studies.md"}
