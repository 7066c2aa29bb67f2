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

from mirage_ds.cluster.environment import MARK, own_variables, parse, quote, render

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
def test_a_rendered_value_arrives_verbatim(value: str, shell: str, tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text(render({"NCCL_X": value}))
    assert parse(file.read_text())[1] == []
    assert arrives(file, "NCCL_X", shell) == value


@given(st.text(st.sampled_from("ab \t\"'$`\\%#=;~*\u00e4\u2003"), max_size=8))
def test_what_is_rendered_has_no_fault_and_stays_one_line(value: str) -> None:
    text = render({"NCCL_X": value})
    assert text.count("\n") == 1
    assert parse(text) == ({"NCCL_X": text.strip().removeprefix("NCCL_X=").strip()}, [])


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


# text → its faulty line, what is said of it, what arrives: None where DeepSpeed raises, "" where nothing is run.
FAULTY = {
    "A=1\n\nB=2\n": (2, "'' is not NAME=value", None),
    "A=1\n# note\n": (2, "'# note' is not NAME=value", None),
    "# NCCL_DEBUG=INFO\nA=1\n": (1, "no comments", ""),
    "A=1\nNCCL_DEBUG\n": (2, "'NCCL_DEBUG' is not NAME=value", None),
    "\ufeffA=1\n": (1, "is not NAME=value", ""),
    'A="two words"\n': (1, "the value of A closes the double quotes", "two"),
    'A="x;y"\n': (1, "the value of A closes the double quotes", "x"),
    "A=two words\\\n": (1, "the value of A closes the double quotes", ""),
}


@pytest.mark.parametrize("text", FAULTY)
def test_a_line_that_stops_the_launch_is_named(text: str, tmp_path: Path) -> None:
    """DeepSpeed's own parsing raises, or the host's shell runs nothing, or the value is cut."""
    number, says, arrived = FAULTY[text]
    (fault,) = parse(text)[1]
    assert fault.startswith(f"line {number}: ")
    assert says in fault
    file = tmp_path / "env"
    file.write_text(text)
    if arrived is None:
        with pytest.raises(ValueError, match="unpack"):
            exports(file)
    else:
        assert (arrives(file, "A") or "") == arrived


@pytest.mark.parametrize(
    "text",
    ["A=two words\n", 'A="quoted"\n', "A=1\r\nB=2\r\n", " A = 1 \n", "A=\n", "A=x=y\n", "A=1", 'A=\\"b\\"\n', ""],
)
def test_what_looks_odd_and_arrives_is_no_fault(text: str, tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_bytes(text.encode())
    assert parse(text)[1] == []
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
    files = [home / ".deepspeed_env", folder / ".deepspeed_env"]
    assert own_variables({}, home, folder) == ({"NCCL_A": "home", "NCCL_B": "job with $HOME", "MINE": "1"}, files)
    (folder / "other").write_text("NCCL_A=other\n")
    assert own_variables({"DS_ENV_FILE": str(folder / "other")}, home, folder)[0]["NCCL_A"] == "other"


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
        assert parse(text)[1] == []


def test_the_command_neither_overwrites_nor_hides_a_users_file(tmp_path: Path) -> None:
    own, home = tmp_path / ".deepspeed_env", tmp_path / "home"
    home.mkdir()
    own.write_text("NCCL_X=mine\n")
    refused = write(home=home, folder=tmp_path, NCCL_X="theirs")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --out .deepspeed_env: was not made here")
    assert own.read_text() == "NCCL_X=mine\n"
    done = write("--out", "made", home=home, folder=tmp_path, NCCL_X="theirs", DS_ENV_FILE=str(tmp_path / "made"))
    assert done.returncode == 0, done.stderr
    assert "NCCL_X=mine" in (tmp_path / "made").read_text().splitlines()
    assert f"{own}: its lines are among them" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text", "said"),
    [
        (["--keep", "GONE"], "A=1\n", "--keep GONE: not set"),
        (["--out", "made"], "A=1\n\n", ".deepspeed_env line 2: '' is not NAME=value"),
        (["--out", "folder/file/made"], "A=1\n", "--out folder/file/made: cannot be written"),
        (["--out", "folder"], "A=1\n", "--out folder: is a folder; give a file"),
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
