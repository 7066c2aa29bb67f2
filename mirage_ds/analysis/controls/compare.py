"""Paired tests between result files of the same records: is one model, or one setting, better than another?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from mirage_ds.analysis.controls.report import apart, measured, p_values
from mirage_ds.analysis.controls.statistics import average, differences
from mirage_ds.errors import UserError, closest, strict_json
from mirage_ds.evaluate.tables import markdown_table, print_table

HEAD = ["file", "score", "− first", "p", "p (Holm)"]


class Result(NamedTuple):
    """A result file.

    Attributes:
        task: its scorer; data: what tells its records file from others (the SHA-256, or the name where it has none).
        samples: (line, hash of the question or "") of each answer; metrics: the scores of each.
    """

    file: Path
    task: str
    data: str
    samples: list[tuple[int, str]]
    metrics: list[dict[str, float]]


def read_result(file: Path) -> Result:
    """Read what `mirage-ds evaluate --out` wrote.

    Raises:
        UserError: no such file, or another kind of file.
    """
    try:
        report = strict_json(file.read_text(encoding="utf-8"))
        answers = report["answers"]
        return Result(
            file,
            str(report["task"]),
            str(report.get("hashes", {}).get("data") or report["data"]),
            [(int(one["line"]), str(one.get("prompt", ""))) for one in answers],
            [{name: float(value) for name, value in one["metrics"].items()} for one in answers],
        )
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); name a file that evaluate wrote") from None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: no result of `mirage-ds evaluate --out` with the metrics of each answer "
            f"({type(error).__name__}: {error}); write it anew"
        ) from None


def check_same(one: Result, other: Result) -> None:
    """Refuse two results that are not of the same records.

    Raises:
        UserError: says the first thing that differs.
    """
    pair = f"{one.file} and {other.file}"
    if one.task != other.task:
        raise UserError(f"{pair}: scored as {one.task} and as {other.task}; only one task's answers can be paired")
    if one.data != other.data:
        raise UserError(f"{pair}: of different data ({one.data}, {other.data}); evaluate both on the same records file")
    if len(one.samples) != len(other.samples):
        raise UserError(
            f"{pair}: {len(one.samples)} and {len(other.samples)} answers; evaluate both with the same --most"
        )
    for (line, prompt), (other_line, other_prompt) in zip(one.samples, other.samples, strict=True):
        if line != other_line:
            raise UserError(f"{pair}: of different rows (line {line}, line {other_line}); evaluate the same records")
        if prompt and other_prompt and prompt != other_prompt:
            raise UserError(f"{pair}: the question on line {line} is not the same; evaluate both on the same images")


def compare(files: Sequence[Path], metric: str | None, seed: int) -> dict[str, Any]:
    """Compare every file with the first, record by record.

    Args:
        metric: what is compared; the task's first metric if None.
        seed: of the bootstrap.

    Returns:
        {"task", "metric", "records", "files": {file: {"mean", "low", "high", "difference"}}}: statistics.Average
        with a statistics.Difference, which is None for the first file.

    Raises:
        UserError: fewer than two files, one given twice, a file that is no result, different records, no such metric.
    """
    if len({file.resolve() for file in files}) < max(2, len(files)):
        raise UserError("compare: give at least two result files, each once")
    results = [read_result(file) for file in files]
    first = results[0]
    for other in results[1:]:
        check_same(first, other)
    if not first.metrics:
        raise UserError(f"{first.file}: holds no answer; evaluate at least one record")
    known = [name for name in first.metrics[0] if all(name in one for result in results for one in result.metrics)]
    name = metric or next(iter(known), "")
    if name not in known:
        raise UserError(f"--metric {name}: not in every answer{closest(name, known)}; there are {', '.join(known)}")
    values = {str(result.file): [one[name] for one in result.metrics] for result in results}
    base = values[str(first.file)]
    found = differences({file: own for file, own in values.items() if file != str(first.file)}, base, seed)
    return {
        "task": first.task,
        "metric": name,
        "records": len(base),
        "files": {
            file: {**asdict(average(own, seed)), "difference": asdict(found[file]) if file in found else None}
            for file, own in values.items()
        },
    }


def comparison_rows(report: dict[str, Any]) -> list[list[str]]:
    """Write a comparison as rows of text, one cell for each entry of HEAD."""
    return [
        [file, measured(one), apart(one["difference"]), *p_values(one["difference"])]
        for file, one in report["files"].items()
    ]


def _title(report: dict[str, Any]) -> str:
    return f"{report['task']}, {report['metric']}, {report['records']} records"


def print_comparison(report: dict[str, Any]) -> None:
    """Print a comparison as a table."""
    print_table(HEAD, comparison_rows(report), _title(report))


def comparison_markdown(report: dict[str, Any]) -> str:
    """Write a comparison in Markdown."""
    return f"# {_title(report)}\n\n{markdown_table(HEAD, comparison_rows(report))}\n"
