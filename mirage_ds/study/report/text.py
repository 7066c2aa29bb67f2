"""The report's dict → GitHub-flavoured Markdown, an HTML page made of that Markdown, and CSV."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markdown_it import MarkdownIt

from mirage_ds.analysis.alike import by_degree
from mirage_ds.analysis.controls.paths import VERDICTS
from mirage_ds.analysis.controls.report import apart, measured, p_values
from mirage_ds.analysis.inspect.page import data_url
from mirage_ds.analysis.inspect.page import page as whole_page
from mirage_ds.config.run import LATENT_MEASURES
from mirage_ds.study.report.statistics import NO_LEVEL, level_key

Report = Mapping[str, Any]
# What would be markup, unless it is an underscore inside a word, which GitHub leaves alone.
_MARKUP = re.compile(r"[\\`*\[\]<>|~&$]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])")
# All but those that keep a number and its interval on one line.
_BLANKS = re.compile(r"[^\S\u00a0]+")
# An arm that varies something: its entry in the study, and name=value of each.
_VARIED = re.compile(r"(.+)\[((?:[\w.]+=).*)\]", re.DOTALL)
# Letters of an example's text, at most.
_EXCERPT = 400
# What is markup at the beginning of a paragraph.
_START = re.compile(r"^(?=[-+#=])|^(\d+)(?=[.)])")
# Columns of report.csv; those behind the first line are of a cell's whole chain.
_OF_SCORES = ["evaluation", "level", "metric", "score", "n"]
_OF_CHAINS = ["steps", "rows", "tokens", "flops", "seconds", "problem"]


def count(number: float | None) -> str:
    """Write a count or an amount: whole numbers with thousands apart, large ones in powers of ten."""
    if number is None:
        return "–"
    if abs(number) >= 1e9:
        return f"{number:.3g}"
    return f"{number:,.0f}" if number == int(number) or abs(number) >= 1000 else f"{number:.3g}"


def setting(value: object) -> str:
    """Write a setting's value."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def settings(values: Mapping[str, Any]) -> str:
    """Write settings in one line."""
    return ", ".join(f"{key} {setting(value)}" for key, value in values.items())


def label(arm: str) -> str:
    """Write an arm shortly: of what it varies the values, once if they are all the same."""
    met = _VARIED.fullmatch(arm)
    if not met:
        return arm
    values = re.split(r"(?:^|,)[\w.]+=", met[2])[1:]
    return f"{met[1]}[{','.join(values if len(set(values)) > 1 else values[:1])}]"


def excerpt(text: str) -> str:
    """Leave out the middle of a long text."""
    return text if len(text) <= _EXCERPT else f"{text[: _EXCERPT // 2]} … {text[-_EXCERPT // 2 :]}"


def where(contrast: Mapping[str, Any]) -> str:
    """Name the records that are compared."""
    return contrast["evaluation"] + (f", levels {', '.join(contrast['levels'])}" if contrast["levels"] else "")


def pair(contrast: Mapping[str, Any]) -> str:
    """Name a contrast: arm − base, and where."""
    return f"{label(contrast['arm'])} − {label(contrast['base'])} ({where(contrast)}; {contrast['metric']})"


def judged(contrast: Mapping[str, Any], margin: float) -> str:
    """Write the verdict; a significant difference that is also equivalent is both."""
    both = contrast["equivalent"] and contrast["verdict"] != "equivalent"
    return f"{contrast['verdict']}, and equivalent within ± {margin:g}" if both else str(contrast["verdict"])


def narrow(one: Mapping[str, Any]) -> str:
    """Write the 90 % interval of a difference."""
    return f"({one['low90']:+.3f}, {one['high90']:+.3f})"


def size(one: Mapping[str, Any]) -> str:
    """Write what an Estimate is a mean of."""
    return f"{one['seeds']} × {one['records']:,}"


def ranged(one: Mapping[str, Any] | None) -> str:
    """Write a mean over seeds, with the least and the most of several."""
    if not one:
        return "–"
    return f"{one['mean']:.3f}" + (f" ({one['least']:.3f}–{one['most']:.3f})" if one["seeds"] > 1 else "")


def alike(entries: Sequence[Mapping[str, Any]]) -> str:
    """Say how alike latents are in each arm, by evaluation where there are several."""
    found = {(one["arm"], one["evaluation"]): one["latents"].get("cosine_between") for one in entries}
    several = len({name for _, name in found}) > 1
    named = {f"{label(arm)}, {name}" if several else label(arm): one for (arm, name), one in found.items()}
    return by_degree({name: one["mean"] for name, one in named.items() if one})


