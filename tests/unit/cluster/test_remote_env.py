"""`.deepspeed_env`: what DeepSpeed's launcher, pdsh and a shell make of each line, by running them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from deepspeed.launcher.multinode_runner import MultiNodeRunner
from hypothesis import given
from hypothesis import strategies as st

from mirage_ds.cluster.environment import MARK, lint, merged, quote, render, user_files
from mirage_ds.errors import UserError

HOSTS_SHELLS = [name for name in ("sh", "bash") if shutil.which(name)]


def exports(file: Path) -> str:
    """What DeepSpeed 0.19.8 puts before the remote command (runner.py 601, multinode_runner.py 37 and 104)."""
    runner = SimpleNamespace(exports={})
    with file.open("r") as lines:
        for line in lines.readlines():
            key, value = line.split("=", maxsplit=1)
            MultiNodeRunner.add_export(runner, key, value)
    return "".join(f"export {key}={value}; " for key, value in runner.exports.items())


def arrives(file: Path, name: str, shell: str = "sh") -> str | None:
    """The variable as a host's shell sets it for a rank, without pdsh in between; None where nothing is run."""
    code = f"import os; print('\\n>', ascii(os.environ.get({name!r})))"
    done = subprocess.run(
        [shell, "-c", f'{exports(file)} {sys.executable} -c "{code}"'],
        capture_output=True,
        text=True,
        env={},
        check=False,
    )
    _, found, value = done.stdout.rpartition("\n> ")
    return eval(value) if found else None


AWKWARD = [
    "",
    "plain/path:with=signs,@+-._",
    "two words",
    " at both ends ",
    "\t",
    "\"quoted\" and 'single'",
    "$HOME ${HOME} $(id) `id` \\$HOME",
    "ends with \\",
    "~/x;y|z&(a)<b>#c!d*?[e]{f}",
    "größer 漢字\u2003",
    "export # =",
]


