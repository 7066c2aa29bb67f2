"""A study whose evaluations would be refused is refused before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.studies import write_study

from mirage_ds.cli import cli
from mirage_ds.errors import UserError

ROW = {"text_input": "<image>Where?", "text_output": "<output_image>\\boxed{UP}", "task": "boxed", "level": 3,
       "image_input": "map.png", "image_output": "path.png"}  # fmt: skip


def rows(*changes: dict[str, Any]) -> str:
    changed = [{key: value for key, value in (ROW | one).items() if value is not None} for one in changes]
    return "".join(json.dumps(one) + "\n" for one in changed)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    for name in ("map", "path"):
        Image.new("RGB", (56, 56), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "data.jsonl").write_text(rows({}, {}))
    return tmp_path


def study(here: Path, nano: Path, test: str, evaluation: dict[str, Any]) -> str:
    (here / "test.jsonl").write_text(test)
    return str(write_study(here, nano, evaluations={"fresh": {"data_path": "test.jsonl"} | evaluation}))


@pytest.mark.parametrize(
    ("test", "evaluation", "said"),
    [
        ("", {}, "test.jsonl: holds no record"),
        ("{", {}, "test.jsonl: line 1, "),
        (rows({}, {"image_input": "gone.png"}), {}, "test.jsonl, line 2, image_input: no image 'gone.png'"),
        (rows({"image_input": "broken.png"}), {}, "test.jsonl, line 1, image_input: "),
        (rows({"task": "vsp-spatial-planning"}), {}, "record on line 1 has no 'map_desc'"),
        (rows({"task": None}), {"task": "vsp-spatial-plannin"}, "unknown task 'vsp-spatial-plannin'"),
        (rows({"task": None}), {"task": "nowhere:Task"}, "task nowhere:Task: no such module here"),
        (rows({"text_output": "UP"}), {}, "record on line 1: a record's own answer 'UP' cannot be read"),
        # The controls ask for more.
        (rows({"text_output": "\\boxed{UP}", "image_output": None}), {"controls": "zero"}, "test.jsonl, line 1, "
         "text_output: no latent block"),
        (rows({"image_output": None}), {"controls": "oracle"}, "test.jsonl, line 1, image_output: stage1 needs"),
        (rows({"image_output": "gone.png"}), {"controls": "oracle"}, "test.jsonl, line 1, image_output: no image"),
        (rows({}, {"level": 4}), {"controls": "swap"}, "--latents swap: the record on line 1 is the only one of level"),
        (rows({}), {"controls": "path"}, "--latents path is about the paths of vsp-spatial-planning"),
    ],
)  # fmt: skip
def test_a_study_that_could_not_be_evaluated_is_refused(
    test: str, evaluation: dict[str, Any], said: str, here: Path, nano: Path
) -> None:
    with pytest.raises(UserError) as caught:
        cli.main(["ablate", "plan", study(here, nano, test, evaluation)], standalone_mode=False)
    assert str(caught.value).replace(f"{here}/", "").startswith(f"evaluation fresh: {said}")
    assert "\n" not in str(caught.value)


def test_it_is_refused_by_run_too_with_nothing_begun(here: Path, nano: Path) -> None:
    file = study(here, nano, "", {})
    with pytest.raises(UserError, match=r"evaluation fresh: .*test\.jsonl: holds no record"):
        cli.main(["ablate", "run", file], standalone_mode=False)
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("test", "evaluation"),
    [
        (rows({}), {}),
        # A helper is asked for by the condition that feeds it, and by no other.
        (rows({"image_output": None}), {"controls": "zero,off"}),
        (rows({"image_output": "gone.png"}), {"controls": "zero"}),
        (rows({}, {}), {"controls": "own,swap,oracle"}),
        # What is not taken is not looked at.
        (rows({}, {"image_input": "gone.png"}), {"most": 1}),
    ],
)
def test_a_study_that_can_be_evaluated_is_planned(
    test: str, evaluation: dict[str, Any], here: Path, nano: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["ablate", "plan", study(here, nano, test, evaluation)], standalone_mode=False)
    assert "4 cells" in capsys.readouterr().out
