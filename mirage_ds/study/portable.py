"""Results that travel: what a study came to on one machine, in one small file that another machine's report takes in.

A study may run in parts: on two clusters, or over days on machines that forget. `mirage-ds ablate export` writes what
is finished, `mirage-ds ablate report --with` takes it where its own is missing. Chains and evaluations are known by the
keys of their runs: one whose settings or records differ is never taken for another, and a renamed arm or another
evaluation beside it changes nothing. Imports no torch.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mirage_ds.errors import UserError, reason
from mirage_ds.files import write_atomically
from mirage_ds.study.results import CONTROLS, SCORES, Cell, Results, Scored, StageResult

FORMAT = 2


def _columns(scores: Sequence[Scored]) -> dict[str, Any]:
    """Turn records' scores into columns: a fifth of the size."""
    names = list(scores[0].metrics) if scores else []
    return {
        "records": [one.record for one in scores],
        "levels": [one.level for one in scores],
        "metrics": {name: [one.metrics[name] for one in scores] for name in names},
    }


def _scores(columns: Mapping[str, Any]) -> list[Scored]:
    metrics = columns["metrics"]
    return [
        Scored(record, level, {name: float(values[place]) for name, values in metrics.items()})
        for place, (record, level) in enumerate(zip(columns["records"], columns["levels"], strict=True))
    ]


def _without_texts(controls: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of the controls' report what answers said: the report reads their metrics alone."""
    answers = [
        {
            **{key: value for key, value in one.items() if key != "conditions"},
            "conditions": {name: {"metrics": own["metrics"]} for name, own in one["conditions"].items()},
        }
        for one in controls.get("answers", [])
    ]
    return {**controls, **({"answers": answers} if answers else {})}


def _is_there(cell: Cell) -> bool:
    return bool(cell.stages and (cell.scores or cell.controls))


def dump(results: Results) -> bytes:
    """Write the cells that have scores; the same bytes for the same results."""
    cells = [
        {
            **{"chain": cell.chain, "arm": cell.arm, "seed": cell.seed, "keys": dict(cell.keys)},
            "stages": [asdict(stage) for stage in cell.stages],
            SCORES: {name: _columns(scores) for name, scores in cell.scores.items()},
            CONTROLS: {name: _without_texts(one) for name, one in cell.controls.items()},
        }
        for cell in results.cells
        if _is_there(cell)
    ]
    text = json.dumps({"format": FORMAT, "study": results.name, "made": dict(results.made), "cells": cells})
    return gzip.compress(text.encode(), mtime=0)


def load(file: Path) -> list[Cell]:
    """Read what `dump` wrote.

    Raises:
        UserError: no such file, or another kind of file.
    """
    try:
        values = json.loads(gzip.decompress(file.read_bytes()))
        if values["format"] != FORMAT:
            raise UserError(f"{file}: written by another version (format {values['format']}); export it anew")
        return [
            Cell(
                arm=one["arm"],
                seed=one["seed"],
                settings={},
                stages=[StageResult(**stage) for stage in one["stages"]],
                scores={name: _scores(columns) for name, columns in one[SCORES].items()},
                controls=one[CONTROLS],
                chain=one["chain"],
                keys=one["keys"],
            )
            for one in values["cells"]
        ]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({reason(error)}); name a file of `mirage-ds ablate export`") from None
    except (ValueError, KeyError, TypeError, EOFError, zlib.error) as error:
        raise UserError(
            f"{file}: no file of `mirage-ds ablate export` ({type(error).__name__}: {reason(error)}); export it anew"
        ) from None


class _Shelf:
    """What the files hold, by keys."""

    def __init__(self) -> None:
        self.stages: dict[str, Sequence[StageResult]] = {}
        self.results: dict[str, Any] = {}

    def put(self, cell: Cell) -> None:
        self.stages.setdefault(cell.chain, cell.stages)
        for kind, found in ((SCORES, cell.scores), (CONTROLS, cell.controls)):
            for name, one in found.items():
                self.results.setdefault(cell.keys[f"{kind} {name}"], one)

    def fill(self, cell: Cell) -> Cell:
        """Return a cell with what it lacks and is there."""
        missing = {
            kind: {
                name: self.results[key]
                for title, key in cell.keys.items()
                for whose, name in [title.split(" ", 1)]
                if whose == kind and name not in had and key in self.results
            }
            for kind, had in ((SCORES, cell.scores), (CONTROLS, cell.controls))
        }
        if not any(missing.values()):
            return cell
        scores, controls = {**cell.scores, **missing[SCORES]}, {**cell.controls, **missing[CONTROLS]}
        whole = len(scores) + len(controls) == len(cell.keys)
        return replace(
            cell,
            stages=self.stages.get(cell.chain, cell.stages),
            scores=scores,
            controls=controls,
            problem=None if whole else cell.problem,
        )


def merge(results: Results, files: Sequence[Path]) -> tuple[Results, list[str]]:
    """Take results from other machines where this one has none.

    Returns:
        The results, and a line for each file that says how many of its cells the study has and were of use.
    """
    said = []
    cells = list(results.cells)
    known = {cell.chain for cell in cells}
    for file in files:
        shelf, found = _Shelf(), load(file)
        for one in found:
            shelf.put(one)
        filled = [shelf.fill(cell) for cell in cells]
        taken = sum(one is not cell for one, cell in zip(filled, cells, strict=True))
        strangers = sum(one.chain not in known for one in found)
        said.append(
            f"{file}: {len(found)} cell(s), {taken} of the study filled"
            + (f", {strangers} are of other settings or records than this study's" if strangers else "")
        )
        cells = filled
    return replace(results, cells=cells), said


def export(results: Results, file: Path) -> int:
    """Write the cells that have scores; return how many.

    Raises:
        UserError: there is none.
    """
    count = sum(map(_is_there, results.cells))
    if not count:
        raise UserError("no arm of the study has been evaluated under any seed; run it first")
    write_atomically(file, dump(results))
    return count
