"""Rewards of decoded answers: which functions give them, their weights, and what came of each answer.

n answers. Imports no torch. Functions run in worker processes (workers.py, functions.py); a judge is asked from here.
"""

import math
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from itertools import groupby
from typing import Any, NamedTuple, Self

from mirage_ds.config.rl import RlSettings
from mirage_ds.data.messages import HELPER_MARK
from mirage_ds.errors import UserError, closest
from mirage_ds.rl.functions import SHIPPED, Asked, Functions, Reward
from mirage_ds.rl.judge import Judge
from mirage_ds.rl.workers import Lost, Workers
from mirage_ds.tasks import own_name

JUDGE = "judge"
NAMES = (*SHIPPED, JUDGE)
_GIVEN = re.compile(r"([^*\s]+)\s*(?:\*\s*(-?(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?))?")


class Answer(NamedTuple):
    """A decoded answer.

    Attributes:
        row: of its prompt.
        record: as tasks.seen_by_scorer returns it.
        text: without latent blocks.
        blocks: the length of each latent block.
        truncated: it ended because it had all its tokens.
        place: of its prompt in the rollout, where a row may stand twice. Neighbours with one row and place are a group,
            and a function gets a group in one call.
    """

    row: int
    record: dict[str, Any]
    text: str
    blocks: tuple[int, ...]
    truncated: bool
    place: int = 0


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
    found: dict[str, float] = {}
    if weights is not None and len(weights) != len(names):
        raise UserError(f"--reward_weights: {len(weights)} weights for {len(names)} rewards; give one for each")
    for at, given in enumerate(names):
        match = _GIVEN.fullmatch(given.strip())
        if match is None:
            raise UserError(f"--reward {given}: neither NAME nor NAME*WEIGHT; write it like accuracy*0.9")
        name, own_weight = match[1], match[2]
        if own_weight and weights is not None:
            raise UserError(f"--reward {given}: has a weight, and --reward_weights too; give one of them")
        if ":" in name:
            own_name(name, "reward")
        elif name not in NAMES:
            own = "your own as package.module:function"
            raise UserError(f"unknown reward '{name}'{closest(name, NAMES)}; there are: {', '.join(NAMES)}, and {own}")
        if name in found:
            raise UserError(f"--reward {name} stands there twice; leave one out")
        found[name] = float(own_weight or (1 if weights is None else weights[at]))
    if not any(found.values()) or not all(map(math.isfinite, found.values())):
        raise UserError(
            "--reward: no weight but 0, or one that is no number, and nothing to learn; write it like accuracy*0.9"
        )
    return found


