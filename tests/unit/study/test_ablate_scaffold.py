"""A scaffold in a study's chains: what the runs behind it start from and learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.studies import STAGES, opened, pretend, write_study

from mirage_ds.errors import UserError
from mirage_ds.study import execute
from mirage_ds.study.execute import Place, Runner, command

CHAIN = ["base", "scaffold", "stage1", "stage2"]
MORE = STAGES | {"scaffold": {"stage": "scaffold"}, "own": {"stage": "stage1", "feed": "own", "latent_loss": "l2"}}


def study(folder: Path, nano: Path, **changed: Any) -> Any:
    arms = {"learned": {"chain": CHAIN}, "pooled": {"chain": ["base", "stage1", "stage2"]}}
    evaluations = {"test": {"data_path": "data.jsonl", "controls": "own,oracle"}}
    given: dict[str, Any] = dict(stages=MORE, arms=arms, seeds=[0], evaluations=evaluations) | changed
    return opened(write_study(folder, nano, **given))


def test_stage1_starts_from_what_the_scaffold_started_from_and_learns_its_targets(tmp_path: Path, nano: Path) -> None:
    made, store = study(tmp_path, nano)
    learned, pooled = made.cells
    base, scaffold, stage1, stage2 = (made.nodes[key] for key in learned.stages)
    assert (scaffold.parent, stage1.parent, stage2.parent) == (base, base, stage1)
    assert (stage1.targets, scaffold.targets, stage2.targets) == (scaffold, None, None)
    assert made.nodes[pooled.stages[1]].targets is None
    assert made.nodes[pooled.stages[1]].key != stage1.key
    for node in (scaffold, stage1):
        store.prepare(node)
    written = yaml.safe_load((store.place(stage1) / "config.yaml").read_text())
    assert written["load_model_path"] == str(store.model(base))
    assert written["latent_targets"] == str(store.model(scaffold))
    assert "latent_targets" not in yaml.safe_load((store.place(scaffold) / "config.yaml").read_text())
    # Its oracle is the encoder, also where the model is that of the stage behind.
    controls = [node for node in made.nodes.values() if node.kind == "controls"]
    assert [node.targets for node in controls] == [scaffold, None]
    words = [command(node, store, Place(1)) for node in controls]
    assert words[0][words[0].index("--latent_targets") + 1] == str(store.model(scaffold))
    assert "--latent_targets" not in words[1]


def test_a_scaffold_in_front_starts_from_the_model_and_so_does_what_follows(tmp_path: Path, nano: Path) -> None:
    made, _ = study(tmp_path, nano, arms={"a": {"chain": ["scaffold", "own"]}})
    scaffold, own = (made.nodes[key] for key in made.cells[0].stages)
    assert (scaffold.parent, own.parent, own.targets) == (None, None, scaffold)
    assert own.material["settings"]["feed"] == "own"


def test_a_changed_scaffold_makes_a_new_stage1_and_old_runs_keep_their_keys(tmp_path: Path, nano: Path) -> None:
    one, _ = study(tmp_path, nano)
    other, _ = study(tmp_path, nano, stages=MORE | {"scaffold": {"stage": "scaffold", "learning_rate": 2e-5}})
    first, second = one.cells[0].stages, other.cells[0].stages
    assert first[0] == second[0]
    assert all(a != b for a, b in zip(first[1:], second[1:], strict=True))
    assert one.cells[1] == other.cells[1]
    # What a run without learned targets is a hash of does not name them.
    settings = one.nodes[one.cells[1].stages[1]].material
    assert not {"targets"} & settings.keys()
    assert not {"feed", "latent_targets"} & settings["settings"].keys()


def test_latents_made_together_are_another_run_and_idle_where_none_are_made(tmp_path: Path, nano: Path) -> None:
    chain: dict[str, Any] = {"chain": ["base", "own", "stage2"]}
    arms = {
        "turn": chain,
        "jacobi": chain | {"settings": {"latent_passes": 2}},
        "parallel": chain | {"settings": {"latent_passes": 0, "detach_latents": True}},
    }
    made, _ = study(tmp_path, nano, arms=arms)
    turn, jacobi, parallel = ([made.nodes[key] for key in cell.stages] for cell in made.cells)
    assert turn[0] == jacobi[0] == parallel[0]
    assert len({one.key for cell in (turn, jacobi, parallel) for one in cell[1:]}) == 6
    assert [one.config.latent_passes for one in jacobi] == [None, 2, 2]
    assert [one.config.detach_latents for one in parallel] == [False] * 3
    # Runs from before there was such a setting keep their keys.
    assert all("latent_passes" not in one.material["settings"] for one in turn)


def test_hidden_images_are_idle_where_no_answer_reads_latents(tmp_path: Path, nano: Path) -> None:
    asked = {"settings": {"bottleneck": True}}
    arms = {"a": asked | {"chain": ["base", "scaffold", "own", "stage2"]}, "b": asked | {"chain": ["stage1"]}}
    arms["b"]["settings"] = asked["settings"] | {"slots": "auxiliary"}
    made, _ = study(tmp_path, nano, arms=arms)
    found = [[made.nodes[key].config.bottleneck for key in cell.stages] for cell in made.cells]
    assert found == [[False, False, True, True], [False]]
    said = [made.nodes[key].material["settings"].get("bottleneck") for key in made.cells[0].stages]
    assert said == [None, None, True, True]


@pytest.mark.parametrize(
    "chain", [["scaffold"], ["base", "scaffold"], ["scaffold", "stage2"], ["scaffold", "sft", "stage1"]]
)
def test_a_scaffold_without_a_stage1_behind_it_is_refused(tmp_path: Path, nano: Path, chain: list[str]) -> None:
    with pytest.raises(UserError, match="arm a: scaffold trains no model; put a stage1 behind it"):
        study(tmp_path, nano, arms={"a": {"chain": chain}})


def test_settings_that_learned_targets_contradict_are_refused(tmp_path: Path, nano: Path) -> None:
    settings = {"stage1.compress_strategy": "grid"}
    with pytest.raises(UserError, match=r"arm a, stage stage1: .*--compress_strategy grid makes targets of features"):
        study(tmp_path, nano, arms={"a": {"chain": ["scaffold", "stage1"], "settings": settings}})
    with pytest.raises(UserError, match="latent_targets is set by the study itself"):
        study(tmp_path, nano, common={"model": str(nano), "latent_targets": "x"})


def test_stage1_waits_for_its_targets(tmp_path: Path, nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, store = study(tmp_path, nano, arms={"a": {"chain": ["scaffold", "stage1"]}})
    begun: list[str] = []
    monkeypatch.setattr(execute, "command", pretend(store, {}))
    scaffold = made.nodes[made.cells[0].stages[0]]

    def say(line: str) -> None:
        begun.append(line)
        if line.startswith("scaffold") and "begins" in line:
            # What a scaffold leaves, beside what a pretended run does.
            store.model(scaffold).mkdir(parents=True, exist_ok=True)
            (store.model(scaffold) / "latent_targets.json").write_text("{}")

    assert Runner(made, store, [Place(1), Place(1)], say).run()
    order = [line.split("-")[0] for line in begun if "begins" in line]
    assert order[:2] == ["scaffold", "stage1"]
    assert begun[1].startswith(scaffold.folder)
    assert all(store.is_done(node) for node in made.nodes.values())
