"""examples/7b: every file is one that a run or a study takes, and the README says of them what the planner says."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
from itertools import dropwhile
from pathlib import Path
from typing import Any

import click
import pytest
from PIL import Image

from mirage_ds.cli import cli
from mirage_ds.config.flags import build_model, read_yaml
from mirage_ds.config.run import RunConfig
from mirage_ds.data.pack import total_steps
from mirage_ds.engine.ds_config import read_json
from mirage_ds.errors import UserError
from mirage_ds.evaluate.command import evaluate
from mirage_ds.evaluate.spec import EvaluateSpec
from mirage_ds.plan.fit import Plan, Question, rank
from mirage_ds.plan.settings import read_settings
from mirage_ds.plan.shape import read_shape, sizes
from mirage_ds.plan.spec import PlanSpec
from mirage_ds.study.nodes import Study, spell_out
from mirage_ds.study.overview import overview
from mirage_ds.study.spec import arm_names, read_study
from mirage_ds.study.store import Store
from mirage_ds.train import command as train

ROOT = Path(__file__).parents[3]
HERE = ROOT / "examples" / "7b"
README = HERE / "README.md"
STAGES = ("sft", "stage1", "stage2")
# Training rows and epochs of each task, and the rows that the README assumes for its hours.
TASKS: dict[str, tuple[int, int, dict[str, int]]] = {
    "vsp-spatial-planning": (1000, 15, {"row_tokens": 600, "image_tokens": 196}),
    "vsp-spatial-reasoning": (3000, 10, {"row_tokens": 700, "image_tokens": 196}),
    "blink-jigsaw": (1000, 15, {"row_tokens": 600, "images": 3, "image_tokens": 130}),
    "sat": (1000, 15, {"row_tokens": 900, "images": 2, "image_tokens": 324}),
    "comt": (820, 15, {"row_tokens": 1000, "image_tokens": 256, "latent_runs": 3}),
}
FILES = [HERE / task / f"{stage}.yaml" for task in TASKS for stage in STAGES]
RL_FILES = [HERE / task / "rl.yaml" for task in TASKS]
MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
# As the paper has them; what the public code does otherwise is in the files' comments.
PAPER = {
    "model": MODEL,
    "latent_size": 4,
    "slots": None,
    "compress_strategy": "average",
    "latent_loss": "cosine",
    "detach_latents": False,
    "train_vision": False,
    "rows_per_step": 8,
    "reduction": "sample",
    "learning_rate": 1e-5,
    "lr_scheduler": "cosine",
    "warmup_steps": 10,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "weight_decay": 0.01,
    "seed": 42,
    "max_steps": None,
}


def config_of(file: Path) -> RunConfig:
    return build_model(RunConfig, {}, read_yaml(file), source=str(file))


def name_of(file: Path) -> str:
    return f"{file.parent.name}-{file.stem}"


each_file = pytest.mark.parametrize("file", FILES, ids=name_of)


# the run's files


def test_there_are_these_files_and_no_others() -> None:
    assert sorted(HERE.glob("*/*.yaml")) == sorted(FILES + RL_FILES)
    assert {one.name for one in HERE.iterdir()} == {*TASKS, "README.md", "make_data.sh", "study.yaml"}


@each_file
def test_it_is_the_papers_run(file: Path) -> None:
    config, task = config_of(file), file.parent.name
    assert {name: getattr(config, name) for name in PAPER} == PAPER
    assert config.gamma == (0.1 if file.stem == "stage1" else 1.0)
    assert config.epochs == TASKS[task][1]
    assert (config.stage, config.task) == (file.stem, task)
    base = Path("runs/7b") / task
    assert (config.data_path, config.save_model_path) == (base / "data/train.jsonl", base / file.stem)
    # Stage 2 goes on from what stage 1 saved; the others begin with the public weights.
    assert config.load_model_path == (config_of(file.with_stem("stage1")).save_model_path if "2" in file.stem else None)


@each_file
def test_its_numbers_are_written_down_and_explained(file: Path) -> None:
    """A complete file: nobody has to know the defaults, and the commands of its head are of this very file."""
    text, values = file.read_text(), read_yaml(file)
    own = {"sft": (), "stage1": ("latent_size", "compress_strategy", "latent_loss"), "stage2": ("latent_size",)}
    latents = {"latent_size", "compress_strategy", "latent_loss"}
    common = set(PAPER) - latents - {"rows_per_step", "slots", "detach_latents", "max_steps"}
    assert common | {"global_batch_size", "epochs", "ce_weight"} <= set(values)
    assert set(own[file.stem]) == latents & set(values)
    assert f"mirage-ds train --config {file.relative_to(ROOT)}" in text
    assert f"examples/7b/make_data.sh {file.parent.name}\n" in text
    assert text.count("# ") > 15


@each_file
def test_it_computes_in_bf16_with_fp32_master_weights(file: Path) -> None:
    path = config_of(file).deepspeed
    assert path is not None
    settings = read_settings(read_json(ROOT / path), path, sizes(read_shape("qwen2.5-vl-7b")))
    stage = 2 if file.stem == "stage2" else 3
    assert (settings.stage, settings.compute, settings.master, settings.moments) == (stage, 2, 4, 4)
    assert settings.moves_all_weights


# As the paper has them; the rest it does not say.
PAPER_RL = {
    "model": MODEL, "stage": "rl", "latent_size": 4, "latent_policy": "through", "objective": "grpo",
    "rows_per_step": 32, "num_generations": 5, "updates": 4, "num_iterations": 1, "beta": 0.01,
    "reward": ["accuracy*0.9", "format*0.1"], "epochs": 15, "learning_rate": 1e-6,
}  # fmt: skip


@pytest.mark.parametrize("file", RL_FILES, ids=name_of)
def test_the_reinforcement_stage_is_the_papers_and_fits(file: Path) -> None:
    config, task, text = config_of(file), file.parent.name, file.read_text()
    assert {name: getattr(config, name) for name in PAPER_RL} == PAPER_RL
    assert config.load_model_path == config_of(file.with_stem("stage2")).save_model_path
    assert (config.task, config.save_model_path) == (task, Path("runs/7b") / task / "rl")
    assert "NOT RUN" in text
    assert f"mirage-ds train --config {file.relative_to(ROOT)}" in text
    rows = TASKS[task][2]
    # Half of a longest row is the answer.
    rows = rows | {"row_tokens": rows["row_tokens"] + config.max_completion_length, "labelled": 0.3}
    same = ("prompts_per_rollout", "num_generations", "max_completion_length", "beta")
    rows |= {name: getattr(config, name) for name in same}
    for nodes in (1, 4):
        plans = plan_of(
            "rl", None, nodes=nodes, gpu_memory=80, **rows | {"micro_batch_tokens": config.micro_batch_tokens}
        )
        (named,) = (plan for plan in plans if config.deepspeed and plan.name == config.deepspeed.name)
        assert named.problem is None
        assert named.step.most <= 1.05 * plans[0].step.most


# the planner


def plan_of(stage: str, path: Path | None, **machine: Any) -> list[Plan]:
    """Judge the stage's JSONs, or one, for a row of a GPU and step."""
    machine = {"micro_batch_tokens": machine.get("row_tokens", 500), "gpus_per_node": 8, **machine}
    spec = PlanSpec(model=MODEL, stage=stage, deepspeed=path, **machine)
    return rank(Question(spec))


