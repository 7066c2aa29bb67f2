"""`mirage-ds config import`: another trainer's configuration as a settings file of a run.

LLaMA-Factory: a YAML or JSON file as in its examples/train_full. ms-swift: a YAML or JSON file of arguments, or a shell
script with `swift sft --…`. What means the same is carried over under our name; every other setting is named with the
reason why it is not.
"""

import json
import math
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from mirage_ds.config.flags import build_model, read_yaml
from mirage_ds.config.names import by_theirs, ours, tables
from mirage_ds.config.run import RunConfig, Stage
from mirage_ds.errors import UserError, reason, shown

Trainer = Literal["LLaMA-Factory", "ms-swift"]
_SFT = re.compile(r"(.*/)?swift (sft)|\S* (.*/)?swift[./]cli[./]sft(\.py)?")
_ASSIGNED = re.compile(r"([A-Za-z_]\w*)=(.*)", re.S)
# What ms-swift's examples have where they share rows out.
_QUOTIENT = re.compile(r"\$\(expr (\d+) / (\d+)\)|\$\(\((\d+) / (\d+)\)\)")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::?-([^}]*))?\})")
# What says nothing: no value, and no limit.
_UNSET: tuple[Any, ...] = (None, "", -1, [], {})


class _Left(Exception):
    """A setting or data set without counterpart; says why."""


@dataclass
class Imported:
    """A configuration of another trainer, and what becomes of it.

    Attributes:
        given: its settings, without those that are empty; ranks: how many it starts, None where it does not say.
        settings: ours; carried: ours → theirs; left: theirs → why it has no counterpart.
        missing: ours → what must be given.
    """

    trainer: Trainer
    file: Path
    given: dict[str, Any]
    ranks: int | None
    settings: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def carry(self, theirs: str, name: str, value: Any) -> None:
        """Set ours, once."""
        if name in self.settings:
            raise _Left(f"another of theirs sets {name}")
        self.settings[name], self.carried[name] = value, theirs

    def as_yaml(self) -> str:
        """Return the settings file, with what is missing as comments."""
        head = f"# {self.trainer}'s {self.file.name}, by `mirage-ds config import`.\n"
        tail = "".join(f"# {name}: {what}\n" for name, what in self.missing.items())
        return head + yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True) + tail


def import_config(file: Path, stage: Stage = "sft", ranks: int | None = None) -> Imported:
    """Turn a configuration into ours; its relative paths count from the working directory, as theirs do.

    Args:
        stage: of the run.
        ranks: GPUs in all, where the file does not say.

    Raises:
        UserError: the file is not recognised, or sets what a run refuses.
    """
    made = read_foreign(file)
    values, settings = dict(made.given), made.settings
    settings["stage"] = stage
    method = _take_method(made, values)
    defaults = {**tables()["defaults"][made.trainer], **tables()["defaults"].get(f"{made.trainer} {method}", {})}
    _take_batch(made, values, ranks or made.ranks)
    _take_data(made, values)
    for theirs, value in values.items():
        try:
            _take(made, theirs, value)
        except _Left as why:
            made.left[theirs] = str(why)
    refused = {ours(theirs) or theirs for theirs in made.left}
    for name in defaults.keys() - settings.keys() - made.missing.keys() - refused:
        made.carry("its default", name, defaults[name])
    if "eval_data_path" in settings and "eval_every" not in settings:
        made.carry("save_steps", "eval_every", settings.get("save_every", 500))
    elif "eval_data_path" not in settings and settings.pop("eval_every", None):
        made.left[made.carried["eval_every"]] = "no file of records to evaluate is named"
    # A row must fit into a micro-batch.
    if settings.get("max_length", 0) > RunConfig.model_fields["micro_batch_tokens"].default:
        made.carry(made.carried["max_length"], "micro_batch_tokens", settings["max_length"])
    needed = {"model": "a folder or hub id", "data_path": "records.jsonl", "save_model_path": "a folder"}
    made.missing = {**{name: what for name, what in needed.items() if name not in settings}, **made.missing}
    checked = build_model(RunConfig, {}, {**needed, **settings}, f"{file}, in our names,")
    # In the order of `--help`.
    made.settings = checked.model_dump(mode="json", include=set(settings))
    return made


