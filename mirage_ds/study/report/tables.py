"""The report's dict → sentences and tables of text, the same for Markdown and HTML. Nothing is escaped here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mirage_ds.analysis.controls.paths import VERDICTS
from mirage_ds.analysis.controls.report import Cells, apart, measured, p_values
from mirage_ds.study.report.grid import level_key
from mirage_ds.study.report.statistics import TOO_FEW

Report = Mapping[str, Any]
TESTS = {
    "sign-flip": "exact sign-flip test over seeds",
    "sign-flip, random": "sign-flip test over seeds with 20,000 random patterns",
    "McNemar": "exact McNemar test over records",
    "none": "no test",
}


class Table(NamedTuple):
    """A table: what it shows, in a sentence, its head and its rows."""

    caption: str
    head: Cells
    rows: list[Cells]


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


def pair(contrast: Mapping[str, Any]) -> str:
    """Name a contrast: arm − base, and where."""
    at = f", levels {', '.join(contrast['levels'])}" if contrast["levels"] else ""
    return f"{contrast['arm']} − {contrast['base']} ({contrast['evaluation']}{at}; {contrast['metric']})"


def judged(contrast: Mapping[str, Any], margin: float) -> str:
    """Write the verdict; a significant difference that is also equivalent is both."""
    both = contrast["equivalent"] and contrast["verdict"] != "equivalent"
    return f"{contrast['verdict']}, and equivalent within ± {margin:g}" if both else str(contrast["verdict"])


def primary_sentence(report: Report) -> str:
    """Say in one sentence what the primary endpoint came to."""
    found = report["primary"]
    if found is None:
        return "The study names no primary endpoint: every difference below is exploratory."
    if found["problem"]:
        return f"The primary endpoint could not be computed: {found['problem']}."
    one, margin = found["difference"], report["margin"]
    p = "no p-value" if found["p"] is None else f"p {_equals(p_values(found)[0])} ({TESTS[found['test']]})"
    why = {
        "higher": "the 95 % interval lies above 0, and the test agrees",
        "lower": "the 95 % interval lies below 0, and the test agrees",
        "equivalent": f"the 90 % interval lies within ± {margin:g}",
        TOO_FEW: "with one seed two models are compared, not two arms"
        if one["seeds"] == 1
        else "with two to four seeds the interval is too narrow to say anything by",
        "undecided": f"the 95 % interval holds 0, and the 90 % interval is not within ± {margin:g}"
        if one["low"] <= 0 <= one["high"]
        else "the 95 % interval leaves out 0, but the test over seeds does not reach 5 %",
    }[found["verdict"]]
    return (
        f"Primary endpoint, {pair(found)}: {one['mean']:+.3f} (95 % interval {one['low']:+.3f} to {one['high']:+.3f}, "
        f"90 % {one['low90']:+.3f} to {one['high90']:+.3f}), {p}, over {one['seeds']} paired seed"
        f"{'' if one['seeds'] == 1 else 's'} and {one['records']:,} records: {judged(found, margin)}, since {why}"
        f"{'; ' + '; '.join(found['notes']) if found['notes'] else ''}."
    )


def _equals(p: str) -> str:
    return p.replace("<", "< 0") if p.startswith("<") else f"= {p}"


def holes(report: Report) -> list[str]:
    """Write each hole as a sentence."""
    found = []
    for one in report["holes"]:
        where = ", ".join(
            text
            for text in (
                one["arm"],
                None if one["seed"] is None else f"seed {one['seed']}",
                None if one["evaluation"] is None else f"evaluation {one['evaluation']}",
            )
            if text is not None
        )
        found.append(f"{where}: {one['problem']}" if where else one["problem"])
    return found


def _evaluations(report: Report) -> list[str]:
    return list(dict.fromkeys(name for arm in report["arms"] for name in arm["evaluations"]))


def levels_of(report: Report, evaluation: str) -> list[str]:
    """Return the levels of an evaluation in any arm; none where records have no level."""
    found = {
        level
        for arm in report["arms"]
        if evaluation in arm["evaluations"]
        for level in arm["evaluations"][evaluation]["levels"]
    }
    return [] if found <= {"?"} else sorted(found, key=level_key)


def arm_table(report: Report) -> Table:
    """Write each arm's description, settings and seeds."""
    rows = [
        [
            arm["name"],
            arm["description"],
            ", ".join(f"{key} {setting(value)}" for key, value in arm["settings"].items()),
            f"{arm['seeds']['scored']} of {arm['seeds']['planned']}",
        ]
        for arm in report["arms"]
    ]
    return Table("The arms. Seeds: with scores, of those planned.", ["arm", "what it is", "settings", "seeds"], rows)


def score_tables(report: Report) -> list[Table]:
    """Write each evaluation's scores, overall and per level."""
    tables = []
    for evaluation in _evaluations(report):
        levels = levels_of(report, evaluation)
        found = [(arm["name"], arm["evaluations"].get(evaluation)) for arm in report["arms"]]
        rows = [
            [
                name,
                measured(one["overall"]),
                *(measured(one["levels"][level]) if level in one["levels"] else "–" for level in levels),
                f"{one['overall']['seeds']} × {one['overall']['records']:,}",
            ]
            for name, one in found
            if one is not None
        ]
        metric = next(one["metric"] for _, one in found if one is not None)
        caption = (
            f"Evaluation {evaluation}: mean {metric} over seeds and records, in brackets the 95 % interval over both."
        )
        head = ["arm", "all", *(f"level {level}" for level in levels), "seeds × records"]
        tables.append(Table(caption, head, rows))
    return tables