def test_the_hub_id_is_a_public_shape() -> None:
    seven = read_shape("qwen2.5-vl-7b")
    for name in (MODEL, "somebody/Qwen2.5-VL-7B-Instruct-AWQ", "Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B"):
        assert read_shape(name) == seven
    with pytest.raises(UserError, match="no preset"):
        read_shape("Qwen/Qwen2.5-VL-8B-Instruct")


@pytest.mark.parametrize("nodes", [1, 4])
@each_file
def test_it_fits_80_gb_with_the_json_it_names(file: Path, nodes: int) -> None:
    config, rows = config_of(file), TASKS[file.parent.name][2]
    # One row a GPU, and as many as --micro_batch_tokens allows.
    for tokens in (rows["row_tokens"], config.micro_batch_tokens):
        plans = plan_of(file.stem, None, nodes=nodes, gpu_memory=80, **rows | {"micro_batch_tokens": tokens})
        assert config.deepspeed is not None
        (named,) = (plan for plan in plans if plan.name == config.deepspeed.name)
        assert named.problem is None
        # The planner's first choice, or as good as that.
        assert named.step.most <= 1.05 * plans[0].step.most


def tables() -> list[list[str]]:
    lines = README.read_text().splitlines()
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


def test_the_readmes_hours_are_the_planners() -> None:
    rows = [cells for cells in tables() if cells[0] in TASKS and cells[1] in ("1", "4")]
    assert [(cells[0], cells[1]) for cells in rows] == [(task, nodes) for task in TASKS for nodes in ("1", "4")]
    for task, nodes, batch, steps, *hours in rows:
        count, epochs, assumed = TASKS[task]
        assert int(batch) == 8 * int(nodes)
        assert steps == f"{total_steps(count, int(batch), epochs):,}"
        for stage, said in zip(STAGES, hours, strict=True):
            path = ROOT / config_of(HERE / task / f"{stage}.yaml").deepspeed  # type: ignore[operator]
            (plan,) = plan_of(stage, path, nodes=int(nodes), gpu_memory=80, **assumed)
            found = [int(steps.replace(",", "")) * one / 3600 for one in (plan.step.least, plan.step.most)]
            assert said == "–".join(f"{one:.2f}" for one in found), f"{task} {nodes} {stage}"


