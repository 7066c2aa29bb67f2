"""Results that travel: what a study came to on one machine, in one small file that another machine's report takes in.

A study may run in parts: on two clusters, or over days on machines that forget. `mirage-ds ablate export` writes what
is finished, `mirage-ds ablate report --with` takes it where its own is missing. Chains and evaluations are known by the
keys of their runs, which are hashes of content: one whose settings or records differ is never taken for another, and a
renamed arm or another evaluation beside it changes nothing. Imports no torch.
"""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from mirage_ds.errors import UserError, reason
from mirage_ds.files import write_atomically
from mirage_ds.study.results import Cell, Results, parted
from mirage_ds.study.spec import first_fault


class Export(BaseModel):
    """What is in a file."""

    format: Literal[2] = 2
    study: str
    made: dict[str, str]
    cells: list[Cell]


def _without_texts(controls: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of the controls' report what answers said: the report reads their metrics alone."""
    answers = [
        {**one, "conditions": {name: {"metrics": own["metrics"]} for name, own in one["conditions"].items()}}
        for one in controls.get("answers", [])
    ]
    return {**controls, **({"answers": answers} if answers else {})}


def export(results: Results, file: Path) -> int:
    """Write the cells that have scores, the same bytes for the same results; return how many.

    Raises:
        UserError: there is none.
    """
    cells = [
        replace(cell, settings={}, controls={name: _without_texts(one) for name, one in cell.controls.items()})
        for cell in results.cells
        if cell.stages and cell.results
    ]
    if not cells:
        raise UserError("no arm of the study has been evaluated under any seed; run it first")
    whole = Export(study=results.name, made=dict(results.made), cells=cells)
    write_atomically(file, gzip.compress(json.dumps(whole.model_dump()).encode(), mtime=0))
    return len(cells)


def load(file: Path) -> list[Cell]:
    """Read what `export` wrote.

    Raises:
        UserError: no such file, or another kind of file.
    """
    try:
        return Export.model_validate(json.loads(gzip.decompress(file.read_bytes()))).cells
    except ValidationError as error:
        why = first_fault(error)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        why = reason(error)
    raise UserError(f"{file}: not a file of this version's `mirage-ds ablate export` ({why}); export it anew")


def _filled(cell: Cell, others: Sequence[Cell]) -> Cell:
    """Return a cell with what it lacks and others have, the first of them that does; itself where there is nothing."""
    known = {other.keys[title]: one for other in reversed(others) for title, one in other.results.items()}
    new = {title: known[key] for title, key in cell.keys.items() if key in known and title not in cell.results}
    if not new:
        return cell
    found = cell.results | new
    scores, controls = parted(found)
    chains = {other.chain: other.stages for other in reversed(others)}
    return replace(
        cell,
        stages=chains.get(cell.chain, cell.stages),
        scores=scores,
        controls=controls,
        problem=None if len(found) == len(cell.keys) else cell.problem,
    )


def merge(results: Results, files: Sequence[Path]) -> tuple[Results, list[str]]:
    """Take results from other machines where this one has none.

    Returns:
        The results, and a line for each file that says how many of its cells the study has and were of use.
    """
    said, chains = [], {cell.chain for cell in results.cells}
    for file in files:
        found, before = load(file), results.cells
        results = replace(results, cells=[_filled(cell, found) for cell in before])
        taken = sum(one is not other for one, other in zip(results.cells, before, strict=True))
        strangers = sum(one.chain not in chains for one in found)
        said.append(
            f"{file}: {len(found)} cell(s), {taken} of the study filled"
            + (f", {strangers} are of other settings or records than this study's" if strangers else "")
        )
    return results, said
