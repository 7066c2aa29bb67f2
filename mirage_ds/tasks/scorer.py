"""A plain function as a task: `score(answer, record)` returns a number, True or False, or several numbers by name.

    def score(answer: str, record: dict) -> float | bool | dict[str, float]: ...

`answer` is the decoded text without latent blocks; `record` has all keys of the record, pictures as lists of paths.
More is better. Of a dict the first number is the main one, as with the metrics of a class.
"""

import importlib
import math
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mirage_ds.errors import UserError, reason, shown
from mirage_ds.tasks.boxed import BoxedAnswer

# What a number without a name is called.
MAIN = "score"


def told(error: Exception) -> str:
    """Return the first line of an error of the user's own code, and the line of that code."""
    passed = (f"{Path(__file__).parents[1]}/", "<frozen", importlib.__file__)
    frames = traceback.extract_tb(error.__traceback__)
    own = next((frame for frame in frames if not frame.filename.startswith(passed)), None)
    return f"{reason(error)}, {own.filename} line {own.lineno}" if own else reason(error)


class Scorer(BoxedAnswer):
    """What only scores, by a function; its box is read where answers are compared as texts (`data rationalize`).

    Raises:
        UserError: it cannot be called.
    """

    def __init__(self, name: str, function: Callable[[str, dict[str, Any]], Any]):
        self._name, self.function = name, function
        if not callable(function):
            how = "write def score(answer, record)"
            raise UserError(f"task '{name}' is {shown(function)}, neither a function nor a class; {how}")

    def score_record(self, text: str, record: Mapping[str, Any]) -> dict[str, float]:
        """Call the function; a number without a name is `score`.

        Raises:
            UserError: the function fails, or returns something else than numbers.
        """
        try:
            value = self.function(text, dict(record))
        except Exception as error:
            what = f"task {self._name} fails for the answer {shown(text)} ({told(error)})"
            how = "a scorer must take any text, an empty one too, as def score(answer, record) does"
            raise UserError(f"{what}; {how}") from error
        named = value if isinstance(value, Mapping) else {MAIN: value}
        numbers = {key: as_number(one) for key, one in named.items()}
        if not numbers or not all(isinstance(key, str) and math.isfinite(one) for key, one in numbers.items()):
            what = f"task {self._name} returned {shown(value)} for the answer {shown(text)}"
            raise UserError(f"{what}; return a finite number, True or False, or a dict of such by name")
        return numbers


def as_number(value: Any) -> float:
    """Return a number of Python, numpy or torch as a float, NaN for anything else, texts too."""
    try:
        return float(value) if hasattr(value, "__float__") else math.nan
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan
