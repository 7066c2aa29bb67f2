"""Answers and their scores, by the task's own scorer; which of two scores is the better one."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mirage_ds.data.encode import LATENT_PAD, LATENT_START, Encoder
from mirage_ds.data.record import Record
from mirage_ds.errors import UserError, closest, shown
from mirage_ds.tasks import get_task, task_name

# Metric → whether more of it is better. `moves`, `runs` and `latents` describe an answer and do not judge it.
MORE_IS_BETTER = {
    **dict.fromkeys(("success", "optimal", "correct", "accuracy"), True),
    **dict.fromkeys(("loss", "ce", "sim", "token_ce", "invalid"), False),
}


class Prediction(NamedTuple):
    """A decoded answer: its text without latent blocks, the length of each block, and the emitted ids."""

    text: str
    runs: list[int]
    ids: list[int]

    def marked(self, encoder: Encoder) -> str:
        """Return the answer with each latent block written as `[k latents]` where it stands."""
        text = str(encoder.tokenizer.decode(self.ids, skip_special_tokens=False))
        for length in self.runs:
            text = text.replace(LATENT_START + LATENT_PAD * length, f"[{length} latents]", 1)
        for token in encoder.literals.special_tokens:
            text = text.replace(token, "")
        return text.strip()


# An answer without a word: what it is scored by is there before anything is decoded.
NOTHING = Prediction("", [], [])


def wilson(successes: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (JASA 22, 1927); 95 % by default."""
    if not count:
        return 0.0, 1.0
    share, spread = successes / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def task_of(records: Sequence[Record], file: Path, named: str | None) -> str:
    """Return the task of a file, from --task or from its records' `task`.

    Raises:
        UserError: none is named, the records are of another task, or one lacks what the scorer needs.
    """
    written = {str(record.extra["task"]) for record in records if "task" in record.extra}
    wanted = task_name(named) if named else None
    if wanted is None and len(written) != 1:
        raise UserError(f"{file}: its records name {len(written)} tasks; say which scorer to use with --task")
    if wanted is None and ":" in next(iter(written)):
        raise UserError(
            f"{file}: its records name the task {shown(next(iter(written)))}, which is code, and data must not choose "
            "what is run; give it with --task"
        )
    found = wanted or task_name(next(iter(written)))
    others = {task_name(name) for name in written} - {found}
    if others:
        raise UserError(f"{file}: holds records of {', '.join(sorted(others))}, not of --task {found}")
    marks(records, [NOTHING] * len(records), found)
    return found


def marks(records: Sequence[Record], answers: Sequence[Prediction], task: str) -> list[dict[str, float]]:
    """Score each answer: the scorer's metrics, and `runs` and `latents` of the answer.

    Raises:
        UserError: a record lacks what the scorer needs.
    """
    scorer = get_task(task).score_record
    found = []
    for record, answer in zip(records, answers, strict=True):
        try:
            # A question alone has an empty answer, and nothing is to be compared with that.
            own = {"text_output": record.text_output} if record.text_output else {}
            values = scorer(answer.text, {**record.extra, **own})
        except KeyError as error:
            raise UserError(f"record on line {record.line} has no {error}, which {task} is scored by") from None
        found.append({**values, "runs": len(answer.runs), "latents": sum(answer.runs)})
    return found


def summarize(records: Sequence[Record], marked: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Average marks per level and in all.

    Returns:
        {"levels": {level: {metric: mean, "count", "low", "high"}}, "all": …}; low and high are Wilson's interval of the
        task's first metric.
    """
    groups: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    for record, values in zip(records, marked, strict=True):
        groups[level_of(record)].append(values)
    levels = {name: _summary(rows) for name, rows in sorted(groups.items())}
    return {"levels": levels, "all": _summary(marked)}


def score(records: Sequence[Record], answers: Sequence[Prediction], task: str) -> dict[str, Any]:
    """Score answers per level and in all, as `summarize` returns it.

    Raises:
        UserError: a record lacks what the scorer needs.
    """
    return summarize(records, marks(records, answers, task))


def level_of(record: Record) -> str:
    """Return what a record calls its level, else the side of its map, else "?"."""
    board = record.extra.get("map_desc")
    return str(record.extra.get("level", len(board) if board and isinstance(board, list) else "?"))


def _summary(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    first = next(iter(rows[0]))
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    low, high = wilson(sum(row[first] for row in rows), len(rows))
    return {**means, "count": len(rows), "low": low, "high": high}


def spread(rows: Sequence[int], count: int) -> list[int]:
    """Choose `count` rows (or all, if there are fewer) evenly over a file, whose levels may stand one after another."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def check_metric(name: str, measured: Sequence[str]) -> None:
    """Refuse as --save_best a metric that is not measured, or of which nobody knows whether more or less is better.

    Args:
        measured: the metrics there are.

    Raises:
        UserError: names those that can be chosen.
    """
    known = [metric for metric in measured if metric in MORE_IS_BETTER]
    if name not in known:
        raise UserError(f"--save_best {name}: no such metric here{closest(name, known)}; there are {', '.join(known)}")


def better(name: str, value: float, than: float | None) -> bool:
    """Tell whether a metric's value is better than another one, which may be none. A NaN is never better."""
    if math.isnan(value):
        return False
    return than is None or (value > than if MORE_IS_BETTER[name] else value < than)
