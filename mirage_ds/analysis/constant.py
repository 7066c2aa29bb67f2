"""Chance: what the best answer that looks at no question would get. Imports no torch."""

from collections import Counter
from collections.abc import Sequence

from mirage_ds.data.messages import HELPER_MARK
from mirage_ds.data.record import Record
from mirage_ds.tasks import DEFAULT, get_task, named_task

# Of the records' own answers, the commonest so many are tried.
TRIED = 10


def best_constant(records: Sequence[Record], task: str | None) -> list[float]:
    """Give every record the one answer that scores best.

    Args:
        task: as --task; None for the records' own.

    Returns:
        The task's first metric of each of the N records; nothing where no record has an answer of its own.

    Raises:
        UserError: the task cannot be imported. KeyError: a record lacks what the scorer needs.
    """
    named = next(filter(None, (named_task(one, task) for one in records)), DEFAULT)
    scorer = get_task(named).score_record
    # What the scorer may read of each record.
    known = [{**one.extra, "text_input": one.text_input, "text_output": one.text_output} for one in records]
    common = Counter(one.text_output.replace(HELPER_MARK, "") for one in records if one.text_output)
    scores = [[float(next(iter(scorer(text, one).values()))) for one in known] for text, _ in common.most_common(TRIED)]
    return max(scores, key=sum, default=[])
