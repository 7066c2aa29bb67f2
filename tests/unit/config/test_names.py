"""Names of other trainers: each leads to a setting that there is, or to the reason why there is none."""

import click
import pytest

from mirage_ds import train
from mirage_ds.config.flags import build_model
from mirage_ds.config.names import by_theirs, hint, ours, tables
from mirage_ds.config.run import RunConfig
from mirage_ds.errors import UserError

# Of the examples that LLaMA-Factory (train_full, train_lora) and ms-swift (train/multimodal) publish for Qwen2.5-VL.
PUBLISHED = """model_name_or_path image_max_pixels trust_remote_code do_train finetuning_type freeze_vision_tower
    freeze_multi_modal_projector dataset template cutoff_len max_samples overwrite_cache preprocessing_num_workers
    dataloader_num_workers output_dir logging_steps save_steps plot_loss overwrite_output_dir save_only_model
    per_device_train_batch_size num_train_epochs lr_scheduler_type warmup_ratio bf16 ddp_timeout resume_from_checkpoint
    val_size per_device_eval_batch_size eval_strategy eval_steps lora_target train_type torch_dtype target_modules
    freeze_vit freeze_aligner save_total_limit attn_impl padding_free use_liger_kernel split_dataset_ratio
    dataset_num_proc val_dataset""".split()  # noqa: SIM905


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_name_is_answered(name: str) -> None:
    said = hint(f"--{name}", RunConfig.model_fields)
    assert said.startswith(("; here it is --", "; it has no counterpart here: "))


def test_the_table_leads_to_settings_that_there_are() -> None:
    # What has no setting yet has a reason.
    found, absent = by_theirs("ours"), by_theirs("absent")
    missing = [theirs for theirs, name in found.items() if name not in RunConfig.model_fields]
    assert set(missing) <= set(absent)
    # A setting of that name would never be answered for.
    assert not set(found) & set(RunConfig.model_fields)
    assert set(tables()["differs"]) <= {*found, *absent}
    # What one name means stands there once.
    for table in ("ours", "absent"):
        names = [theirs for those in tables()[table].values() for theirs in those]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--output_dir", "No such option: --output_dir; here it is --save_model_path"),
        ("--output-dir", "No such option: --output_dir; here it is --save_model_path"),
        ("--lr", "No such option: --lr; here it is --learning_rate"),
        (
            "--per_device_train_batch_size",
            "No such option: --per_device_train_batch_size; here it is --global_batch_size (theirs × "
            "gradient_accumulation_steps × ranks)",
        ),
        (
            "--bf16",
            "No such option: --bf16; it has no counterpart here: the DeepSpeed JSON (--deepspeed) sets the precision",
        ),
        ("--latent_sizes", "No such option: --latent_sizes (did you mean '--latent_size'?)"),
        ("--zzz", "No such option: --zzz; --help lists them"),
    ],
)
def test_a_flag_of_another_trainer_is_answered_with_ours(flag: str, said: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        train.command.main([flag, "1"], standalone_mode=False)
    assert caught.value.format_message() == said


def test_a_key_of_another_trainer_too() -> None:
    with pytest.raises(UserError, match=r"unknown key .num_train_epochs. in run\.yaml; here it is epochs$"):
        build_model(RunConfig, {}, {"num_train_epochs": 3}, "run.yaml")
    for name in ("ranks", "nproc_per_node", "num-gpus"):
        with pytest.raises(UserError, match=rf"unknown key '{name}' in run\.yaml; give --ranks to `mirage-ds train`$"):
            build_model(RunConfig, {}, {name: 2}, "run.yaml")
    assert (ours("--num-train-epochs"), ours("epochs")) == ("epochs", None)


def test_other_mistakes_stay_what_they_are() -> None:
    with pytest.raises(click.BadParameter):
        train.command.main(["--epochs", "many"], standalone_mode=False)
