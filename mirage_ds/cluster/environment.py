"""The environment of remote ranks, as a file that DeepSpeed's pdsh launcher reads. Imports no torch.

    export DS_ENV_FILE=runs/stage1/deepspeed_env
    python -m mirage_ds.cluster.environment --out "$DS_ENV_FILE"
    deepspeed --hostfile hosts --module mirage_ds.train …

Under pdsh a remote rank has the environment of an ssh login. DeepSpeed 0.19.8 adds variables that begin with PYTHON,
MLFLOW, MV2 and UCX, on GPUs NCCL too, and the lines `NAME=value` of `.deepspeed_env` in the home folder and in the
launching directory (`$DS_ENV_FILE` is another name, or a path). It reads no comments there and puts the values between
double quotes without escaping them; pdsh then replaces %h, %n and %u, and a shell on the host expands the rest.
"""

import io
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import click

from mirage_ds.data.folders import readable
from mirage_ds.errors import UserError, is_text, shown
from mirage_ds.files import Output, write_atomically
from mirage_ds.run.process import run_rank

# A rank's numbers, speed, files or programs may depend on these.
WANTED = re.compile(
    "(PATH|LD_LIBRARY_PATH|LD_PRELOAD|TOKENIZERS_PARALLELISM|XDG_CACHE_HOME|ACCELERATE_USE_CPU)$"
    "|(NCCL|GLOO|DS|DEEPSPEED|MIRAGE|PYTORCH|TRITON|CUDA|CUBLAS|CUDNN|OMP|GOMP|KMP|MKL|OPENBLAS)_"
    "|(HF|TRANSFORMERS|WANDB|TENSORBOARD)_|TORCH"
)
# The launcher sets the first on each host; the second names this file.
LOCAL = {"CUDA_VISIBLE_DEVICES", "DS_ENV_FILE"}
# pdsh puts the values into a command line, which everyone on a host can read.
SECRET = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD)$")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# DeepSpeed leaves a value of such characters without quotes.
_PLAIN = re.compile(r"[\w@%+=:,./-]*")
_PDSH = re.compile(r"%[%hnu]")
# This line says that a file was made here and may be replaced: there are no comments.
MARK = "MIRAGE_ENV_FILE=generated"
DEFAULT_NAME = ".deepspeed_env"


def as_exported(text: str) -> str:
    """Return what DeepSpeed makes of the text behind `NAME=`, as it stands in the command for the hosts."""
    return text if _PLAIN.fullmatch(text) else f'"{text}"'


def quote(value: str) -> str:
    """Return what has to stand behind `NAME=` so that a rank under pdsh finds exactly `value`.

    Raises:
        ValueError: a line break or bytes that are no UTF-8; no line can hold these.
    """
    if "\n" in value or "\r" in value:
        raise ValueError("holds a line break")
    if not is_text(value):
        raise ValueError("is not UTF-8 text")
    if _PDSH.search(value):
        value = value.replace("%", "%%")
    if _PLAIN.fullmatch(value):
        return value
    escaped = re.sub(r'[\\"$`]', r"\\\g<0>", value)
    # DeepSpeed strips the line; empty pairs of quotes keep spaces, and show that single quotes at the ends are meant.
    return escaped if escaped == escaped.strip().strip("'") else f'""{escaped}""'


def is_wanted(name: str) -> bool:
    """Whether a variable is one that remote ranks should have too: of WANTED, not LOCAL, no secret."""
    return bool(_NAME.fullmatch(name) and WANTED.match(name) and name not in LOCAL and not SECRET.search(name))


def choose(environment: Mapping[str, str], extra_names: Iterable[str] = ()) -> tuple[dict[str, str], dict[str, str]]:
    """Return name → the text behind `NAME=` of what remote ranks get, and name → why it is left out.

    Args:
        extra_names: variables to send besides WANTED.
    """
    kept: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for name, value in sorted(environment.items()):
        if name in extra_names or is_wanted(name):
            try:
                kept[name] = quote(value)
            except ValueError as error:
                left_out[name] = str(error)
        elif WANTED.match(name) and SECRET.search(name):
            left_out[name] = "everyone on a host can read command lines; --keep sends it all the same"
    return kept, left_out


