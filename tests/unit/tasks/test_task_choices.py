r"""Reading the option that a ``\boxed{}`` names."""

from __future__ import annotations

import pytest

from mirage_ds.errors import UserError
from mirage_ds.tasks import get_task
from mirage_ds.tasks.choices import read_choice, without_letters

SIDES = ["rotated left", "Rotated right."]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("\\boxed{A}", "A"),
        ("\\boxed{b}", "B"),
        ("so \\boxed{A}, no, \\boxed{(B)}.", "B"),
        ("\\boxed{ ( A ) }", "A"),
        ("\\boxed{B.}", "B"),
        ("\\boxed{B) rotated left}", "B"),
        ("\\boxed{(A) rotated right}", "A"),
        ("\\boxed{\\text{B}}", "B"),
        ("\\boxed{\\textbf{Rotated  LEFT}}", "A"),
        ("\\boxed{rotated right}", "B"),
        ("\\boxed{rotated\nleft.}", "A"),
        ("\\boxed{C}", None),
        ("\\boxed{AB}", None),
        ("\\boxed{A or B}", None),
        ("\\boxed{left}", None),
        ("\\boxed{}", None),
        ("\\boxed{A", None),
        ("A", None),
        ("", None),
    ],
)
def test_the_last_box_names_an_option_by_letter_or_text(text: str, letter: str | None) -> None:
    assert read_choice(text, SIDES) == letter
    assert read_choice(text, SIDES, letter_first=False) == letter


def test_options_that_are_letters_themselves() -> None:
    swapped = ["B", "A", "c"]
    assert [read_choice(f"\\boxed{{{x}}}", swapped) for x in "ABC"] == ["A", "B", "C"]
    assert [read_choice(f"\\boxed{{{x}}}", swapped, letter_first=False) for x in "ABC"] == ["B", "A", "C"]
    assert read_choice("\\boxed{yes}", ["no", "yes", "yes"]) == "B"


def test_letters_in_front_of_options_go_only_where_all_have_their_own() -> None:
    assert without_letters(["A. 3", "B. 4"]) == ["3", "4"]
    assert without_letters(["(A) 3", "(B)  4"]) == ["3", "4"]
    for kept in (["B. 3", "A. 4"], ["A. 3", "4"], ["A", "B"], ["Apple", "Bee"]):
        assert without_letters(kept) == kept


def test_a_question_with_its_options() -> None:
    def ask(question: str, options: list[str], images: int) -> str:
        row = {"question": question, "options": options, "image_input": ["x.png"] * images}
        return get_task("blink-jigsaw").prompt(row, None)

    assert ask("Which?", ["x", "y"], 2) == (
        "<image><image>\nWhich?\n(A) x\n(B) y\nPut the letter of the right option in \\boxed{}."
    )
    assert ask("In <image> and <image>?", ["x"], 2).startswith("In <image> and <image>?\n(A) x")
    assert ask("Which?", ["x"], 0).startswith("Which?\n")


def test_scores() -> None:
    task = get_task("sat")
    record = {"options": SIDES, "text_output": "\\boxed{rotated left}"}
    for text, correct, invalid in (
        ("\\boxed{rotated left}", 1.0, 0.0),
        ("\\boxed{A}", 1.0, 0.0),
        ("\\boxed{B}", 0.0, 0.0),
        ("left", 0.0, 1.0),
    ):
        assert list(task.score_record(text, record).items()) == [("correct", correct), ("invalid", invalid)]
    with pytest.raises(UserError, match=r"answer '\\\\boxed\{up\}' cannot be read by its task; fix its text_output"):
        task.score_record("\\boxed{A}", record | {"text_output": "\\boxed{up}"})
    with pytest.raises(KeyError, match="text_output"):
        task.score_record("\\boxed{A}", {"options": SIDES})
