"""Paired tests between result files of the same records: is one model, or one setting, better than another?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mirage_ds.analysis.controls.report import apart, measured, p_values
from mirage_ds.analysis.controls.statistics import differences
from mirage_ds.analysis.controls.words import sentence
from mirage_ds.config.columns import parse_columns
from mirage_ds.errors import UserError, closest
from mirage_ds.evaluate.scoring import average
from mirage_ds.evaluate.tables import Told, read_report

HEAD = ["file", "score", "− first", "p", "p (Holm)"]


def check_same(files: Sequence[Path], one: dict[str, Any], other: dict[str, Any]) -> None:
    """Refuse two reports, of two files, that are not of the same records.

    Raises:
        UserError: says the first thing that differs.
    """
    pair = f"{files[0]} and {files[1]}"
    if one["task"] != other["task"]:
        raise UserError(
            f"{pair}: scored as {one['task']} and as {other['task']}; only one task's answers can be paired"
        )
    data, others = one["hashes"]["data"], other["hashes"]["data"]
    if data != others:
        raise UserError(f"{pair}: of different data ({data}, {others}); evaluate both on the same records file")
    columns = one.get("columns"), other.get("columns")
    if parse_columns(columns[0]) != parse_columns(columns[1]):
        raise UserError(f"{pair}: of other --columns ({columns[0]}, {columns[1]}); evaluate both with the same")
    counts = len(one["answers"]), len(other["answers"])
    if counts[0] != counts[1]:
        raise UserError(f"{pair}: {counts[0]} and {counts[1]} answers; evaluate both with the same --most")
    for a, b in zip(one["answers"], other["answers"], strict=True):
        line = a["line"]
        if line != b["line"]:
            raise UserError(f"{pair}: of different rows (line {line}, line {b['line']}); evaluate the same records")
        if a["prompt"] != b["prompt"]:
            raise UserError(f"{pair}: the question on line {line} is not the same; evaluate both on the same images")


def compare(files: Sequence[Path], metric: str | None, seed: int) -> dict[str, Any]:
    """Compare every file with the first, record by record.

    Args:
        metric: what is compared; the task's first metric if None.
        seed: of the bootstrap.

    Returns:
        {"task", "metric", "records", "files": {file: {"mean", "low", "high", "difference"}}}, as statistics.average
        and differences give them; the difference of the first file is None.

    Raises:
        UserError: fewer than two files, one given twice, a file that is no result, different records, no such metric.
    """
    if len({file.resolve() for file in files}) < max(2, len(files)):
        raise UserError("compare: give at least two result files, each once")
    results = {str(file): read_report(file) for file in files}
    first, *others = results
    for other in others:
        check_same((files[0], Path(other)), results[first], results[other])
    if not results[first]["answers"]:
        raise UserError(f"{first}: holds no answer; evaluate at least one record")
    metrics = {file: [one["metrics"] for one in report["answers"]] for file, report in results.items()}
    known = [name for name in metrics[first][0] if all(name in one for own in metrics.values() for one in own)]
    name = metric or next(iter(known), "")
    if name not in known:
        raise UserError(f"--metric {name}: not in every answer{closest(name, known)}; there are {', '.join(known)}")
    values = {file: [float(one[name]) for one in own] for file, own in metrics.items()}
    found = differences({file: values[file] for file in others}, values[first], seed)
    return {
        "task": results[first]["task"],
        "metric": name,
        "records": len(values[first]),
        "files": {file: {**average(own, seed), "difference": found.get(file)} for file, own in values.items()},
    }


def told(report: dict[str, Any]) -> Told:
    """Write a comparison as a table and a sentence."""
    rows = [
        [file, measured(one), apart(one["difference"]), *p_values(one["difference"])]
        for file, one in report["files"].items()
    ]
    (first, _), *others = report["files"].items()
    words = sentence({file: one["difference"] for file, one in others}, first, report["records"], report["metric"])
    return Told(f"{report['task']}, {report['metric']}, {report['records']} records", [(HEAD, rows)], [words])
