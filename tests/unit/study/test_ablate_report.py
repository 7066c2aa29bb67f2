"""A study's report: numbers against plain loops, what is missing is said, files are whole and strict."""

from __future__ import annotations

import base64
import csv
import datetime
import io
import math
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.studies import Scored, columns, contrast, rows

from mirage_ds.analysis.controls.statistics import holm
from mirage_ds.analysis.inspect import style
from mirage_ds.errors import UserError, strict_json
from mirage_ds.study.report import figures
from mirage_ds.study.report.build import build, write_report
from mirage_ds.study.report.statistics import TOO_FEW
from mirage_ds.study.report.text import _TEMPLATES, escaped, label, markdown, page, sheet
from mirage_ds.study.results import SCORES, Cell, Results, Scores, StageResult
from mirage_ds.study.spec import ContrastSpec, ReportSpec

LEVELS = ("5", "6", "10")


def stage(key: str, steps: int = 100, **other: Any) -> StageResult:
    curve = [{"step": float(at), "loss": 2 / (1 + at)} for at in range(0, steps, 25)]
    fields = {"rows": 6400, "tokens": 10**6, "flops": 3e15, "seconds": 50.0, "samples_s": 128.0, "peak_gb": 40.0}
    return StageResult(
        **{"name": "s", "key": key, "stage": "stage1", "steps": steps, "curve": curve, **fields, **other}
    )


def success(arm: str, seed: int, record: str, rate: float) -> float:
    return float(random.Random(f"{arm}/{seed}/{record}").random() < rate)


def scored(arm: str, seed: int, rate: float, count: int = 12, levels: Sequence[str] = LEVELS) -> Scores:
    """`count` records a level, in an order of the arm's and seed's own."""
    found = [
        Scored(f"{level}-{i}", level, {"success": success(arm, seed, f"{level}-{i}", rate), "optimal": 0.25})
        for level in levels or ("?",)
        for i in range(count)
    ]
    random.Random(f"{arm}/{seed}").shuffle(found)
    return columns(found)


def control_report(arm: str, seed: int, count: int = 20, path: bool = True) -> dict[str, Any]:
    """What `mirage-ds controls` writes, as far as the report reads it."""
    rates = {"own": 0.8, "zero": 0.3, "swap": 0.5}
    answers = [
        {
            "line": line,
            "conditions": {
                name: {"metrics": {"success": bool(success(arm + name, seed, str(line), rate))}}
                for name, rate in rates.items()
            },
        }
        for line in range(1, count + 1)
    ]
    read = {"accuracy": 0.5 + seed / 250, "low": 0.4, "high": 0.7, "chance": 0.25, "rows": count, "maps": count}
    report: dict[str, Any] = {
        "conditions": {name: {"score": {"metric": "success"}} for name in rates},
        "answers": answers,
        "latents": {"cosine_within": 0.8, "cosine_between": COSINES[arm] + seed / 250, "effective_rank": 2.0 * seed},
        "probe": {"cells (4 × 4)": read},
    }
    if path:
        rng = random.Random(f"{arm}/{seed}/path")
        kinds = ("injected", "injected", "other", "neither")
        follows = [{"line": line, "follows": {name: rng.choice(kinds) for name in "AB"}} for line in range(count)]
        report["path"] = {"records": count, "answers": follows}
    return report


COSINES = {"k4": 0.9, "k8": 0.2, "top": 0.6}
RATES = {"base": 0.4, "k4": 0.7, "k8": 0.65, "top": 0.5}
SETTINGS = {
    "base": {"latent_size": 0, "compress_strategy": "none"},
    "k4": {"latent_size": 4, "compress_strategy": "average"},
    "k8": {"latent_size": 8, "compress_strategy": "average"},
    "top": {"latent_size": 4, "compress_strategy": "topk"},
}


def study(seeds: Sequence[int] = range(1, 6), levels: Sequence[str] = LEVELS) -> Results:
    """Four arms; the primary contrast is k4 − base."""
    cells = [
        Cell(
            arm,
            seed,
            SETTINGS[arm],
            [stage(f"{arm}/{seed}/1"), stage(f"{arm}/{seed}/2", peak_gb=44.0)],
            {"test": scored(arm, seed, rate, levels=levels)},
            {"test": control_report(arm, seed)} if arm != "base" else {},
        )
        for arm, rate in RATES.items()
        for seed in seeds
    ]
    contrasts = [contrast("k8", "k4", "test"), contrast("top", "k4", "test"), contrast("k8", "base", "test", ("5",))]
    asked = ReportSpec(primary=contrast("k4", "base", "test"), contrasts=contrasts)
    about = {arm: f"what {arm} is" for arm in RATES}
    return Results("study", "Why?", about, cells, asked, {"date": "2026-12-01", "commit": "abc"})


def asking(results: Results, **changed: Any) -> Results:
    """The study with another primary contrast or others."""
    return replace(results, report=results.report.model_copy(update=changed))


def changed(results: Results, arm: str, seed: int, change: Callable[[Cell], Cell]) -> Results:
    """The study with one cell changed."""
    cells = [change(cell) if (cell.arm, cell.seed) == (arm, seed) else cell for cell in results.cells]
    return replace(results, cells=cells)


