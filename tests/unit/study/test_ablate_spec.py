"""A study's file: what it becomes, what runs once, what makes a new run, what is refused."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import caller
from support.studies import STAGES, opened, write_study

from mirage_ds.config.rl import RL_ONLY
from mirage_ds.config.run import RunConfig
from mirage_ds.errors import UserError
from mirage_ds.study.collect import POINTS, curve_of, stated
from mirage_ds.study.execute import Place, command
from mirage_ds.study.nodes import MACHINE, model_hash, records_hash
from mirage_ds.study.overview import steps_of
from mirage_ds.study.spec import arm_names, read_study


def folders(file: Path) -> list[str]:
    return [node.folder for node in opened(file)[0].nodes.values()]


def names(file: Path) -> list[str]:
    return [node.name if node.kind == "train" else node.kind for node in opened(file)[0].nodes.values()]


def test_equal_parts_of_chains_are_one_run(tmp_path: Path, nano: Path) -> None:
    arms = {
        "text": {"chain": ["base", "sft", "sft"]},
        "one": {"chain": ["base", "stage1"]},
        "both": {"chain": ["base", "stage1", "stage2"]},
        "k": {"chain": ["base", "stage1", "stage2"], "grid": {"stage2.ce_weight": [0.5, 2.0]}},
    }
    study, _ = opened(write_study(tmp_path, nano, arms=arms))
    trained = [node.name for node in study.nodes.values() if node.kind == "train"]
    # One base for both seeds, since it fixes its own; each seed: two sft, one stage1 for four arms, three stage2.
    assert sorted(trained) == sorted(["base"] + 2 * ["sft", "sft", "stage1", "stage2", "stage2", "stage2"])
    cells = {(cell.arm, cell.seed): cell for cell in study.cells}
    assert len(cells) == 2 * 5
    one, both = cells["one", 0], cells["both", 0]
    assert one.stages == both.stages[:2]
    assert cells["one", 1].stages[0] == one.stages[0]
    assert cells["one", 1].stages[1] != one.stages[1]
    text = cells["text", 0].stages
    assert len(set(text)) == 3, "the second sft starts from the first"
    assert [study.nodes[key].parent for key in text] == [None, *(study.nodes[key] for key in text[:2])]
    assert set(cells["k[stage2.ce_weight=0.5]", 0].settings) == {"stage2.ce_weight"}


def test_every_node_stands_behind_its_parent_and_seeds_go_one_by_one(tmp_path: Path, nano: Path) -> None:
    study, _ = opened(write_study(tmp_path, nano, seeds=[0, 1, 2]))
    order = list(study.nodes)
    parents = {key: node.parent for key, node in study.nodes.items()}
    assert all(one is None or order.index(one.key) < order.index(key) for key, one in parents.items())
    seeds = [study.nodes[key].config.seed for key in order if study.nodes[key].kind == "train"][1:]
    assert seeds == sorted(seeds)


def test_variations(tmp_path: Path, nano: Path) -> None:
    chain = ["base", "stage1"]
    arms = {
        "grid": {"chain": chain, "grid": {"latent_size": [2, 4], "compress_strategy": ["average", "grid"]}},
        "pairs": {"chain": chain, "pairs": {"latent_size": [2, 8], "ce_weight": [0.1, 0.2]}},
        "list": {"chain": chain, "list": [{"latent_loss": "l2"}, {"slots": "auxiliary"}]},
        "plain": {"chain": chain, "seeds": 1},
    }
    for one in arms.values():
        one["chain"] = ["stage1"]
    study, _ = opened(write_study(tmp_path, nano, arms=arms))
    assert list(arm_names(study.spec)) == [
        "grid[latent_size=2,compress_strategy=average]",
        "grid[latent_size=2,compress_strategy=grid]",
        "grid[latent_size=4,compress_strategy=average]",
        "grid[latent_size=4,compress_strategy=grid]",
        "pairs[latent_size=2,ce_weight=0.1]",
        "pairs[latent_size=8,ce_weight=0.2]",
        "list[latent_loss=l2]",
        "list[slots=auxiliary]",
        "plain",
    ]
    seeds = {arm: [cell.seed for cell in study.cells if cell.arm == arm] for arm in arm_names(study.spec)}
    assert seeds.pop("plain") == [0]
    assert set(map(tuple, seeds.values())) == {(0, 1)}
    configs = {cell.arm: study.nodes[cell.stages[-1]].config for cell in study.cells}
    assert (configs["pairs[latent_size=8,ce_weight=0.2]"].latent_size, configs["plain"].latent_size) == (8, 4)
    # k = 4, average is the plain arm: it runs once.
    plain = next(cell for cell in study.cells if cell.arm == "plain")
    same = next(cell for cell in study.cells if cell.arm == "grid[latent_size=4,compress_strategy=average]")
    assert plain.stages == same.stages


def test_settings_win_in_their_order(tmp_path: Path, nano: Path) -> None:
    study, _ = opened(
        write_study(
            tmp_path,
            nano,
            common={"model": str(nano), "data_path": "data.jsonl", "learning_rate": 1e-5, "max_steps": 2, "epochs": 3},
            stages=STAGES | {"sft": {"stage": "sft", "learning_rate": 2e-5, "warmup_steps": 5}},
            arms={
                "a": {
                    "chain": ["base", "sft"],
                    "settings": {"sft.warmup_steps": 6, "epochs": 4},
                    "grid": {"epochs": [5]},
                }
            },
            seeds=[0, {"seed": 1, "sft.learning_rate": 3e-5, "base.seed": 7}],
        )
    )
    of = {cell.seed: [study.nodes[key].config for key in cell.stages] for cell in study.cells}
    (base, sft), (other, last) = of[0], of[1]
    assert (base.learning_rate, sft.learning_rate, last.learning_rate) == (1e-5, 2e-5, 3e-5)
    assert (base.warmup_steps, sft.warmup_steps, sft.epochs, base.epochs) == (10, 6, 5, 5)
    # A stage that fixes its seed keeps it, unless the seed's entry says otherwise.
    assert (base.seed, sft.seed, other.seed, last.seed) == (0, 0, 7, 1)


@pytest.mark.parametrize("field", ["learning_rate", "data", "images", "model", "parent", "json", "evaluated"])
def test_what_a_result_follows_from_makes_a_new_run(tmp_path: Path, nano: Path, field: str) -> None:
    base = tmp_path / "nano"
    shutil.copytree(nano, base)
    common = {"model": "nano", "data_path": "data.jsonl", "max_steps": 2}
    file = write_study(tmp_path, nano, common=common)
    before = folders(file)
    if field == "learning_rate":
        write_study(tmp_path, nano, common=common | {"learning_rate": 2e-5})
    elif field == "data":
        (tmp_path / "data.jsonl").write_text((tmp_path / "data.jsonl").read_text().replace("UP", "DOWN"))
    elif field == "images":
        write_study(tmp_path, nano, common=common | {"max_pixels": 10_000})
    elif field == "model":
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"note": 1}))
    elif field == "parent":
        write_study(tmp_path, nano, common=common, stages=STAGES | {"base": {"stage": "sft", "seed": 1}})
    elif field == "json":
        (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
        write_study(tmp_path, nano, common=common | {"deepspeed": "ds.json"})
    else:
        more = {"eval_data_path": "data.jsonl", "eval_every": 1}
        write_study(tmp_path, nano, common=common | more)
    assert not set(before) & set(folders(file))


def test_what_changes_nothing_makes_no_new_run(tmp_path: Path, nano: Path) -> None:
    common = {"model": str(nano), "data_path": "data.jsonl", "max_steps": 2}
    before = folders(write_study(tmp_path, nano, common=common))
    machine = {"num_workers": 0, "micro_batch_size": 4, "gradient_checkpointing": False, "save_every": 1}
    (tmp_path / "moved").mkdir()
    shutil.copy(tmp_path / "data.jsonl", tmp_path / "moved" / "other.jsonl")
    shutil.copytree(nano, tmp_path / "moved" / "nano")
    moved = {"model": "moved/nano", "data_path": "moved/other.jsonl", "global_batch_size": 8}
    assert folders(write_study(tmp_path, nano, common=common | machine | moved)) == before
    # And what has no meaning in a stage: k of text, the pooling of stage2.
    stages = STAGES | {"base": {"stage": "sft", "seed": 0, "latent_size": 9, "compress_strategy": "grid"}}
    assert folders(write_study(tmp_path, nano, common=common, stages=stages)) == before
    paused = STAGES | {"base": {"stage": "sft", "seed": 0, "slots": "pause", "latent_size": 9}}
    assert not set(folders(write_study(tmp_path, nano, common=common, stages=paused))) & set(before)


def test_runs_that_the_file_puts_on_the_cpu_are_others_than_on_gpus(tmp_path: Path, nano: Path, monkeypatch) -> None:
    """A recipe computes in float32 there. The machine that looks does not count: it may be a login node."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    on_gpus = folders(write_study(tmp_path, nano))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert folders(write_study(tmp_path, nano)) == on_gpus
    # The key of a run of GPUs is what it was.
    assert "device" not in opened(write_study(tmp_path, nano))[0].nodes.popitem()[1].material
    launch = {"environment": {"DS_ACCELERATOR": "cpu"}}
    assert not set(folders(write_study(tmp_path, nano, launch=launch))) & set(on_gpus)
    assert folders(write_study(tmp_path, nano, launch={"environment": {"A": "b"}})) == on_gpus


