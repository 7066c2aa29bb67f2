"""Answers and their scores, by the task's own scorer; which of two scores is the better one."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mirage_ds.config.run import LATENT_MEASURES, LOSSES
from mirage_ds.data.encode import LATENT_PAD, LATENT_START, Encoder
from mirage_ds.data.record import HELPER_MARK, Record, blamed
from mirage_ds.errors import UserError, closest
from mirage_ds.tasks import DEFAULT, NO_METRICS, get_task, level_of, named_task, seen_by_scorer

# Metric → whether more of it is better. `moves`, `runs` and `latents` describe an answer and do not judge it.
MORE_IS_BETTER = {
    **dict.fromkeys(("success", "optimal", "correct", "accuracy", "score"), True),
    **dict.fromkeys(("loss", "ce", "sim", "token_ce", "invalid"), False),
}
RESAMPLES = 10_000
# Values drawn at a time: their indices take 8 bytes each. Above so many records the mean is as good as normal.
_CHUNK, _NORMAL = 2_000_000, 10_000


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


def bootstrap(values: Sequence[float], seed: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile interval of the mean of N records' values, by resampling records; the normal one of very many.

    Raises:
        ValueError: there is no value.
    """
    if not len(values):
        raise ValueError("no value to resample")
    array, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    if len(array) > _NORMAL:
        half = 1.959964 * array.std() / math.sqrt(len(array))
        return float(array.mean() - half), float(array.mean() + half)
    chunk = max(1, _CHUNK // len(array))
    sizes = [min(chunk, resamples - at) for at in range(0, resamples, chunk)]
    means = [array[rng.integers(len(array), size=(size, len(array)))].mean(1) for size in sizes]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def is_binary(values: Iterable[float]) -> bool:
    """Tell whether all values are 0 or 1."""
    return {float(value) for value in values} <= {0.0, 1.0}


def average(values: Sequence[float], seed: int) -> dict[str, float]:
    """Average N records' values.

    Returns:
        {"mean", "low", "high"}: the 95 % interval is Wilson's where all values are 0 or 1, else by bootstrap.
    """
    low, high = wilson(sum(values), len(values)) if is_binary(values) else bootstrap(values, seed)
    return {"mean": float(sum(values) / len(values)), "low": low, "high": high}


def task_of(records: Sequence[Record], file: Path, named: str | None) -> str:
    """Return the task that scores a file: --task, else the records' own, else DEFAULT (tasks.named_task).

    Raises:
        UserError: the records name several tasks, or one lacks what the scorer needs.
    """
    with blamed(f"{file}, "):
        own = {named_task(record, named) for record in records}
    found, *others = sorted({name or DEFAULT for name in own})
    if others:
        raise UserError(
            f"{file}: its records are of several tasks ({', '.join([found, *others])}); name one that scores all of "
            "them with --task"
        )
    try:
        # An own answer, of one record alone, shows what a scorer returns otherwise than for none.
        given = Prediction(records[0].text_output.replace(HELPER_MARK, ""), [], [])
        marks([*records, *records[:1]], [NOTHING] * len(records) + [given], found)
    except UserError as error:
        if own != {None}:
            raise
        raise UserError(
            f"{file}: neither --task nor its records name a task, and {DEFAULT} does not fit ({error}); name another "
            "with --task, such as your own module:function (`mirage-ds docs tasks`)"
        ) from None
    return found


def marks(records: Sequence[Record], answers: Sequence[Prediction], task: str) -> list[dict[str, float]]:
    """Score each answer: the scorer's metrics, and `runs` and `latents` of the answer.

    Raises:
        UserError: a record lacks what the scorer needs, or a scorer of one's own fails.
    """
    scorer = get_task(task).score_record
    found: list[dict[str, float]] = []
    for record, answer in zip(records, answers, strict=True):
        try:
            values = scorer(answer.text, seen_by_scorer(record))
        except KeyError as error:
            raise UserError(f"record on line {record.line} has no {error}, which {task} is scored by") from None
        except UserError as error:
            raise UserError(f"record on line {record.line}: {error}") from error
        found.append({**values, "runs": len(answer.runs), "latents": sum(answer.runs)})
        taken = values.keys() & {*NO_METRICS, *LOSSES, *LATENT_MEASURES}
        if taken:
            raise UserError(f"task {task} returns {', '.join(sorted(taken))}, which is something else; rename it")
        if found[0].keys() != found[-1].keys():
            raise UserError(
                f"record on line {record.line}: task {task} returns {', '.join(values)}, and "
                f"{', '.join([*found[0]][:-2])} for line {records[0].line}; return the same names every time"
            )
    return found


def summarize(records: Sequence[Record], marked: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Average marks per level and in all.

    Returns:
        {"levels": {level: {metric: mean, "count", "low", "high"}}, "all": …}; low and high are the first metric's 95 %
        interval, as in `average`.
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


def _summary(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    first = next(iter(rows[0]))
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    interval = average([row[first] for row in rows], seed=0)
    return {**means, "count": len(rows), "low": interval["low"], "high": interval["high"]}


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
