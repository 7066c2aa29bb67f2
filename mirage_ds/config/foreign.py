"""Read a training configuration of LLaMA-Factory or ms-swift: whose it is, and what it sets.

LLaMA-Factory: a YAML or JSON file as in its examples/train_full. ms-swift: a YAML or JSON file of arguments, or a shell
script with `swift sft --…`.
"""

import math
import re
import shlex
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from mirage_ds.config.run import read_yaml
from mirage_ds.errors import UserError, reason

Trainer = Literal["LLaMA-Factory", "ms-swift"]
_SFT = re.compile(r".*?(?:\bswift\s+(sft)|swift[./]cli[./]sft(?:\.py)?)(?=\s)")
_ASSIGNED = re.compile(r"(?:^|\s)([A-Za-z_]\w*)=(\"[^\"]*\"|'[^']*'|\S*)")
# What ms-swift's examples have where they share rows out.
_QUOTIENT = re.compile(r"\$\(expr (\d+) / (\d+)\)|\$\(\((\d+) / (\d+)\)\)")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::?-([^}]*))?\})")
# What says nothing: no value, and no limit.
_UNSET: tuple[Any, ...] = (None, "", -1, [], {})


class Foreign(NamedTuple):
    """A configuration of another trainer.

    Attributes:
        given: its settings, without those that are empty.
        ranks: how many it starts; None where it does not say.
    """

    trainer: Trainer
    file: Path
    given: dict[str, Any]
    ranks: int | None


def read_foreign(file: Path) -> Foreign:
    """Read a configuration.

    Raises:
        UserError: it cannot be read, is none of those that are recognised, or does not fine-tune on answers.
    """
    # JSON is YAML too.
    values, ranks = _script(file) if file.suffix == ".sh" else (read_yaml(file), None)
    given = {key: value for key, value in values.items() if value not in _UNSET}
    factory = "model_name_or_path" in given
    swift = file.suffix == ".sh" or ("model" in given and given.keys() & {"train_type", "tuner_type", "dataset"})
    if not (factory or swift):
        raise UserError(
            f"{file}: is no configuration that is recognised; give one of LLaMA-Factory (it has model_name_or_path) or "
            "of ms-swift (model with train_type and dataset, or a script with `swift sft`)"
        )
    if not given.pop("do_train", not factory):
        raise UserError(f"{file}: trains nothing (it has no do_train: true); give the configuration of a training")
    megatron = "Megatron" if "micro_batch_size" in given else None
    for kind in (given.pop("stage", None), given.get("rlhf_type"), given.pop("task_type", None), megatron):
        if kind not in (None, "sft", "causal_lm"):
            raise UserError(f"{file}: is for {kind}; only fine-tuning on answers (sft) can be carried over")
    return Foreign("LLaMA-Factory" if factory else "ms-swift", file, given, ranks)


def _script(file: Path) -> tuple[dict[str, Any], int | None]:
    """Read the `swift sft` of a shell script: its flags, and the number of ranks."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({reason(error)})") from None
    known: dict[str, str] = {}
    for line in re.sub(r"(?m)^\s*#.*", "", text).replace("\\\n", " ").splitlines():
        expanded = _expanded(line, known)
        command = _SFT.match(expanded)
        before = command[0] if command else expanded
        known |= {name: value.strip("\"'") for name, value in _ASSIGNED.findall(before)}
        if command:
            flags = _flags(expanded[command.end() :])
            flags |= {name.lower(): known[name] for name in ("MAX_PIXELS", "MIN_PIXELS") if name in known}
            # Another launcher has its own words for it.
            numbers = [known.get("NPROC_PER_NODE", "1" if command[1] else ""), known.get("NNODES", "1")]
            return flags, math.prod(map(int, numbers)) if all(map(str.isdecimal, numbers)) else None
    raise UserError(f"{file}: has no `swift sft`; give a YAML, a JSON or a shell script with that command")


def _expanded(line: str, known: dict[str, str]) -> str:
    """Put in the variables that are known, or their ${NAME:-default}, and quotients; the rest stays."""
    line = _VARIABLE.sub(lambda match: known.get(match[1] or match[2], match[3] or match[0]), line)
    return _QUOTIENT.sub(lambda match: str(int(match[1] or match[3]) // int(match[2] or match[4])), line)


def _flags(line: str) -> dict[str, Any]:
    """Read flags up to a comment, pipe or redirection: a list where one has several values, True where it has none."""
    try:
        words = shlex.split(line)
    except ValueError:
        # A text that goes on in the next line.
        words = line.split()
    flags: dict[str, list[Any]] = {}
    own: list[Any] = []
    for word in takewhile(lambda word: word[:1] not in ("#", "|", ">", "&", ";") and word != "2>&1", words):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            own = flags[name.replace("-", "_")] = [_scalar(value)] if equals else []
        else:
            own.append(_scalar(word))
    return {name: values[0] if len(values) == 1 else values or True for name, values in flags.items()}


def _scalar(text: str) -> Any:
    """Return a number or a truth value where a word is one."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, (int, float)) else text
