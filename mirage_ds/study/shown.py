"""What a report shows of its records: each evaluation's chance level, and two answers. Imports no torch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    chance: dict[str, dict[str, float]] = {}
    unseen: list[str] = []
    first = results.report.primary
    order = sorted(results.cells, key=lambda cell: first is None or cell.arm != first.arm)

    @contextmanager
    def told(hole: str) -> Iterator[None]:
        try:
            yield
        except (KeyError, RecordError, UserError) as error:
            unseen.append(f"{hole} ({error})")

    def other(name: str) -> bool:
        return first is None or name != first.evaluation

    shown = next(
        ((cell, name) for cell in order for name in sorted(cell.scores, key=other) if cell.scores[name].said), None
    )
    examples: list[dict[str, Any]] = []
    for name in dict.fromkeys(name for cell in results.cells for name in cell.scores):
        spec = evaluations[name]
        with told(f"evaluation {name}: its records are not shown"):
            records = read_records(spec.data_path, False, parse_columns(spec.columns), spec.most)
            with told(f"evaluation {name}: its chance level is not shown"):
                if best := best_constant(records, spec.task):
                    chance[name] = {str(one.line): score for one, score in zip(records, best, strict=True)}
            if shown and shown[1] == name:
                by_line = {str(one.line): one for one in records}
                said, own = shown[0].scores[name].said, {"arm": shown[0].arm, "seed": shown[0].seed, "evaluation": name}
                examples = [{**own, **_example(by_line[line], spec), **answer} for line, answer in said.items()]
    return replace(results, chance=chance, examples=examples, unseen=unseen)


def _example(record: Record, spec: EvaluationSpec) -> dict[str, Any]:
    """Return a record's line, question, answer and first picture, a PNG of at most SIDE pixels."""
    picture = None
    if record.image_input:
        finder = ImageFinder.beside(Path(spec.data_path), spec.image_root)
        image = finder.load(record, "image_input", record.image_input[0])
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        picture = png_of(image)
    question, right = record.text_input.replace(IMAGE_MARK, ""), record.text_output.replace(HELPER_MARK, "")
    return {"line": record.line, "question": question, "right": right, "picture": picture}
