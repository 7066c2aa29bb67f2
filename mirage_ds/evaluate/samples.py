"""Several answers a record: what the best of k is worth, what most of them say, how far they lie apart.

n answers a record, k of them looked at.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import comb
from statistics import fmean, stdev
from typing import Any

from mirage_ds.evaluate.scoring import Prediction
from mirage_ds.tasks.boxed import last_boxed


def best_of(values: Sequence[float], k: int) -> float:
    """Expected best of k values drawn from n without putting back.

    Of values 0 and 1 that is the unbiased pass@k of arXiv 2107.03374, 1 − C(n − c, k) / C(n, k).
    """
    return sum(value * comb(place, k - 1) for place, value in enumerate(sorted(values))) / comb(len(values), k)


def means(marked: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over one record's answers."""
    return {name: fmean(float(one[name]) for one in marked) for name in marked[0]}


def sampled(answers: Sequence[Sequence[Prediction]], marked: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Compare the answers of each record by the first metric.

    Args:
        answers, marked: n a record.

    Returns:
        {"count": n, "metric", "pass": {k: mean over records, for k = 1, 2, 4, … and n}, "majority": mean score of the
        answer that most of a record's n say, the earliest of equals (what is boxed counts, or the whole text),
        "spread": standard deviation between the n runs through the file, "distinct": mean number of different answers}.
    """
    metric, n = next(iter(marked[0][0])), len(answers[0])
    scores = [[float(one[metric]) for one in own] for own in marked]
    texts = [[last_boxed(one.text) or one.text for one in own] for own in answers]
    most = [own.index(Counter(own).most_common(1)[0][0]) for own in texts]
    ks = [*(1 << power for power in range(n.bit_length()) if 1 << power < n), n]
    return {
        "count": n,
        "metric": metric,
        "pass": {str(k): fmean(best_of(own, k) for own in scores) for k in ks},
        "majority": fmean(own[at] for own, at in zip(scores, most, strict=True)),
        "spread": stdev(fmean(one) for one in zip(*scores, strict=True)),
        "distinct": fmean(len(set(own)) for own in texts),
    }


def sentence(found: Mapping[str, Any]) -> str:
    """Say it in a line."""
    passed = ", ".join(f"best of {k} {value:.2f}" for k, value in found["pass"].items())
    said = f"majority {found['majority']:.2f}, spread {found['spread']:.3f}, {found['distinct']:.1f} different answers"
    return f"{found['metric']} over {found['count']} answers a record: {passed}, {said}"
