"""What the settings of other trainers are called here: one table for wrong flags and for `mirage-ds config import`.

Their names stand in the documentation of transformers (TrainingArguments), TRL, LLaMA-Factory and ms-swift.
"""

from collections.abc import Collection

from mirage_ds.errors import closest

# Our setting: what others call it.
_OURS = {
    "model": "model_name_or_path model_id model_id_or_path model_name base_model pretrained_model_name_or_path",
    "save_model_path": "output_dir output output_path save_dir save_path",
    "data_path": "dataset datasets dataset_name dataset_path train_dataset train_file train_data train_data_path data",
    "eval_data_path": "val_dataset eval_dataset eval_file val_file validation_file validation_data",
    "image_root": "image_folder image_dir images_dir media_dir data_root",
    "max_length": "cutoff_len max_seq_length max_seq_len model_max_length max_model_len sequence_len",
    "min_pixels": "image_min_pixels",
    "max_pixels": "image_max_pixels",
    "num_workers": "dataloader_num_workers",
    "epochs": "num_train_epochs num_epochs n_epochs max_epochs",
    "max_steps": "max_train_steps total_steps train_steps train_iters",
    "global_batch_size": "per_device_train_batch_size per_device_batch_size per_gpu_train_batch_size train_batch_size "
    "batch_size train_micro_batch_size_per_gpu",
    "learning_rate": "lr",
    "lr_scheduler": "lr_scheduler_type scheduler",
    "warmup_steps": "warmup_ratio num_warmup_steps lr_warmup_steps",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_eps": "adam_epsilon eps epsilon",
    "max_grad_norm": "gradient_clipping clip_grad grad_clip max_norm",
    "seed": "data_seed",
    "deepspeed": "deepspeed_config ds_config",
    "attention": "attn_implementation attn_impl flash_attn use_flash_attention_2",
    "gradient_checkpointing": "use_gradient_checkpointing disable_gradient_checkpointing",
    "train_vision": "freeze_vit freeze_vision_tower freeze_vision tune_mm_vision unfreeze_vision",
    "lora_rank": "lora_r use_lora use_peft lora_enable",
    "lora_targets": "lora_target target_modules lora_target_modules",
    "save_every": "save_steps save_interval save_freq checkpointing_steps",
    "keep_checkpoints": "save_total_limit",
    "eval_every": "eval_steps eval_interval eval_freq",
    "resume": "resume_from_checkpoint auto_resume",
    "overwrite": "overwrite_output_dir",
    "log_every": "logging_steps log_interval log_freq",
    "report_to": "use_wandb log_with",
    # A flag of `mirage-ds train` alone.
    "ranks": "nproc_per_node num_gpus n_gpu num_processes",
}
# Why there is no such setting here: whose names.
_ABSENT = {
    "the DeepSpeed JSON (--deepspeed) sets the precision": "bf16 fp16 tf32 torch_dtype dtype model_dtype pure_bf16",
    "run/log.jsonl has every step": "logging_strategy logging_first_step",
    "TensorBoard reads the run folder": "logging_dir plot_loss run_name",
    "the optimizer is AdamW": "optim optimizer",
    "the command trains": "do_train do_eval do_predict",
    "all weights are trained, or adapters (--lora_rank)": "finetuning_type train_type tuner_type",
    "--save_every and --eval_every count steps, never epochs": "save_strategy eval_strategy evaluation_strategy",
    "--save_best keeps the model of the best evaluation": "load_best_model_at_end metric_for_best_model",
    "a hung run ends after --collective_timeout seconds": "ddp_timeout",
    "--data_path names the files themselves": "dataset_dir",
    "write it into the records, as their system message": "system",
    "the model's own chat template is used": "template model_type chat_template use_chat_template",
    "code of the hub is never run": "trust_remote_code",
    "rows are always packed": "packing padding_free neat_packing group_by_length pad_to_multiple_of",
    "every checkpoint can be continued; the model is saved at the end": "save_only_model",
    "all keys of a record are kept": "remove_unused_columns",
    "records are indexed once, by all ranks (--cache_dir)": "preprocessing_num_workers dataset_num_proc "
    "overwrite_cache load_from_cache_file lazy_preprocess",
    "name held-out records with --eval_data_path": "split_dataset_ratio val_size",
    "all records are taken; `mirage-ds data mix FILE --count N` takes some": "max_samples",
    "--micro_batch_tokens is the bound for evaluation too": "per_device_eval_batch_size eval_batch_size",
    "the launcher says how many ranks there are": "nproc_per_node num_gpus n_gpu num_processes world_size nnodes",
    "the merger is frozen and trained with the tower (--train_vision)": "freeze_aligner freeze_multi_modal_projector "
    "freeze_merger tune_mm_mlp",
    "the decoder is trained, or adapters of it (--lora_rank)": "freeze_llm freeze_language_model tune_mm_llm",
    "there is one learning rate": "vit_lr aligner_lr vision_lr merger_lr mm_projector_lr loraplus_lr_ratio "
    "lorap_lr_ratio",
    "quantised weights are not trained": "quantization_bit quantization_method quant_bits quant_method load_in_4bit "
    "load_in_8bit bits",
    "there is nothing like it": "use_liger_kernel enable_liger_kernel use_unsloth video_max_pixels video_min_pixels "
    "video_fps video_maxlen push_to_hub hub_model_id hub_token hub_private_repo neftune_noise_alpha "
    "label_smoothing_factor",
    "only a record's last answer is learnt": "mask_history train_on_prompt loss_scale",
}
OURS = {theirs: ours for ours, names in _OURS.items() for theirs in names.split()}
ABSENT = {theirs: why for why, names in _ABSENT.items() for theirs in names.split()}
# What differs besides the name.
DIFFERS = {
    "batch_size": "rows of all ranks together",
    "per_device_train_batch_size": "theirs × gradient_accumulation_steps × ranks",
    "warmup_ratio": "a number of steps, not a share",
    **dict.fromkeys(("disable_gradient_checkpointing", "freeze_vit", "freeze_vision_tower"), "the other way round"),
    "resume_from_checkpoint": "auto, from the run folder's newest checkpoint",
}


def ours(name: str) -> str | None:
    """Return our setting for another trainer's, or None; `-` and `_` are alike."""
    return OURS.get(_key(name))


def hint(name: str, known: Collection[str]) -> str:
    """Return what to say behind an unknown setting: its name here, why there is none, or the nearest known name.

    Args:
        name: as it was given: a flag with its dashes, or a key.
        known: the settings that there are.
    """
    theirs, found = _key(name), ours(name)
    dashes = "--" if name.startswith("-") else ""
    if found and found in known:
        return f"; here it is {dashes}{found}{f' ({DIFFERS[theirs]})' if theirs in DIFFERS else ''}"
    if theirs in ABSENT:
        return f"; it has no counterpart here: {ABSENT[theirs]}"
    return closest(name, [dashes + one for one in known])


def _key(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()
