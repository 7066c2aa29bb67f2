"""`mirage-ds config import`: another trainer's configuration as a settings file of a run.

What means the same is carried over under our name; every other setting is named with the reason why it is not.
"""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mirage_ds.config.flags import build_model
from mirage_ds.config.foreign import DEFAULTS, Foreign, read_foreign
from mirage_ds.config.names import ABSENT, ours
from mirage_ds.config.run import RunConfig, Stage
from mirage_ds.errors import UserError, reason, shown

# Our setting: their value → ours.
_VALUES: dict[str, dict[str, str]] = {
    "lr_scheduler": {**{name: name for name in ("cosine", "linear", "constant")}, "constant_with_warmup": "constant"},
    "attention": {"auto": "auto", "sdpa": "sdpa", **dict.fromkeys(("fa2", "flash_attn", "flash_attention_2"), "flash")},
    "report_to": {name: name for name in ("tensorboard", "wandb", "mlflow", "none")},
}
_INVERSE = ("freeze_vit", "freeze_vision_tower", "disable_gradient_checkpointing")
# Names of ours, or of the table, that mean something else there; nothing is said where all runs are so.
_OTHERS = {
    **dict.fromkeys(("stage", "task_type", "do_train"), ""),
    **dict.fromkeys(("model_name", "model_author"), "only for the data set swift/self-cognition"),
    **dict.fromkeys(("save_strategy", "eval_strategy", "evaluation_strategy"), "every so many steps, never epochs"),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model"), "--save_best keeps the best model beside it"),
    "deepspeed": "the shipped JSONs are made for this trainer (zero3 is the default); `mirage-ds plan` ranks them",
    "ddp_timeout": "a hung run ends after --collective_timeout seconds",
    "dataset_dir": "data_path names the files themselves",
    "lora_dropout": "must be 0: layers are computed again in backward",
    "system": "write it into the records, as their system message",
}  # fmt: skip
# LLaMA-Factory's names of a data set's parts: what they are without being named, and our role.
_COLUMNS = {"prompt": ("question", "instruction"), "response": ("answer", "output"), "images": ("image", "images"),
            "messages": ("messages", "conversations", "messages")}  # fmt: skip
# Other parts are read under their usual names alone, and an `input` behind an `instruction` alone.
_USUAL = {"query": "input"}
_TAGS = {"from", "role", "value", "content", "human", "user", "gpt", "assistant", "system", "observation", "tool",
         "function_call", "function"}  # fmt: skip


class _Left(Exception):
    """A setting or data set without counterpart; says why."""


@dataclass
class Imported:
    """A configuration in our words.

    Attributes:
        carried: (theirs, ours, value); left: theirs → why it has no counterpart; missing: ours → what must be given.
    """

    source: Foreign
    settings: dict[str, Any] = field(default_factory=dict)
    carried: list[tuple[str, str, str]] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def carry(self, theirs: str, name: str, value: Any) -> None:
        """Set ours, once."""
        if name in self.settings:
            raise _Left(f"another of theirs sets {name}")
        self.settings[name] = value
        default = "" if set(theirs.split(" × ")) & self.source.given.keys() else " (default)"
        self.carried.append((theirs + default, name, value if isinstance(value, str) else json.dumps(value)))

    def as_yaml(self) -> str:
        """Return the settings file, with what is missing as comments."""
        head = f"# {self.source.trainer}'s {self.source.file.name}, by `mirage-ds config import`.\n"
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
    source = read_foreign(file)
    made = Imported(source, {"stage": stage})
    values = {**DEFAULTS[source.trainer], **source.given}
    _take_method(made, values)
    _take_batch(made, values, ranks or source.ranks)
    _take_data(made, values)
    for theirs, value in values.items():
        try:
            _take(made, theirs, value)
        except _Left as why:
            # Nobody has asked for a default.
            if theirs in source.given and str(why):
                made.left[theirs] = str(why)
        except (TypeError, ValueError):
            made.left[theirs] = f"{shown(value)} is not understood"
    _check(made)
    made.carried.sort(key=lambda line: list(RunConfig.model_fields).index(line[1]))
    return made


