"""What the controls found, for eyes and for programs: a table, Markdown, JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from mirage_ds.analysis.controls.paths import VERDICTS
from mirage_ds.analysis.controls.run import Outcome
from mirage_ds.analysis.controls.statistics import average, differences
from mirage_ds.data.record import Record
from mirage_ds.evaluate.scoring import marks
from mirage_ds.evaluate.tables import Cells, markdown_table, print_table
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
            "score": {"metric": metric, **asdict(average(scores[name], seed))},
            "log_likelihood": asdict(average(logs[name], seed)),
            "score_difference": asdict(by_score[name]) if name in by_score else None,
            "log_likelihood_difference": asdict(by_log[name]) if name in by_log else None,
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


def score_rows(conditions: Mapping[str, Any]) -> list[Cells]:
    """Write the scores as rows of text, one cell for each entry of SCORE_HEAD."""
    return [
        [name, measured(one["score"]), apart(one["score_difference"]), *p_values(one["score_difference"])]
        for name, one in conditions.items()
    ]


def likelihood_rows(conditions: Mapping[str, Any]) -> list[Cells]:
    """Write the likelihoods as rows of text, one cell for each entry of LIKELIHOOD_HEAD."""
    return [
        [
            name,
            f"{one['metrics']['latents']:.1f}",
            measured(one["log_likelihood"]),
            apart(one["log_likelihood_difference"]),
        ]
        for name, one in conditions.items()
    ]


def path_rows(path: Mapping[str, Any]) -> list[Cells]:
    """Write the two injections as rows of text, one cell for each entry of PATH_HEAD."""
    return [[name, str(path["records"]), *(measured(path[name][kind], "share") for kind in VERDICTS)] for name in "AB"]


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
    return said


def _tables(report: Mapping[str, Any]) -> list[tuple[Cells, list[Cells]]]:
    tables = []
    if "conditions" in report:
        tables.append((SCORE_HEAD, score_rows(report["conditions"])))
        tables.append((LIKELIHOOD_HEAD, likelihood_rows(report["conditions"])))
    if "path" in report:
        tables.append((PATH_HEAD, path_rows(report["path"])))
    return tables


def print_tables(report: Mapping[str, Any]) -> None:
    """Print tables and notes."""
    for head, rows in _tables(report):
        print_table(head, rows, f"{report['task']}, {report['model']}")
    for note in notes(report):
        Console().print(note, highlight=False)


def markdown(report: Mapping[str, Any]) -> str:
    """Write tables and notes in Markdown."""
    parts = [f"# {report['task']}, {report['model']}"]
    parts += [markdown_table(head, rows) for head, rows in _tables(report)]
    return "\n\n".join([*parts, *notes(report)]) + "\n"


def write_json(report: Mapping[str, Any], file: Path) -> None:
    """Write everything, each record's answers too."""
    write_atomically(file, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
