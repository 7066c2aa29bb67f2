r"""The form of a reply: k + 1 parts of text around k helpers, and the answer; how it is read, judged and put together.

Tags and not JSON: models write `\boxed`, `\frac` and line breaks as they are, which JSON would misread or refuse.
"""

import re
from pathlib import Path
from typing import Literal, NamedTuple, Self

import yaml

from mirage_ds.chat import Reply
from mirage_ds.data.record import HELPER_MARK, IMAGE_MARK, Record
from mirage_ds.errors import is_text, shown
from mirage_ds.tasks import DEFAULT, get_task, named_task, seen_by_scorer
from mirage_ds.tasks.boxed import last_boxed
from mirage_ds.tasks.task import Task

Outcome = Literal["accepted", "wrong answer", "no form", "empty part", "cut off", "refused", "no reply"]
_TEXTS = yaml.safe_load(Path(__file__).with_name("form.yaml").read_text(encoding="utf-8"))
# Of each outcome that drops a reply.
MEANINGS: dict[Outcome, str] = _TEXTS["meanings"]

_TAG = re.compile(r"</?(?:before|between|after|answer)>", re.IGNORECASE)
_PART = re.compile(r"<(before|between|after|answer)>(.*?)</\1>", re.IGNORECASE | re.DOTALL)
_THINK = re.compile(r"\s*</?think>\s*", re.IGNORECASE)


def tags(helpers: int) -> list[str]:
    """Name the parts of a reply, in order."""
    return ["before", *["between"] * (helpers - 1), "after", "answer"]


def described(helpers: int) -> str:
    """Write the form down for the model that is to keep to it."""
    what = _TEXTS["parts"] | (_TEXTS["of several"] if helpers > 1 else {})
    lines = [f"<{tag}>{what[tag]}</{tag}>" for tag in tags(helpers)]
    return "Reply with nothing but this, your text between the tags:\n" + "\n".join(lines)


def read(text: str, helpers: int) -> tuple[list[str], str] | None:
    """Return the helpers + 1 parts and the answer of a reply; None unless each is there once and in order.

    What stands before the last `<before>` is left out: models that think aloud try the form there. So are `<think>`
    tags, which `composed` places.
    """
    start = text.lower().rfind("<before>")
    found = [(match[1].lower(), match[2]) for match in _PART.finditer(text, start)] if start >= 0 else []
    if [tag for tag, _ in found] != tags(helpers):
        return None
    parts = [_THINK.sub(" ", part).strip() for _, part in found]
    for part in parts:
        # Half a surrogate pair can be spelt in a server's JSON, and no file can hold it.
        if _TAG.search(part) or any(mark in part for mark in (HELPER_MARK, IMAGE_MARK)) or not is_text(part):
            return None
    return parts[:-1], parts[-1]


class Judge(NamedTuple):
    """Knows the right answer of a record, and whether a written one is that.

    Attributes:
        record: with at least one helper and a boxed answer.
        task: whose scorer decides.
        boxed: what stands in the record's own box.
    """

    record: Record
    task: Task
    boxed: str

    @classmethod
    def of(cls, record: Record, named: str | None) -> Self:
        """Make a record's judge.

        Args:
            named: --task; else the record's own `task`, and `boxed` where it has none.

        Raises:
            RecordError: the record has no helper, no boxed answer, or one that its own task calls wrong.
            UserError: there is no such task.
        """
        if not record.image_output:
            raise record.fault("image_output", "no helper image to write about", "add its path, or leave the row out")
        boxed = last_boxed(record.text_output)
        if boxed is None or not boxed.strip():
            raise record.fault("text_output", r"no answer in \boxed{…}", r"write the answer as \boxed{answer}")
        name = named_task(record, named) or DEFAULT
        judge = cls(record, get_task(name), boxed)
        try:
            right = judge.agrees(record.text_output)
        except KeyError as error:
            raise record.fault(str(error.args[0]), "missing", f"add it: {name} scores by it") from None
        if not right:
            what = f"its own answer {shown(boxed)} is wrong by the scorer of {name}"
            raise record.fault("text_output", what, "fix it, or leave the row out")
        return judge

    def agrees(self, text: str) -> bool:
        """Whether a text's last box holds the record's answer.

        The task's scorer must call it right, and the task must read the same from both: of two right answers the
        helper image belongs to one.
        """
        known = seen_by_scorer(self.record)
        marks = self.task.score_record(text, known)
        own = self.task.parse(self.record.text_output, known)
        return next(iter(marks.values())) >= 1 and self.task.parse(text, known) == own

    def outcome(self, reply: Reply) -> Outcome:
        """Judge a reply."""
        if reply.lost:
            return reply.lost
        found = read(reply.text, len(self.record.image_output))
        if found is None:
            return "cut off" if reply.cut else "no form"
        parts, answer = found
        if not all(re.search(r"\w", part) for part in parts):
            return "empty part"
        said = answer if last_boxed(answer) is not None else f"\\boxed{{{answer}}}"
        # A box in the reasoning is a conclusion too.
        boxes = [part for part in parts if last_boxed(part) is not None]
        return "accepted" if all(self.agrees(one) for one in [said, *boxes[-1:]]) else "wrong answer"

    def composed(self, text: str) -> str:
        r"""Return the `text_output` that an accepted reply makes: parts, marks, and the record's own answer, boxed.

        Where the question speaks of <think> each part stands in such a block, as in the rows of `data build`.
        """
        found = read(text, len(self.record.image_output))
        assert found is not None
        end = f"The answer is \\boxed{{{self.boxed}}}."
        if "<think>" in self.record.text_input:
            return HELPER_MARK.join(f"<think> {part} </think>" for part in found[0]) + end
        return f"\n{HELPER_MARK}\n".join(found[0]) + f"\n{end}"
