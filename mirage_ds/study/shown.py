"""What a report shows of its records: each evaluation's chance level, and two answers. Imports no torch."""

import base64
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from mirage_ds.analysis.constant import best_constant
from mirage_ds.config.columns import parse_columns
from mirage_ds.data.images import ImageFinder, png_of
from mirage_ds.data.messages import HELPER_MARK, IMAGE_MARK
from mirage_ds.data.record import Record, RecordError
from mirage_ds.data.record_files import read_records
from mirage_ds.errors import UserError
from mirage_ds.study.results import Results
from mirage_ds.study.spec import EvaluationSpec

# Of an example's picture, in pixels.
SIDE = 320


def with_records(results: Results, evaluations: Mapping[str, EvaluationSpec]) -> Results:
    """Look into the records behind the scores: add `chance`, `examples`, and to `unseen` why one is not there."""
    chance: dict[str, Any] = {}
    unseen: list[str] = []
    first = results.report.primary
    order = sorted(results.cells, key=lambda cell: first is None or cell.arm != first.arm)
    shown = next(((cell, name) for cell in order for name, one in cell.scores.items() if one.said), None)
    examples: list[dict[str, Any]] = []
    for name in dict.fromkeys(name for cell in results.cells for name in cell.scores):
        spec = evaluations[name]
        try:
            records = read_records(spec.data_path, False, parse_columns(spec.columns), spec.most)
            chance |= _chance(name, records, spec.task)
            if shown and shown[1] == name:
                cell = shown[0]
                by_line = {str(one.line): one for one in records}
                examples = [
                    {"arm": cell.arm, "seed": cell.seed, "evaluation": name, **_example(by_line[line], spec), **said}
                    for line, said in cell.scores[name].said.items()
                ]
        except (KeyError, RecordError, UserError) as error:
            unseen.append(f"evaluation {name}: its records are not shown ({error})")
    return replace(results, chance=chance, examples=examples, unseen=unseen)


def _chance(name: str, records: list[Record], given: str | None) -> dict[str, Any]:
    """Score the best constant answer: {evaluation: {"answer", "scores": line → score}}."""
    found = best_constant(records, given)
    if found is None:
        return {}
    scores = {str(record.line): score for record, score in zip(records, found[1], strict=True)}
    return {name: {"answer": found[0], "scores": scores}}


def _example(record: Record, spec: EvaluationSpec) -> dict[str, Any]:
    """Return a record's line, question, answer and first picture, a PNG of at most SIDE pixels in base64."""
    picture = None
    if record.image_input:
        finder = ImageFinder.beside(Path(spec.data_path), spec.image_root)
        image = finder.load(record, "image_input", record.image_input[0])
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        picture = base64.b64encode(png_of(image)).decode()
    question, right = record.text_input.replace(IMAGE_MARK, ""), record.text_output.replace(HELPER_MARK, "")
    return {"line": record.line, "question": question, "right": right, "picture": picture}