def arm_of(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    return next(arm for arm in report["arms"] if arm["name"] == name)


def problems(report: Mapping[str, Any]) -> list[str]:
    return [one["problem"] for one in report["holes"]]


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def primary_sentence(report: Mapping[str, Any]) -> str:
    """What the report says of the primary endpoint."""
    return _TEMPLATES.get_template("primary.md.jinja").render(report).strip()


# ------------------------------------------------------------------------------------------------------------ numbers


def test_scores_are_means_over_seeds_and_records() -> None:
    report = build(study(), 300)
    for arm, rate in RATES.items():
        found = arm_of(report, arm)["evaluations"]["test"]
        marks = {
            (seed, level): [success(arm, seed, f"{level}-{i}", rate) for i in range(12)]
            for seed in range(1, 6)
            for level in LEVELS
        }
        assert found["overall"]["mean"] == pytest.approx(average([average(one) for one in marks.values()]))
        assert list(found["levels"]) == list(LEVELS)
        for level, one in found["levels"].items():
            assert one["mean"] == pytest.approx(average([average(marks[seed, level]) for seed in range(1, 6)]))
            assert one["low"] <= one["mean"] <= one["high"]
            assert (one["seeds"], one["records"]) == (5, 12)
        for one in found["by_seed"]:
            assert one["score"] == pytest.approx(average([average(marks[one["seed"], level]) for level in LEVELS]))
            assert one["levels"]["6"] == {"score": pytest.approx(average(marks[one["seed"], "6"])), "records": 12}
        assert (found["metric"], found["other_metrics"]) == ("success", {"optimal": 0.25})
    assert problems(report) == []
    cost = arm_of(report, "k4")["cost"]
    assert cost == {
        **{"steps": 200, "rows": 12800, "tokens": 2 * 10**6, "flops": 6e15, "seconds": 100, "samples_s": 128},
        "peak_gb": 44,
    }


def test_contrasts_pair_seeds_and_records() -> None:
    report = build(study(), 300)
    primary = report["primary"]
    apart = {
        (seed, level): average(
            [
                success("k4", seed, f"{level}-{i}", RATES["k4"]) - success("base", seed, f"{level}-{i}", RATES["base"])
                for i in range(12)
            ]
        )
        for seed in range(1, 6)
        for level in LEVELS
    }
    assert primary["difference"]["mean"] == pytest.approx(average(list(apart.values())))
    for level, one in primary["by_level"].items():
        assert one["mean"] == pytest.approx(average([apart[seed, level] for seed in range(1, 6)]))
    by_seed = {one["seed"]: one["difference"] for one in primary["by_seed"]}
    assert by_seed == {seed: pytest.approx(average([apart[seed, level] for level in LEVELS])) for seed in range(1, 6)}
    assert (primary["test"], primary["p"], primary["verdict"]) == ("sign-flip", 0.0625, "undecided")
    assert any("p cannot fall below 0.0625" in note for note in primary["notes"])
    assert report["contrasts"][2]["difference"]["records"] == 12
    assert "k4 − base" in primary_sentence(report)
    # Its 95 % interval leaves out 0, and five seeds can never reach 5 %.
    assert primary["difference"]["low"] > 0
    assert primary_sentence(report).endswith(
        "5 paired seeds and 36 records: undecided, since the 95 % interval leaves out 0, but the test over seeds does "
        f"not reach 5 %; {'; '.join(primary['notes'])}."
    )
    six = build(study(range(1, 7)), 300)
    assert (six["primary"]["p"], six["primary"]["verdict"]) == (2 / 2**6, "higher")
    assert "higher, since the 95 % interval lies above 0, and the test agrees" in primary_sentence(six)


def from_bases(bases: Mapping[int, Sequence[str]]) -> Results:
    """The study with runs of these names put before each seed's own chains, in every arm."""
    whole = study(list(bases))
    cells = [replace(cell, stages=[*(stage(name) for name in bases[cell.seed]), *cell.stages]) for cell in whole.cells]
    return replace(whole, cells=cells)


def test_seeds_that_share_a_run_are_named_with_their_own_difference() -> None:
    bases = {0: ["a"], 1: ["b"], 2: ["a"], 3: ["b"], 4: ["c"], 5: ["a"]}
    primary = build(from_bases(bases), 300)["primary"]
    apart = {one["seed"]: one["difference"] for one in primary["by_seed"]}
    assert primary["families"] == [
        {"runs": ["a"], "seeds": [0, 2, 5], "difference": pytest.approx(average([apart[seed] for seed in (0, 2, 5)]))},
        {"runs": ["b"], "seeds": [1, 3], "difference": pytest.approx(average([apart[seed] for seed in (1, 3)]))},
    ]
    said = (
        f"seeds 0, 2, 5 share a ({average([apart[seed] for seed in (0, 2, 5)]):+.3f}); "
        f"seeds 1, 3 share b ({average([apart[seed] for seed in (1, 3)]):+.3f}); 1 share nothing: "
    )
    assert said in primary_sentence({"primary": primary, "margin": 0.02})
    # A chain of runs joins seeds that no single run joins.
    linked = build(from_bases({0: ["a"], 1: ["a", "b"], 2: ["b"]}), 50)["primary"]["families"]
    assert [(one["runs"], one["seeds"]) for one in linked] == [(["a", "b"], [0, 1, 2])]
    one = build(from_bases({0: ["a"], 1: ["a"], 2: ["a"]}), 50)["primary"]
    assert "all seeds share a: the interval says nothing about another one" in one["notes"]
    alone = build(study(), 50)["primary"]
    assert alone["families"] == []
    assert not any("share" in note for note in alone["notes"])


def test_a_run_is_shared_only_by_the_seeds_that_are_compared() -> None:
    whole = from_bases({0: ["a"], 1: ["a"], 2: ["b"]})
    assert build(changed(whole, "base", 1, lambda cell: replace(cell, scores={})), 50)["primary"]["families"] == []


def test_an_evaluation_of_some_arms_leaves_no_hole_in_the_others() -> None:
    whole = study(range(1, 6))
    first = whole.cells[0].arm

    def holes(asked_of: set[str]) -> set[tuple[str, str | None]]:
        """Arms and evaluations of the holes where `gate` is asked of these arms and answered by the first."""
        cells = []
        for cell in whole.cells:
            (name,) = cell.scores
            asked = [name, *(["gate"] if cell.arm in asked_of else [])]
            scores = {**cell.scores, **({"gate": cell.scores[name]} if cell.arm == first else {})}
            cells.append(replace(cell, scores=scores, keys={f"{SCORES} {one}": "key" for one in asked}))
        return {(one["arm"], one["evaluation"]) for one in build(replace(whole, cells=cells), 50)["holes"]}

    others = {cell.arm for cell in whole.cells} - {first}
    assert holes({first, *others}) - holes({first}) == {(arm, "gate") for arm in others}
    assert not any(evaluation == "gate" for _, evaluation in holes({first}))


def test_holm_is_over_all_contrasts_but_the_primary() -> None:
    twice = study(range(1, 9))
    asked = twice.report
    twice = asking(twice, contrasts=[*asked.contrasts, asked.primary, asked.contrasts[0]])
    report = build(twice, 300)
    others = report["contrasts"]
    # Neither the primary again nor the same one twice.
    assert [(one["arm"], one["base"]) for one in others] == [("k8", "k4"), ("top", "k4"), ("k8", "base")]
    assert report["primary"]["p_holm"] is None
    assert report["primary"]["p"] == 2 / 2**8
    assert [one["p_holm"] for one in others] == holm([one["p"] for one in others])
    assert others[1]["p_holm"] > others[1]["p"]


def test_one_seed_is_tested_on_the_records_and_says_so() -> None:
    report = build(study([7]), 300)
    primary = report["primary"]
    assert (primary["test"], primary["difference"]["resampled"]) == ("McNemar", "records")
    assert 0 < primary["p"] < 1
    assert "says nothing about another training run" in primary_sentence(report)
    assert "too few seeds, since with one seed two models are compared, not two arms" in primary_sentence(report)
    three = build(study([1, 2, 3]), 300)["primary"]
    assert (three["test"], three["p"], three["p_holm"]) == ("none", None, None)
    assert "no p-value" in primary_sentence({"primary": three, "margin": 0.02})


def test_a_result_does_not_depend_on_the_order_of_cells_and_records() -> None:
    results = study()
    cells = [replace(cell, scores={"test": columns(rows(cell.scores["test"])[::-1])}) for cell in results.cells]
    random.Random(1).shuffle(cells)
    assert build(replace(results, cells=cells), 300) == build(results, 300)


def test_a_metric_that_is_not_binary_and_one_that_is_named() -> None:
    results = study([1])
    primary = contrast("k4", "base", "test", metric="optimal")
    report = build(asking(results, primary=primary), 300)
    assert (report["primary"]["test"], report["primary"]["verdict"]) == ("none", TOO_FEW)
    assert any("do not differ in any record" in note for note in report["primary"]["notes"])
    gone = build(asking(results, primary=contrast("k4", "base", "test", metric="nonsense")), 300)
    assert "by nonsense" in gone["primary"]["problem"]


def test_what_could_not_be_seen_is_noted_where_a_test_found_nothing() -> None:
    def notes(seeds: int, arm: str) -> list[str]:
        found = build(asking(study(range(1, seeds + 1)), primary=contrast(arm, "k4", "test")), 300)["primary"]
        return [note for note in found["notes"] if "missed" in note]

    alike, (eight,) = notes(1, "k8"), notes(8, "k8")
    # Of 36 records no p of 5 % is made of fewer than six: 17 points, and here many more than six differ.
    size = [
        float(re.search(r"^of true differences one below (\d+\.\d) points would", one)[1]) for one in (*alike, eight)
    ]
    assert 17 < size[1] + 5 < size[0] < 40
    assert notes(8, "base") == notes(3, "k8") == []


def test_steps_that_do_not_match_are_noted() -> None:
    results = changed(study(), "k8", 3, lambda cell: replace(cell, stages=[stage("x", 100), stage("y", 99)]))
    report = build(results, 300)
    noted = {(one["arm"], one["base"]): "not step-matched" in one["notes"] for one in report["contrasts"]}
    assert noted == {("k8", "k4"): True, ("top", "k4"): False, ("k8", "base"): True}
    assert "not step-matched" not in report["primary"]["notes"]
    # Other stages, but as many steps in all.
    results = changed(study(), "k8", 3, lambda cell: replace(cell, stages=[stage("x", 200)]))
    assert "not step-matched" not in build(results, 300)["contrasts"][0]["notes"]


# -------------------------------------------------------------------------------------------------------------- holes


def test_a_missing_cell_is_a_hole_and_its_seed_is_left_out_of_pairs() -> None:
    problem = "stage2 ended after 12 of 400 steps: a loss that is not finite"
    results = changed(study(), "k4", 2, lambda cell: replace(cell, scores={}, controls={}, problem=problem))
    report = build(results, 300)
    assert report["holes"] == [{"arm": "k4", "seed": 2, "evaluation": None, "problem": problem}]
    assert arm_of(report, "k4")["seeds"] == {"scored": 4, "planned": 5}
    assert [one["seed"] for one in report["primary"]["by_seed"]] == [1, 3, 4, 5]
    assert any("1 seeds have scores in one of the two arms only" in note for note in report["primary"]["notes"])
    assert f"- k4, seed 2: {problem}" in markdown(report)
    rows = list(csv.DictReader(io.StringIO(sheet(report))))
    assert [row["problem"] for row in rows if (row["arm"], row["seed"]) == ("k4", "2")] == [problem]


def test_an_arm_that_fails_altogether_does_not_prevent_the_report(tmp_path: Path) -> None:
    results = study()
    for seed in range(1, 6):
        results = changed(
            results, "k4", seed, lambda cell: replace(cell, stages=[], scores={}, controls={}, problem="gone")
        )
    report = write_report(results, tmp_path, 100)
    assert arm_of(report, "k4")["evaluations"] == {}
    assert arm_of(report, "k4")["cost"]["seconds"] is None
    assert "contrast k4 − base: no cell of 'k4' has scores" in report["primary"]["problem"]
    assert [bool(one["problem"]) for one in report["contrasts"]] == [True, True, False]
    assert "could not be computed" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("against", "said"),
    [
        (contrast("k4", "base", "other"), "no cell of 'k4' has scores in evaluation 'other'"),
        (contrast("k4", "base", "test", ("7",)), "evaluation 'test' at levels 7"),
        (contrast("k4", "lone", "test"), "contrast k4 − lone: they have no common seed"),
        (contrast("k4", "alien", "test"), "contrast k4 − alien: they have no common record"),
    ],
)
def test_contrasts_that_cannot_be_made_are_holes(against: ContrastSpec, said: str) -> None:
    results = study()
    lone = Cell("lone", 77, {}, [], {"test": scored("lone", 77, 0.5)})
    alien = Cell("alien", 1, {}, [], {"test": columns([Scored("x", "5", {"success": 1.0})])})
    arms = {**results.arms, "lone": "", "alien": ""}
    results = replace(results, arms=arms, cells=[*results.cells, lone, alien])
    report = build(asking(results, primary=against), 100)
    assert said in report["primary"]["problem"]
    assert any(said in problem for problem in problems(report))
    assert said in primary_sentence(report)


