"""The environment of remote ranks: `.deepspeed_env`, checked and made. Imports no torch.

    export DS_ENV_FILE=runs/stage1/deepspeed_env
    python -m mirage_ds.cluster.environment --out "$DS_ENV_FILE"
    deepspeed --hostfile hosts --module mirage_ds.train …

Under pdsh a remote rank has the environment of an ssh login. DeepSpeed 0.19.8 hands on variables that begin with
PYTHON, MLFLOW, MV2 and UCX, on GPUs NCCL too, and the lines `NAME=value` of `.deepspeed_env` in the home folder and in
the launching directory (`$DS_ENV_FILE` is another name, or a path). It reads no comments there and puts the values
between double quotes without escaping them; pdsh then replaces %h, %n and %u, and a shell on the host expands the rest.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import click

from mirage_ds.errors import EXIT_USER_ERROR, UserError, reason, shown
from mirage_ds.files import write_atomically
from mirage_ds.run.process import print_anything

# What a rank's numbers or speed may depend on, or what it finds its files and programs by.
NAMES = frozenset(
    ("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "TOKENIZERS_PARALLELISM", "XDG_CACHE_HOME", "ACCELERATE_USE_CPU")
)
PREFIXES = (
    *("NCCL_", "GLOO_", "DS_", "DEEPSPEED_", "MIRAGE_", "TORCH", "PYTORCH_", "TRITON_", "CUDA_", "CUBLAS_", "CUDNN_"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "HF_", "TRANSFORMERS_", "WANDB_", "TENSORBOARD_"),
)
# The launcher sets the first on each host; the second names this file.
LOCAL = frozenset(("CUDA_VISIBLE_DEVICES", "DS_ENV_FILE"))
# Everyone on a host can read a command line, where pdsh puts the values.
SECRET = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD)$")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# DeepSpeed leaves a value of such characters without quotes.
_PLAIN = re.compile(r"[\w@%+=:,./-]*")
_ESCAPED = re.compile(r'[\\"$`]')
_PDSH = re.compile(r"%[%hnu]")
# Its line says that a file is made here and may be made again: there are no comments.
MARK = "MIRAGE_ENV_FILE=generated"
DEFAULT_NAME = ".deepspeed_env"


class Fault(NamedTuple):
    """What is wrong with one line of a `.deepspeed_env`.

    Attributes:
        fatal: the launch stops, or a value arrives cut; else one arrives changed, which may be meant.
    """

    line: int
    what: str
    how: str
    fatal: bool


def _lines(text: str) -> list[str]:
    # As Python reads a text file, and so DeepSpeed: CRLF is a line's end like any other.
    return io.StringIO(text, newline=None).readlines()


def _value_faults(value: str) -> list[tuple[str, str, bool]]:
    """Follow a value through DeepSpeed's quotes and a POSIX shell: (what, how, fatal) of what does not arrive."""
    faults, expands, broken, quoted, escaped = [], False, False, False, False
    for sign in as_exported(value):
        if escaped:
            escaped = False
        elif sign == "\\":
            escaped = True
        elif sign == '"':
            quoted = not quoted
        elif sign in "$`":
            expands = True
        elif not quoted and not _PLAIN.fullmatch(sign):
            broken = True
    if broken or quoted or escaped:
        what = "its double quotes or its last backslash end the quotes that DeepSpeed puts around a value"
        faults.append((what, 'write the value without quotes around it, \\" and \\\\ for such signs inside it', True))
    if expands:
        faults.append(("a shell on each host expands $ and `", "write \\$ and \\` where the signs are meant", False))
    if len(value) > 1 and value[0] == value[-1] == "'":
        faults.append(("the single quotes become part of the value", "leave them out: spaces need no quotes", False))
    if _PDSH.search(value.replace("%%", "")):
        faults.append(("pdsh replaces %h, %n and %u", "write %% for a percent sign", False))
    return faults


def lint(text: str) -> list[Fault]:
    """Return every fault of a `.deepspeed_env`, in the order of its lines."""
    faults: list[Fault] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(_lines(text), 1):
        name, sign, value = (part.strip() for part in line.partition("="))
        if not line.strip():
            faults.append(
                Fault(number, "an empty line: DeepSpeed's launcher stops with a ValueError", "remove it", True)
            )
        elif line.lstrip().startswith("#"):
            what = "a comment: " + (
                "it hides the command from the hosts' shells, which run nothing and report success"
                if sign
                else "DeepSpeed's launcher stops with a ValueError"
            )
            faults.append(Fault(number, what, "remove it; the file has no comments", True))
        elif not sign:
            what = f"{shown(line.strip())} has no '=': DeepSpeed's launcher stops with a ValueError"
            faults.append(Fault(number, what, "write NAME=value, or remove the line", True))
        elif not _NAME.fullmatch(name):
            # `export export A=1` works, a shell's chance.
            exports = name.startswith("export ")
            how = "write NAME=value" + (" without `export`" if exports else "")
            faults.append(Fault(number, f"{shown(name)} is no name of a variable", how, not exports))
        else:
            if name in seen:
                what = f"{name} stands in line {seen[name]} already, and the last line wins"
                faults.append(Fault(number, what, "keep one of them", False))
            seen[name] = number
            faults += (Fault(number, f"{name}: {what}", how, fatal) for what, how, fatal in _value_faults(value))
    return faults


