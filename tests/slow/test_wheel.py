"""The built wheel in an environment of its own and an empty folder: what `pip install` gives."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
# A page's relative link.
LINK = re.compile(r"\]\(([^()\s#:]+)(?:#[^()\s]*)?\)")
# All that the pages link to and the wheel leaves out, or has at another place.
SOURCES = re.compile(r"(\.\./)*(CONTRIBUTING\.md|mirage_ds/[\w/.]+|LICENSE)")

Run = Callable[..., str]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "uv", "build", "--quiet", "--wheel", "--out-dir", out, REPO]
    subprocess.run(list(map(str, command)), check=True, timeout=300)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def binaries(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin/ of an environment with the wheel; its dependencies are those of this one."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin/python"
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--python", python, wheel]
    subprocess.run(list(map(str, install)), check=True, timeout=300)
    packages = next(environment.glob("lib/python*/site-packages"))
    # A line of a .pth adds a folder alone, not the .pth files in it: no editable install comes along.
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return environment / "bin"


@pytest.fixture(scope="module")
def run(binaries: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a command in the same empty folder, as that environment's user; returns what it printed."""
    folder = tmp_path_factory.mktemp("empty")
    found = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # `deepspeed`, and other programs of the dependencies, come second.
    found["PATH"] = os.pathsep.join([str(binaries), str(Path(sys.executable).parent), os.environ["PATH"]])

    def run(command: str, **variables: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=found | variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    return run


def test_its_metadata_says_what_it_is_and_where_to_read(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        name = next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        said = message_from_bytes(file.read(name))
    assert "latent visual tokens" in said["Summary"]
    assert "arxiv.org" in " ".join(said.get_all("Project-URL") or [])
    assert said["License-Expression"] == "Apache-2.0"
    assert said.get_payload().startswith("# mirage_ds")


def test_nothing_of_the_repository_is_seen(run: Run) -> None:
    seen = run("python -c 'import sys, mirage_ds, mirage_ds.train; print(mirage_ds.__file__, *sys.path, sep=chr(10))'")
    assert "environment" in seen.splitlines()[0]
    assert str(REPO) not in [line for line in seen.splitlines() if "site-packages" not in line]
    assert not [line for line in seen.splitlines() if line in (str(REPO), str(REPO / "tests"))]


HELP = """
import click
from mirage_ds.cli import cli
def walk(command):
    context = click.Context(command)
    assert command.get_help(context)
    names = command.list_commands(context) if isinstance(command, click.Group) else ()
    return 1 + sum(walk(command.get_command(context, name)) for name in names)
print(walk(cli))
"""


def test_every_command_is_there(run: Run) -> None:
    assert int(run(f"python -c '{HELP}'")) > 40


def test_every_page_is_there_and_what_it_links_to(run: Run) -> None:
    listed = run("mirage-ds docs").splitlines()
    root = Path(listed[-1].partition("They lie in ")[2].rstrip("."))
    assert "site-packages" in str(root)
    names = [line.split()[0] for line in listed[:-1]]
    assert {"README", "first_hour", "data/README", "examples/7b/README", "study/report"} <= set(names)
    for name in names:
        page = root / f"{name}.md" if (root / f"{name}.md").exists() else root / "docs" / f"{name}.md"
        text = re.sub(r"^ *```.*?^ *```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        links = [link for link in LINK.findall(text) if not SOURCES.fullmatch(link)]
        assert [link for link in links if not (page.parent / link).exists()] == [], name
    assert run("mirage-ds docs lora").startswith("# ")


def test_a_model_is_trained_by_what_it_holds(run: Run) -> None:
    run("mirage-ds examples --write .")
    run("mirage-ds launch --write launch")
    fewer = 's/"train", 1000, 0/"train", 16, 0/; s/"test", 400, 1/"test", 4, 1/'
    run(f"sed -i '{fewer}' examples/first_hour/records.py")
    run("python examples/first_hour/records.py && mirage-ds data check train.jsonl")
    run("mirage-ds init --preset nano --text train.jsonl --out base")
    flags = "--data_path train.jsonl --global_batch_size 8 --epochs 1 --train_vision --deepspeed ds_configs/zero2.json"
    run(f"launch/local.sh --model base --stage stage1 {flags} --save_model_path stage1", MIRAGE_RANKS="2")
    run(f"mirage-ds train --ranks 1 --model stage1 --stage stage2 {flags} --save_model_path stage2")
    run("mirage-ds evaluate stage2 --data_path test.jsonl --max_new_tokens 8 --out scores.json")
    assert json.loads(run("cat scores.json"))["all"]["count"] == 4
    run("mirage-ds plan --model qwen2.5-vl-7b --stage stage2 --nodes 1 --gpus_per_node 8 --gpu_memory 80")
    run("cp examples/first_hour/study.yaml . && mirage-ds ablate plan study.yaml")
    run("mirage-ds status stage2")