def test_records_that_a_cell_lacks_or_has_no_number_for_are_left_out_and_said() -> None:
    def fewer(cell: Cell) -> Cell:
        kept = [one for one in rows(cell.scores["test"]) if one.record != "5-3"]
        kept = [one._replace(metrics={"success": math.nan}) if one.record == "6-1" else one for one in kept]
        return replace(cell, scores={"test": columns(kept)})

    report = build(changed(study(), "k4", 2, fewer), 300)
    overall = arm_of(report, "k4")["evaluations"]["test"]["overall"]
    assert (overall["records"], report["primary"]["difference"]["records"]) == (34, 34)
    assert "1 records have no number for 'success' and are left out" in problems(report)
    assert any("2 records do not have scores under every seed" in problem for problem in problems(report))


def test_a_study_without_scores_is_refused(tmp_path: Path) -> None:
    cells = [Cell("a", 1, {}, [], problem="never started"), Cell("a", 2, {}, [], {"test": columns([])})]
    with pytest.raises(UserError, match="none of its 2 cells has scores"):
        write_report(Results("x", "?", {"a": ""}, cells), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------- controls


def test_controls_are_averaged_over_seeds_and_paired_with_own() -> None:
    report = build(study(), 300)
    assert [entry["arm"] for entry in report["controls"]] == ["k4", "k8", "top"]
    entry = report["controls"][0]
    rates = {"own": 0.8, "zero": 0.3, "swap": 0.5}
    marks = {
        name: [success("k4" + name, seed, str(line), rate) for seed in range(1, 6) for line in range(1, 21)]
        for name, rate in rates.items()
    }
    assert list(entry["conditions"]) == list(rates)
    for name, one in entry["conditions"].items():
        assert one["mean"] == pytest.approx(average(marks[name]))
        assert (one["seeds"], one["records"], one["resampled"]) == (5, 20, "seeds and records")
        if name == "own":
            assert one["difference"] is None
        else:
            assert one["difference"]["mean"] == pytest.approx(average(marks[name]) - average(marks["own"]))
    follows = [
        one["follows"][name]
        for seed in range(1, 6)
        for one in control_report("k4", seed)["path"]["answers"]
        for name in "AB"
    ]
    for kind in ("injected", "other", "neither"):
        assert entry["path"][kind]["mean"] == pytest.approx(follows.count(kind) / 200)
    apart = (follows.count("injected") - follows.count("other")) / 200
    assert entry["path"]["difference"]["mean"] == pytest.approx(apart)


def test_measures_of_latents_are_averaged_over_the_seeds_that_have_them() -> None:
    # An older report has none.
    old = control_report("k4", 2)
    del old["latents"], old["probe"]
    results = changed(study(), "k4", 2, lambda cell: replace(cell, controls={"test": old}))
    report = build(results, 50)
    entry = report["controls"][0]
    assert list(entry["latents"]) == ["cosine_within", "cosine_between", "effective_rank"]
    assert entry["latents"]["cosine_between"] == pytest.approx(
        {"mean": 0.913, "least": 0.904, "most": 0.92, "seeds": 4}
    )
    assert entry["latents"]["effective_rank"] == {"mean": 6.5, "least": 2.0, "most": 10.0, "seeds": 4}
    (question,) = entry["probe"]
    assert entry["probe"][question]["accuracy"] == pytest.approx(
        {"mean": 0.513, "least": 0.504, "most": 0.52, "seeds": 4}
    )
    assert entry["probe"][question]["chance"]["mean"] == 0.25
    text = markdown(report).replace("\u00a0", " ")
    own = text[text.index("## Latents") : text.index("## Cost")]
    assert (
        "Latents of different rows are nearly alike in k4 (0.91); partly alike in top (0.61); unlike in k8 (0.21)."
        in own
    )
    injected = entry["path"]["injected"]
    follows = f"{injected['mean']:.3f} ({injected['low']:.3f}, {injected['high']:.3f})"
    cells = ["k4", "test", "0.800 (0.800–0.800)", "0.913 (0.904–0.920)", "–", "–", "6.500 (2.000–10.000)", follows]
    assert f"| {' | '.join(cells)} |" in own
    assert "| k4 | test | cells (4 × 4) | 0.513 (0.504–0.520) | 0.250 (0.250–0.250) |" in own
    one = build(study(seeds=[1]), 50)
    assert "| k8 | test | 0.800 | 0.204 | – | – | 2.000 |" in markdown(one).replace("\u00a0", " ")


def test_a_study_of_older_controls_has_no_table_of_latents() -> None:
    bare = {"conditions": control_report("k4", 1)["conditions"], "answers": control_report("k4", 1)["answers"]}
    results = replace(study(), cells=[replace(one, controls=one.controls and {"test": bare}) for one in study().cells])
    report = build(results, 50)
    assert report["controls"][0]["latents"] == report["controls"][0]["probe"] == {}
    assert "## Latents" not in markdown(report)


def test_controls_without_path_in_some_cells() -> None:
    results = changed(
        study(), "k4", 2, lambda cell: replace(cell, controls={"test": control_report("k4", 2, path=False)})
    )
    results = changed(results, "k4", 4, lambda cell: replace(cell, controls={}))
    report = build(results, 100)
    entry = report["controls"][0]
    assert (entry["conditions"]["own"]["seeds"], entry["path"]["injected"]["seeds"]) == (4, 3)
    none = build(replace(results, cells=[replace(cell, controls={}) for cell in results.cells]), 100)
    assert none["controls"] == []
    assert "## Controls" not in markdown(none)


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ({"conditions": {}}, "KeyError: 'answers'"),
        ({"conditions": {}, "answers": []}, "they have no common record"),
        ({"path": {"answers": []}}, "they have no common record"),
        ({"path": {"answers": [{"line": 1, "follows": None}]}}, "AttributeError: "),
        ({"conditions": {}, "answers": [{"line": 1, "conditions": {"own": {"metrics": {}}}}]}, "KeyError: 'success'"),
        ({"conditions": {}, "answers": [{"line": 1, "conditions": {"own": {"metrics": {"success": "x"}}}}]}, "could"),
    ],
)
def test_broken_controls_are_a_hole(broken: dict[str, Any], why: str) -> None:
    results = changed(study(), "k4", 3, lambda cell: replace(cell, controls={"test": broken}))
    report = build(results, 50)
    assert [one["arm"] for one in report["controls"]] == ["k8", "top"]
    (hole,) = report["holes"]
    assert (hole["arm"], hole["seed"], hole["evaluation"]) == ("k4", None, "test")
    assert hole["problem"].startswith(f"its controls cannot be read ({why}")