def read_foreign(file: Path) -> Imported:
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
        swifts = "of ms-swift (model with train_type and dataset, or a script with `swift sft`)"
        how = f"give one of LLaMA-Factory (it has model_name_or_path) or {swifts}"
        raise UserError(f"{file}: is no configuration that is recognised; {how}")
    if not given.pop("do_train", not factory):
        raise UserError(f"{file}: trains nothing (it has no do_train: true); give the configuration of a training")
    megatron = "Megatron" if "micro_batch_size" in given else None
    for kind in (given.pop("stage", None), given.get("rlhf_type"), given.pop("task_type", None), megatron):
        if kind not in (None, "sft", "causal_lm"):
            raise UserError(f"{file}: is for {kind}; only fine-tuning on answers (sft) can be carried over")
    return Imported("LLaMA-Factory" if factory else "ms-swift", file, given, ranks)


def _script(file: Path) -> tuple[dict[str, Any], int | None]:
    """Read the `swift sft` of a shell script: its flags, and the number of ranks."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({reason(error)})") from None
    known: dict[str, str] = {}
    for line in re.sub(r"(?m)^\s*#.*", "", text).replace("\\\n", " ").splitlines():
        words = _words(_expanded(line, known))
        # Of two words: what is quoted as one, for `echo` say, starts nothing.
        found = (_SFT.fullmatch(f"{before} {word}") for before, word in zip(["", *words], words, strict=False))
        at, command = next(((at, one) for at, one in enumerate(found) if one), (len(words), None))
        known |= {one[1]: one[2] for one in filter(None, map(_ASSIGNED.fullmatch, words[:at]))}
        if command:
            flags = _flags(words[at + 1 :])
            flags |= {name.lower(): known[name] for name in ("MAX_PIXELS", "MIN_PIXELS") if name in known}
            # Another launcher has its own words for it.
            numbers = [known.get("NPROC_PER_NODE", "1" if command[2] else ""), known.get("NNODES", "1")]
            return flags, math.prod(map(int, numbers)) if all(map(str.isdecimal, numbers)) else None
    raise UserError(f"{file}: has no `swift sft`; give a YAML, a JSON or a shell script with that command")


def _expanded(line: str, known: dict[str, str]) -> str:
    """Put in the variables that are known, or their ${NAME:-default}, and quotients; the rest stays."""
    line = _VARIABLE.sub(lambda match: known.get(match[1] or match[2], match[3] or match[0]), line)
    return _QUOTIENT.sub(lambda match: str(int(match[1] or match[3]) // int(match[2] or match[4])), line)


def _words(line: str) -> list[str]:
    """Split a line as a shell does, up to its comment, pipe or redirection."""
    try:
        words = shlex.split(line)
    except ValueError:
        # A text that goes on in the next line.
        words = line.split()
    return list(takewhile(lambda word: word[:1] not in ("#", "|", ">", "&", ";") and word != "2>&1", words))


def _flags(words: Sequence[str]) -> dict[str, Any]:
    """Read flags: a list where one has several values, True where it has none."""
    flags: dict[str, list[Any]] = {}
    own: list[Any] = []
    for word in words:
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


def _take(made: Imported, theirs: str, value: Any) -> None:
    """Carry one setting over; _Left where it has no counterpart."""
    name = ours(theirs) or theirs
    setting = RunConfig.model_fields.get(name)
    if "$" in str(value):
        raise _Left("a variable of the shell")
    if theirs in by_theirs("absent") or setting is None:
        raise _Left(by_theirs("absent").get(theirs, "not known here"))
    if name.startswith("lora_") and "lora_rank" not in made.settings:
        raise _Left("all weights are trained")
    if name == "warmup_steps":
        # YAML takes 5e-2 for a text.
        with suppress(TypeError, ValueError):
            if 0 < float(value) < 1:
                made.missing[name] = f"{value} × the steps of the run (its log says how many)"
                return
    if theirs.startswith(("freeze_", "disable_")):
        value = not value
    if name == "train_vision" and value and "lora_rank" in made.settings:
        raise _Left("adapters train the decoder alone")
    if name == "resume":
        value = "auto"
    if name in ("report_to", "lora_targets"):
        value = value if isinstance(value, list) else [part.strip() for part in str(value).split(",")]
        # All layers have adapters here too.
        if name == "lora_targets" and value[0] in ("all", "all-linear"):
            return
    elif isinstance(value, str):
        value = tables()["values"].get(value, value)
    kind: Any = Annotated[setting.annotation, setting]
    try:
        value = TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise _Left(f"{shown(value)}: {error.errors()[0]['msg']}") from None
    made.carry(theirs, name, value)


def _take_method(made: Imported, values: dict[str, Any]) -> str:
    """Return whether adapters are trained or all weights: "lora" or "full"."""
    theirs = next((name for name in ("finetuning_type", "tuner_type") if name in values), "train_type")
    method = values.pop(theirs, "lora")
    if method not in ("lora", "full"):
        raise UserError(f"{made.file}: {theirs} {method} has no counterpart; there are full and lora")
    if method == "lora":
        theirs = "lora_rank" if "lora_rank" in values else "its default"
        made.carry(theirs, "lora_rank", values.pop("lora_rank", 8))
    return method


def _take_batch(made: Imported, values: dict[str, Any], ranks: int | None) -> None:
    factory = made.trainer == "LLaMA-Factory"
    size = values.pop("per_device_train_batch_size", 8 if factory else 1)
    steps = values.pop("gradient_accumulation_steps", 1 if factory else None)
    rows: int | str = f"{size} × {steps}"
    with suppress(TypeError, ValueError):
        # Without a number ms-swift takes as many as give a step 16 rows at least.
        rows = int(size) * int(steps or math.ceil(16 / (int(size) * (ranks or 1))))
    if ranks and isinstance(rows, int):
        theirs = f"per_device_train_batch_size × gradient_accumulation_steps × {ranks} ranks"
        made.carry(theirs, "global_batch_size", rows * ranks)
    else:
        made.missing["global_batch_size"] = f"{rows} × the number of GPUs; give --ranks"


def _take_data(made: Imported, values: dict[str, Any]) -> None:
    """Data sets by their own files and columns."""
    columns: set[str] = set()
    held_out = "val_dataset" if "val_dataset" in values else "eval_dataset"
    for theirs, name in (("dataset", "data_path"), (held_out, "eval_data_path")):
        given = values.pop(theirs, [])
        files = []
        for one in given if isinstance(given, list) else map(str.strip, str(given).split(",")):
            try:
                file, own = _placed(made, one, values)
            except _Left as why:
                made.missing[name] = f"{one} {why}"
                continue
            files.append(file)
            columns.add(own)
        if name == "eval_data_path" and len(files) > 1:
            made.missing[name] = f"one file; `mirage-ds data mix {shlex.join(files)} --out DIR` makes it"
        elif files:
            made.carry(theirs, name, files if name == "data_path" else files[0])
    if len(columns) > 1:
        differ = " / ".join(sorted(own or "the usual ones" for own in columns))
        but = f"theirs differ ({differ}); `data import` names them anew"
        made.missing["columns"] = f"the same for all records, and {but}"
    elif any(columns):
        made.carry("dataset", "columns", columns.pop())


def _placed(made: Imported, name: str, values: dict[str, Any]) -> tuple[str, str]:
    """Return a data set's file, and its columns as --columns has them."""
    entry, folder = _swift_entry(made, name) if made.trainer == "ms-swift" else _entry(made, name, values)
    strange = set(entry.get("tags", {}).values()) - set(tables()["tags"])
    parts = {part: column for part, column in entry.get("columns", {}).items() if column}
    # Other parts are read under their usual names alone, and an `input` behind an `instruction` alone.
    usual = {"query": "input" if parts.get("prompt", "instruction") == "instruction" else ""}
    roles = tables()["roles"]
    lost = [f"{part} ({parts[part]})" for part in parts if part not in roles and parts[part] != usual.get(part, part)]
    unusual = [part for part in parts if part in roles and parts[part] not in tables()["usual"][part]]
    columns = ",".join(f"{roles[part]}={parts[part]}" for part in unusual)
    hub = entry.get("hf_hub_url", "")
    flags = {"--split": entry.get("split"), "--columns": columns, "--out": "DIR"}
    words = [word for flag, value in flags.items() if value for word in (flag, value)]
    command = shlex.join(["mirage-ds", "data", "import", hub, *words])
    for why, met in {
        "holds preferences; name one with answers": entry.get("ranking"),
        f"calls its roles {', '.join(sorted(strange))}; rename them as sharegpt has them": strange,
        "is a script, a subset or not on the Hugging Face Hub; download it, and name its file":
            "subset" in entry or not (hub or "file_name" in entry),
        f"has {', '.join(lost)}, which --columns cannot name; call its columns instruction, input, output, system and "
        "history": lost,
        f"is no file; where the Hugging Face Hub has it, `{command}` makes records of it": hub,
    }.items():  # fmt: skip
        if met:
            raise _Left(why)
    file = folder / entry["file_name"]
    if file.parent != folder:
        # Their pictures' paths start from it.
        values.setdefault("media_dir", str(folder))
    return str(file), columns