def test_the_readmes_memory_is_the_planners() -> None:
    rows = [cells for cells in tables() if cells[0] in ("80 GB", "40 GB")]
    assert len(rows) == 6
    for memory, stage, name, *said in rows:
        gb = int(memory.split()[0])
        # On 40 GB the README bounds a row to 1,024 tokens.
        row = {"row_tokens": 600, "image_tokens": 196} if gb == 80 else {"row_tokens": 1024}
        plans = [
            plan_of(stage, ROOT / f"ds_configs/{name}.json", nodes=nodes, gpu_memory=gb, **row)[0] for nodes in (1, 4)
        ]
        assert [one.problem for one in plans] == [None, None]
        assert [f"{one.held.gpu / 1e9:.0f}" for one in plans] == said


def test_the_planners_lines_are_in_the_readme() -> None:
    assumed = {"row_tokens": 600, "image_tokens": 196, "nodes": 1, "gpu_memory": 80}
    quoted = re.findall(r"^ fits +(\w+) +(\d+) +\d+ +\d+ +([\d.]+) +([\d.]+) ", README.read_text(), re.M)
    plans = plan_of("stage2", None, **assumed)
    found = [
        (one.name.removesuffix(".json"), f"{one.held.gpu / 1e9:.0f}", f"{one.step.least:.2f}", f"{one.step.most:.2f}")
        for one in plans
    ]
    assert quoted == found[:3]


# the study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Store]:
    """The study over a thousand stand-in records in each file that it names."""
    root = tmp_path_factory.mktemp("root")
    (root / "examples/7b").mkdir(parents=True)
    file = shutil.copy(HERE / "study.yaml", root / "examples/7b")
    (root / "ds_configs").symlink_to(ROOT / "ds_configs")
    data = root / "runs/7b/vsp-spatial-planning/data"
    for name in ("", "helper-swap", "helper-noise", "helper-rows", "helper-text", "helper-input"):
        (data / name).mkdir(parents=True, exist_ok=True)
        rows = 2000 if name == "helper-rows" else 1000
        # One row more or less makes other records of them.
        lines = [json.dumps({"text_input": f"{name} {row}", "text_output": "UP"}) + "\n" for row in range(rows)]
        (data / name / "train.jsonl").write_text("".join(lines))
        (data / name / "test.jsonl").write_text(lines[0])
    spec = read_study(Path(file))
    return spell_out(spec, Path(file).parent), Store(spec.out)


