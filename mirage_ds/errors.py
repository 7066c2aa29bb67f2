"""A user's mistake is one sentence and exit code 2; everything else keeps its traceback."""

from __future__ import annotations

EXIT_USER_ERROR = 2


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where, and how to mend it.

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