def _swift_entry(made: Imported, name: str) -> tuple[dict[str, Any], Path]:
    """Describe FILE[#COUNT] or NAME[:SUBSET] as _entry does."""
    if "$" in name:
        raise _Left("is a variable of the shell; name the file")
    place, _, count = name.partition("#")
    file = Path(place)
    if ":" in place or not (file.suffix or file.exists()):
        return {"hf_hub_url": place} | ({"subset": ""} if ":" in place else {}), Path()
    if count:
        made.left[name] = by_theirs("absent")["max_samples"]
    return {"file_name": file.name}, file.parent


def _entry(made: Imported, name: str, values: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """Look a data set up in dataset_info.json; return its entry and the folder where the file lies.

    That is dataset_dir, below the working directory or a folder above the configuration.
    """
    folder = Path(values.get("dataset_dir", "data"))
    tops = [top for top in (Path(), *made.file.parents) if (top / folder / "dataset_info.json").is_file()]
    folder = tops[0] / folder if tops else folder
    try:
        return json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))[name], folder
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _Left(f"is not described in {folder}/dataset_info.json ({reason(error)})") from None


def print_imported(made: Imported, on_stderr: bool) -> None:
    """Print what became of each of their settings."""
    from rich.console import Console
    from rich.table import Column, Table

    values = {name: json.dumps(value, ensure_ascii=False).strip('"') for name, value in made.settings.items()}
    carried = [(made.carried[name], name, value) for name, value in values.items() if name in made.carried]
    console = Console(stderr=on_stderr)
    for title, head, rows in (
        ("carried over", (made.trainer, "here", "value"), carried),
        ("no counterpart", (made.trainer, "why"), made.left.items()),
        ("to be given still", ("setting", "what"), made.missing.items()),
    ):
        table = Table(*(Column(name, overflow="fold") for name in head), title=title)
        for row in rows:
            table.add_row(*row)
        if table.row_count:
            console.print(table)