def test_the_study_has_twenty_arms_and_the_runs_that_the_readme_says(study: tuple[Study, Store]) -> None:
    made, store = study
    assert len(arm_names(made.spec)) == 20
    assert len({cell.seed for cell in made.cells}) == 3
    kinds = [node.kind for node in made.nodes.values()]
    trained, text = kinds.count("train"), " ".join(README.read_text().split())
    assert f"{len(made.cells)} cells (arms × seeds); {trained} training runs instead of 120" in text
    assert f"; {len(kinds) - trained} evaluations" in text
    lines = overview(made, store, {"gpu_memory": 80, "row_tokens": 600, "image_tokens": 196})
    estimates = [line.estimate for line in lines if line.estimate.steps]
    assert [one.problem for one in estimates] == [None] * trained
    # Every run of the study takes as many steps as every other one.
    assert {one.steps for one in estimates} == {1875}
    assert f"{sum(one.hours or 0 for one in estimates):.1f} GPU-hours" in text


def test_the_study_compares_what_it_says(study: tuple[Study, Store]) -> None:
    made, _ = study
    arms = set(arm_names(made.spec))
    chains = {name: tuple(arm.chain) for name, arm in made.spec.arms.items()}
    alone = [(name, name) for name in ("sft", "pause", "marks", "stage1", "stage2", "auxiliary")]
    assert [chains[name] for name, _ in alone] == alone
    assert chains["main"] == ("stage1", "stage2")
    primary = made.spec.report.primary
    assert primary is not None
    assert (primary.arm, primary.base, primary.evaluation, primary.levels) == ("main", "sft", "test", ("5", "6"))
    for one in (primary, *made.spec.report.contrasts):
        assert {one.arm, one.base} <= arms
        assert one.evaluation in made.spec.evaluations
    # What a variation changes, it changes: no two arms come to be the same runs.
    ends = [cell.stages[-1] for cell in made.cells]
    assert len(set(ends)) == len(ends)


def test_the_study_trains_as_the_files_do(study: tuple[Study, Store]) -> None:
    made, _ = study
    cell = next(one for one in made.cells if (one.arm, one.seed) == ("main", 42))
    for stage, key in zip(("stage1", "stage2"), cell.stages, strict=True):
        node, file = made.nodes[key].config, config_of(HERE / "vsp-spatial-planning" / f"{stage}.yaml")
        assert node is not None
        for name in (*PAPER, "epochs", "gamma", "stage"):
            assert getattr(node, name) == getattr(file, name), name
        assert node.deepspeed is not None
        assert file.deepspeed is not None
        assert node.deepspeed.name == file.deepspeed.name
    assert made.spec.launch.ranks == 8


# the commands


def commands(text: str) -> list[list[str]]:
    """List the words of every command in shell text, without variables that are set for it or by it."""
    lines = [re.sub(r"^\w+=\$\((.*)\)$", r"\1", line) for line in text.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line, comments=True) for line in lines]
    return [list(dropwhile(lambda word: re.match(r"[A-Z_0-9]+=", word), words)) for words in found if words]