@pytest.mark.parametrize("shell", HOSTS_SHELLS)
@pytest.mark.parametrize("value", AWKWARD)
def test_a_rendered_value_arrives_letter_by_letter(value: str, shell: str, tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text(render({"NCCL_X": value}))
    assert lint(file.read_text()) == []
    assert arrives(file, "NCCL_X", shell) == value


@given(st.text(st.sampled_from("ab \t\"'$`\\%#=;~*\u00e4\u2003"), max_size=8))
def test_what_is_rendered_has_no_fault_and_stays_one_line(value: str) -> None:
    text = render({"NCCL_X": value})
    assert text.count("\n") == 1
    assert lint(text) == []


@pytest.mark.skipif(not shutil.which("pdsh"), reason="pdsh is not installed")
@pytest.mark.parametrize("value", [*AWKWARD, "%n", "100%", "a%%b%h%%u%%%n", "%Y-%m"])
def test_a_rendered_value_arrives_through_pdsh(value: str, tmp_path: Path) -> None:
    """The real pdsh with an `ssh` that runs its command here, as sshd would there."""
    file, ssh = tmp_path / "env", tmp_path / "bin" / "ssh"
    file.write_text(render({"NCCL_X": value}))
    ssh.parent.mkdir()
    ssh.write_text('#!/bin/sh\nwhile [ "$1" != somewhere ]; do shift; done; shift\nexec sh -c "$*"\n')
    ssh.chmod(0o755)
    code = "import os; print(ascii(os.environ['NCCL_X']))"
    command = ["pdsh", "-S", "-N", "-w", "somewhere", exports(file), sys.executable, "-c", f'"{code}"']
    environment = {"PATH": f"{ssh.parent}:{os.environ['PATH']}", "PDSH_RCMD_TYPE": "ssh"}
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert eval(said) == value


def test_what_no_line_can_hold_is_left_out() -> None:
    assert render({"NCCL_X": "a\nb", "NCCL_Y": "c"}) == "NCCL_Y=c\n"
    for value, why in (("a\nb", "line break"), ("a\rb", "line break"), ("\udcff", "UTF-8")):
        with pytest.raises(ValueError, match=why):
            quote(value)


def test_what_travels_and_what_does_not() -> None:
    yes = "PATH OMP_NUM_THREADS DS_ACCELERATOR NCCL_DEBUG HF_HOME TORCH_NCCL_TRACE TORCHINDUCTOR_CACHE_DIR CUDA_HOME "
    yes += "TOKENIZERS_PARALLELISM LD_LIBRARY_PATH TRITON_CACHE_DIR MIRAGE_X PYTORCH_CUDA_ALLOC_CONF WANDB_MODE"
    no = "HOME RANK MASTER_ADDR SLURM_JOB_ID CUDA_VISIBLE_DEVICES DS_ENV_FILE HF_TOKEN WANDB_API_KEY PYTHONPATH EDITOR"
    names = {line.partition("=")[0] for line in render(dict.fromkeys(f"{yes} {no}".split(), "1")).splitlines()}
    assert names == set(yes.split())
    assert render({"HF_TOKEN": "t", "EDITOR": "vi"}, extra_names=["HF_TOKEN", "EDITOR"]) == "EDITOR=vi\nHF_TOKEN=t\n"


FATAL = {
    "A=1\n\nB=2\n": (2, "empty line", "remove"),
    "A=1\n# note\n": (2, "ValueError", "remove"),
    "# NCCL_DEBUG=INFO\n": (1, "run nothing and report success", "remove"),
    "A=1\nNCCL_DEBUG\n": (2, "'NCCL_DEBUG' has no '='", "NAME=value"),
    'A="two words"\n': (1, "A: its double quotes", "without quotes"),
    "A=two words\\\n": (1, "last backslash", "\\\\"),
    "\ufeffA=1\n": (1, "no name of a variable", "NAME=value"),
}
CHANGED = {
    "A=1\nB=2\nA=3\n": (3, "A stands in line 1 already", "keep one"),
    "A=$HOME/x\n": (1, "expands", "\\$"),
    "A=`id`\n": (1, "expands", "\\`"),
    "A='two words'\n": (1, "single quotes", "leave them out"),
    "A=log.%h\n": (1, "pdsh replaces", "%%"),
    "export A=1\n": (1, "'export A'", "without `export`"),
}


@pytest.mark.parametrize("text", [*FATAL, *CHANGED])
def test_every_fault_is_named_with_its_line_and_cure(text: str) -> None:
    line, what, how = {**FATAL, **CHANGED}[text]
    (fault,) = lint(text)
    assert fault.line == line
    assert what in fault.what
    assert how in fault.how
    assert fault.fatal == (text in FATAL)


@pytest.mark.parametrize("text", FATAL)
def test_what_lint_calls_fatal_stops_the_launch(text: str, tmp_path: Path) -> None:
    """DeepSpeed's own parsing raises, or the host's shell runs nothing, or the value is cut."""
    file = tmp_path / "env"
    file.write_text(text)
    if "ValueError" in FATAL[text][1] + lint(text)[0].what:
        with pytest.raises(ValueError, match="unpack"):
            exports(file)
    else:
        assert arrives(file, "A") == ("two" if "two words" in text and "\\" not in text else None)


@pytest.mark.parametrize(
    "text",
    ["A=two words\n", 'A="quoted"\n', "A=1\r\nB=2\r\n", " A = 1 \n", "A=\n", "A=x=y\n", "A=1", 'A=\\"b\\"\n', ""],
)
def test_what_looks_odd_and_arrives_is_no_fault(text: str, tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_bytes(text.encode())
    assert lint(text) == []
    wanted = {
        "A=two words\n": "two words",
        'A="quoted"\n': "quoted",
        "A=\n": "",
        "A=x=y\n": "x=y",
        'A=\\"b\\"\n': '"b"',
    }
    if text:
        assert arrives(file, "A") == wanted.get(text, "1")


# The user's own files


def test_the_users_lines_win_the_later_file_over_the_earlier(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "job"
    for place, text in ((home, "NCCL_A=home\nNCCL_B=home\n"), (folder, "NCCL_B=job with $HOME\nMINE=1\n")):
        place.mkdir()
        (place / ".deepspeed_env").write_text(text)
    environment = {"NCCL_A": "here", "NCCL_B": "here", "NCCL_C": "here"}
    own = user_files(environment, home, folder)
    assert merged(environment, (), own) == {
        **{"NCCL_A": "home", "NCCL_B": "job with $HOME", "NCCL_C": "here", "MINE": "1"}
    }
    (folder / "other").write_text("NCCL_A=other\n")
    own = user_files({"DS_ENV_FILE": str(folder / "other")}, home, folder)
    assert merged(environment, (), own)["NCCL_A"] == "other"


def write(*arguments: object, home: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[3])}
    return subprocess.run(
        [sys.executable, "-m", "mirage_ds.cluster.environment", *map(str, arguments)],
        cwd=folder,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_writes_says_what_and_may_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    for value in ("first", "second"):
        done = write(home=tmp_path / "home", folder=tmp_path, NCCL_X=value, HF_TOKEN="secret", CUDA_CRLF="a\nb")
        assert (done.returncode, done.stderr) == (0, "")
        text = (tmp_path / ".deepspeed_env").read_text()
        assert {MARK, f"NCCL_X={value}", f"PATH={os.environ['PATH']}"} <= set(text.splitlines())
        assert "secret" not in text + done.stdout
        assert "NCCL_X" in done.stdout
        assert "left out: CUDA_CRLF (holds a line break)" in done.stdout
        assert "left out: HF_TOKEN" in done.stdout
        assert lint(text) == []


def test_the_command_neither_overwrites_nor_hides_a_users_file(tmp_path: Path) -> None:
    own, home = tmp_path / ".deepspeed_env", tmp_path / "home"
    home.mkdir()
    own.write_text("NCCL_X=mine\n")
    refused = write(home=home, folder=tmp_path, NCCL_X="theirs")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --out .deepspeed_env: is not a file made here")
    assert own.read_text() == "NCCL_X=mine\n"
    done = write("--out", "made", home=home, folder=tmp_path, NCCL_X="theirs", DS_ENV_FILE=str(tmp_path / "made"))
    assert done.returncode == 0, done.stderr
    assert "NCCL_X=mine" in (tmp_path / "made").read_text().splitlines()
    assert f"{own}: its lines are among them" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text", "said"),
    [
        (["--keep", "GONE"], "A=1\n", "--keep GONE: not set"),
        (["--out", "made"], "A=1\n\n", ".deepspeed_env line 2: an empty line"),
        (["--out", "folder/file/made"], "A=1\n", "--out folder/file/made: cannot be written"),
        (["--out", "folder"], "A=1\n", "folder: cannot be read"),
        (["--output", "x"], "A=1\n", "--output"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(
    arguments: list[str], text: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    (tmp_path / ".deepspeed_env").write_text(text)
    done = write(*arguments, home=tmp_path / "folder", folder=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "made").exists()


def test_a_value_read_by_deepspeed_in_an_unrendered_file_may_change(tmp_path: Path) -> None:
    """What `lint` warns of is real: without rendering another value arrives."""
    for text in ("A=$HOME/x\n", "A=`echo hi`\n", "A='two words'\n"):
        file = tmp_path / "env"
        file.write_text(text)
        assert arrives(file, "A") != text.strip().removeprefix("A=").strip("'")
    with pytest.raises(UserError, match="line 1"):
        merged({}, (), [_written(tmp_path / "bad", "# A=1\n")])


def _written(file: Path, text: str) -> Path:
    file.write_text(text)
    return file