def render(environment: Mapping[str, str], extra_names: Iterable[str] = ()) -> str:
    """Return a `.deepspeed_env` that gives remote ranks the values that `choose` keeps, verbatim."""
    return "".join(f"{name}={text}\n" for name, text in choose(environment, extra_names)[0].items())


def parse(text: str) -> tuple[dict[str, str], list[str]]:
    """Read a `.deepspeed_env` as DeepSpeed does.

    Returns:
        Name → the text behind `NAME=`; the last of a name wins. And one sentence for each line that stops the launch.
    """
    values: dict[str, str] = {}
    faults: list[str] = []
    # As Python reads a text file, and so DeepSpeed: CRLF is a line's end like any other.
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        name, sign, value = (part.strip() for part in line.partition("="))
        # `export A=1` works, by chance.
        if not sign or not _NAME.fullmatch(name.removeprefix("export ")):
            what = f"{shown(line.strip())} is not NAME=value (DeepSpeed reads no comments and no empty lines)"
            faults.append(f"line {number}: {what}; remove it")
        elif not _is_one_word(as_exported(value)):
            what = f"the value of {name} closes the double quotes that DeepSpeed puts around it"
            faults.append(f'line {number}: {what}; write it without quotes and with \\" and \\\\ for such signs inside')
        else:
            values[name] = value
    return values, faults


def _is_one_word(text: str) -> bool:
    words = shlex.shlex(text, posix=True, punctuation_chars=True)
    words.whitespace_split, words.commenters = True, ""
    with suppress(ValueError):
        return len(list(words)) <= 1
    return False


def env_files(names: Iterable[str], home: Path, folder: Path) -> list[Path]:
    """Return the files of these names in the order in which DeepSpeed, started in `folder`, reads them."""
    files = dict.fromkeys(place / name for name in names for place in (home, folder))
    return [file for file in files if file.is_file()]


def read(file: Path) -> str:
    """Return a file's text; UserError when it cannot be read."""
    with readable(file, "write NAME=value lines into it"):
        return file.read_text(encoding="utf-8")


def own_variables(environment: Mapping[str, str], home: Path, folder: Path) -> tuple[dict[str, str], list[Path]]:
    """Return the variables of the user's own files, also of those that DS_ENV_FILE hides, and the files.

    Raises:
        UserError: a line that stops the launch.
    """
    values: dict[str, str] = {}
    files = []
    for file in env_files((DEFAULT_NAME, environment.get("DS_ENV_FILE", DEFAULT_NAME)), home, folder):
        text = read(file)
        if MARK not in text.splitlines():
            found, faults = parse(text)
            if faults:
                raise UserError(f"{file} {faults[0]}")
            values |= found
            files.append(file)
    return values, files


@click.command()
@click.option("--keep", "extra_names", multiple=True, metavar="NAME", help="Send this variable too; repeatable.")
@click.option(
    "--out",
    default=Path(DEFAULT_NAME),
    show_default=True,
    type=Output(),
    help="File to write. Anything but .deepspeed_env in the launching directory needs DS_ENV_FILE to name it.",
)
def command(extra_names: tuple[str, ...], out: Path) -> None:
    """Write this environment into a file from which DeepSpeed's pdsh launcher gives it to the remote ranks.

    The lines of your own .deepspeed_env files go into it and win; those files are never changed.
    """
    missing = [name for name in extra_names if name not in os.environ]
    if missing:
        raise UserError(f"--keep {missing[0]}: not set in this environment; export it first")
    if out.exists() and MARK not in read(out).splitlines():
        raise UserError(f"--out {out}: was not made here and is kept; give another --out, and DS_ENV_FILE its path")
    own, files = own_variables(os.environ, Path.home(), Path.cwd())
    sent, left_out = choose(os.environ, extra_names)
    values = sent | own
    write_atomically(out, "".join(f"{line}\n" for line in (MARK, *(f"{n}={v}" for n, v in values.items()))))
    click.echo(f"{out}: {len(values)} variables: {', '.join(values)}")
    for file in files:
        click.echo(f"{file}: its lines are among them and win")
    for name in sorted(left_out.keys() - values.keys()):
        click.echo(f"left out: {name} ({left_out[name]})")


if __name__ == "__main__":
    run_rank(command, alone=True)
