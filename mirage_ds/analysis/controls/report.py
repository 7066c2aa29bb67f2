"""What the controls found, for eyes and for programs: a table, Markdown, JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from mirage_ds.analysis.controls.paths import VERDICTS
from mirage_ds.analysis.controls.run import Outcome
from mirage_ds.analysis.controls.statistics import differences, differs
from mirage_ds.analysis.controls.words import listed, sentence, unseen
from mirage_ds.data.record import Record
from mirage_ds.evaluate.scoring import average, marks
from mirage_ds.evaluate.tables import Cells, Told

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
        scores, likelihoods = [], []
        for name, one in conditions.items():
            score, slots = one["score_difference"], f"{one['metrics']['latents']:.1f}"
            scores.append([name, measured(one["score"]), apart(score), *p_values(score)])
            log_p = one["log_likelihood"], one["log_likelihood_difference"]
            likelihoods.append([name, slots, measured(log_p[0]), apart(log_p[1])])
        tables += [(SCORE_HEAD, scores), (LIKELIHOOD_HEAD, likelihoods)]
    if path := report.get("path"):
        shares = [[measured(path[name][kind], "share") for kind in VERDICTS] for name in "AB"]
        rows = [[name, str(path["records"]), *own] for name, own in zip("AB", shares, strict=True)]
        tables.append((PATH_HEAD, rows))
    return Told(f"{report['task']}, {report['model']}", tables, notes(report))
