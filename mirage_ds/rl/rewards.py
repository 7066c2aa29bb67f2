"""Rewards of decoded answers: which functions give them, their weights, and what came of each answer.

n answers. Imports no torch. Functions run in worker processes (workers.py, functions.py); a judge is asked from here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from mirage_ds.errors import UserError, shown
from mirage_ds.rl.judge import Judge, JudgeSpec


class Answer(NamedTuple):
    """A decoded answer.

    Attributes:
        row: of its prompt; neighbours with one row are a group, and a function gets a group in one call.
        record: as tasks.seen_by_scorer returns it.
        text: without latent blocks.
        blocks: the length of each latent block.
        truncated: it ended because it had all its tokens.
    """

    row: int
    record: dict[str, Any]
    text: str
    blocks: tuple[int, ...]
    truncated: bool


class Scored(NamedTuple):
    """What n answers got.

    Attributes:
        total: the weighted sum; NaN where a function with a weight failed, or none applied: that answer leaves its
            group.
        by_function: name → its n rewards, without weight; NaN where it failed or does not apply.
        faults: (row, function, sentence) of each failure, in the order of the answers.
    """

    total: list[float]
    by_function: dict[str, list[float]]
    faults: list[tuple[int, str, str]]


def read_rewards(names: Sequence[str], weights: Sequence[float] | None = None) -> dict[str, float]:
    """Return name → weight of --reward, as NAME or NAME*WEIGHT, and --reward_weights; 1 where none is given.

    A function of weight 0 is measured and does not count. Nothing is imported.

    Raises:
        UserError: no such name, a name twice, or weights that do not fit.
    """
    raise NotImplementedError


class Rewards:
    """Scores answers. A context manager: its processes start when it is entered, and none is left when it is closed.

    Args:
        names, weights: see read_rewards.
        task: --task, whose scorer gives `accuracy`; else the record's own.
        timeout_s: seconds that a function may take for a group.
        workers: processes.
        fault_share: of the answers of one `score`, those that may go without a reward (rounded up).
        judge: needed by the name `judge`.

    Raises:
        UserError: as read_rewards, or on entering: a function cannot be imported or called.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: Sequence[float] | None = None,
        task: str | None = None,
        timeout_s: float = 30.0,
        workers: int = 2,
        fault_share: float = 0.1,
        judge: JudgeSpec | None = None,
    ):
        raise NotImplementedError

    def __enter__(self) -> Rewards:
        raise NotImplementedError

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""

    def check(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Call each function once, before anything is decoded, with an empty answer and the record's own.

        Raises:
            UserError: it fails, or returns something else than a number for each answer.
        """
        raise NotImplementedError

    def score(self, answers: Sequence[Answer]) -> Scored:
        """Score answers.

        Raises:
            UserError: more than `fault_share` of them went without a reward (this process alone knows), or the judge
                refuses.
        """
        raise NotImplementedError