def test_a_record_without_a_score_under_one_condition_is_left_out_and_said() -> None:
    report = control_report("k4", 2)
    report["answers"][0]["conditions"]["swap"]["metrics"]["success"] = math.nan
    found = build(changed(study(), "k4", 2, lambda cell: replace(cell, controls={"test": report})), 50)
    assert found["controls"][0]["conditions"]["own"]["records"] == 19
    fault = "1 records have no score under some condition or seed of its controls and are left out"
    assert found["holes"] == [{"arm": "k4", "seed": None, "evaluation": "test", "problem": fault}]


# -------------------------------------------------------------------------------------------------------------- files

NASTY = "<b>k</b>|4_% $x$ & `c` *s* [l](u)"


class Tags(HTMLParser):
    """Which tags a page has, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def nasty(text: str) -> Results:
    """The study with an arm, an evaluation, a level and a setting named by `text`."""
    results = study()
    name = {"k4": text}
    cells = [
        replace(
            cell,
            arm=name.get(cell.arm, cell.arm),
            settings={**cell.settings, text: cell.arm},
            scores={
                text: replace(
                    cell.scores["test"], levels=[text if one == "5" else one for one in cell.scores["test"].levels]
                )
            },
            controls=dict.fromkeys([text], cell.controls["test"]) if cell.controls else {},
        )
        for cell in results.cells
    ]
    return Results(
        text,
        text,
        {name.get(arm, arm): text for arm in RATES},
        cells,
        ReportSpec(primary=contrast(text, "base", text)),
        {text: text},
    )


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    write_report(nasty(NASTY), tmp_path, 100)
    tags = Tags()
    tags.feed((tmp_path / "report.html").read_text())
    assert not tags.tags & {"b", "script", "em"}
    assert NASTY in tags.text
    for table in re.findall(r"(?:^\|.*\n)+", (tmp_path / "report.md").read_text(), re.M):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(counts) == 1
    assert r"\<b\>k\</b\>\|4\_% \$x\$ \& \`c\` \*s\* \[l\](u)" in (tmp_path / "report.md").read_text()
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert {row["arm"] for row in rows} == {"base", NASTY, "k8", "top"}


def test_names_in_figures_are_no_formulas_and_none_is_hidden() -> None:
    # As a formula this one is an error; and matplotlib hides legend entries with an underscore in front.
    name = r"_$\frac$ 100 %"
    results = nasty(name)
    report = build(results, 100)
    with style.styled():
        drawn = [*figures.curves(results, report), *figures.controls(report), *figures.scores(report)]
        for one in drawn:
            style.png(one.figure)
        for one in drawn[:2]:
            (legend,) = one.figure.legends
            assert name in [text.get_text().strip("\u200a") for text in legend.get_texts()]


def test_markdown_keeps_underscores_inside_words() -> None:
    assert escaped("latent_size _x_ a\nb") == r"latent_size \_x\_ a b"
    report = {**build(study([1]), 100), "question": "1. # is it?"}
    assert "\n1\\. # is it?\n" in markdown(report)


def test_pages_hold_their_parts_in_order() -> None:
    report = build(study(), 100)
    text = page(report, [(b"PNG", "a caption"), (b"GIF", "another")])
    order = [
        "<h1>study",
        "Why?",
        "On test, k4 gets 0.7",
        "data:image/png;base64,UE5H",
        "<h2>Arms",
        "<h2>Figures",
        "base64,R0lG",
    ]
    order += ["<h2>Contrasts", "Primary endpoint", "<h2>Controls", "<h2>Cost", "<h2>How it was made", "2026-12-01"]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    assert "http" not in text.replace("http-equiv", "")
    text = markdown(report, [("figures/a.png", "a caption")])
    order = ["# study", "Why?", "](figures/a.png)", "## Arms", "## Contrasts", "Primary endpoint", "## Controls"]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)


@pytest.mark.parametrize(
    ("arm", "short"),
    [
        ("mirage", "mirage"),
        ("k[stage1.latent_size=1,stage2.latent_size=1]", "k[1]"),
        ("k[stage1.latent_size=1,stage2.latent_size=2]", "k[1,2]"),
        ("k[a=1,b=1,c=2]", "k[1,1,2]"),
        ("pooling[stage1.compress_strategy=grid]", "pooling[grid]"),
        ("data[data_path=a,b.jsonl]", "data[a,b.jsonl]"),
        ("odd[1]", "odd[1]"),
    ],
)
def test_an_arm_is_called_by_the_values_that_it_varies(arm: str, short: str) -> None:
    assert label(arm) == short


def with_examples(results: Results) -> Results:
    """The study with a chance level and two answers, one of them without a picture."""
    records = results.cells[0].scores["test"].records
    one = {"arm": "k4", "seed": 1, "evaluation": "test", "question": "Where?", "right": "*Up*", "latents": 4}
    examples = [
        {**one, "line": 3, "answer": "Up", "score": 1.0, "picture": b"a PNG"},
        {**one, "line": 9, "answer": "Down " * 200, "score": 0.0, "picture": None},
    ]
    chance = {"test": {record: float(record[0] == "5") for record in records}}
    return replace(results, chance=chance, examples=examples, unseen=["evaluation other: gone"])


def test_a_report_leads_with_a_sentence_and_a_picture_and_shows_chance_and_two_answers(tmp_path: Path) -> None:
    bare = [replace(cell, controls={}, stages=[], settings={}) for cell in study().cells]
    report = write_report(with_examples(asking(replace(study(), cells=bare), contrasts=[])), tmp_path, 100)
    assert report["chance"]["test"] == {"overall": pytest.approx(1 / 3), "levels": {"5": 1.0, "6": 0.0, "10": 0.0}}
    assert "evaluation other: gone" in problems(report)
    found = report["primary"]["difference"]
    text = (tmp_path / "report.md").read_text()
    _, question, sentence, picture, caption, title = text.split("\n\n")[:6]
    assert question == "Why?"
    means = report["primary"]["means"]
    assert sentence.startswith(
        f"**On test, k4 gets {means['arm']:.3f} and base {means['base']:.3f} (success): a difference of"
    )
    assert f"{found['mean']:+.3f}" in sentence
    assert picture == "![figure](figures/lead.png)"
    assert caption.endswith("the best constant answer gets, 0.333.")
    assert title == "## Two answers"
    assert "gets 0.333.\n\n| arm | all |" in text
    assert "| picture | ![the question's picture](figures/example-1.png) |  |" in text
    assert r"| right | \*Up\* | \*Up\* |" in text
    assert "(4 latents) Up |" in text
    assert len(max(text.splitlines(), key=lambda line: line.count("Down"))) < 500
    assert (tmp_path / "figures/example-1.png").read_bytes() == b"a PNG"
    assert not (tmp_path / "figures/example-2.png").exists()
    assert base64.b64encode(b"a PNG").decode() in (tmp_path / "report.html").read_text()
    with style.styled():
        lead = figures.lead(report)
        assert "best constant answer" in [text.get_text() for text in lead.figure.legends[0].get_texts()]
        assert any(line.get_xdata()[0] == pytest.approx(1 / 3) for line in lead.figure.axes[0].lines)


def test_losses_of_other_stages_and_weights_have_axes_of_their_own() -> None:
    kinds = {"base": "sft", "k4": "stage1", "k8": "stage1", "top": "stage1"}
    cells = [
        replace(
            cell,
            stages=[stage(f"{cell.arm}/{cell.seed}", name=f"a {cell.arm}", **{"stage": kinds[cell.arm]})],
            settings={"stage1.ce_weight": 20} if cell.arm == "top" else {},
        )
        for cell in study().cells
    ]
    results = replace(study(), cells=cells)
    with style.styled():
        (drawn,) = figures.curves(results, build(results, 50))
    assert [axes.get_title() for axes in drawn.figure.axes if axes.get_visible()] == [
        "1, sft: a base (5 runs)",
        "1, stage1: a k4, a k8 (10 runs)",
        "1, stage1, stage1.ce_weight 20: a top (5 runs)",
    ]


def test_no_levels_and_equal_scores() -> None:
    results = study(levels=())
    cells = [
        replace(
            cell,
            scores={"test": columns([one._replace(metrics={"success": 1.0}) for one in rows(cell.scores["test"])])},
        )
        for cell in results.cells
    ]
    report = build(asking(replace(results, cells=cells), contrasts=[]), 100)
    assert report["primary"]["verdict"] == "equivalent"
    assert list(arm_of(report, "k4")["evaluations"]["test"]["levels"]) == ["?"]
    text = markdown(report)
    assert "level" not in text.split("## Cost")[0].replace("levels", "")
    with style.styled():
        # What leads is all there is.
        assert figures.scores(report) == []
        style.png(figures.lead(report).figure)


def test_csv_has_a_row_an_arm_seed_evaluation_and_level() -> None:
    rows = list(csv.DictReader(io.StringIO(sheet(build(study(), 100)))))
    assert len(rows) == 4 * 5 * 4
    row = next(one for one in rows if (one["arm"], one["seed"], one["level"]) == ("k8", "3", "10"))
    marks = [success("k8", 3, f"10-{i}", RATES["k8"]) for i in range(12)]
    assert float(row["score"]) == pytest.approx(average(marks))
    assert {key: row[key] for key in ("evaluation", "metric", "n", "steps", "rows", "tokens", "flops", "seconds")} == {
        **{"evaluation": "test", "metric": "success", "n": "12", "steps": "200", "rows": "12800"},
        **{"tokens": "2000000", "flops": "6000000000000000.0", "seconds": "100.0"},
    }


def test_files_are_strict_repeatable_and_without_what_is_gone(tmp_path: Path) -> None:
    def unmeasured(cell: Cell) -> Cell:
        curve = [{"step": 1.0, "loss": math.nan}, {"step": 2.0, "loss": 1.0}, {"step": 3.0}]
        return replace(cell, stages=[stage("x", flops=math.inf, seconds=0.0, peak_gb=None, curve=curve)])

    results = changed(study(), "k4", 2, unmeasured)
    # A date and a number as YAML has them.
    settings = {"since": datetime.date(2026, 1, 2), "rate": math.nan}
    results = replace(results, cells=[replace(cell, settings=cell.settings | settings) for cell in results.cells])
    # Half of a pair, as a record's level may have it: no text file can hold it.
    results = changed(results, "k8", 2, lambda cell: replace(cell, scores={}, problem="lost \ud83d"))
    report = write_report(results, tmp_path, 100)
    assert strict_json((tmp_path / "report.json").read_text()) == report
    assert "lost \\ud83d" in (tmp_path / "report.csv").read_text()
    cell = arm_of(report, "k4")["cells"][1]
    assert (cell["flops"], cell["samples_s"], cell["peak_gb"]) == (None, None, None)
    assert arm_of(report, "k4")["settings"] == SETTINGS["k4"] | {"since": "2026-01-02", "rate": None}
    files = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.*")}
    drawn = [
        "lead",
        "scores-test",
        "contrasts",
        "setting-latent-size",
        "setting-compress-strategy",
        "curves",
        "controls-test",
    ]
    assert set(files) == {f"report.{kind}" for kind in ("json", "csv", "md", "html")} | {
        f"figures/{name}.png" for name in [*drawn, "follow-test"]
    }
    write_report(results, tmp_path / "again", 100)
    again = tmp_path / "again"
    assert {path.relative_to(again).as_posix(): path.read_bytes() for path in again.rglob("*.*")} == files
    bare = [replace(cell, controls={}, stages=[], settings={}) for cell in results.cells]
    write_report(replace(results, cells=bare, report=ReportSpec()), tmp_path, 100)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"lead.png", "scores-test.png"}


def test_a_text_that_cannot_be_made_leaves_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mirage_ds.study.report.build.sheet", lambda report: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(study([1]), tmp_path, 50)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ figures


def test_every_axis_says_what_it_shows() -> None:
    results = study()
    report = build(results, 100)
    with style.styled():
        drawn = [
            *(figures.lead(report), *figures.scores(report), *figures.contrasts(report), *figures.controls(report)),
            *(*figures.sweeps(report), *figures.curves(results, report)),
        ]
        assert len(drawn) == 8
        for one in drawn:
            style.png(one.figure)
            for axes in one.figure.axes:
                if axes.get_visible():
                    assert axes.get_xlabel() or not axes.xaxis.get_tick_params()["labelbottom"]
                    named = [label.get_text() for label in axes.get_yticklabels()]
                    # Rows are named one by one; numbers need a label.
                    assert axes.get_ylabel() or not any(re.fullmatch(r"−?[\d.]+", name) for name in named)
            # Beside the axes, so that nothing is hidden.
            assert all(axes.get_legend() is None for axes in one.figure.axes)


def test_a_line_joins_arms_that_differ_in_one_setting_alone() -> None:
    report = build(study(), 100)
    with style.styled():
        drawn = {one.name: one.figure for one in figures.sweeps(report)}
    assert set(drawn) == {"setting-latent-size", "setting-compress-strategy"}
    (axes,) = drawn["setting-latent-size"].axes
    joined = [
        line.get_xdata() for line in axes.get_lines() if line.get_linestyle() == "-" and len(line.get_xdata()) > 1
    ]
    # 0, 4 and 8, evenly spaced.
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "4", "8"]
    assert [list(line) for line in joined] == [[1, 2]]
    means = [arm_of(report, name)["evaluations"]["test"]["overall"]["mean"] for name in ("k4", "k8")]
    assert [line.get_ydata().tolist() for line in axes.get_lines() if line.get_linestyle() == "-"] == [means]


def swept(settings: Mapping[str, Mapping[str, Any]], chains: Mapping[str, Sequence[str]]) -> Results:
    """One seed of arms with these settings, whose stages have these names."""
    cells = [
        Cell(arm, 0, own, [stage(f"{arm}/{name}", name=name) for name in chains[arm]], {"test": scored(arm, 0, 0.5)})
        for arm, own in settings.items()
    ]
    return Results("study", "Why?", dict.fromkeys(settings, ""), cells)


def lines_of(results: Results) -> dict[str, list[list[float]]]:
    """Figure → places of the points that its lines join."""
    with style.styled():
        return {
            one.name: [
                sorted(map(float, line.get_xdata()))
                for line in one.figure.axes[0].get_lines()
                if line.get_linestyle() in style.DASHES and len(line.get_xdata()) > 1
            ]
            for one in figures.sweeps(build(results, 50))
        }


def test_an_arm_without_the_setting_is_not_on_its_axis() -> None:
    results = study()
    cells = [replace(cell, settings={}) if cell.arm == "base" else cell for cell in results.cells]
    with style.styled():
        drawn = figures.sweeps(build(replace(results, cells=cells), 50))
    ticks = {one.name: [text.get_text() for text in one.figure.axes[0].get_xticklabels()] for one in drawn}
    assert ticks == {"setting-latent-size": ["4", "8"], "setting-compress-strategy": ["average", "topk"]}


def test_arms_of_other_stages_are_on_lines_of_their_own() -> None:
    settings = {f"{kind}{k}": {"latent_size": k} for kind in "ab" for k in (2, 4, 8)}
    chains = {arm: ("base", "stage1" if arm[0] == "a" else "placebo") for arm in settings}
    (lines,) = lines_of(swept(settings, chains)).values()
    assert len(lines) == 2
    assert all(len(line) == 3 for line in lines)
    (one,) = lines_of(swept(settings, dict.fromkeys(settings, ("base",)))).values()
    assert [len(line) for line in one] == [6]


def test_settings_that_vary_together_are_one_axis() -> None:
    settings = {f"k{k}": {"stage1.latent_size": k, "stage2.latent_size": k} for k in (1, 2, 4)}
    together = swept(settings, dict.fromkeys(settings, ("stage1", "stage2")))
    assert lines_of(together) == {"setting-stage1-latent-size": [[0, 1, 2]]}
    figure = figures.sweeps(build(together, 50))[0].figure
    assert figure.axes[0].get_xlabel() == "stage1.latent_size = stage2.latent_size"
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1", "2", "4"]
    # One that goes its own way: nothing differs in one setting alone.
    settings["k4"] = {"stage1.latent_size": 4, "stage2.latent_size": 3}
    assert lines_of(swept(settings, dict.fromkeys(settings, ("stage1", "stage2")))) == {}


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((12345678901, 12345678902), ["12345678901", "12345678902"]),
        ((0.1, 2.0, 2), ["0.1", "2"]),
        (("", "x", None), ["", "x"]),
    ],
)
def test_values_that_differ_stand_apart(values: Sequence[Any], ticks: list[str]) -> None:
    """None: the arm has no such setting."""
    settings = {f"a{at}": {} if one is None else {"path": one} for at, one in enumerate(values)}
    (drawn,) = figures.sweeps(build(swept(settings, dict.fromkeys(settings, ("s",))), 50))
    assert [label.get_text() for label in drawn.figure.axes[0].get_xticklabels()] == ticks


def test_many_arms_have_looks_of_their_own() -> None:
    looks = [style.look(number) for number in range(32)]
    assert len(set(looks)) == 32
    assert style.legible("é\n漢" + "x" * 50 + "end").startswith("é \\u6f22x")
    assert style.legible("é\n漢" + "x" * 50 + "end").endswith("xend")
    assert len(style.legible("y" * 100)) == 38


def many(count: int) -> Results:
    """So many arms of eight seeds, all compared with the first."""
    rng = random.Random(1)
    arms = {f"arm {number}": "" for number in range(count)}
    cells = [
        Cell(
            arm,
            seed,
            {"rows": number},
            [stage(f"{arm}/{seed}")],
            {"test": columns([Scored(str(i), str(i % 2), {"success": float(rng.random() < 0.5)}) for i in range(100)])},
        )
        for number, arm in enumerate(arms)
        for seed in range(8)
    ]
    contrasts = [contrast(arm, "arm 0", "test") for arm in arms if arm != "arm 0"]
    return Results("many", "?", arms, cells, ReportSpec(contrasts=contrasts))


@pytest.mark.slow
def test_a_thousand_cells_take_seconds(tmp_path: Path) -> None:
    results, fewer = many(125), many(25)
    start = time.process_time()
    report = build(results)
    # matplotlib takes a tenth of a second for an arm: 25 of them show what 125 would.
    write_report(fewer, tmp_path)
    assert time.process_time() - start < 20
    assert len(report["contrasts"]) == 124
