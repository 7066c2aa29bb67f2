"""The report's dict → CSV, one row an arm, seed, evaluation and level."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

HEAD = (
    *("arm", "seed", "evaluation", "level", "metric", "score", "n"),
    *("steps", "rows", "tokens", "flops", "seconds", "problem"),
)
# The level of a row over all records.
ALL = "all"


def sheet(report: Mapping[str, Any]) -> str:
    """Write all scores seed by seed.

    `n` is the number of records; steps, rows, tokens, flops and seconds are those of the cell's whole chain, so they
    stand there once for each evaluation and level. A cell without scores has one row, with its problem.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, HEAD, restval="", lineterminator="\n")
    writer.writeheader()
    for arm in report["arms"]:
        for cell in arm["cells"]:
            chain = {
                key: "" if cell[key] is None else cell[key] for key in ("steps", "rows", "tokens", "flops", "seconds")
            }
            same = {"arm": arm["name"], "seed": cell["seed"], **chain, "problem": cell["problem"] or ""}
            scores = list(_scores(arm, cell["seed"]))
            writer.writerows({**same, **row} for row in scores or [{}])
    return out.getvalue()


def _scores(arm: Mapping[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    for evaluation, found in arm["evaluations"].items():
        same = {"evaluation": evaluation, "metric": found["metric"]}
        for one in found["by_seed"]:
            if one["seed"] == seed:
                yield {**same, "level": ALL, "score": one["score"], "n": one["records"]}
                for level, part in one["levels"].items():
                    yield {**same, "level": level, "score": part["score"], "n": part["records"]}
