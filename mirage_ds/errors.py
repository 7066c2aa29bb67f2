"""A user's error is one sentence and exit code 2; everything else keeps its traceback."""

import json
import math
import signal
from typing import Any, NoReturn

EXIT_USER_ERROR = 2
# sysexits' EX_UNAVAILABLE: another rank, its host or the network is gone.
EXIT_LOST = 69
# sysexits' EX_TEMPFAIL: "try again later". A scheduler's script requeues the job on this code.
EXIT_STOPPED = 75
# They ask a process to stop (run/stop.py).
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(BaseException):
    """The work has ended on request, before its end, with nothing half-written.

    A signal may raise it anywhere, in a picture's decoder too: what takes any Exception for a broken file lets it pass.

    Attributes:
        told: a line has said it already.
    """

    def __init__(self, *why: str, told: bool = False):
        super().__init__(*why)
        self.told = told


class UserError(Exception):
    """Something the user can fix. The message says what is wrong, where, and how to fix it.

    Attributes:
        everywhere: every rank raises it too, so that one of them says it; False where one rank alone has met it.
    """

    def __init__(self, message: str, everywhere: bool = True):
        super().__init__(message)
        self.everywhere = everywhere


def closest(word: str, known: object) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known word nearest to `word`, or an empty string."""
    import difflib

    near = difflib.get_close_matches(word, [str(name) for name in known], n=1)  # type: ignore[attr-defined]
    return f" (did you mean '{near[0]}'?)" if near else ""


def shown(value: object, most: int = 80) -> str:
    """Return `repr(value)`, cut so that it fits into a sentence."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"


def reason(error: Exception) -> str:
    """Return the first line of another library's error, with its class where the text alone says little."""
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, (OSError, ValueError)) and text else f"{type(error).__name__}: {text}"


def is_text(text: str) -> bool:
    """Whether UTF-8 can hold a text: it has no half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {shown(digits)} is too large")
    return value


def _whole_number(digits: str) -> int:
    # Python's own limit; beyond it int() refuses with a hint for programmers.
    if len(digits) > 4000:
        raise ValueError(f"a number of {len(digits)} digits is too large")
    return int(digits)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in values if keys.count(key) > 1)
        raise ValueError(f"key {shown(twice)} stands there twice")
    return values


def strict_json(text: str) -> Any:
    """Parse JSON and nothing but JSON: json.loads also takes NaN and Infinity, and the last of two equal keys.

    Raises:
        json.JSONDecodeError: no JSON. ValueError: a key twice, a number that is not finite or too large.
        RecursionError: nested too deeply.
    """
    return json.loads(
        text, parse_constant=_no_constant, parse_float=_finite, parse_int=_whole_number, object_pairs_hook=_once
    )
