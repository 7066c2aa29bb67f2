"""Settings: flags over YAML over defaults; a mistake anywhere is one sentence."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import ValidationError

from mirage_ds import train
from mirage_ds.config.flags import PARTS
from mirage_ds.config.rl import RL_ONLY
from mirage_ds.config.run import RunConfig
from mirage_ds.errors import UserError

NEEDED = ["--model", "m", "--stage", "stage1", "--data_path", "d.jsonl", "--save_model_path", "out"]
Parse = Callable[..., RunConfig]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Parse:
    """Parse a command line (and the text of a YAML file) to the RunConfig that a run would get."""
    made: list[RunConfig] = []
    monkeypatch.setattr(train, "run", made.append)

    def call(*flags: str, yaml: str | bytes | None = None, needed: list[str] = NEEDED) -> RunConfig:
        arguments = [*needed, *flags]
        if yaml is not None:
            file = tmp_path / "run.yaml"
            file.write_bytes(yaml if isinstance(yaml, bytes) else yaml.encode())
            arguments += ["--config", str(file)]
        train.command.main(arguments, standalone_mode=False)
        return made[-1]

    return call


@pytest.fixture
def sentence(parse: Parse) -> Callable[..., str]:
    """The one sentence that a wrong command line gets."""

    def call(*flags: str, **options: Any) -> str:
        with pytest.raises((UserError, click.UsageError)) as caught:
            parse(*flags, **options)
        error = caught.value
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        assert text
        assert "\n" not in text
        assert "pydantic" not in text
        return text

    return call


def test_flags_win_over_yaml_which_wins_over_defaults(parse: Parse) -> None:
    yaml = "latent_size: 6\nepochs: 3\nreport_to: [none]\ntrain_vision: true\n"
    config = parse("--latent_size", "2", "--no_train_vision", yaml=yaml)
    assert (config.latent_size, config.epochs, config.report_to) == (2, 3, ["none"])
    assert (config.train_vision, config.learning_rate) == (False, 1e-5)
    assert parse("--report_to", "wandb", yaml=yaml).report_to == ["wandb"]
    assert parse(yaml=yaml).train_vision is True


def test_yaml_alone_is_enough(parse: Parse) -> None:
    config = parse(
        yaml="model: m\nstage: sft\ndata_path: a.jsonl\nsave_model_path: o\nlearning_rate: 1e-5\n", needed=[]
    )
    # YAML 1.1 reads 1e-5 as a string.
    assert (config.learning_rate, config.stage, config.data_path) == (1e-5, "sft", Path("a.jsonl"))


def test_the_defaults_are_the_papers(parse: Parse) -> None:
    config = parse()
    assert (config.latent_size, config.learning_rate, config.epochs, config.rows_per_step) == (4, 1e-5, 10, 8)
    assert (config.adam_beta1, config.adam_beta2, config.weight_decay, config.warmup_steps) == (0.9, 0.95, 0.01, 10)
    assert (config.lr_scheduler, config.reduction, config.train_vision, config.seed) == ("cosine", "sample", False, 42)


@pytest.mark.parametrize(("stage", "gamma"), [("sft", 1), ("stage1", 0.1), ("stage2", 1)])
def test_gamma_is_a_tenth_in_stage1_and_one_elsewhere_unless_it_is_given(
    stage: str, gamma: float, parse: Parse
) -> None:
    assert parse("--stage", stage).gamma == gamma
    assert parse("--stage", stage, "--ce_weight", "0").gamma == 0


def test_an_unknown_key_is_an_error_with_a_suggestion_in_flags_and_yaml(sentence: Callable[..., str]) -> None:
    assert "--latent_size" in sentence("--latent_sizes", "3")
    said = sentence(yaml="latnt-size: 3\n")
    assert "unknown key 'latnt-size' in " in said
    assert "run.yaml" in said
    assert said.endswith("(did you mean 'latent_size'?)")
    assert "did you mean" not in sentence(yaml="zzz: 3\n")
    with pytest.raises(ValidationError):
        RunConfig(model="m", stage="sft", data_path=Path("d"), save_model_path=Path("o"), latnt_size=3)


def test_dashes_and_underscores_are_alike_in_flags_and_yaml_keys(parse: Parse) -> None:
    config = parse(
        "--latent-size", "3", "--no-gradient-checkpointing", "--micro-batch_tokens", "5000", yaml="max-length: 50\n"
    )
    assert (config.latent_size, config.gradient_checkpointing) == (3, False)
    assert (config.micro_batch_tokens, config.max_length) == (5000, 50)


def test_dashes_and_underscores_are_alike_in_choices(parse: Parse) -> None:
    assert parse("--attention", "torch-varlen").attention == "torch_varlen"
    assert parse(yaml="attention: torch-varlen\n").attention == "torch_varlen"


@pytest.mark.parametrize(
    "flags", [["--report_to", "tensorboard,wandb"], ["--report_to", "tensorboard", "--report_to", "wandb"]]
)
def test_a_list_flag_takes_commas_and_may_be_repeated(flags: list[str], parse: Parse) -> None:
    assert parse(*flags).report_to == ["tensorboard", "wandb"]


def test_gradient_accumulation_steps_are_rows_a_step_as_in_the_public_code(
    parse: Parse, sentence: Callable[..., str]
) -> None:
    assert parse("--gradient_accumulation_steps", "16").rows_per_step == 16
    assert parse("--global_batch_size", "16").rows_per_step == 16
    assert parse("--global_batch_size", "16", "--gradient_accumulation_steps", "16").rows_per_step == 16
    said = sentence("--global_batch_size", "16", "--gradient_accumulation_steps", "8")
    assert "--global_batch_size 16" in said
    assert "--gradient_accumulation_steps 8" in said


def test_a_row_must_fit_into_a_micro_batch(sentence: Callable[..., str]) -> None:
    said = sentence("--max_length", "9000", "--micro_batch_tokens", "8999")
    assert "--max_length 9000" in said
    assert "--micro_batch_tokens 8999" in said


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--eval_data_path", "e.jsonl"], ["--eval_data_path", "--eval_every"]),
        (["--eval_every", "5"], ["--eval_data_path", "--eval_every"]),
        (["--resume", "auto", "--overwrite"], ["--resume auto", "--overwrite"]),
    ],
)
def test_flags_that_contradict_each_other_are_both_named(
    flags: list[str], named: list[str], sentence: Callable[..., str]
) -> None:
    said = sentence(*flags)
    assert all(name in said for name in named)


@pytest.mark.parametrize("flag", ["--model", "--stage", "--data_path", "--save_model_path"])
def test_a_missing_required_flag_is_named(flag: str, sentence: Callable[..., str]) -> None:
    at = NEEDED.index(flag)
    said = sentence(needed=NEEDED[:at] + NEEDED[at + 2 :])
    assert said.startswith(f"{flag} is required")


def test_steps_to_profile(parse: Parse, sentence: Callable[..., str]) -> None:
    assert list(parse().profiled) == []
    assert list(parse("--profile_steps", "20:22").profiled) == [20, 21, 22]
    assert list(parse("--profile_steps", "7:7").profiled) == [7]
    for wrong in ("3", "0:2", "4:3", "20:2a", "3:"):
        assert sentence("--profile_steps", wrong) == f"--profile_steps {wrong}: give FIRST:LAST, such as 20:22"
    # YAML takes it for a number of base 60.
    assert "'profile_steps' in " in sentence(yaml="profile_steps: 20:22\n")


def test_load_model_path_stands_in_for_model(parse: Parse) -> None:
    assert parse("--load_model_path", "stage1_out", needed=NEEDED[2:]).model is None


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("latent_size", "0"),
        ("latent_size", "four"),
        ("epochs", "-1"),
        ("epochs", "inf"),
        ("learning_rate", "nan"),
        ("learning_rate", "inf"),
        ("stage", "stage3"),
        ("attention", "eager"),
        ("adam_beta2", "1"),
        ("max_dropped_share", "1.5"),
        ("report_to", "comet"),
        ("warmup_steps", "-1"),
        ("num_workers", "-2"),
        ("seed", "-1"),
    ],
)
def test_a_wrong_value_names_its_flag_and_in_yaml_its_key_and_file(
    flag: str, value: str, sentence: Callable[..., str]
) -> None:
    assert f"--{flag}" in sentence(f"--{flag}", value)
    needed = [part for part in NEEDED if flag != "stage" or part not in ("--stage", "stage1")]
    listed = f"[{value}]" if flag == "report_to" else f".{value}" if value in ("inf", "nan") else value
    said = sentence(yaml=f"{flag}: {listed}\n", needed=needed)
    assert f"'{flag}' in " in said
    assert "run.yaml" in said


@pytest.mark.parametrize(
    "yaml", ["latent_size: [4]", "latent_size: {k: 4}", "model: 3", "latent_size: true", "epochs: yes"]
)
def test_a_value_of_another_type_in_yaml_is_one_sentence(yaml: str, sentence: Callable[..., str]) -> None:
    key = yaml.partition(":")[0]
    at = len(NEEDED) if key != "model" else 0
    assert f"'{key}' in " in sentence(yaml=yaml, needed=NEEDED[:at] + (NEEDED[2:] if not at else []))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "expected `key: value` lines"),
        ("- a\n- b\n", "expected `key: value` lines, found list"),
        ("epochs: 3\nseed: [1\n", "not valid YAML"),
        ("epochs: 3\n\tseed: 1\n", "line 2: not valid YAML"),
        (b"model: caf\xe9\n", "utf-8"),
    ],
    ids=["empty", "list", "broken", "tab", "latin-1"],
)
def test_a_broken_yaml_file_is_one_sentence(content: str | bytes, part: str, sentence: Callable[..., str]) -> None:
    said = sentence(yaml=content)
    assert re.match(r"\S+\.yaml\b", said)
    assert part in said


def test_a_missing_yaml_file_is_named(sentence: Callable[..., str]) -> None:
    assert sentence("--config", "gone.yaml") == "gone.yaml: no such file of settings"


def test_every_setting_stands_in_the_help_under_its_heading() -> None:
    context = click.Context(train.command, terminal_width=110, help_option_names=["-h", "--help"])
    lines = train.command.get_help(context).splitlines()
    first = {line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")}
    assert first >= RunConfig.model_fields.keys()
    headings = {PARTS["prompts_per_rollout"]: RL_ONLY, PARTS["yaml_file"]: ("config", "-h,")}
    assert [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")] == list(PARTS.values())
    for heading, names in headings.items():
        part = itertools.takewhile(str.strip, lines[lines.index(f"{heading}:") + 1 :])
        assert tuple(line.split()[0].removeprefix("--") for line in part if re.match("  -", line)) == names
    text = " ".join(" ".join(lines).split())
    assert "k: latent tokens of a latent block. [default: 4]" in text
    stages = "sft (text), scaffold (learned targets), stage1 (latents from helpers), stage2 (own latents), rl."
    assert f"--stage [sft|scaffold|stage1|stage2|rl] {stages} [required]" in text
    assert "the trained model. [required to train] --stage" in text


def test_main_says_a_mistake_in_one_line_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The process leaves without clean-up, since other ranks may be waiting in a collective; here it must not leave.
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["train", *NEEDED, "--latent_size", "x"])
    with pytest.raises(SystemExit) as caught:
        train.main()
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as caught:
        train.main()
    assert (caught.value.code, capsys.readouterr().err) == (2, "")


def test_planning_modules_import_neither_torch_nor_transformers_nor_deepspeed() -> None:
    modules = ["config.run", "config.flags", "errors", "engine.ds_config", "model.presets", "model.family"]
    code = "import sys\n" + "".join(f"import mirage_ds.{module}\n" for module in modules)
    code += "print(sorted({'torch', 'transformers', 'deepspeed', 'datasets', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("flags", "fields"),
    [
        ([], ("image_input", "image_output")),
        (["--feature_cache", "targets"], ("image_output",)),
        (["--feature_cache", "off"], ()),
        (["--stage", "stage2"], ("image_input",)),
        (["--stage", "stage2", "--feature_cache", "targets"], ()),
        (["--train_vision"], ()),
        (["--train_vision", "--feature_cache", "off"], ()),
        (["--stage", "scaffold"], ("image_input", "image_output")),
        (["--stage", "scaffold", "--feature_cache", "targets"], ("image_output",)),
        # Its copy of the tower encodes helpers alone.
        (["--stage", "scaffold", "--train_vision"], ("image_input",)),
        (["--stage", "scaffold", "--train_vision", "--feature_cache", "off"], ()),
    ],
)
def test_which_features_are_kept(flags: list[str], fields: tuple[str, ...], parse: Parse) -> None:
    assert parse(*flags).kept_fields == fields


def test_where_features_are_kept(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert parse().features_folder == Path("/home/me/.cache/mirage_ds/features")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch")
    assert parse().features_folder == Path("/scratch/mirage_ds/features")
    assert parse("--cache_dir", "/lab").features_folder == Path("/lab/features")
    assert parse("--cache_dir", "/lab", "--feature_dir", "/fast").features_folder == Path("/fast")


def test_features_of_a_trained_tower_are_not_kept(sentence: Callable[..., str]) -> None:
    said = sentence("--train_vision", "--feature_cache", "targets")
    assert said.startswith("--train_vision changes the features that --feature_cache targets would keep")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--stage sft --feed own", "--feed own is for --stage stage1, this run is sft"),
        ("--stage stage2 --latent_targets t", "--latent_targets t is for --stage stage1, this run is stage2"),
        ("--stage scaffold --latent_targets t", "--latent_targets t is for --stage stage1, this run is scaffold"),
        ("--stage scaffold --lora_rank 4", "--lora_rank: --stage scaffold trains no weight of the model"),
        (
            "--stage scaffold --eval_data_path e --eval_every 1 --eval_decode 2",
            "--eval_decode 2: --stage scaffold trains no model that answers",
        ),
        (
            "--stage scaffold --eval_data_path e --eval_every 1 --eval_pictures 2",
            "--eval_pictures 2: --stage scaffold trains no model that answers",
        ),
        ("--stage scaffold --slots auxiliary", "--slots auxiliary: --stage scaffold takes latents"),
        ("--stage scaffold --train_targets --train_vision", "--train_targets trains the tower of stage1"),
        ("--latent_targets t --train_vision", "--train_vision would change the tower that --latent_targets reads"),
        ("--latent_targets t --compress_strategy grid", "--compress_strategy grid makes targets of features"),
        ("--feed own --slots auxiliary", "--feed own: answers of --slots auxiliary see no latents"),
        ("--feed own --train_vision --train_targets", "--train_targets trains the tower by the latents' inputs"),
        ("--detach_latents", "--detach_latents is for --stage stage2"),
        ("--latent_passes 2", "--latent_passes 2 is for stage2 and --feed own, this run is stage1: leave it out"),
        ("--stage sft --latent_passes 0", "--latent_passes 0 is for stage2 and --feed own, this run is sft"),
        ("--stage scaffold --latent_passes 1", "--latent_passes 1 is for stage2 and --feed own, this run is scaffold"),
        ("--stage rl --latent_passes 1", "--latent_passes 1 is for stage2 and --feed own, this run is rl"),
        ("--feed own --latent_passes -1", "--latent_passes"),
        (
            "--stage stage2 --latent_passes 0 --detach_latents",
            "--detach_latents is for --stage stage2: no state is fed back in --latent_passes 0",
        ),
        ("--bottleneck --slots auxiliary", "--bottleneck: answers of --slots auxiliary see no latents; leave out one"),
        ("--bottleneck --stage sft", "--bottleneck is for --stage stage1 and stage2, this run is sft: leave it out"),
        ("--bottleneck --stage scaffold", "--bottleneck is for --stage stage1 and stage2, this run is scaffold"),
    ],
)
def test_learned_targets_and_own_states_are_refused_where_they_mean_nothing(
    flags: str, said: str, sentence: Callable[..., str]
) -> None:
    assert sentence(*flags.split()).startswith(said)


def test_passes_and_recipe_of_own_states_are_those_of_stage2(parse: Parse) -> None:
    own, usual = parse("--feed", "own"), parse()
    assert [own.passes(runs) for runs in (0, 1, 2)] == [1, 5, 9]
    assert (own.recurrent, usual.recurrent, usual.passes(2)) == (True, False, 1)
    assert parse("--feed", "own", "--detach_latents").detach_latents
    assert parse("--stage", "scaffold", "--train_vision", "--feature_cache", "all").gamma == 1.0


def test_passes_of_latents_made_together_are_never_more_than_those_in_turn(parse: Parse) -> None:
    wanted = {0: [1, 1, 1], 1: [1, 2, 3], 3: [1, 4, 7], 4: [1, 5, 9], 9: [1, 5, 9]}
    for flags in (("--feed", "own"), ("--stage", "stage2")):
        for passes, counts in wanted.items():
            config = parse(*flags, "--latent_passes", str(passes))
            assert [config.passes(runs) for runs in (0, 1, 2)] == counts
            # Without a pass that feeds back, the recipe is that of one pass.
            assert config.recurrent == (passes > 0)
    assert parse("--stage", "stage2", "--latent_passes", "1", "--detach_latents").detach_latents
