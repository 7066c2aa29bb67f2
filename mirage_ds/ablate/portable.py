"""Results that travel: what a study came to on one machine, in one small file that another machine's report takes in.

A study may run in parts: on two clusters, or over days on machines that forget. `mirage-ds ablate export` writes the
finished cells, `mirage-ds ablate report --with` takes them where its own are missing. A cell is known by the keys of
its runs, so one whose settings or records differ is never taken for another. Imports no torch.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mirage_ds.ablate.results import Cell, Results, Scored, StageResult
from mirage_ds.errors import UserError, reason
from mirage_ds.files import write_atomically

FORMAT = 1


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


def dump(results: Results) -> bytes:
    """Write the cells that have scores; the same bytes for the same results."""
    cells = [
        {
            **{"key": cell.key, "arm": cell.arm, "seed": cell.seed, "settings": dict(cell.settings)},
            "stages": [asdict(stage) for stage in cell.stages],
            "scores": {name: _columns(scores) for name, scores in cell.scores.items()},
            "controls": {name: _without_texts(one) for name, one in cell.controls.items()},
        }
        for cell in results.cells
        if cell.problem is None
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
                settings=one["settings"],
                stages=[StageResult(**stage) for stage in one["stages"]],
                scores={name: _scores(columns) for name, columns in one["scores"].items()},
                controls=one["controls"],
                key=one["key"],
            )
            for one in values["cells"]
        ]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({reason(error)}); name a file of `mirage-ds ablate export`") from None
    except (ValueError, KeyError, TypeError, EOFError, zlib.error) as error:
        raise UserError(
            f"{file}: no file of `mirage-ds ablate export` ({type(error).__name__}: {reason(error)}); export it anew"
        ) from None


def merge(results: Results, files: Sequence[Path]) -> tuple[Results, list[str]]:
    """Take cells from other machines where this one has none.

    Returns:
        The results, and a line for each file that says how many of its cells the study has and were taken.
    """
    there: dict[str, Cell] = {}
    said = []
    wanted = {cell.key for cell in results.cells if cell.problem is not None}
    known = {cell.key for cell in results.cells}
    for file in files:
        cells = load(file)
        taken = [cell for cell in cells if cell.key in wanted and cell.key not in there]
        there |= {cell.key: cell for cell in taken}
        strangers = sum(cell.key not in known for cell in cells)
        said.append(
            f"{file}: {len(taken)} of {len(cells)} cell(s) taken"
            + (f", {strangers} are of other settings or records than this study's" if strangers else "")
        )
    cells = [
        # What it is called here: an arm may have been renamed since.
        replace(there[cell.key], arm=cell.arm, settings=cell.settings) if cell.key in there else cell
        for cell in results.cells
    ]
    return replace(results, cells=cells), said


def export(results: Results, file: Path) -> int:
    """Write the finished cells; return how many.

    Raises:
        UserError: there is none.
    """
    count = sum(cell.problem is None for cell in results.cells)
    if not count:
        raise UserError("no arm of the study is done under any seed; run it first")
    write_atomically(file, dump(results))
    return count
