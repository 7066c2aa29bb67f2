"""examples/study2: the study is what docs/study2_plan.md plans, and its rows are what they say."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image, ImageChops

from mirage_ds.config.run import RunConfig
from mirage_ds.study.nodes import Study
from mirage_ds.study.store import open_study

REPO = Path(__file__).parents[3]
HERE, PAGE = REPO / "examples/study2", (REPO / "docs/study2_plan.md").read_text()
BASE = ("see-small", "see", "read")
SAMPLE = REPO / "data/sample_planning.jsonl"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The study as its own reader has it."""
    place = tmp_path_factory.mktemp("study2")
    shutil.copy(HERE / "learned.yaml", place)
    for name in set(re.findall(r"([\w-]+)/data\.jsonl", (HERE / "learned.yaml").read_text())):
        (place / name).mkdir()
        # Runs are named by their rows: equal ones would be one run.
        (place / name / "data.jsonl").write_text(json.dumps({"rows": name}) + "\n")
    return open_study(place / "learned.yaml")[0]


def chains(study: Study, seed: int) -> dict[str, dict[str, RunConfig]]:
    """Arm → stage and place in the chain → settings."""
    found = {}
    for cell in study.cells:
        if cell.seed == seed:
            nodes = [study.nodes[key] for key in cell.stages]
            found[cell.arm] = {f"{place} {node.name}": node.config for place, node in enumerate(nodes)}
    return found


def rows_of(config: RunConfig) -> str:
    """Name the folder of a run's records."""
    assert isinstance(config.data_path, Path)
    return config.data_path.parent.name


def test_arms_and_bases_are_the_pages(study: Study) -> None:
    rows = re.findall(r"^\| ([\w-]+) \|.*\| (24|12) \|$", PAGE, re.MULTILINE)
    seeds = {arm: {cell.seed for cell in study.cells if cell.arm == arm} for arm, _ in rows}
    assert {arm: len(found) for arm, found in seeds.items()} == {arm: int(count) for arm, count in rows}
    assert {cell.arm for cell in study.cells} - set(seeds) == {"shown", "base"}
    assert all(found == set(range(int(count))) for (_, count), found in zip(rows, seeds.values(), strict=True))


@pytest.mark.parametrize("seed", [0, 23])
def test_every_arm_begins_at_its_base_and_has_as_many_steps(study: Study, seed: int) -> None:
    (steps,) = set(re.findall(r"Three phases of (\d+) steps", PAGE))
    for arm, chain in chains(study, seed).items():
        names = [name.split()[1] for name in chain]
        assert tuple(names[:3]) == BASE[: len(names)]
        phases = list(chain.values())[3:]
        assert len(phases) == {"shown": 0, "base": 0, "text-lm": 2}.get(arm, 3)
        assert all(one.max_steps == int(steps) and one.rows_per_step == 64 for one in phases)
        assert all(one.seed == seed for one in chain.values())
        for one in phases:
            assert rows_of(one).endswith(f"-{seed}")
        for name, rows in zip(BASE, ("small-shown", "large-shown", "large-read"), strict=True):
            for place, one in chain.items():
                assert name != place.split()[1] or rows_of(one) == rows


def test_what_is_compared_is_the_pages(study: Study) -> None:
    report = study.spec.report
    assert report is not None
    (margin,) = re.findall(r"90 % interval lies within ± (0\.\d+)", PAGE)
    assert report.margin == float(margin)
    assert report.primary is not None
    assert (report.primary.arm, report.primary.base, report.primary.levels) == ("learned", "text", ())
    script = (HERE / "make_data.sh").read_text()
    assert "--levels 5,6 --proportions 1,1 --count 2000 --seed 40 --split test" in script
    assert "2,000 fresh maps, 1,000 each of levels 5 and 6" in " ".join(PAGE.split())


