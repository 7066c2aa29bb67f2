"""Chance: what the best answer that looks at no question would get. Imports no torch."""

from collections import Counter
from collections.abc import Sequence

from mirage_ds.data.messages import HELPER_MARK
from mirage_ds.data.record import Record
from mirage_ds.tasks import DEFAULT, get_task, named_task, seen_by_scorer

# Of the records' own answers, the commonest so many are tried.
TRIED = 10


def best_constant(records: Sequence[Record], task: str | None) -> tuple[str, list[float]] | None:
    """Find the one answer that scores best if it is given to every record.

    Returns:
        The answer and the task's first metric of each of the N records; None where no record has an answer of its own.

    Raises:
        UserError: the task cannot be imported. KeyError: a record lacks what the scorer needs.
    """
    scorer = get_task(named_task(records[0], task) or DEFAULT).score_record
    known = [seen_by_scorer(one) for one in records]
    common = Counter(one.text_output.replace(HELPER_MARK, "") for one in records if one.text_output)
    scored = [
        (text, [float(next(iter(scorer(text, one).values()))) for one in known])
        for text, _ in common.most_common(TRIED)
    ]
    return max(scored, key=lambda one: sum(one[1]), default=None)
