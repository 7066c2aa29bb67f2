"""What a rollout was: its groups, the numbers that are logged of it, and its answers as JSON lines.

P prompts of a rollout, G answers of each.

    run/completions.jsonl   a line an answer: rollout, step, file and line of the record, question, pictures, the
                            answer with its latents marked, rewards, advantage, whether it was cut off
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from mirage_ds.evaluate.decoder import answer_of
from mirage_ds.files import write_atomically
from mirage_ds.model.rows import Generated
from mirage_ds.rl.examples import FILE, picture_of, told
from mirage_ds.rl.rollout import Sampled
from mirage_ds.rl.step import Lesson
from mirage_ds.run.settings import Run
from mirage_ds.run.setup import Data
from mirage_ds.tasks import level_of

# A difference of rewards below this is rounding.
ALIKE = 1e-9
# One prompt of each of the first so many rollouts is shown in TensorBoard, and of each so many-th.
SHOWN = 10


class Group(NamedTuple):
    """The G answers to a prompt.

    Attributes:
        row: dataset row; answers: all G; rewards: of each, NaN where there is none; by_function: name → of each.
    """

    row: int
    answers: list[Sampled]
    rewards: list[float]
    by_function: dict[str, list[float]]

    @property
    def flat(self) -> bool:
        """Whether all answers are rewarded alike, so that none is better than another."""
        known = [one for one in self.rewards if not math.isnan(one)]
        return len(known) < 2 or max(known) - min(known) < ALIKE


class Rollout(NamedTuple):
    """A rollout, sampled and scored.

    Attributes:
        groups: P; redrawn: prompts that were drawn beyond these; seconds: name → what a part took on this rank.
    """

    groups: list[Group]
    redrawn: int
    seconds: dict[str, float]

    @property
    def answers(self) -> list[Sampled]:
        """All answers, a prompt's behind each other."""
        return [answer for group in self.groups for answer in group.answers]

    @property
    def rewards(self) -> list[float]:
        """Of all answers."""
        return [one for group in self.groups for one in group.rewards]


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def measures(data: Data, rollout: Rollout) -> dict[str, float]:
    """Return what is logged of a rollout: means over its answers or groups; the same on every rank but for seconds."""
    groups, answers = rollout.groups, rollout.answers
    levels: dict[str, list[float]] = defaultdict(list)
    functions: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        levels[level_of(data.index.rows.record(group.row))] += group.rewards
        for name, values in group.by_function.items():
            functions[name] += values
    return {
        "reward": _mean(rollout.rewards),
        **{f"reward_{name}": _mean(values) for name, values in functions.items()},
        **({f"reward_level_{name}": _mean(values) for name, values in levels.items()} if len(levels) > 1 else {}),
        "flat_groups": _mean(group.flat for group in groups),
        "redrawn": rollout.redrawn,
        "failed_rewards": sum(math.isnan(one) for one in rollout.rewards),
        "answer_tokens": _mean(answer.drawn for answer in answers),
        "truncated": _mean(answer.truncated for answer in answers),
        "latent_share": _mean(bool(answer.blocks) for answer in answers),
        **{name: round(value, 4) for name, value in rollout.seconds.items()},
    }


class Completions:
    """Writes the answers of each rollout, on rank 0.

    Args:
        start: rollouts that have been learnt from; what an interrupted run wrote beyond them is dropped.
    """

    def __init__(self, run: Run, data: Data, start: int):
        self.run, self.data = run, data
        self.place = run.folder / FILE
        if run.world.rank == 0 and self.place.is_file():
            # Not splitlines: an answer may hold U+2028. What stands behind the last end of a line is half of one.
            lines = self.place.read_text(encoding="utf-8").split("\n")[:-1]
            write_atomically(self.place, "".join(f"{one}\n" for one in lines if json.loads(one)["rollout"] <= start))

    def write(self, step: int, rollout: Rollout, lesson: Lesson) -> None:
        """Add a rollout's answers; `step`: optimizer steps before it."""
        if self.run.world.rank > 0:
            return
        number, encoder = step // self.run.config.steps_per_rollout + 1, self.data.loader.rows.encoder
        advantages, lines = iter(lesson.advantages.tolist()), []
        with self.place.open("a", encoding="utf-8") as file:
            for group in rollout.groups:
                record, place = self.data.index.rows.record(group.row), self.data.index.rows.places_of([group.row])[0]
                for at, answer in enumerate(group.answers):
                    line = {
                        "rollout": number,
                        "step": step,
                        "file": place["file"],
                        "line": place["line"],
                        "question": record.text_input,
                        "image_input": list(record.image_input),
                        "answer": answer_of(Generated(answer.ids), encoder).marked(encoder),
                        "reward": _plain(group.rewards[at]),
                        "rewards": {name: _plain(values[at]) for name, values in group.by_function.items()},
                        "advantage": next(advantages),
                        "tokens": answer.drawn,
                        "truncated": answer.truncated,
                    }
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    lines.append(line)
        if number < SHOWN or number % SHOWN == 0:
            first, text = told(lines)
            picture = picture_of(first, self.run.config.image_root)
            shown = {"said": text} | ({"picture": picture} if picture else {})
            self.run.journal.pictures(step + 1, shown, "answers")


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value