class Rewards:
    """Scores answers. A context manager: its processes start when it is entered, and none is left when it is closed.

    Args:
        config: which functions, their weights and limits, and who judges.
        task: --task, whose scorer gives `accuracy`; else the record's own.
        place: says where a row was read from.
        asked: whether somebody wants this process to stop; `check` and `score` then raise Stopped.

    Raises:
        UserError: as read_rewards; or on entering, which this process alone knows: a function cannot be imported or
            called.
    """

    def __init__(
        self,
        config: RlSettings,
        task: str | None = None,
        place: Callable[[int], str] = lambda row: f"record {row + 1}",
        asked: Callable[[], bool] = lambda: False,
    ):
        self.weights = read_rewards(config.reward, config.reward_weights)
        self.config, self.task, self.place, self.asked = config, task, place, asked
        judged = JUDGE in self.weights
        if judged and (config.judge_endpoint is None or config.judge_model_name is None):
            raise UserError("--reward judge: which server? give --judge_endpoint URL and --judge_model_name")
        self.judge = Judge(config) if judged else None
        self.functions = [name for name in self.weights if name != JUDGE]
        self.workers: Workers | None = None
        # Functions as for TRL that want messages.
        self.messages: set[str] = set()

    def __enter__(self) -> Self:
        if self.functions:
            self.workers = Workers(
                Functions, (self.functions, self.task), self.config.reward_timeout, self.config.reward_workers
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes and the judge's requests."""
        if self.workers is not None:
            self.workers.close()
        if self.judge is not None:
            self.judge.close()

    def check(self, records: Mapping[int, Mapping[str, Any]]) -> None:
        """Call each function before anything is decoded, with an empty answer (not the judge) and the record's own.

        `accuracy` is called for each record, others for the first.

        Args:
            records: of each row.

        Raises:
            UserError: it fails, or returns something else than a number for each answer.
        """
        for name in self.weights:
            tried = [*records.items()][: None if name == "accuracy" else 1]
            answers = [
                Answer(row, dict(record), text, (), False)
                for row, record in tried
                for text in ("", str(record.get("text_output", "")).replace(HELPER_MARK, ""))
                if text or name != JUDGE
            ]
            faults = first = self._faults(answers, self._found(answers, [name]))
            if faults and ":" in name:
                # TRL has texts or messages, as the data are; a function of one kind fails with the other.
                self.messages.add(name)
                faults = self._faults(answers, self._found(answers, [name]))
            if faults:
                row, _, sentence = first[0]
                where = self.place(row)
                raise UserError(f"reward '{name}', tried with {where}: {sentence}; fix it", everywhere=False)

    def score(self, answers: Sequence[Answer]) -> Scored:
        """Score answers.

        Raises:
            UserError: more of them than allowed went without a reward (this process alone knows), or the judge refuses.
        """
        found = self._found(answers, [*self.weights], math.ceil(self.config.max_reward_faults * len(answers)))
        numbers = {
            name: [value if isinstance(value, float) else math.nan for value in values]
            for name, values in found.items()
        }
        total = [self._total([found[name][at] for name in self.weights]) for at in range(len(answers))]
        return Scored(total, numbers, self._faults(answers, found))

    def _total(self, rewards: Sequence[Reward]) -> float:
        counted = [(weight, one) for weight, one in zip(self.weights.values(), rewards, strict=True) if weight]
        terms = [weight * one for weight, one in counted if isinstance(one, float)]
        failed = any(isinstance(one, str) for _, one in counted)
        return math.nan if failed or not terms else sum(terms)

    def _found(
        self, answers: Sequence[Answer], names: Sequence[str], most: float = math.inf
    ) -> dict[str, list[Reward]]:
        """Return name → n rewards; UserError where more than `most` answers lack one."""
        found: dict[str, list[Reward]] = {name: [None] * len(answers) for name in names}
        lost: set[int] = set()

        def note(name: str, places: Sequence[int], rewards: Sequence[Reward]) -> None:
            for at, reward in zip(places, rewards, strict=True):
                found[name][at] = reward
                if isinstance(reward, str):
                    lost.add(at)
            if len(lost) > most:
                row, which, sentence = self._faults(answers, found)[0]
                what = f"{len(lost)} of {len(answers)} answers are without a reward, more than --max_reward_faults"
                first = f"{self.place(row)}, {which}: {sentence}"
                raise UserError(
                    f"{what} {self.config.max_reward_faults:g} allows; the first: {first}; fix the reward, or raise "
                    "the share",
                    everywhere=False,
                )

        groups = [
            tuple(group) for _, group in groupby(range(len(answers)), lambda at: (answers[at].place, answers[at].row))
        ]
        calls = deque(self._asked(answers, name, group) for name in names if name != JUDGE for group in groups)
        if calls and self.workers is not None:
            with closing(self.workers.run(calls, self.asked)) as results:
                for asked, result in results:
                    if isinstance(result, Lost) and len(asked.at) > 1:
                        # One answer may be the cause: each gets a call of its own.
                        calls.extendleft(self._asked(answers, asked.function, (at,)) for at in reversed(asked.at))
                    else:
                        note(asked.function, asked.at, [result.sentence] if isinstance(result, Lost) else result)
        if self.judge is not None and JUDGE in names:
            replies = self.judge.rewards([(one.record, one.text) for one in answers], self.asked)
            note(JUDGE, range(len(answers)), replies)
        return found

    def _asked(self, answers: Sequence[Answer], name: str, at: tuple[int, ...]) -> Asked:
        group = [answers[one] for one in at]
        texts, blocks, truncated = zip(*((one.text, one.blocks, one.truncated) for one in group), strict=True)
        return Asked(at, name, group[0].record, texts, blocks, truncated, name in self.messages)

    def _faults(self, answers: Sequence[Answer], found: Mapping[str, Sequence[Reward]]) -> list[tuple[int, str, str]]:
        return [
            (answer.row, name, value)
            for at, answer in enumerate(answers)
            for name, values in found.items()
            if isinstance(value := values[at], str)
        ]
