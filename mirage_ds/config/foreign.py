"""Read a training configuration of LLaMA-Factory or ms-swift: whose it is, and what it sets.

LLaMA-Factory: a YAML or JSON file as in its examples/train_full. ms-swift: a YAML or JSON file of arguments, or a shell
script with `swift sft --…`.
"""

import math
import re
import shlex
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from mirage_ds.config.run import read_yaml
from mirage_ds.errors import UserError, reason

Trainer = Literal["LLaMA-Factory", "ms-swift"]
# What their settings are where nobody sets them, as far as ours are something else.
DEFAULTS: dict[Trainer, dict[str, Any]] = {
    "LLaMA-Factory": {"finetuning_type": "lora", "cutoff_len": 2048, "image_max_pixels": 589824,
                      "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 5e-5,
                      "num_train_epochs": 3.0, "lr_scheduler_type": "linear", "warmup_ratio": 0, "weight_decay": 0.0,
                      "adam_beta2": 0.999, "save_steps": 500},
    "ms-swift": {"train_type": "lora", "lora_alpha": 32, "per_device_train_batch_size": 1, "num_train_epochs": 3.0,
                 "warmup_ratio": 0, "weight_decay": 0.1, "save_steps": 500},
}  # fmt: skip
_SWIFT = {"train_type", "tuner_type", "torch_dtype", "target_modules", "split_dataset_ratio", "freeze_vit", "attn_impl"}
_MODULE = re.compile(r"(.*/)?swift[./]cli[./]sft(\.py)?")
_ASSIGNED = re.compile(r"([A-Za-z_]\w*)=(.*)", re.S)
# What ms-swift's examples have where they share rows out.
_QUOTIENT = re.compile(r"\$\(expr (\d+) / (\d+)\)|\$\(\((\d+) / (\d+)\)\)")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::?-([^}]*))?\})")


class Foreign(NamedTuple):
    """A configuration of another trainer.

    Attributes:
        given: its settings, without those that are null or empty.
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
    script = file.suffix == ".sh"
    # JSON is YAML too.
    values, ranks = _script(file) if script else (read_yaml(file), None)
    given = {key: value for key, value in values.items() if value not in (None, "", [], {})}
    if not (script or "model_name_or_path" in given or ("model" in given and given.keys() & _SWIFT)):
        raise UserError(
            f"{file}: is no configuration that is recognised; give one of LLaMA-Factory (it has model_name_or_path) or "
            "of ms-swift (model with train_type and the like, or a script with `swift sft`)"
        )
    if "model_name_or_path" in given and not given.get("do_train"):
        raise UserError(f"{file}: trains nothing (it has no do_train: true); give the configuration of a training")
    megatron = "Megatron" if "micro_batch_size" in given else None
    for kind in (given.get("stage"), given.get("rlhf_type"), given.get("task_type"), megatron):
        if kind not in (None, "sft", "causal_lm"):
            raise UserError(f"{file}: is for {kind}; only fine-tuning on answers (sft) can be carried over")
    return Foreign("LLaMA-Factory" if "model_name_or_path" in given else "ms-swift", file, given, ranks)


def _script(file: Path) -> tuple[dict[str, Any], int | None]:
    """Read the `swift sft` of a shell script: its flags, and the number of ranks."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({reason(error)})") from None
    known: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        words = _words(_expanded(line, known))
        before = ["", *words]
        at = next(
            (n for n, word in enumerate(words) if _MODULE.fullmatch(word) or (before[n], word) == ("swift", "sft")), -1
        )
        known |= {match[1]: match[2] for match in filter(None, map(_ASSIGNED.fullmatch, words[: max(at, 0) or None]))}
        if at >= 0:
            pixels = {name.lower(): known[name] for name in ("MAX_PIXELS", "MIN_PIXELS") if name in known}
            # Another launcher has its own words for it.
            each = known.get("NPROC_PER_NODE", "1" if words[at] == "sft" else "")
            numbers = [each, known.get("NNODES", "1")]
            ranks = math.prod(map(int, numbers)) if all(map(str.isdecimal, numbers)) else None
            return {**dict(_flags(words[at + 1 :])), **pixels}, ranks
    raise UserError(f"{file}: has no `swift sft`; give a YAML, a JSON or a shell script with that command")


def _words(line: str) -> list[str]:
    """Split a line as a shell does, up to its comment, pipe or redirection."""
    try:
        words = [] if line.lstrip().startswith("#") else shlex.split(line)
    except ValueError:
        # A text that goes on in the next line.
        words = line.split()
    return list(takewhile(lambda word: word[:1] not in ("#", "|", ">", "&", ";") and word != "2>&1", words))


def _expanded(line: str, known: dict[str, str]) -> str:
    """Put in the variables that are known, or their ${NAME:-default}, and quotients; the rest stays."""
    line = _VARIABLE.sub(lambda match: known.get(match[1] or match[2], match[3] or match[0]), line)
    return _QUOTIENT.sub(lambda match: str(int(match[1] or match[3]) // int(match[2] or match[4])), line)


def _flags(words: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield (name, value): a list where a flag has several, True where it has none."""
    name, values = "", []
    for word in [*words, "--"]:
        if not word.startswith("--"):
            values.append(_scalar(word))
            continue
        if name:
            yield name.replace("-", "_"), values[0] if len(values) == 1 else values or True
        name, equals, value = word[2:].partition("=")
        values = [_scalar(value)] if equals else []


def _scalar(text: str) -> Any:
    """Return a number or a truth value where a word is one."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, (int, float)) else text
