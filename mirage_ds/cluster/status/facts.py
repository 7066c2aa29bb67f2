"""What the files of a run say, read while somebody writes them: no lock, nothing written. Imports no torch.

A line that is half written, the last one or one that a killed process left, is passed over.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from mirage_ds.engine.manifest import MANIFEST, candidates, is_whole, step_of
from mirage_ds.errors import UserError
from mirage_ds.run import events, odd_steps

Line = dict[str, Any]


def find_run(path: Path) -> Path:
    """Return the --save_model_path of the run that a path names: that folder, run/ in it, or a study's folder of it.

    Raises:
        UserError: there is no run.
    """
    if path.is_file():
        raise UserError(f"{path}: is a file; give a --save_model_path, or use `mirage-ds ablate status` for a study")
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; a run makes its own once its records are read")
    if (path / "runs").is_dir() and next(path.glob("runs/*/node.json"), None) is not None:
        raise UserError(f"{path}: is a study's folder, no run; `mirage-ds ablate status STUDY.yaml` shows it")
    for own in (path / "run", path / "model" / "run", *([path] if path.name == "run" else [])):
        if any((own / name).is_file() for name in (events.FILE, "config.yaml", "log.jsonl")):
            return own.parent
    what = "holds no run, or one that has not begun (there is no run/ in it)"
    raise UserError(f"{path}: {what}; give a training's --save_model_path")


def json_lines(file: Path) -> list[Line]:
    """Read the objects of a file of JSON lines, those that are whole; none where there is no file."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    found = []
    for line in content.split(b"\n"):
        with suppress(ValueError):
            found.append(json.loads(line))
    return [value for value in found if isinstance(value, dict)]


def _object(file: Path) -> dict[str, Any] | None:
    """Read a JSON or YAML file that is written at once; None where there is none, or no object in it."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        text = file.read_text(encoding="utf-8")
        value = yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)
        return value if isinstance(value, dict) else None
    return None


def split_log(lines: Iterable[Line]) -> tuple[list[Line], list[Line]]:
    """Return a log's steps and its evaluations, in order; the last line of each step counts.

    A run that goes on from a checkpoint takes some steps again.
    """
    steps: dict[int, Line] = {}
    evaluations: dict[int, Line] = {}
    for line in lines:
        if isinstance(line.get("step"), int):
            if "seconds" in line:
                steps[line["step"]] = line
            if any(name.startswith("eval_") for name in line):
                evaluations[line["step"]] = line
    return [steps[step] for step in sorted(steps)], [evaluations[step] for step in sorted(evaluations)]


def _changed(file: Path) -> float:
    with suppress(OSError):
        return file.stat().st_mtime
    return 0.0


class Facts:
    """A run as its files show it.

    Attributes:
        folder: its --save_model_path.
        settings: config.yaml; start: run.json. Empty where they are not there yet.
        events: of events.jsonl; recent: those of the newest start; began: when that was.
        verdicts: the guards', of faults.jsonl; odd: of odd_steps.jsonl.
        steps, evaluations: the lines of log.jsonl, one a step.
        logged: when log.jsonl was last written to, without one config.yaml, in seconds since 1970.
        skipped_records: lines of skipped.jsonl.
        best: best.json, or None.
        saved: (step, when) of the newest whole checkpoint that a resume would take; damaged: names of newer ones.
    """

    def __init__(self, folder: Path):
        """Read a run; `folder` is what find_run returns."""
        own = folder / "run"
        self.folder = folder
        self.settings = _object(own / "config.yaml") or {}
        self.start = _object(own / "run.json") or {}
        noted = json_lines(own / events.FILE)
        self.events = [one for one in noted if isinstance(one.get("event"), str) and isinstance(one.get("time"), float)]
        begins = [at for at, one in enumerate(self.events) if one["event"] == events.LOAD_BEGINS]
        self.recent = self.events[begins[-1] :] if begins else self.events
        self.began = float(self.recent[0]["time"]) if self.recent else 0.0
        told = json_lines(own / "faults.jsonl")
        self.verdicts = [one for one in told if one.get("time") and one.get("code") and one.get("why")]
        self.odd = json_lines(own / odd_steps.FILE)
        self.steps, self.evaluations = split_log(json_lines(own / "log.jsonl"))
        self.logged = _changed(own / "log.jsonl") or _changed(own / "config.yaml")
        self.skipped_records = len(json_lines(own / "skipped.jsonl"))
        self.best = _object(folder / "best" / "best.json")
        self.saved: tuple[int, float] | None = None
        self.damaged: list[str] = []
        for place in candidates(own / "checkpoints"):
            if is_whole(place):
                self.saved = (step_of(place), self._saved_at(place))
                break
            self.damaged.append(place.name)

    def _saved_at(self, checkpoint: Path) -> float:
        """Return when a checkpoint was whole; a copied folder has other dates than its events."""
        ends = [one for one in self.events if one["event"] == events.SAVE_ENDS]
        times = [float(one["time"]) for one in ends if one.get("step") == step_of(checkpoint)]
        return times[-1] if times else _changed(checkpoint / MANIFEST)