def test_the_base_is_trained_as_the_page_says(study: Study) -> None:
    chain = {name.split()[1]: one for name, one in chains(study, 3)["learned"].items()}
    rows = re.findall(r"^\| (see-small|see|read) \|.*\| (\d+) \| ([\d.e-]+) \|$", PAGE, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(BASE)
    for name, steps, rate in rows:
        assert (chain[name].max_steps, chain[name].learning_rate) == (int(steps), float(rate))
        assert chain[name].train_vision


def test_arms_are_what_their_names_say(study: Study) -> None:
    arms = {arm: list(chain.values())[3:] for arm, chain in chains(study, 0).items()}
    stages = {arm: [one.stage for one in phases] for arm, phases in arms.items()}
    assert stages["learned"] == stages["other"] == stages["letters"] == stages["parallel"]
    assert stages["learned"] == ["scaffold", "stage1", "stage2"]
    assert stages["mirage"] == stages["averaged"] == stages["bottleneck"] == ["stage1", "stage1", "stage2"]
    assert all(set(stages[arm]) == {"sft"} for arm in ("text", "text-lm", "marks", "pause", "caption"))
    for arm in ("learned", "other", "letters", "averaged", "parallel"):
        own = arms[arm][1]
        assert (own.feed, own.latent_loss, own.ce_weight) == ("own", "l2", 0.5)
    assert arms["mirage"][0].feed == "targets"
    assert [one.latent_size for one in arms["mirage-k2"]] == [2, 2, 2]
    assert [one.bottleneck for one in arms["bottleneck"]] == [True] * 3
    assert [one.latent_passes for one in arms["parallel"][1:]] == [0, 0]
    assert {one.slots for one in arms["marks"]} == {"marks"}
    data = {arm: [rows_of(one) for one in phases] for arm, phases in arms.items()}
    assert data["other"] == ["swapped-0", "swapped-0", "train-0"]
    assert data["letters"] == ["letters-0", "letters-0", "train-0"]
    assert data["caption"] == ["caption-0"] * 3
    assert data["learned"] == data["text"] == ["train-0"] * 3


def test_drawn_paths_are_read_beside_another_maps_board(tmp_path: Path) -> None:
    made = CliRunner().invoke(
        runpy.run_path(str(HERE / "reading_rows.py"))["main"], [str(SAMPLE), "--out", str(tmp_path / "r")]
    )
    assert made.exit_code == 0, made.output
    before = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    after = [json.loads(line) for line in (tmp_path / "r/data.jsonl").read_text().splitlines()]
    boards = {(SAMPLE.parent / row["image_input"]).resolve(): row for row in before}
    assert len(after) == len(before)
    for old, new in zip(before, after, strict=True):
        assert (tmp_path / "r" / new["image_output"]).resolve() == (SAMPLE.parent / old["image_output"]).resolve()
        shown = boards[(tmp_path / "r" / new["image_input"]).resolve()]
        assert shown["map_id"] != old["map_id"]
        assert shown["level"] == old["level"]
        assert new["text_output"] == old["text_output"]
    assert len({row["image_input"] for row in after}) == len(before)


def test_letters_are_those_of_the_moves(tmp_path: Path) -> None:
    tool = runpy.run_path(str(HERE / "letters.py"))
    made = CliRunner().invoke(tool["main"], [str(SAMPLE), "--out", str(tmp_path / "l")])
    assert made.exit_code == 0, made.output
    rows = [json.loads(line) for line in (tmp_path / "l/data.jsonl").read_text().splitlines()]
    for row in rows:
        picture = Image.open(tmp_path / "l" / row["image_output"])
        assert picture.size == (28 * row["level"],) * 2
    one, other = (tool["picture_of"](moves, 3) for moves in (["UP", "LEFT"], ["UP", "RIGHT"]))
    left, _, right, _ = ImageChops.difference(one, other).getbbox() or (0, 0, 0, 0)
    # They differ in the second cell alone.
    assert 28 <= left < right <= 56