def readme_commands() -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```", README.read_text(), re.M | re.S)
    return [words for block in blocks for words in commands(block)]


def study_commands() -> list[list[str]]:
    lines = [line[1:].strip() for line in (HERE / "study.yaml").read_text().splitlines() if line.startswith("#     ")]
    return commands("\n".join(lines))


def parse_mirage(words: list[str]) -> None:
    """Parse the words after `mirage-ds` as the command line does; click refuses what it does not know."""
    command: click.Command = cli
    parent = click.Context(cli)
    while isinstance(command, click.Group):
        _, found, words = command.resolve_command(parent, words)
        assert found is not None
        command = found
    given = command.make_context(command.name, list(words), parent=parent).params
    if command is evaluate:
        take_evaluate(given)


def take_evaluate(given: dict[str, Any]) -> None:
    """Make what `evaluate` makes of its flags: click alone does not know which are required."""
    build_model(EvaluateSpec, {name: value for name, value in given.items() if name in EvaluateSpec.model_fields})


def parse_train(words: list[str]) -> RunConfig:
    """Make the run of a training line: its file with its flags over it."""
    given = train.make_context("train", list(words)).params
    file = given.pop("yaml_file")
    return build_model(RunConfig, given, read_yaml(ROOT / file), source=str(file))


def parse(words: list[str]) -> RunConfig | None:
    """Parse one documented command, and check that the files it names are there."""
    program, *rest = words
    if words[:2] == ["mirage-ds", "train"]:
        return parse_train(rest[1:])
    if program == "mirage-ds":
        parse_mirage(rest)
        return None
    if program.endswith("make_data.sh"):
        assert set(rest) <= {*TASKS, "study"}
        return None
    if program == "sbatch":
        script = rest.index("launch/slurm.sbatch")
        known = {"--nodes", "--dependency", "--parsable"}
        assert {word for word in rest[:script] if word.startswith("--")} <= known
        return parse_train(rest[script + 1 :])
    if program == "deepspeed":
        at = rest.index("--module")
        assert rest[:at] in (["--num_gpus", "8"], ["--hostfile", "hosts"])
        module, *rest = rest[at + 1 :]
        if module == "mirage_ds.evaluate":
            take_evaluate(evaluate.make_context("evaluate", rest).params)
            return None
        assert module == "mirage_ds.train"
        return parse_train(rest)
    assert program == "launch/deepspeed.sh"
    assert (ROOT / program).is_file()
    assert rest.pop(0) == "hosts"
    return parse_train(rest)


@pytest.mark.parametrize("words", [*readme_commands(), *study_commands()], ids=lambda words: " ".join(words)[:60])
def test_a_documented_command_is_one(words: list[str]) -> None:
    run = parse(words)
    for word in words:
        if word.startswith(("examples/", "ds_configs/", "launch/")):
            assert (ROOT / word).exists(), word
    if run is not None and {"--nodes", "--hostfile", "hosts"} & set(words):
        # Eight rows are too few for 32 ranks.
        assert (run.rows_per_step, run.learning_rate) == (32, pytest.approx(1e-5 * math.sqrt(32 / 8)))


def test_the_parser_of_commands_refuses() -> None:
    assert len(readme_commands()) > 20
    assert len(study_commands()) == 5
    for wrong in ("mirage-ds plan --modell x", "mirage-ds data bild x", "mirage-ds evaluate x"):
        with pytest.raises((click.UsageError, UserError)):
            parse(shlex.split(wrong))
    with pytest.raises(click.UsageError):
        parse(shlex.split("mirage-ds train --config examples/7b/sat/sft.yaml --latentsize 3"))


def test_the_slurm_line_submits_three_arrays(
    study: tuple[Study, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mirage_ds.study.slurm import submit, write_scripts

    (line,) = [words for words in study_commands() if "--slurm" in words]
    options = shlex.split(line[line.index("--sbatch") + 1])
    for_evaluations = shlex.split(line[line.index("--sbatch_evaluate") + 1])
    (tmp_path / "sbatch").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\necho 7\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    made, _ = study
    arrays = write_scripts(
        made, Store(tmp_path / "study"), HERE / "study.yaml", made.nodes, int(line[line.index("--at_once") + 1])
    )
    assert submit(arrays, options, for_evaluations) == ["7"] * 3
    asked = (tmp_path / "asked").read_text().splitlines()
    # 57 first stages, 57 second ones, 105 evaluations and controls.
    gpus = [re.search(r"--partition gpu --nodes 1 --gpus-per-node (\d)", one).group(1) for one in asked]  # type: ignore[union-attr]
    assert gpus == ["8", "8", "1"]
    assert [one.evaluates for one in arrays] == [False, False, True]
    lasts = [re.search(r"--array=0-(\d+)%8", one.script.read_text()).group(1) for one in arrays]  # type: ignore[union-attr]
    assert sum(int(last) + 1 for last in lasts) == len(made.nodes)


# the data


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run make_data.sh with a mirage-ds that writes its words down; return (calls, folder)."""
    fake = tmp_path / "bin/mirage-ds"
    fake.parent.mkdir()
    fake.write_text(
        "#!/usr/bin/env bash\nset -eu\n"
        f'(printf "%s\\t" "$@"; echo) >> {tmp_path}/calls\n'
        'while [ "$1" != --out ]; do shift; done\nmkdir -p "$2"\ntouch "$2/$4.jsonl"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=":")
    monkeypatch.chdir(tmp_path)
    for name in ("PHOTOS", "BLINK", "SAT", "SAT_V2", "HELPERS", "COMT"):
        monkeypatch.setenv(name, name.lower())

    def run(*tasks: str) -> tuple[int, list[list[str]]]:
        (tmp_path / "calls").write_text("")
        done = subprocess.run([HERE / "make_data.sh", *tasks], capture_output=True, text=True, check=False)
        return done.returncode, [line.split("\t")[:-1] for line in (tmp_path / "calls").read_text().splitlines()]

    return run


def test_the_data_script_makes_what_the_files_read(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, calls = made(*TASKS, "study")
    assert code == 0
    for words in calls:
        parse_mirage(words)
    for file in FILES:
        config = config_of(file)
        assert (tmp_path / config.data_path).is_file()
        assert config.eval_data_path is None or (tmp_path / config.eval_data_path).is_file()
    counts = {words[words.index("--out") + 1]: words for words in calls if words[words.index("--name") + 1] == "train"}
    for task, (rows, _, _) in TASKS.items():
        words = counts[f"runs/7b/{task}/data"]
        # COMT's rows are counted when they are there.
        assert task == "comt" or words[words.index("--count") + 1] == str(rows)
    # Neither what is trained on nor what is chosen by has a board of the public test set.
    boards = [words for words in calls if words[1] == "build" and words[2].startswith("vsp") and "test" not in words]
    assert len(boards) == 4
    assert all(words[words.index("--exclude") + 1] == "data/vsp_test_maps.sha256" for words in boards)
    assert (ROOT / "data/vsp_test_maps.sha256").is_file()
    # The study finds its files where the script has put them.
    values = read_yaml(HERE / "study.yaml")
    named = re.findall(r"\.\./\.\./(runs/\S+\.jsonl)", (HERE / "study.yaml").read_text())
    assert len(named) == 8
    assert values["common"]["data_path"] == f"../../{named[0]}"
    assert all((tmp_path / name).is_file() for name in named)
    # Once made, nothing is made again; what lacks its source is said.
    assert made(*TASKS, "study") == (0, [])
    assert made("sats")[0] == made()[0] == 2
    shutil.rmtree(tmp_path / "runs")
    monkeypatch.delenv("COMT")
    assert made("comt")[0] != 0
    monkeypatch.delenv("HELPERS")
    assert "--helpers" not in made("sat")[1][0]


def test_the_data_script_is_clean() -> None:
    subprocess.run(["bash", "-n", HERE / "make_data.sh"], check=True)
    assert (HERE / "make_data.sh").stat().st_mode & 0o111 == 0o111
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", HERE / "make_data.sh"], check=True)


# the doctor


@each_file
def test_the_doctor_has_nothing_to_mend(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What needs neither a GPU nor a network: the records, the JSON, and a model that the hub may have."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    config = config_of(file)
    config.data_path.parent.mkdir(parents=True)
    Image.new("RGB", (56, 56)).save(config.data_path.parent / "i.png")
    row = {"text_input": "q", "text_output": "a", "image_input": "i.png", "image_output": "i.png"}
    for path in (config.data_path, config.eval_data_path):
        if path is not None:
            path.write_text(json.dumps(row) + "\n")
    words = ["--config", str(file), "--only", "model,data,ds-config", "--no_bandwidth", "--json"]
    if config.load_model_path is not None:
        # What stage 1 will have saved is not there yet; the doctor says so of every other run as well.
        words[3] = "data,ds-config"
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    code = 0
    try:
        cli.commands["doctor"].main(words, standalone_mode=False)
    except SystemExit as leave:
        code = int(leave.code or 0)
    said = json.loads(capsys.readouterr().out)
    assert code == 0, said
    found = {one["check"]: one["status"] for one in said["findings"]}
    # The model is not in the hub's cache here, which is a warning.
    model = {} if config.load_model_path else {"model": "warn"}
    assert found == {"data": "pass", "ds-config": "pass"} | model