def _take(made: Imported, theirs: str, value: Any) -> None:
    name = ours(theirs) or theirs
    if "$" in str(value):
        raise _Left("a variable of the shell")
    if theirs in _OTHERS or name not in RunConfig.model_fields:
        raise _Left(_OTHERS.get(theirs, ABSENT.get(theirs, "not known here")))
    if name == "warmup_steps" and 0 < float(value) < 1:
        made.missing[name] = f"{value} × the steps of the run (its log says how many)"
        return
    if name in _VALUES:
        found = [_VALUES[name].get(str(one)) for one in (value if isinstance(value, list) else [value])]
        if None in found:
            raise _Left(f"there are {', '.join(dict.fromkeys(_VALUES[name].values()))}")
        value = found if name == "report_to" else found[0]
    elif name == "lora_targets":
        value = value if isinstance(value, list) else [part.strip() for part in str(value).split(",")]
        if value[0] in ("all", "all-linear"):
            # So it is here too.
            raise _Left("")
    elif name == "train_vision" and not value and "lora_rank" in made.settings:
        raise _Left("adapters train the decoder alone")
    elif name in ("save_every", "max_steps", "keep_checkpoints") and float(value) < 1:
        raise _Left("ours is a whole number, 1 at least" if value != -1 else "")
    elif name == "resume":
        value = "auto"
    made.carry(theirs, name, not value if theirs in _INVERSE else value)


def _take_method(made: Imported, values: dict[str, Any]) -> None:
    """Adapters or all weights."""
    theirs = next(name for name in ("finetuning_type", "tuner_type", "train_type") if name in values)
    method = values[theirs]
    for name in [name for name in values if ours(name) == "lora_rank"]:
        values.pop(name)
    if method not in ("lora", "full"):
        raise UserError(f"{made.source.file}: {theirs} {method} has no counterpart; there are full and lora")
    values.setdefault("learning_rate", 1e-4 if method == "lora" else 1e-5)
    if method == "lora":
        made.carry("lora_rank", "lora_rank", values.pop("lora_rank", 8))
        return
    for name in [name for name in values if name.startswith("lora_") or ours(name) == "lora_targets"]:
        values.pop(name)
        if name in made.source.given:
            made.left[name] = "all weights are trained"


