"""The task for own records: the last boxes are compared."""

from __future__ import annotations

import pytest

from mirage_ds.errors import UserError
from mirage_ds.tasks import get_task

TASK = get_task("boxed")


@pytest.mark.parametrize(
    ("answer", "right", "invalid"),
    [
        (r"It is \boxed{Dark  Red}", 1, 0),
        (r"\boxed{blue} no, \boxed{dark red}", 1, 0),
        (r"\boxed{dark red} no, \boxed{blue}", 0, 0),
        (r"\boxed{\frac{1}{2}}", 0, 0),
        ("dark red", 0, 1),
        (r"\boxed{ }", 0, 1),
        (r"\boxed{dark red", 0, 1),
    ],
)
def test_the_last_boxes_are_compared(answer: str, right: int, invalid: int) -> None:
    own = {"text_output": r"I see \boxed{blue} and say \boxed{dark red}."}
    assert TASK.score_record(answer, own) == {"correct": right, "invalid": invalid}


def test_a_record_without_a_box_is_said() -> None:
    with pytest.raises(UserError, match="own answer 'b' cannot be read by its task"):
        TASK.score_record("a", {"text_output": "b"})
    with pytest.raises(KeyError):
        TASK.score_record("a", {})
    with pytest.raises(UserError, match="builds no records"):
        TASK.prompt({}, None)
    assert TASK.parse(r"\boxed{A  b}", {}) == "a b"
