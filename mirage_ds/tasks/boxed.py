r"""Read the final answer, the last ``\boxed{…}``, out of a generated text."""

from __future__ import annotations

_OPEN = r"\boxed{"


def last_boxed(text: str) -> str | None:
    r"""Return what stands in the last ``\boxed{…}`` that is closed, braces inside it included; None without one."""
    begin = text.rfind(_OPEN)
    while begin >= 0:
        depth, first = 1, begin + len(_OPEN)
        for at in range(first, len(text)):
            depth += (text[at] == "{") - (text[at] == "}")
            if depth == 0:
                return text[first:at]
        begin = text.rfind(_OPEN, 0, begin)
    return None