def _take_batch(made: Imported, values: dict[str, Any], ranks: int | None) -> None:
    size, steps = values.pop("per_device_train_batch_size"), values.pop("gradient_accumulation_steps", None)
    try:
        # Without a number ms-swift takes as many as give a step 16 rows at least.
        rows = int(size) * int(steps or -(-16 // (int(size) * (ranks or 1))))
    except (TypeError, ValueError):
        made.missing["global_batch_size"] = f"rows a step; theirs is {size} × {steps} × ranks"
        return
    if ranks is None:
        made.missing["global_batch_size"] = f"{rows} × the number of GPUs; give --ranks"
        return
    theirs = f"per_device_train_batch_size × gradient_accumulation_steps × {ranks} ranks"
    made.carry(theirs, "global_batch_size", rows * ranks)


def _take_data(made: Imported, values: dict[str, Any]) -> None:
    """Data sets by their own files and columns; records to evaluate go together with a number of steps."""
    held_out = "val_dataset" if "val_dataset" in values else "eval_dataset"
    columns: set[str] = set()
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
        if files and (len(files) == 1 or name == "data_path"):
            made.carry(theirs, name, files if len(files) > 1 else files[0])
        elif files:
            made.missing[name] = f"one file; `mirage-ds data mix {shlex.join(files)} --out DIR` makes it"
    if len(columns) > 1:
        differ = " / ".join(sorted(own or "the usual ones" for own in columns))
        made.missing["columns"] = (
            f"the same for all records, and theirs differ ({differ}); `data import` names them anew"
        )
    elif any(columns):
        made.carry("dataset", "columns", columns.pop())
    every = "eval_steps" if "eval_steps" in values else "save_steps"
    steps = values.pop("eval_steps", values["save_steps"])
    if "eval_data_path" in made.settings:
        made.carry(every, "eval_every", steps)
    elif every == "eval_steps":
        made.left[every] = "no file of records to evaluate is named"


def _placed(made: Imported, name: str, values: dict[str, Any]) -> tuple[str, str]:
    """Return a data set's file, and its columns as --columns has them."""
    if "$" in name:
        raise _Left("is a variable of the shell; name the file")
    if made.source.trainer == "LLaMA-Factory":
        return _described(made, name, values)
    place, _, most = name.partition("#")
    if ":" in place:
        raise _Left("names a subset; download it, and name its file")
    if not Path(place).suffix and not Path(place).exists():
        raise _of_hub(place)
    if most:
        made.left[name] = ABSENT["max_samples"]
    return place, ""


def _of_hub(name: str, *flags: str) -> _Left:
    command = shlex.join(["mirage-ds", "data", "import", name, *flags, "--out", "DIR"])
    return _Left(f"is no file; where the Hugging Face Hub has it, `{command}` makes records of it")


def _described(made: Imported, name: str, values: dict[str, Any]) -> tuple[str, str]:
    """Look up in dataset_info.json where a data set lies and what its columns are; see _placed.

    The file lies in dataset_dir, below the working directory or a folder above the configuration.
    """
    folder = Path(values.get("dataset_dir", "data"))
    tops = [top for top in (Path(), *made.source.file.parents) if (top / folder / "dataset_info.json").is_file()]
    folder = tops[0] / folder if tops else folder
    try:
        entry = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _Left(f"is not described in {folder}/dataset_info.json ({reason(error)})") from None
    if entry.get("ranking"):
        raise _Left("holds preferences; name one with answers")
    strange = set(entry.get("tags", {}).values()) - _TAGS
    if strange:
        raise _Left(f"calls its roles {', '.join(sorted(strange))}; rename them as sharegpt has them")
    if ("file_name" not in entry and "hf_hub_url" not in entry) or "subset" in entry:
        raise _Left("is a script, a subset or not on the Hugging Face Hub; download it, and name its file")
    theirs = {part: column for part, column in entry.get("columns", {}).items() if column}
    renamed = theirs.get("prompt", "instruction") != "instruction"
    lost = [f"{part} ({column})" for part, column in theirs.items() if part not in _COLUMNS
            and (column != _USUAL.get(part, part) or (renamed and part == "query"))]  # fmt: skip
    if lost:
        raise _Left(f"has {', '.join(lost)}, which --columns cannot name; call its columns instruction, input, output, "
                    "system and history")  # fmt: skip
    named = [(_COLUMNS[part], column) for part, column in theirs.items() if part in _COLUMNS]
    columns = ",".join(f"{role}={column}" for (role, *known), column in named if column not in known)
    if "hf_hub_url" in entry:
        split = ("--split", entry["split"]) if "split" in entry else ()
        raise _of_hub(entry["hf_hub_url"], *split, *(("--columns", columns) if columns else ()))
    file = folder / entry["file_name"]
    if file.parent != folder:
        # Their pictures' paths start from it.
        values.setdefault("media_dir", str(folder))
    return str(file), columns


def _check(made: Imported) -> None:
    """Pass the settings through the run's own parser; UserError where it refuses them."""
    settings = made.settings
    if int(settings.get("max_length", 0)) > RunConfig.model_fields["micro_batch_tokens"].default:
        # A row must fit into a micro-batch.
        theirs = "max_length" if made.source.trainer == "ms-swift" else "cutoff_len"
        made.carry(theirs, "micro_batch_tokens", settings["max_length"])
    needed = {"model": "a folder or hub id", "data_path": "records.jsonl", "save_model_path": "a folder"}
    made.missing = {**{name: what for name, what in needed.items() if name not in settings}, **made.missing}
    checked = build_model(RunConfig, {}, {**needed, **settings}, f"{made.source.file}, in our names,")
    # In the order of `--help`.
    made.settings = checked.model_dump(mode="json", include=set(settings))


def print_imported(made: Imported, on_stderr: bool) -> None:
    """Print what became of each of their settings."""
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(stderr=on_stderr)
    for title, head, rows in (
        ("carried over", (made.source.trainer, "here", "value"), made.carried),
        ("no counterpart", (made.source.trainer, "why"), made.left.items()),
        ("to be given still", ("setting", "what"), made.missing.items()),
    ):
        table = Table(*(Column(name, overflow="fold") for name in head), title=title)
        for row in rows:
            table.add_row(*row)
        if table.row_count:
            console.print(table)
