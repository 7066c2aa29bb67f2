"""What the controls found, and what a comparison of files of scores: for programs, and as tables and sentences."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mirage_ds.analysis.alike import sentence as sentence_of
from mirage_ds.analysis.controls.paths import VERDICTS
from mirage_ds.analysis.controls.statistics import differences, differs, listed, sentence, unseen
from mirage_ds.analysis.controls.teach import Outcome
from mirage_ds.config.columns import parse_columns
from mirage_ds.data.record import Record
from mirage_ds.errors import UserError, closest
from mirage_ds.evaluate.harness import WRITTEN, read_harness
from mirage_ds.evaluate.scoring import average, marks
from mirage_ds.evaluate.tables import Cells, Told, read_report
from mirage_ds.files import write_atomically

SCORE_HEAD = ["latents", "score", "− own", "p", "p (Holm)"]
LIKELIHOOD_HEAD = ["latents", "slots", "log p", "− own"]
PATH_HEAD = ["latents of", "records", *VERDICTS]


def summarize(records: Sequence[Record], outcomes: Mapping[str, Sequence[Outcome]], task: str, seed: int) -> Any:
    """Score every condition and compare it with `own`.

    Args:
        outcomes: condition → an Outcome a record; `own` is among them.

    Returns:
        (conditions, answers): per condition the means, intervals and differences (see docs/controls.md), and per record
        its answers under every condition.

    Raises:
        UserError: a record lacks what the scorer needs.
    """
    marked = {name: marks(records, [one.answer for one in found], task) for name, found in outcomes.items()}
    metric = next(iter(marked["own"][0]))
    scores = {name: [float(one[metric]) for one in found] for name, found in marked.items()}
    logs = {name: [one.log_likelihood for one in found] for name, found in outcomes.items()}
    others = [name for name in outcomes if name != "own"]
    by_score = differences({name: scores[name] for name in others}, scores["own"], seed)
    by_log = differences({name: logs[name] for name in others}, logs["own"], seed)
    conditions = {
        name: {
            "metrics": {key: sum(float(one[key]) for one in found) / len(found) for key in found[0]},
            "opened": sum(one["runs"] > 0 for one in found),
            "score": {"metric": metric, **average(scores[name], seed)},
            "log_likelihood": average(logs[name], seed),
            "score_difference": by_score.get(name),
            "log_likelihood_difference": by_log.get(name),
        }
        for name, found in marked.items()
    }

    def written(name: str, i: int) -> dict[str, Any]:
        answer, value = outcomes[name][i]
        return {"text": answer.text, "runs": answer.runs, "metrics": marked[name][i], "log_likelihood": value}

    answers = [
        {"line": record.line, "conditions": {name: written(name, i) for name in outcomes}}
        for i, record in enumerate(records)
    ]
    return conditions, answers


def measured(one: Mapping[str, Any], value: str = "mean", signs: str = "") -> str:
    """Write a number with its 95 % interval."""
    return f"{one[value]:{signs}.3f} ({one['low']:{signs}.3f}, {one['high']:{signs}.3f})"


def apart(one: Mapping[str, Any] | None) -> str:
    """Write a difference with its 95 % interval; nothing for the condition that the others are compared with."""
    return measured(one, signs="+") if one else ""


def p_values(one: Mapping[str, Any] | None) -> Cells:
    """Write p and p by Holm; nothing where there is none."""
    found = [one[key] if one else None for key in ("p", "p_holm")]
    return ["" if p is None else "<.0001" if p < 1e-4 else f"{p:.4f}" for p in found]


def differing(one: Mapping[str, Any] | None) -> Cells:
    """Write a difference and its p-values, a cell each."""
    return [apart(one), *p_values(one)]


def notes(report: Mapping[str, Any]) -> list[str]:
    """Say in sentences what the tables cannot."""
    said = []
    if "conditions" in report:
        own, count = report["conditions"]["own"], len(report["answers"])
        said.append(
            f"{count} records, scored by {own['score']['metric']}. In {own['opened']} the model opened a latent block, "
            "and only there can a replacement change the answer. slots: slots of an answer. log p: mean "
            "log-probability of the given answer's tokens behind the block. In brackets: 95 % intervals."
        )
    if "path" in report:
        path = report["path"]
        said.append(
            "Latents of path A (the record's own) or B (another shortest one): the answer is the path whose latents "
            f"were fed more often than the other path by {measured(path, 'difference', '+')}. In {path['opened']} of "
            f"{2 * path['records']} answers the model opened a latent block. {path['left_out']} records without an "
            "alternative are left out."
        )
        if path["low"] <= 0 <= path["high"]:
            said[-1] += f" So no difference is found, where {unseen([path['visible']], True)}."
    if others := {name: one for name, one in report.get("conditions", {}).items() if name != "own"}:
        said.append(words(others, own, count))
    if similar := sentence_of(report.get("latents", {})):
        said.append(similar)
    return said


def words(others: Mapping[str, Any], own: Mapping[str, Any], count: int) -> str:
    """Say what was found over `count` records, from the other conditions and own."""
    if not own["opened"]:
        return f"Nothing could show: the model opened no latent block in any of {count:,} records."
    found = {name: one["score_difference"] for name, one in others.items()}
    said = sentence(found, "own", count, own["score"]["metric"])[:-1]
    moved = [name for name, one in others.items() if differs(one["log_likelihood_difference"])]
    if quiet := [name for name in moved if not differs(found[name])]:
        said += f"; log p does differ with {listed(quiet)}"
    if own["opened"] < count:
        said += f"; in {count - own['opened']:,} the model opened no latent block, and there nothing can change"
    return f"{said}."


def told(report: Mapping[str, Any]) -> Told:
    """Write what was found as tables and sentences."""
    tables = []
    if conditions := report.get("conditions"):
        scores, logs = [], []
        for name, one in conditions.items():
            scores.append([name, measured(one["score"]), *differing(one["score_difference"])])
            slots, by = f"{one['metrics']['latents']:.1f}", one["log_likelihood_difference"]
            logs.append([name, slots, measured(one["log_likelihood"]), apart(by)])
        tables += [(SCORE_HEAD, scores), (LIKELIHOOD_HEAD, logs)]
    if path := report.get("path"):
        shares = [[measured(path[name][kind], "share") for kind in VERDICTS] for name in "AB"]
        rows = [[name, str(path["records"]), *own] for name, own in zip("AB", shares, strict=True)]
        tables.append((PATH_HEAD, rows))
    return Told(f"{report['task']}, {report['model']}", tables, notes(report))


def tell(report: Mapping[str, Any], told: Told, out: Path | None, markdown: Path | None) -> None:
    """Print a report, and write it into the files asked for."""
    told.print()
    if out:
        write_atomically(out, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if markdown:
        write_atomically(markdown, told.markdown())


FILE_HEAD = ["file", "score", "− first", "p", "p (Holm)"]


def check_same(files: Sequence[Path], one: dict[str, Any], other: dict[str, Any]) -> None:
    """Refuse two reports, of two files, that are not of the same records.

    Raises:
        UserError: says the first thing that differs.
    """
    pair = f"{files[0]} and {files[1]}"
    columns, counts = (one.get("columns"), other.get("columns")), (len(one["answers"]), len(other["answers"]))
    same = parse_columns(columns[0]) == parse_columns(columns[1])
    for what, a, b, how in (
        ("tasks", one["task"], other["task"], "only one task's answers can be paired"),
        ("data", one["hashes"]["data"], other["hashes"]["data"], "evaluate both on the same records file"),
        ("--columns", *((None, None) if same else columns), "evaluate both with the same"),
        ("numbers of answers", *counts, "evaluate both with the same --most or --limit"),
    ):
        if a != b:
            raise UserError(f"{pair}: of different {what} ({a}, {b}); {how}")
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
    results = {str(file): (read_harness if file.suffix in WRITTEN else read_report)(file) for file in files}
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


def compared(report: dict[str, Any]) -> Told:
    """Write a comparison of files as a table and a sentence."""
    rows = [[file, measured(one), *differing(one["difference"])] for file, one in report["files"].items()]
    (first, _), *others = report["files"].items()
    words = sentence({file: one["difference"] for file, one in others}, first, report["records"], report["metric"])
    return Told(f"{report['task']}, {report['metric']}, {report['records']} records", [(FILE_HEAD, rows)], [words])