def contrast_table(report: Report) -> Table | None:
    """Write all contrasts, the primary first; None without any."""
    found = [one for one in (report["primary"], *report["contrasts"]) if one is not None and not one["problem"]]
    if not found:
        return None
    rows = []
    for one in found:
        first = one is report["primary"]
        p, adjusted = p_values(one)
        rows.append(
            [
                pair(one) + (" – primary" if first else ""),
                f"{one['means']['arm']:.3f} − {one['means']['base']:.3f}",
                apart(one["difference"]),
                f"({one['difference']['low90']:+.3f}, {one['difference']['high90']:+.3f})",
                p or "–",
                "alone" if first and p else adjusted or "–",
                TESTS[one["test"]],
                f"{one['difference']['seeds']} × {one['difference']['records']:,}",
                judged(one, report["margin"]),
                "; ".join(one["notes"]),
            ]
        )
    caption = (
        f"Differences, paired by seed and record, with 95 % and 90 % intervals. Equivalent: the 90 % interval lies "
        f"within ± {report['margin']:g}. The primary endpoint's p stands alone; the others' are Holm-adjusted together."
    )
    head = ["contrast", "means", "difference (95 %)", "90 %", "p", "p (Holm)", "test", "seeds × records", "verdict"]
    return Table(caption, [*head, "note"], rows)


def primary_levels(report: Report) -> Table | None:
    """Write the primary contrast level by level; None where there are no levels."""
    found = report["primary"]
    if not found or found["problem"] or set(found["by_level"]) <= {"?"}:
        return None
    rows = [
        [level, apart(one), f"({one['low90']:+.3f}, {one['high90']:+.3f})", f"{one['seeds']} × {one['records']:,}"]
        for level, one in found["by_level"].items()
    ]
    caption = "The primary contrast level by level (not corrected for their number)."
    return Table(caption, ["level", "difference (95 %)", "90 %", "seeds × records"], rows)


def control_tables(report: Report) -> list[Table]:
    """Write the controls' scores and the follow rates."""
    scores = [
        [
            entry["arm"],
            entry["evaluation"],
            name,
            measured(one),
            apart(one["difference"]),
            f"{one['seeds']} × {one['records']:,}",
        ]
        for entry in report["controls"]
        for name, one in entry["conditions"].items()
    ]
    paths = [
        [
            entry["arm"],
            entry["evaluation"],
            *(measured(entry["path"][kind]) for kind in VERDICTS),
            apart(entry["path"]["difference"]),
            f"{entry['path']['injected']['seeds']} × {entry['path']['injected']['records']:,}",
        ]
        for entry in report["controls"]
        if entry["path"]
    ]
    tables = []
    if scores:
        caption = "Scores with other latents fed at the slots, and the difference from the model's own."
        head = ["arm", "evaluation", "latents", "score", "− own", "seeds × records"]
        tables.append(Table(caption, head, scores))
    if paths:
        caption = (
            "Latents of one of two shortest paths were fed: the share of answers that follow it, the other, neither."
        )
        head = ["arm", "evaluation", *VERDICTS, "injected − other", "seeds × records"]
        tables.append(Table(caption, head, paths))
    return tables


def cost_table(report: Report) -> Table:
    """Write what a chain of each arm cost, on average over its seeds with scores."""
    keys = ("steps", "rows", "tokens", "flops", "seconds", "samples_s", "peak_gb")
    rows = [[arm["name"], *(count(arm["cost"][key]) for key in keys)] for arm in report["arms"]]
    caption = (
        "A whole chain of stages, mean over the seeds with scores. A stage that several arms share counts in each. "
        "FLOPs are the model's, forward and backward."
    )
    head = ["arm", "optimizer steps", "rows", "tokens", "FLOPs", "seconds", "samples/s", "peak memory, GB"]
    return Table(caption, head, rows)


def method(report: Report) -> Sequence[str]:
    """Say how the numbers were made."""
    made = report["statistics"]
    return (
        f"Intervals are percentiles of {made['resamples']:,} resamples (seed {made['seed']}): seeds are drawn with "
        "replacement and, crossed with them, records within each level, since all seeds answer the same records. With "
        "one seed only records are drawn, and the interval is about those models, not about their arms. With two to "
        "four seeds it is too narrow, since so few say little about how seeds differ. Below five there is no verdict.",
        "From five paired seeds on, p is that of the sign-flip permutation test on the seeds' mean differences; with "
        "one seed, of McNemar's exact test on the records; from two to four there is none. n seeds can give no p below "
        "2/2ⁿ.",
        "“Equivalent” means that two one-sided tests at 5 % place the difference within the margin; a difference that "
        "is neither higher, lower nor equivalent is undecided, which does not say that there is none. Higher and lower "
        "want both a 95 % interval without 0 and a p of at most 5 % (uncorrected; five seeds cannot give one). These "
        "words are not corrected for the number of contrasts; the p-values in the table are.",
    )
