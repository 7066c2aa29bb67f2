"""The whole report into a folder."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mirage_ds.analysis.controls.statistics import RESAMPLES
from mirage_ds.files import write_atomically
from mirage_ds.study.report.build import build
from mirage_ds.study.report.text import markdown, page, sheet
from mirage_ds.study.results import Results


def write_report(results: Results, out: Path, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Write report.json, report.csv, report.md, report.html and figures/*.png; each is whole or the old one.

    The folder `figures` belongs to the report: pictures of an earlier one that are no longer made are removed. The same
    results give the same files, to the byte.

    Args:
        out: made if it does not exist; resamples: of every bootstrap.

    Returns:
        What report.json holds; see build.build.

    Raises:
        UserError: no cell has a score.
    """
    report = build(results, resamples)
    folder = out / "figures"
    drawn = list(_figures(results, report))
    examples = [(f"example-{number}", one["picture"]) for number, one in enumerate(results.examples, 1)]
    named = {name: data for name, data, _ in drawn} | {name: data for name, data in examples if data}
    paths = [f"figures/{name}.png" if name in named else None for name, _ in examples]
    texts = {
        "csv": sheet(report),
        "md": markdown(report, [(f"figures/{name}.png", text) for name, _, text in drawn], paths),
        "html": page(report, [(data, text) for _, data, text in drawn], [data for _, data in examples]),
        "json": json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
    for name, data in named.items():
        write_atomically(folder / f"{name}.png", data)
    for name in _earlier(out) - named.keys():
        (folder / f"{name}.png").unlink(missing_ok=True)
    for kind, text in texts.items():
        # A record's level or a study's words may hold half of a surrogate pair, which UTF-8 has not.
        write_atomically(out / f"report.{kind}", text.encode("utf-8", "backslashreplace"))
    return report


def _earlier(out: Path) -> set[str]:
    """Name the figures of the report that is replaced; other pictures beside them are not ours."""
    file = out / "report.md"
    return set(re.findall(r"\(figures/([^/)]+)\.png\)", file.read_text(encoding="utf-8"))) if file.is_file() else set()


def _figures(results: Results, report: dict[str, Any]) -> Iterator[tuple[str, bytes, str]]:
    """Yield each figure's name, PNG and caption."""
    from mirage_ds.analysis.inspect import style
    from mirage_ds.study.report import figures, sweeps

    taken: Counter[str] = Counter()
    with style.styled():
        for name, figure, caption in (
            figures.lead(report),
            *figures.scores(report),
            *figures.contrasts(report),
            *sweeps.sweeps(report),
            *sweeps.curves(results, report),
            *figures.controls(report),
        ):
            # Two evaluations whose names differ in odd characters alone.
            taken[name] += 1
            yield name if taken[name] == 1 else f"{name}-{taken[name]}", style.png(figure), caption