def test_every_setting_is_either_hashed_or_named_as_the_machines(
    nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    study, _ = opened(write_study(tmp_path, nano))
    node = next(iter(study.nodes.values()))
    # Settings of adapters, columns, rl and how latents are made or seen stand there only where there are such.
    later = {name for name in RunConfig.model_fields if name.startswith("lora_")} | {
        "columns",
        "feed",
        "bottleneck",
        "latent_passes",
        *RL_ONLY,
    }
    assert set(RunConfig.model_fields) - MACHINE - later == set(node.material["settings"])
    assert set(RunConfig.model_fields) >= MACHINE
    (tmp_path / "rewards_here.py").write_text("def one(answers, records): return [1.0] * len(answers)\n")
    stages = {"end": {"stage": "rl", "reward": ["format", "rewards_here:one*0.5"], "latent_loss": "l2"}}
    plain = {"one": {"chain": ["end"]}}
    learnt = next(iter(opened(write_study(tmp_path, nano, stages=stages, arms=plain))[0].nodes.values())).material
    assert set(learnt["settings"]) >= set(RL_ONLY) - MACHINE
    assert learnt["settings"]["latent_loss"] == "cosine"
    assert set(learnt["rewards"]) == {"rewards_here:one"}
    # These are hashed by content, under another name.
    assert node.material["rows_per_step"] == 8
    assert node.material["data"] == records_hash(tmp_path / "data.jsonl")
    assert node.material["model"] == model_hash(str(nano))


def test_controls_run_where_answers_see_latents(tmp_path: Path, nano: Path) -> None:
    arms = {
        "text": {"chain": ["sft"]},
        "pause": {"chain": ["sft"], "settings": {"slots": "pause"}},
        "aux": {"chain": ["stage1"], "settings": {"slots": "auxiliary"}},
        "one": {"chain": ["stage1"]},
        "two": {"chain": ["stage1", "stage2"]},
        "learnt": {"chain": ["stage1", "rl"]},
        "mute": {"chain": ["stage1", "rl"], "settings": {"rl.latent_policy": "text"}},
        "words": {"chain": ["sft", "rl"]},
    }
    asked = {"data_path": "data.jsonl", "controls": "zero,own"}
    evaluations = {"test": asked, "some": asked | {"arms": ["two"], "controls_most": 2}}
    stages = STAGES | {"rl": {"stage": "rl"}}
    study, store = opened(write_study(tmp_path, nano, arms=arms, seeds=[0], evaluations=evaluations, stages=stages))
    cells = {cell.arm: cell for cell in study.cells}
    assert {name for name, cell in cells.items() if "controls test" in cell.results} == {"one", "two", "learnt"}
    scored = {name: study.nodes[cell.results["scores test"]] for name, cell in cells.items()}
    silent = {name for name, node in scored.items() if "--no_latents" in command(node, store, Place(1))}
    assert silent == {"text", "mute", "words"}
    assert {name for name, cell in cells.items() if "scores some" in cell.results} == {"two"}
    assert study.nodes[cells["one"].results["controls test"]].material["conditions"] == ["own", "zero"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"arms": {"a": {"chain": ["bass"]}}}, r"no stage 'bass' \(did you mean 'base'\?\)"),
        ({"arms": {"a": {"chain": ["sft"], "settings": {"learning_rat": 1}}}}, r"no setting 'learning_rat' \(did you"),
        ({"arms": {"a": {"chain": ["sft"], "settings": {"stage3.epochs": 1}}}}, "no stage 'stage3'"),
        ({"common": {"save_model_path": "x"}}, "save_model_path is set by the study itself"),
        ({"arms": {"a": {"chain": ["sft"], "grid": {"epochs": [1]}, "pairs": {"seed": [1]}}}}, "give one of them"),
        ({"arms": {"a": {"chain": ["sft"], "pairs": {"epochs": [1], "seed": [1, 2]}}}}, "make them equally long"),
        ({"arms": {"a": {"chain": ["sft"], "grid": {"epochs": [1, 1]}}}}, r"arm a\[epochs=1\] is there twice"),
        ({"arms": {"a": {"chain": ["sft"], "seeds": 3}}}, "arm a: 3 seeds, the study has 2"),
        ({"arms": {"a/b": {"chain": ["sft"]}}}, "a name may only have letters"),
        ({"seeds": [{"base.seed": 3}]}, "needs `seed`"),
        ({"seeds": [1, 1]}, "a number is there twice"),
        ({"seeds": [1, "1"]}, "a number is there twice"),
        ({"seeds": [0.5]}, "seeds.0.int: Input should be a valid integer, got a number with a fractional part"),
        ({"seeds": ["one"]}, "seeds.0.int: Input should be a valid integer, unable to parse"),
        ({"evaluations": {"test": {"data_path": "none.jsonl"}}}, "evaluations.test.data_path: no file"),
        ({"evaluations": {"test": {"data_path": "data.jsonl", "arms": ["x"]}}}, "evaluation test: no arm 'x'"),
        ({"evaluations": {"test": {"data_path": "data.jsonl", "controls": "zer"}}}, "no condition 'zer'"),
        ({"arms": {"a": {"chain": ["sft"], "settings": {"epochs": -1}}}}, "arm a, stage sft: epochs: Input should be"),
        ({"arms": {"a": {"chain": ["sft"], "settings": {"slots": "auxiliary"}}}}, "--slots auxiliary: --stage sft"),
        ({"common": {"model": "/no/model", "data_path": "data.jsonl"}}, "model /no/model: no such folder"),
        ({"common": {"data_path": "data.jsonl"}}, "arm text, stage base: settings: --model is required"),
        ({"arms": {"a": {"chain": ["sft"], "abuot": "x"}}}, "arms.a.abuot: unknown key 'abuot'"),
        ({"arms": {"a": {"chain": []}}}, "arms.a.chain: List should have at least 1 item"),
        ({"arms": {"a": {"chain": ["sft"], "grid": {"epochs": []}}}}, "epochs: an empty list makes no arm"),
        ({"report": {"primary": {"arm": "mirage", "base": "txt", "evaluation": "test"}}}, "report: no arm 'txt'"),
        ({"report": {"contrasts": [{"arm": "mirage", "base": "text", "evaluation": "t"}]}}, "no evaluation 't'"),
        ({"colour": "red"}, "unknown key 'colour'"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, nano: Path, changed: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        opened(write_study(tmp_path, nano, **changed))


def test_seeds_are_whole_numbers_however_they_are_written(tmp_path: Path, nano: Path) -> None:
    study, _ = opened(write_study(tmp_path, nano, seeds=["3", 4.0, True, {"seed": False}]))
    assert {repr(cell.seed) for cell in study.cells} == {"3", "4", "1", "0"}


def test_relative_paths_start_at_the_file(tmp_path: Path, nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_study(tmp_path, nano)
    monkeypatch.chdir("/")
    assert read_study(file).out == tmp_path / "runs"
    assert opened(file)[0].cells


def test_records_of_a_folder_and_a_pattern_are_hashed_by_content(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", "1"), ("b.jsonl", "2")):
        (tmp_path / name).write_text(text)
    whole = records_hash(tmp_path)
    assert records_hash(tmp_path / "*.jsonl") == whole
    (tmp_path / "b.jsonl").write_text("3")
    assert records_hash(tmp_path) != whole
    with pytest.raises(UserError, match="no file has such a name"):
        records_hash(tmp_path / "*.parquet")


def test_a_large_weight_file_is_told_apart_by_its_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mirage_ds.study.nodes.WHOLE_BYTES", 100)
    monkeypatch.setattr("mirage_ds.study.nodes.END_BYTES", 10)
    hashes = set()
    for number, content in enumerate((b"a" * 200, b"a" * 199 + b"b", b"b" + b"a" * 199, b"a" * 201)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(content)
        hashes.add(model_hash(str(folder)))
    assert len(hashes) == 4
    assert model_hash("Qwen/Qwen2.5-VL-7B-Instruct") == "Qwen/Qwen2.5-VL-7B-Instruct"


def test_the_planning_study_is_what_its_plan_says(tmp_path: Path, nano: Path) -> None:
    example = Path(__file__).parents[3] / "examples" / "study" / "planning.yaml"
    shutil.copy(example, tmp_path / "planning.yaml")
    for seed in (0, 2):
        shutil.copytree(nano, tmp_path / f"nano-{seed}")
        config = json.loads((nano / "config.json").read_text())
        (tmp_path / f"nano-{seed}" / "config.json").write_text(json.dumps(config | {"note": seed}))
    rest = ("dev", "dev-helper", "dev-blind", "dev-read", "wide-helper", "train-blind")
    for name in ("base0", "base2", "train", "swapped", "test", *rest):
        (tmp_path / name).mkdir()
        count = 3000 if name == "wide-helper" else 1000
        rows = [{"text_input": f"{name} {row}", "text_output": "x", "level": 5} for row in range(count)]
        (tmp_path / name / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    study, _ = opened(tmp_path / "planning.yaml")
    arms = {name: sum(cell.arm.partition("[")[0] == name for cell in study.cells) for name in study.spec.arms}
    assert (arms["sft"], arms["mirage"]) == (8, 8)
    assert {arms[name] for name in ("pause", "marks", "grounded", "own", "auxiliary", "placebo")} == {4}
    assert (arms["k"], arms["pooling"]) == (6, 4)
    trained = [node for node in study.nodes.values() if node.kind == "train"]
    bases = [node for node in trained if node.name == "base"]
    assert [(node.config.seed, node.config.max_steps, node.config.train_targets) for node in bases] == [
        (0, 2000, True),
        (2, 2000, True),
    ]
    # Two phases of 235 steps of 64 rows at one learning rate, whatever the arm.
    phases = [node.config for node in trained if node.name not in ("base", "shown")]
    assert {(steps_of(one), one.rows_per_step, one.learning_rate, one.adam_beta2) for one in phases} == {
        (235, 64, 1e-3, 0.98)
    }
    # Both phases of an arm see their rows in the order of the seed, and the seeds halve the bases.
    assert {cell.seed % 2: study.nodes[cell.stages[0]].config.seed for cell in study.cells} == {0: 0, 1: 2}
    assert study.spec.report.primary.levels == ("5", "6")
    # The gates, one for each base, on other maps than the test's.
    assert {arms[name] for name in ("base", "shown", "blind")} == {2}
    assert {steps_of(node.config) for node in trained if node.name == "shown"} == {469}
    fresh = study.spec.evaluations["test"]
    assert not {"base", "shown", "blind"} & set(fresh.arms)
    assert all(one.data_path.parent.name.startswith("dev") for one in study.spec.evaluations.values() if one != fresh)


def test_the_recipes_chains_take_as_many_steps_and_never_see_the_test(tmp_path: Path, nano: Path) -> None:
    example = Path(__file__).parents[3] / "examples" / "vsp_planning"
    shutil.copy(example / "recipe.yaml", tmp_path / "recipe.yaml")
    shutil.copytree(nano, tmp_path / "nano")
    for name, count in (("base", 16000), ("train", 20000), ("test", 1216)):
        (tmp_path / name).mkdir()
        rows = "".join(f'{{"text_input": "{name} {row}", "text_output": "x", "level": 5}}\n' for row in range(count))
        (tmp_path / name / "data.jsonl").write_text(rows)
    study, _ = opened(tmp_path / "recipe.yaml")
    trained = [node.config for node in study.nodes.values() if node.kind == "train"]
    stages = {
        node.key: (node.name, node.config.stage, steps_of(node.config)) for node in study.nodes.values() if node.config
    }
    base = ("base", "stage1", 2000)
    assert [[stages[key] for key in cell.stages] for cell in study.cells] == [
        [base, ("stage1", "stage1", 938), ("stage2", "stage2", 1563)],
        [base, ("text1", "sft", 938), ("text2", "sft", 1563)],
    ]
    assert {one.data_path.parent.name for one in study.spec.evaluations.values()} == {"test"}
    assert not any("test" in str(one.data_path.relative_to(tmp_path)) for one in trained)
    script = (example / "make_data.sh").read_text()
    subprocess.run(["bash", "-n", example / "make_data.sh"], check=True)
    assert script.count("--split test") == 1
    assert f"--count {1216} --seed 4 --split test --out test" in script


def test_the_arm_that_varies_nothing_has_its_place_among_those_that_do(tmp_path: Path, nano: Path) -> None:
    arms = {
        "main": {"chain": ["base", "stage1", "stage2"]},
        "k": {"chain": ["base", "stage1", "stage2"], "pairs": {"stage1.latent_size": [2], "stage2.latent_size": [2]}},
        "rows": {"chain": ["base", "stage1", "stage2"], "grid": {"learning_rate": [0.5]}},
        "text": {"chain": ["base", "sft"]},
    }
    study, _ = opened(write_study(tmp_path, nano, arms=arms, seeds=[0]))
    found = {cell.arm.partition("[")[0]: own for cell, own in zip(study.cells, stated(study), strict=True)}
    default = RunConfig.model_fields["learning_rate"].default
    assert found == {
        "main": {"stage1.latent_size": 4, "stage2.latent_size": 4, "learning_rate": default},
        "k": {"stage1.latent_size": 2, "stage2.latent_size": 2, "learning_rate": default},
        "rows": {"stage1.latent_size": 4, "stage2.latent_size": 4, "learning_rate": 0.5},
        "text": {},
    }


def test_stage2_knows_how_its_targets_were_made(tmp_path: Path, nano: Path) -> None:
    """Its controls feed the helper's targets, so they are made as in the stage1 before it."""
    grid = {"stage1.compress_strategy": "grid", "stage1.helper_max_pixels": 50_000}
    arms = {"a": {"chain": ["stage1", "stage2"], "settings": grid}, "plain": {"chain": ["stage1", "stage2"]}}
    evaluations = {"test": {"data_path": "data.jsonl", "controls": "own,oracle"}}
    study, _ = opened(write_study(tmp_path, nano, arms=arms, seeds=[0], evaluations=evaluations))
    cells = {cell.arm: cell for cell in study.cells}
    last = study.nodes[cells["a"].stages[-1]].config
    assert (last.compress_strategy, last.helper_max_pixels) == ("grid", 50_000)
    assert study.nodes[cells["a"].results["controls test"]].material["helper_pixels"] == [None, 50_000]
    assert study.nodes[cells["plain"].stages[-1]].config.compress_strategy == "average"


def last_key(folder: Path, nano: Path, stage: dict[str, object]) -> str:
    arms = {"one": {"chain": ["stage"]}}
    return opened(write_study(folder, nano, stages={"stage": stage}, arms=arms, seeds=[0]))[0].cells[0].stages[-1]


def test_what_a_key_does_not_depend_on(tmp_path: Path, nano: Path) -> None:
    def key(**more: object) -> str:
        return last_key(tmp_path, nano, {"stage": "stage1", **more})

    plain = key()
    assert key(slots="latents") == plain
    assert key(max_skipped_steps=3, confine_paths=True, max_bad_share=0.5) == plain
    assert key(image_root="pictures") != plain
    assert key(slots="auxiliary") != plain


def test_studies_of_earlier_versions_keep_their_runs(tmp_path: Path) -> None:
    """Keys of 2026-11-29: a new setting that is hashed would train every study anew."""
    (tmp_path / "data.jsonl").write_text('{"text_input": "1?", "text_output": "1"}\n')
    settings = {"model": "some/hub", "data_path": "data.jsonl", "epochs": 1, "global_batch_size": 8}
    study = {
        **{"name": "frozen", "out": "out", "seeds": [1], "common": settings},
        "stages": {"one": {"stage": "stage1"}, "two": {"stage": "stage2"}},
        "arms": {"latents": {"chain": ["one", "two"]}},
        "evaluations": {"own": {"data_path": "data.jsonl", "task": "boxed", "most": 4}},
    }
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    found = ["one-3390f6a71fa7", "two-351d09aed40e", "evaluate-own-101813cc2604"]
    assert folders(tmp_path / "study.yaml") == found


def test_a_key_holds_the_place_of_images_from_the_study(tmp_path: Path, nano: Path) -> None:
    keys = set()
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        keys.add(last_key(tmp_path / name, nano, {"stage": "stage1", "image_root": "pictures"}))
    assert len(keys) == 1


@pytest.mark.parametrize(("text", "message"), [(None, "no such file"), ("{", "cannot be read as JSON")])
def test_a_deepspeed_json_that_cannot_be_read_is_said(
    tmp_path: Path, nano: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError, match=message):
        last_key(tmp_path, nano, {"stage": "stage1", "deepspeed": "ds.json"})


def test_an_arm_that_fixes_its_seeds_is_one_cell(tmp_path: Path, nano: Path) -> None:
    arms = {"reference": {"chain": ["base"]}, "text": {"chain": ["base", "sft"]}}
    study, _ = opened(write_study(tmp_path, nano, arms=arms, seeds=[0, 1, 2]))
    assert [(cell.arm, cell.seed) for cell in study.cells] == [("reference", 0), ("text", 0), ("text", 1), ("text", 2)]


def test_a_renamed_stage_keeps_its_folder(tmp_path: Path, nano: Path) -> None:
    study, store = opened(write_study(tmp_path, nano, arms={"a": {"chain": ["base"]}}, seeds=[0]))
    (base,) = (node for node in study.nodes.values() if node.kind == "train")
    store.place(base).mkdir(parents=True)
    store.finish(base, 0.0)
    stages = {"start": STAGES["base"]}
    study, store = opened(write_study(tmp_path, nano, arms={"a": {"chain": ["start"]}}, stages=stages, seeds=[0]))
    (start,) = (node for node in study.nodes.values() if node.kind == "train")
    assert start.folder.startswith("start-")
    assert store.place(start).name == base.folder
    assert store.state(start) == "done"


def test_a_learning_curve_has_the_means_of_neighbouring_steps() -> None:
    log = [
        {"step": at, "loss": None if at == 2 else at / 2, "lr": 1e-3, "time": 5.0} for at in range(1, 2 * POINTS + 2)
    ]
    found = curve_of(log)
    assert len(found) <= POINTS
    assert found[0] == {"step": 3.0, "loss": (1 / 2 + 3 / 2) / 2}
    assert found[1] == {"step": 6.0, "loss": 5 / 2}
    assert found[-1]["step"] == 2 * POINTS + 1
    assert curve_of(log[:3]) == [{"step": 1.0, "loss": 0.5}, {"step": 3.0, "loss": 1.5}]
    assert curve_of([]) == []
    # Of rl the reward: its loss says nothing.
    assert curve_of([{**one, "reward": 2.0} for one in log[:1]]) == [{"step": 1.0, "reward": 2.0}]


def test_a_scorer_beside_the_study_is_found_and_its_change_is_a_new_evaluation(
    tmp_path: Path, nano: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study").mkdir()
    own = {"test": {"data_path": "data.jsonl", "task": "own_judge:score"}}
    file = write_study(tmp_path / "study", nano, evaluations=own)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    call = caller(monkeypatch, capsys, "ablate", "plan", str(file), "--json")
    said = "error: evaluation test: task own_judge:score: no such module here; put it beside the study's file\n"
    assert call() == (2, "", said)
    broken = write_study(
        tmp_path / "study", nano, evaluations={"test": own["test"] | {"task": "faulty_pack.judge:score"}}
    )
    (tmp_path / "study/faulty_pack").mkdir()
    (tmp_path / "study/faulty_pack/__init__.py").write_text("1 / 0")
    code, _, said = caller(monkeypatch, capsys, "ablate", "plan", str(broken))()
    assert (code, said.partition(" (")[0]) == (
        2,
        "error: evaluation test: task faulty_pack.judge:score cannot be imported",
    )
    file = write_study(tmp_path / "study", nano, evaluations=own)
    scorer, found = tmp_path / "study/own_judge.py", []
    for points in (1, 2, 2):
        scorer.write_text(f"def score(answer, record): return {points}\n")
        found.append([node["folder"] for node in json.loads(call()[1])["nodes"]])
        importlib.invalidate_caches()
    one, two, same = found
    assert two == same
    assert {name for name in one if name in two} == {name for name in one if not name.startswith("evaluate")}
    # The runs look there too, behind what they were told.
    assert os.environ["PYTHONPATH"] == f"elsewhere{os.pathsep}{tmp_path / 'study'}"
