"""Results that travel from one machine to another."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.studies import Scored, columns

from mirage_ds.errors import UserError
from mirage_ds.study.report.build import build
from mirage_ds.study.results import Cell, Results, StageResult, export, load, merge


def cell(arm: str, seed: int, problem: str | None = None) -> Cell:
    stage = StageResult("sft", f"sft-{seed}", "sft", 2, 8, 80, 1e9, 1.5, 5.3, 0.5, [{"step": 1.0, "loss": 2.0}])
    scores = [Scored(str(i), str(5 + i % 2), {"success": float((i + seed) % 3 == 0), "moves": i / 2}) for i in range(9)]
    answers = [
        {
            "line": i,
            "conditions": {name: {"metrics": {"success": float(i % 2)}, "text": "UP"} for name in ("own", "zero")},
        }
        for i in range(9)
    ]
    conditions = {name: {"score": {"metric": "success"}} for name in ("own", "zero")}
    known = {"chain": f"{arm}{seed}", "keys": {f"{kind} test": f"{kind}{arm}{seed}" for kind in ("scores", "controls")}}
    if problem:
        return Cell(arm, seed, {}, [], problem=problem, **known)
    controls = {"test": {"conditions": conditions, "answers": answers}}
    return Cell(arm, seed, {"latent_size": 4}, [stage], {"test": columns(scores)}, controls, **known)


WHOLE = Results("s", "?", {"a": "", "b": ""}, [cell(arm, seed) for arm in "ab" for seed in (0, 1)])


def test_cells_come_back_as_they_were_without_what_answers_said(tmp_path: Path) -> None:
    assert export(WHOLE, tmp_path / "part.json.gz") == 4
    back = load(tmp_path / "part.json.gz")
    for one, other in zip(back, WHOLE.cells, strict=True):
        assert replace(one, controls={}) == replace(other, controls={}, settings={})
    # The results themselves keep them.
    assert WHOLE.cells[0].controls["test"]["answers"][0]["conditions"]["own"]["text"] == "UP"
    assert b"UP" not in gzip.decompress((tmp_path / "part.json.gz").read_bytes())
    export(WHOLE, tmp_path / "again.json.gz")
    assert (tmp_path / "again.json.gz").read_bytes() == (tmp_path / "part.json.gz").read_bytes()


def test_half_of_a_surrogate_pair_comes_back(tmp_path: Path) -> None:
    level = Scored("0", "lost \ud83d", {"success": 1.0})
    export(replace(WHOLE, cells=[replace(WHOLE.cells[0], scores={"test": columns([level])})]), tmp_path / "part.gz")
    assert load(tmp_path / "part.gz")[0].scores["test"].levels == ["lost \ud83d"]


def test_a_report_of_parts_is_the_report_of_the_whole(tmp_path: Path) -> None:
    parts = []
    for number, seed in enumerate((0, 1)):
        parts.append(tmp_path / f"{number}.gz")
        export(replace(WHOLE, cells=[one for one in WHOLE.cells if one.seed == seed]), parts[-1])
    holes = [replace(cell(one.arm, one.seed, "not run")) for one in WHOLE.cells]
    merged, said = merge(replace(WHOLE, cells=[replace(one, settings={"latent_size": 4}) for one in holes]), parts)
    assert [line.split(": ")[1] for line in said] == ["2 cell(s), 2 of the study filled"] * 2
    assert build(merged, 200) == build(WHOLE, 200)


def test_what_is_there_stays_and_strangers_are_not_taken(tmp_path: Path) -> None:
    other = replace(WHOLE.cells[0], scores={"test": columns([])})
    stranger = replace(WHOLE.cells[0], chain="x", keys={"scores test": "y", "controls test": "z"})
    export(replace(WHOLE, cells=[other, stranger]), tmp_path / "part.gz")
    merged, said = merge(WHOLE, [tmp_path / "part.gz"])
    assert merged == WHOLE
    assert said[0].endswith("2 cell(s), 0 of the study filled, 1 are of other settings or records than this study's")


def test_a_renamed_arm_is_called_what_it_is_called_now(tmp_path: Path) -> None:
    export(WHOLE, tmp_path / "part.gz")
    renamed = replace(cell("a", 0, "not run"), arm="new", settings={"k": 1})
    merged, _ = merge(replace(WHOLE, cells=[renamed]), [tmp_path / "part.gz"])
    assert (merged.cells[0].arm, merged.cells[0].settings, merged.cells[0].problem) == ("new", {"k": 1}, None)


def test_an_evaluation_is_taken_by_its_key_whatever_it_is_called_and_stands_beside(tmp_path: Path) -> None:
    export(WHOLE, tmp_path / "part.gz")
    keys = {"scores more": "new", "scores fresh": "scoresa0", "controls fresh": "controlsa0"}
    one = replace(cell("a", 0, "not run"), keys=keys)
    merged, _ = merge(replace(WHOLE, cells=[one]), [tmp_path / "part.gz"])
    found = merged.cells[0]
    assert found.scores == {"fresh": WHOLE.cells[0].scores["test"]}
    assert set(found.controls) == {"fresh"}
    assert found.problem == "not run", "one evaluation is still missing"
    # A second file brings what is missing; what is there stays.
    more = replace(WHOLE.cells[0], scores={"x": WHOLE.cells[1].scores["test"]}, controls={}, keys={"scores x": "new"})
    export(replace(WHOLE, cells=[more]), tmp_path / "more.gz")
    merged, _ = merge(merged, [tmp_path / "more.gz"])
    assert merged.cells[0].scores == {**found.scores, "more": more.scores["x"]}
    assert merged.cells[0].problem is None


def test_what_is_no_such_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("no gzip")
    (tmp_path / "b").write_bytes(gzip.compress(b"[]"))
    (tmp_path / "c").write_bytes(gzip.compress(json.dumps({"format": 9}).encode()))
    export(WHOLE, tmp_path / "d")
    (tmp_path / "d").write_bytes((tmp_path / "d").read_bytes()[:50])
    (tmp_path / "f").write_bytes(
        gzip.compress(json.dumps({"study": "s", "made": {}, "cells": [{"arm": "a"}]}).encode())
    )
    (tmp_path / "h").write_bytes(gzip.compress(b"{"))
    for name, said in {
        "a": "Not a gzipped file",
        "b": "Input should be a valid dictionary",
        "c": "format: Input should be 2",
        "d": "ended before",
        "f": "seed: Field required",
        "e": "No such file",
        "h": "Expecting property name",
    }.items():
        with pytest.raises(UserError, match=f"not a file of this version's `mirage-ds ablate export`.*{said}"):
            load(tmp_path / name)
    with pytest.raises(UserError, match="no arm of the study has been evaluated"):
        export(replace(WHOLE, cells=[cell("a", 0, "not run")]), tmp_path / "g")
    assert not (tmp_path / "g").exists()