def having(evaluation: str, arms: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the arms that have scores of an evaluation."""
    return [arm for arm in arms if evaluation in arm["evaluations"]]


def evaluations(report: Report) -> dict[str, list[str]]:
    """Return each evaluation's levels in any arm, the primary's first; none where records have no level."""
    primary = report["primary"]
    found: dict[str, dict[str, None]] = {}
    for arm in report["arms"]:
        for name, one in arm["evaluations"].items():
            found.setdefault(name, {}).update(dict.fromkeys(one["levels"]))
    order = sorted(found.items(), key=lambda one: not primary or one[0] != primary["evaluation"])
    return {name: [] if set(own) <= {NO_LEVEL} else sorted(own, key=level_key) for name, own in order}


class Escaped(str):
    """A text that is Markdown already."""


def escaped(text: object) -> str:
    """Write a text so that Markdown shows it as it is, on one line."""
    if isinstance(text, Escaped):
        return text
    return _MARKUP.sub(lambda met: f"\\{met[0]}", _BLANKS.sub(" ", str(text)).strip(" "))


def paragraph(text: str) -> str:
    """Write a text as a paragraph of its own."""
    return Escaped(_START.sub(lambda met: f"{met[1] or ''}\\", escaped(text)))


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), finalize=escaped, trim_blocks=True, lstrip_blocks=True
)


def _unbroken(write: Callable[[Any], str]) -> Callable[[Any], str]:
    """Keep a number and its interval on one line."""
    return lambda one: write(one).replace(" ", "\u00a0")


_TEMPLATES.filters |= {
    one.__name__: one
    for one in (count, settings, pair, judged, having, paragraph, label, where, excerpt, p_values, alike)
}
_TEMPLATES.filters |= {one.__name__: _unbroken(one) for one in (measured, apart, narrow, size, ranged)}
_TEMPLATES.filters["verbatim"] = Escaped


def markdown(report: Report, figures: Sequence[tuple[str, str]] = (), pictures: Sequence[str | None] = ()) -> str:
    """Write the whole report.

    Args:
        figures: (link, caption) of each; the first leads. pictures: link of each example's picture, then of each
            rollout's.
    """
    values = {
        "pictures": pictures,
        "evaluations": evaluations(report),
        "figures": figures,
        "verdicts": VERDICTS,
        "measures": LATENT_MEASURES,
    }
    body = _TEMPLATES.get_template("report.md.jinja").render(**report, **values).strip()
    return f"# {escaped(report['name'])}\n\n{body}\n"


def page(report: Report, figures: Sequence[tuple[bytes, str]] = (), pictures: Sequence[bytes | None] = ()) -> str:
    """Write the whole report as a page that needs nothing beside it.

    Args:
        figures: (PNG, caption) of each; the first leads. pictures: the PNG of each example and rollout.
    """
    shown = [(data_url(data), caption) for data, caption in figures]
    # The page has a title of its own.
    _, _, text = markdown(report, shown, [data_url(data) if data else None for data in pictures]).partition("\n\n")
    html = MarkdownIt("commonmark").enable("table").render(text)
    html = html.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    return whole_page(report["name"], html, [])


def sheet(report: Report) -> str:
    """Write all scores as CSV, one row an arm, seed, evaluation and level; the level "all" is over all records.

    `n` is the number of records; steps, rows, tokens, flops and seconds are those of the cell's whole chain, so they
    stand there once for each evaluation and level. A cell without scores has one row, with its problem.
    """
    rows: list[dict[str, Any]] = []
    for arm in report["arms"]:
        for cell in arm["cells"]:
            whole = {"arm": arm["name"], **{key: cell[key] for key in ("seed", *_OF_CHAINS)}}
            scores = [
                dict(zip(_OF_SCORES, (evaluation, level, found["metric"], part["score"], part["records"]), strict=True))
                for evaluation, found in arm["evaluations"].items()
                for one in found["by_seed"]
                if one["seed"] == cell["seed"]
                for level, part in [("all", one), *one["levels"].items()]
            ]
            rows += [{**whole, **one} for one in scores or [{}]]
    # As objects: whole numbers stay whole beside cells without any.
    frame = pd.DataFrame(rows, columns=["arm", "seed", *_OF_SCORES, *_OF_CHAINS], dtype=object)
    return frame.to_csv(index=False, lineterminator="\n")
