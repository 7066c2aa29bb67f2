"""What a worker process of --reward does: import the functions, call one for a group of answers, read its numbers.

n answers of one prompt. Imports no torch.
"""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mirage_ds.data.messages import TURNS_BEFORE
from mirage_ds.errors import UserError, shown
from mirage_ds.rl.workers import Lost
from mirage_ds.tasks import DEFAULT, get_task, own_module
from mirage_ds.tasks.boxed import last_boxed
from mirage_ds.tasks.scorer import as_number, told

SHIPPED = ("accuracy", "format")
# Without its thoughts, which may be several blocks with latents between them.
_THOUGHT, _ANY = re.compile(r"\s*<think>.*</think>(.*)", re.DOTALL), re.compile("(.*)", re.DOTALL)


class Asked(NamedTuple):
    """A call: which function, and a prompt's record with n answers to it.

    Attributes:
        at: the answers' places among those that are scored.
        texts, blocks, truncated: of each answer, as in rewards.Answer.
        messages: for a function as for TRL: each text is a list of one message, which TRL has where there are pictures.
    """

    at: tuple[int, ...]
    function: str
    record: dict[str, Any]
    texts: tuple[str, ...]
    blocks: tuple[tuple[int, ...], ...]
    truncated: tuple[bool, ...]
    messages: bool = False


# A number, why there is none, or None where the function does not apply.
Reward = float | str | None
Function = Callable[[Asked], Any]


def accuracy(task: str | None) -> Function:
    """Make the reward of a task: the first number of its scorer.

    Args:
        task: --task; else the record's own.
    """

    def rewards(asked: Asked) -> list[float]:
        name = task or str(asked.record.get("task") or DEFAULT)
        if ":" in name and not task:
            raise UserError(f"the record's task {shown(name)} is code, which data must not choose; give it with --task")
        scorer = get_task(name)
        try:
            return [next(iter(scorer.score_record(text, asked.record).values())) for text in asked.texts]
        except KeyError as error:
            raise UserError(f"the record has no {error}, which {name} is scored by") from None

    return rewards


def answer_format(asked: Asked) -> list[float]:
    r"""Return 1 for each answer that has the form its question asks for, else 0.

    It has a closed ``\boxed{…}``; where the question speaks of <think>, it begins with such a block, and the box stands
    behind the last one. The paper does not write its rule down; this is the usual one for boxed answers (verl's
    for geo3k), which weighs .1 beside .9 too.
    """
    thoughts = "<think>" in str(asked.record.get("text_input", ""))
    form = _THOUGHT if thoughts else _ANY
    matches = [form.fullmatch(text) for text in asked.texts]
    return [float(match is not None and last_boxed(match[1]) is not None) for match in matches]


class OwnFunction:
    """A user's function `package.module:function`.

    Attributes:
        trl: it is written as for TRL: it has a parameter `completions`.

    Raises:
        UserError: it cannot be imported, or cannot be called.
    """

    def __init__(self, name: str):
        module_name, _, attribute = name.partition(":")
        what = f"reward '{name}'"
        how = "write def reward(answers, records) or, as for TRL, def reward(completions, **kwargs)"
        function = getattr(own_module(module_name, what), attribute, None)
        if not callable(function):
            raise UserError(f"{what}: {module_name} has no function {attribute}; {how}")
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            raise UserError(f"{what} is async; write it with def alone, for calls run side by side in processes anyway")
        self.function: Callable[..., Any] = function
        try:
            self.signature = inspect.signature(function)
            self.trl = "completions" in self.signature.parameters
            if not self.trl:
                self.signature.bind([], [], **self._taken({"blocks": [], "truncated": []}))
        except (ValueError, TypeError) as error:
            raise UserError(f"{what} cannot be called as it is ({error}); {how}") from None

    def _taken(self, named: dict[str, Any]) -> dict[str, Any]:
        """Return those of the arguments that it takes."""
        parameters = self.signature.parameters
        if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
            return named
        return {key: value for key, value in named.items() if key in parameters}

    def __call__(self, asked: Asked) -> Any:
        """Call it for a group; UserError where the record lacks a key that it needs."""
        named: dict[str, Any] = {"blocks": list(asked.blocks), "truncated": list(asked.truncated)}
        if not self.trl:
            records = [dict(asked.record) for _ in asked.texts]
            return self.function(list(asked.texts), records, **self._taken(named))
        given = self._taken({**_as_trl(asked), **named})
        try:
            self.signature.bind(**given)
        except TypeError as error:
            raise UserError(f"gets the record's keys as arguments, and these do not fit: {error}") from None
        return self.function(**given)


def _as_trl(asked: Asked) -> dict[str, list[Any]]:
    """Return TRL's arguments: prompts, completions, and each key of the record as a column."""
    count, record = len(asked.texts), asked.record
    prompt: Any = record.get("text_input", "")
    completions: list[Any] = list(asked.texts)
    if asked.messages:
        prompt = [*record.get(TURNS_BEFORE, ()), {"role": "user", "content": prompt}]
        completions = [[{"role": "assistant", "content": text}] for text in asked.texts]
    columns = {key: [value] * count for key, value in record.items()}
    return {**columns, "prompts": [prompt] * count, "completions": completions}


def read_rewards_of(values: Any, count: int, may_pass: bool) -> list[Reward]:
    """Read what a function returned for `count` answers.

    Args:
        may_pass: None means that it does not apply to an answer, as for TRL.

    Raises:
        UserError: not as many results as answers.
    """
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise UserError(f"returns {shown(values)}, not a list of {count} numbers")
    results: Sequence[Any] = list(values)
    if len(results) != count:
        raise UserError(f"returns {len(results)} results for {count} answers")
    read: list[Reward] = []
    for value in results:
        number = as_number(value)
        skipped = value is None and may_pass
        read.append(None if skipped else number if math.isfinite(number) else f"returns {shown(value)}, no number")
    return read


class Functions:
    """Answers the calls of a worker process.

    Args:
        setup: the names of the functions, and --task.

    Raises:
        UserError: one of them cannot be used.
    """

    def __init__(self, setup: tuple[Sequence[str], str | None]):
        names, task = setup
        shipped: dict[str, Function] = dict(zip(SHIPPED, (accuracy(task), answer_format), strict=True))
        if task and "accuracy" in names:
            get_task(task)
        self.functions = {name: shipped.get(name) or OwnFunction(name) for name in names}

    def __call__(self, asked: Asked) -> list[Reward] | Lost:
        """Return n rewards, or why the call came to nothing."""
        function = self.functions[asked.function]
        try:
            return read_rewards_of(function(asked), len(asked.texts), getattr(function, "trl", False))
        except UserError as error:
            return Lost(str(error))
        except Exception as error:  # noqa: BLE001  # it is the user's own code
            return Lost(f"raises {told(error)}"[:500])
