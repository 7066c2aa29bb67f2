"""`mirage-ds config import`: configurations with the keys that LLaMA-Factory and ms-swift publish, as ours."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
from PIL import Image

from mirage_ds.cli import cli
from mirage_ds.config.columns import parse_columns
from mirage_ds.config.flags import build_model, read_yaml
from mirage_ds.config.importing import import_config, read_foreign
from mirage_ds.config.run import RunConfig
from mirage_ds.curate.check import check_file
from mirage_ds.data.folders import find_files
from mirage_ds.errors import UserError

# The keys of examples/train_lora/qwen2_5vl_lora_sft.yaml.
FACTORY = """
model_name_or_path: Qwen/Qwen2.5-VL-7B-Instruct
image_max_pixels: 262144
video_max_pixels: 16384
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: q_proj,v_proj
dataset: shapes
template: qwen2_vl
cutoff_len: 3000
max_samples: 2
preprocessing_num_workers: 16
dataloader_num_workers: 4
output_dir: saves/lora
logging_steps: 10
save_steps: 250
overwrite_output_dir: true
save_only_model: false
report_to: wandb
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
# Those of examples/train/multimodal/vit_gradient_checkpointing.sh, with what real scripts have around them.
SWIFT = r"""#!/bin/bash
# don't stop here
RUN=one
EACH=4
export MODEL=${MODEL:-Qwen/Qwen2.5-VL-3B-Instruct}
CUDA_VISIBLE_DEVICES=0,1,2,3 \
NPROC_PER_NODE=4 \
MAX_PIXELS=1003520 \
swift sft \
    --model "$MODEL" \
    --dataset a.jsonl#2000 'b.jsonl' \
    --val_dataset dev/a.jsonl \
    --train_type full \
    --torch_dtype bfloat16 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 4 \
    --learning_rate 1e-5 \
    --freeze_vit false \
    --freeze_aligner=false \
    --gradient_accumulation_steps $(expr 8 / $EACH) \
    --gradient_checkpointing false \
    --eval_steps 100 \
    --save_steps 100 \
    --max_length 10000 \
    --output_dir output/$RUN \
    --deepspeed zero3 \
    --attn_impl flash_attn \
    --seed $SEED \
    --padding_free true 2>&1 | tee log.txt
"""
SWIFT_JSON = {
    "model": "Qwen/Qwen2.5-VL-7B-Instruct",
    "tuner_type": "lora",
    "target_modules": "all-linear",
    "dataset": ["rows.jsonl"],
    "output_dir": "output",
    "freeze_vit": False,
    "lora_dropout": 0.05,
    "report_to": "swanlab",
    "lr_scheduler_type": "cosine_with_min_lr",
    "val_dataset": [],
    "max_steps": -1,
}
# Ours by theirs, where it is the same for all.
CASES: list[tuple[str, str, int | None, dict[str, Any], set[str], set[str]]] = [
    (
        "lora.yaml",
        FACTORY,
        4,
        {"model": "Qwen/Qwen2.5-VL-7B-Instruct", "save_model_path": "saves/lora", "stage": "sft", "lora_rank": 16,
         "lora_targets": ["q_proj", "v_proj"], "data_path": "data/shapes.json", "max_length": 3000,
         "max_pixels": 262144, "num_workers": 4, "epochs": 2.0, "global_batch_size": 32, "learning_rate": 1e-4,
         "lr_scheduler": "cosine", "adam_beta2": 0.999, "weight_decay": 0.0, "save_every": 250, "overwrite": True,
         "report_to": ["wandb"], "log_every": 10},
        {"video_max_pixels", "trust_remote_code", "template", "max_samples", "preprocessing_num_workers",
         "save_only_model", "bf16", "ddp_timeout"},
        {"warmup_steps"},
    ),
    (
        "least.json",
        '{"model_name_or_path": "m", "output_dir": "o", "dataset": "shapes", "finetuning_type": "full", '
        '"do_train": true}',
        None,
        {"model": "m", "save_model_path": "o", "stage": "sft", "data_path": "data/shapes.json",
         "max_length": 2048, "max_pixels": 589824, "epochs": 3.0, "learning_rate": 5e-5, "lr_scheduler": "linear",
         "warmup_steps": 0, "adam_beta2": 0.999, "weight_decay": 0.0, "save_every": 500},
        set(),
        {"global_batch_size"},
    ),
    (
        "sft.sh",
        SWIFT,
        None,
        {"model": "Qwen/Qwen2.5-VL-3B-Instruct", "save_model_path": "output/one", "stage": "sft", "train_vision": True,
         "data_path": ["a.jsonl", "b.jsonl"], "max_length": 10000, "max_pixels": 1003520,
         "epochs": 1.0, "global_batch_size": 32, "micro_batch_tokens": 10000, "learning_rate": 1e-5,
         "warmup_steps": 0, "weight_decay": 0.1, "attention": "flash", "gradient_checkpointing": False,
         "save_every": 100, "eval_data_path": "dev/a.jsonl", "eval_every": 100},
        {"a.jsonl#2000", "torch_dtype", "freeze_aligner", "deepspeed", "padding_free", "seed"},
        set(),
    ),
    (
        "args.json",
        json.dumps(SWIFT_JSON),
        2,
        {"model": "Qwen/Qwen2.5-VL-7B-Instruct", "save_model_path": "output", "stage": "sft", "lora_rank": 8,
         "lora_alpha": 32, "data_path": "rows.jsonl", "epochs": 3.0, "global_batch_size": 16,
         "learning_rate": 1e-4, "warmup_steps": 0, "weight_decay": 0.1, "save_every": 500},
        {"freeze_vit", "lora_dropout", "report_to", "lr_scheduler_type"},
        set(),
    ),
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with LLaMA-Factory's data/ and one data set in it."""
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (56, 56), "red").save(data / "red.png")
    turns = [{"role": "user", "content": "<image>Which colour?"}, {"role": "assistant", "content": "red"}]
    (data / "shapes.json").write_text(json.dumps([{"messages": turns, "images": ["red.png"]}] * 3))
    shapes = {
        "file_name": "shapes.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
    (data / "more.json").write_text((data / "shapes.json").read_text())
    (data / "own").mkdir()
    (data / "own/own.json").write_text(json.dumps([{"q": "Which?", "a": "red", "pictures": ["red.png"]}] * 3))
    own = {"file_name": "own/own.json", "columns": {"prompt": "q", "response": "a", "images": "pictures"}}
    hub = {"hf_hub_url": "people/rows", "split": "train_sft", "formatting": "sharegpt"}
    odd = {"file_name": "odd.json", "formatting": "sharegpt", "tags": {"user_tag": "asker"}}
    more = shapes | {"file_name": "more.json"}
    known = {
        "shapes": shapes,
        "more": more,
        "own": own,
        "hub": hub,
        "odd": odd,
        "likes": {"file_name": "l.json", "ranking": True},
        "parts": own | {"columns": {"prompt": "instruction", "query": "context", "response": "a", "system": "sys"}},
        "beside": own | {"columns": own["columns"] | {"query": "input", "system": "system"}},
    }
    (data / "dataset_info.json").write_text(json.dumps(known))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "text", "ranks", "settings", "left", "missing"), CASES, ids=[one[0] for one in CASES])