def quote(value: str) -> str:
    """Return what has to stand behind `NAME=` so that a rank under pdsh finds exactly `value`.

    Raises:
        ValueError: a line break or bytes that are no UTF-8; no line can hold these.
    """
    if "\n" in value or "\r" in value:
        raise ValueError("holds a line break")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("is not UTF-8 text") from None
    if _PDSH.search(value):
        value = value.replace("%", "%%")
    if _PLAIN.fullmatch(value):
        return value
    escaped = _ESCAPED.sub(r"\\\g<0>", value)
    # DeepSpeed strips the line; empty pairs of quotes keep spaces, and say that single quotes at the ends are meant.
    return escaped if escaped == escaped.strip().strip("'") else f'""{escaped}""'


def as_exported(text: str) -> str:
    """Return what DeepSpeed makes of the text behind `NAME=`, as it stands in the command for the hosts."""
    return text if _PLAIN.fullmatch(text) else f'"{text}"'


def is_wanted(name: str) -> bool:
    """Whether a variable is one that remote ranks should have too: of NAMES or PREFIXES, not LOCAL, no secret."""
    known = name in NAMES or name.startswith(PREFIXES)
    return known and name not in LOCAL and _NAME.fullmatch(name) is not None and not SECRET.search(name)


def _chosen(environment: Mapping[str, str], extra_names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return (name: the text behind `NAME=`, name: why it is left out)."""
    kept: dict[str, str] = {}
    left_out: dict[str, str] = {}
    extra = set(extra_names)
    for name, value in sorted(environment.items()):
        if name not in extra and not is_wanted(name):
            if name.startswith(PREFIXES) and SECRET.search(name):
                left_out[name] = "command lines are public; --keep sends it all the same"
            continue
        try:
            kept[name] = quote(value)
        except ValueError as error:
            left_out[name] = str(error)
    return kept, left_out


def render(environment: Mapping[str, str], extra_names: Iterable[str] = ()) -> str:
    """Return a `.deepspeed_env` that gives remote ranks this environment's values, letter by letter.

    Args:
        extra_names: variables to hand on besides NAMES and PREFIXES.

    What no line can hold (a value with a line break) and secrets that are not asked for are left out.
    """
    return "".join(f"{name}={value}\n" for name, value in _chosen(environment, extra_names)[0].items())


def launcher_files(environment: Mapping[str, str], home: Path, folder: Path) -> list[Path]:
    """Return the files that DeepSpeed reads when it is started in `folder`, whoever made them."""
    name = environment.get("DS_ENV_FILE", DEFAULT_NAME)
    return [file for file in dict.fromkeys((home / name, folder / name)) if file.is_file()]


def user_files(environment: Mapping[str, str], home: Path, folder: Path) -> list[Path]:
    """Return the user's own files, also those that DS_ENV_FILE hides; where two name a variable, the later wins."""
    names = (DEFAULT_NAME, environment.get("DS_ENV_FILE", DEFAULT_NAME))
    files = dict.fromkeys(path / name for name in names for path in (home, folder))
    return [file for file in files if file.is_file() and MARK not in read(file).splitlines()]


def read(file: Path) -> str:
    """Return a file's text; UserError when it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({reason(error)}); write NAME=value lines into it") from None


def parse(text: str) -> dict[str, str]:
    """Return name: text behind `NAME=`, of lines that have a '='; the last of a name wins, as with DeepSpeed."""
    pairs = (line.partition("=") for line in _lines(text) if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def merged(environment: Mapping[str, str], extra_names: Iterable[str], own: Iterable[Path]) -> dict[str, str]:
    """Return the variables of `render` with those of the user's own files, which win: name: text behind `NAME=`.

    Raises:
        UserError: a line in one of them that would stop the launch.
    """
    values = _chosen(environment, extra_names)[0]
    for file in own:
        text = read(file)
        for fault in lint(text):
            if fault.fatal:
                raise UserError(f"{file} line {fault.line}: {fault.what}; {fault.how}")
        values |= parse(text)
    return values


@click.command()
@click.option("--keep", "extra_names", multiple=True, metavar="NAME", help="Hand on this variable too; repeatable.")
@click.option(
    "--out",
    default=Path(DEFAULT_NAME),
    show_default=True,
    type=click.Path(path_type=Path),
    help="File to write. Anything but .deepspeed_env in the launching directory needs DS_ENV_FILE to name it.",
)
def command(extra_names: tuple[str, ...], out: Path) -> None:
    """Write this environment where DeepSpeed's pdsh launcher takes the remote ranks' from.

    What the user's own .deepspeed_env files say goes into it and wins; they are never written to.
    """
    missing = [name for name in extra_names if name not in os.environ]
    if missing:
        raise UserError(f"--keep {missing[0]}: not set in this environment; export it first")
    own = user_files(os.environ, Path.home(), Path.cwd())
    if out.exists() and MARK not in read(out).splitlines():
        raise UserError(
            f"--out {out}: is not a file made here and is kept; give another --out, and DS_ENV_FILE its path"
        )
    values = merged(os.environ, extra_names, own)
    try:
        write_atomically(out, "".join(f"{line}\n" for line in (MARK, *(f"{n}={v}" for n, v in values.items()))))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    click.echo(f"{out}: {len(values)} variables: {', '.join(values)}")
    for file in own:
        click.echo(f"{file}: its lines are among them and win")
    for name, why in _chosen(os.environ, extra_names)[1].items():
        if name not in values:
            click.echo(f"left out: {name} ({why})")


def main() -> None:
    """Run the command; a user's mistake is one sentence and exit code 2."""
    print_anything()
    try:
        command.main(standalone_mode=False)
    except click.ClickException as error:
        message = error.format_message()
    except UserError as error:
        message = str(error)
    else:
        return
    click.echo(f"error: {message}", err=True)
    sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    main()