def test_a_configuration_becomes_ours(
    name: str, text: str, ranks: int | None, settings: dict[str, Any], left: set[str], missing: set[str], here: Path
) -> None:
    Path(name).write_text(text)
    made = import_config(Path(name), ranks=ranks)
    assert (made.settings, set(made.left), set(made.missing)) == (settings, left, missing)
    assert all(made.left.values())
    # Every setting of theirs is told of, once.
    told = [part for theirs in made.carried.values() for part in theirs.split(" × ")]
    given = {key for key, value in made.given.items() if value not in (-1, "all-linear")} - {"stage", "do_train"}
    assert given <= {*told, *made.left, "warmup_ratio", "finetuning_type", "train_type", "tuner_type", *told}
    # What is written is what a run reads.
    Path("run.yaml").write_text(made.as_yaml())
    config = build_model(RunConfig, {}, read_yaml(Path("run.yaml")))
    dumped = config.model_dump(mode="json")
    assert {key: dumped[key] for key in settings} == settings


def test_its_tables_are_printed_and_no_file_is_written_over(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("examples").mkdir()
    Path("examples/lora.yaml").write_text(FACTORY)
    cli.main(["config", "import", "examples/lora.yaml", "--out", "run.yaml", "--ranks", "8"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "no counterpart" in said
    assert said.rstrip().endswith("train with --config run.yaml")
    with pytest.raises(UserError, match=r"run\.yaml: is there already"):
        cli.main(["config", "import", "examples/lora.yaml", "--out", "run.yaml"], standalone_mode=False)


def configuration(dataset: str) -> Path:
    Path("a.yaml").write_text(f"do_train: true\nmodel_name_or_path: m\noutput_dir: o\ndataset: {dataset}\n")
    return Path("a.yaml")


@pytest.mark.parametrize(
    ("dataset", "placed"),
    [
        ("shapes", {"data_path": "data/shapes.json"}),
        ("own", {"data_path": "data/own/own.json", "columns": "question=q,answer=a,image=pictures",
                 "image_root": "data"}),
        ("shapes,more", {"data_path": ["data/shapes.json", "data/more.json"]}),
    ],
)  # fmt: skip
def test_data_sets_train_as_they_lie(dataset: str, placed: dict[str, Any], here: Path) -> None:
    """What is written reads their rows and finds their pictures."""
    Path("run.yaml").write_text(import_config(configuration(dataset)).as_yaml())
    values = read_yaml(Path("run.yaml"))
    assert {name: values[name] for name in ("data_path", "columns", "image_root") if name in values} == placed
    config = build_model(RunConfig, {}, values)
    for file in find_files(config.records):
        count, faults = check_file(
            file, "sft", config.image_root, None, config.latent_size, columns=parse_columns(config.columns)
        )
        assert (count, faults) == (3, [])


def test_a_usual_column_in_another_part_is_named(here: Path) -> None:
    """Questions made for answers: unnamed, the usual columns would be read the other way round."""
    Path("data/dataset_info.json").write_text(
        json.dumps({"back": {"file_name": "back.json", "columns": {"prompt": "output", "response": "instruction"}}})
    )
    assert import_config(configuration("back")).settings["columns"] == "question=output,answer=instruction"


def test_without_out_the_settings_alone_are_on_stdout(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("lora.yaml").write_text(FACTORY)
    cli.main(["config", "import", "lora.yaml", "--stage", "stage1"], standalone_mode=False)
    printed = capsys.readouterr()
    Path("run.yaml").write_text(printed.out)
    assert read_yaml(Path("run.yaml"))["stage"] == "stage1"
    assert "8 × the number of GPUs" in printed.out
    assert "carried over" in printed.err


@pytest.mark.parametrize(
    ("dataset", "name", "why"),
    [
        ("gone", "data_path", "gone is not described in data/dataset_info.json"),
        ("odd", "data_path", "odd calls its roles asker; rename them"),
        ("likes", "data_path", "likes holds preferences"),
        ("parts", "data_path", "parts has query (context), system (sys), which --columns cannot name; call its columns "
                               "instruction, input, output, system and history"),
        ("beside", "data_path", "beside has query (input), which --columns cannot name"),
        ("hub", "data_path", "hub is no file; where the Hugging Face Hub has it, `mirage-ds data import people/rows "
                             "--split train_sft --out DIR` makes records of it"),
        ("shapes,own", "columns", "the same for all records, and theirs differ (question=q,answer=a,image=pictures / "
                                  "the usual ones)"),
    ],
)  # fmt: skip
def test_a_data_set_that_cannot_be_taken_is_to_be_given(dataset: str, name: str, why: str, here: Path) -> None:
    made = import_config(configuration(dataset))
    assert made.missing[name].startswith(why)
    assert f"# {name}: {why}" in made.as_yaml()


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("a.yaml", "stage: dpo\ndo_train: true\nmodel_name_or_path: m\n", "a.yaml: is for dpo; only fine-tuning"),
        ("a.yaml", "model_name_or_path: m\ntemplate: qwen2_vl\n", "a.yaml: trains nothing (it has no do_train: true)"),
        ("a.yaml", "model: m\ntuner_type: lora\ntask_type: seq_cls\n", "a.yaml: is for seq_cls; only fine-tuning"),
        ("a.yaml", "model: m\ntuner_type: lora\nmicro_batch_size: 1\n", "a.yaml: is for Megatron; only fine-tuning"),
        ("a.yaml", "model: m\nlr: 3\n", "a.yaml: is no configuration that is recognised; give one of LLaMA-Factory"),
        ("a.yaml", "save_model_path: m\ndata_path: a\n", "a.yaml: is no configuration that is recognised"),
        ("a.yaml", "- a\n", "a.yaml: expected `key: value` lines, found list"),
        ("a.json", "{", "a.json line 1: not valid YAML"),
        (
            "a.yaml",
            "do_train: true\nfinetuning_type: oft\nmodel_name_or_path: m\n",
            "a.yaml: finetuning_type oft has no counterpart",
        ),
        (
            "a.yaml",
            "do_train: true\nlora_rank: many\nmodel_name_or_path: m\n",
            "'lora_rank' in a.yaml, in our names, is 'many'",
        ),
        ("a.sh", "swift rlhf --rlhf_type dpo", "a.sh: has no `swift sft`"),
        ("a.sh", "llamafactory-cli train a.yaml", "a.sh: has no `swift sft`"),
        ("gone.yaml", None, "gone.yaml: no such file"),
    ],
)
def test_what_is_not_recognised_is_one_sentence(file: str, text: str | None, said: str, here: Path) -> None:
    if text is not None:
        Path(file).write_text(text)
    with pytest.raises(UserError) as caught:
        import_config(Path(file))
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_what_is_given_wins_over_a_default_of_theirs(here: Path) -> None:
    file = configuration("shapes")
    file.write_text(file.read_text() + "warmup_steps: 100\nlr_scheduler_type: cosine_with_min_lr\n")
    made = import_config(file)
    assert made.settings["warmup_steps"] == 100
    # What has no counterpart is not replaced by a default that nobody asked for.
    assert "lr_scheduler" not in made.settings
    assert "'cosine'" in made.left["lr_scheduler_type"]


def test_values_are_taken_as_yaml_gives_them(here: Path) -> None:
    """A list of one, and a number with an exponent, which YAML takes for a text."""
    Path("a.yaml").write_text(
        "model: m\ntuner_type: lora\ndataset: [a.jsonl]\noutput_dir: o\ntarget_modules: [all]\nwarmup_ratio: 5e-2\n"
        "per_device_train_batch_size: [2]\n"
    )
    made = import_config(Path("a.yaml"), ranks=2)
    assert "lora_targets" not in made.settings
    assert made.missing["warmup_steps"].startswith("5e-2 × the steps")
    assert made.missing["global_batch_size"].startswith("[2] × None")
    # Nobody has set it.
    assert (made.settings["lora_rank"], made.carried["lora_rank"]) == (8, "its default")


def test_the_group_is_listed() -> None:
    assert isinstance(cli.commands["config"], click.Group)


@pytest.mark.parametrize(
    ("script", "given", "ranks"),
    [
        ("swift sft --model m", {"model": "m"}, 1),
        ("NPROC_PER_NODE=8 NNODES=2 swift sft --model m --packing", {"model": "m", "packing": True}, 16),
        ("export NPROC_PER_NODE=2\nswift sft --model m  # as usual", {"model": "m"}, 2),
        ("NNODES=$WORLD_SIZE swift sft --model m", {"model": "m"}, None),
        # Another launcher's own flags stand before ours.
        ("torchrun --nproc_per_node 2 swift/cli/sft.py --model m --lora-rank=4", {"model": "m", "lora_rank": 4}, None),
        ("python -m swift.cli.sft --model m > log.txt", {"model": "m"}, None),
        ("swift export --model x\nswift sft --model m", {"model": "m"}, 1),
        # What is said or noted starts nothing and sets nothing.
        ("echo 'now swift sft begins'\nNPROC_PER_NODE=2 \\\n/opt/bin/swift sft --model m", {"model": "m"}, 2),
        ("NPROC_PER_NODE=8  # for swift sft below; was NPROC_PER_NODE=4\nswift sft --model m", {"model": "m"}, 8),
        ("say() { echo 'a\nb'; }\nN=4\nswift sft --gradient_accumulation_steps $(expr 16 / $N) --model ${M:-m}",
         {"gradient_accumulation_steps": 4, "model": "m"}, 1),
    ],
)  # fmt: skip
def test_scripts_are_read_as_a_shell_reads_them(
    script: str, given: dict[str, Any], ranks: int | None, here: Path
) -> None:
    Path("a.sh").write_text(script)
    found = read_foreign(Path("a.sh"))
    assert (found.trainer, found.given, found.ranks) == ("ms-swift", given, ranks)
