"""What a run is: every setting, typed and checked, with its default. Imports no torch.

The names and meanings of the public Mirage code's flags are kept: --model --stage --task --data_path --latent_size
--compress_strategy --epochs --gradient_accumulation_steps --save_model_path --load_model_path --cache_dir --log_file.
"""

import os
import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from mirage_ds.config.columns import COLUMNS_HELP, ColumnsText
from mirage_ds.config.mixture import Records, records_of
from mirage_ds.config.rl import RL_ONLY, RlSettings
from mirage_ds.errors import is_text

Stage = Literal["sft", "scaffold", "stage1", "stage2", "rl"]
# Those that read helper images; each row needs one.
HELPED = ("scaffold", "stage1")
FeatureCache = Literal["all", "targets", "off"]
Compress = Literal["average", "grid", "random", "first", "region"]
# What region goes with.
WITH_REGION = {"stage": ("stage1",), "feed": ("targets",), "slots": (None, "latents"), "eval_pictures": (0,)}
# They act in data/encode.py, in decoding in model/slots.py.
Slots = Literal["latents", "pause", "marks", "auxiliary"]
LatentLoss = Literal["cosine", "l2"]
Feed = Literal["targets", "own"]

# The public code trains at micro-batch 1; the paper's batch is 8 rows an optimizer step.
PAPER_BATCH = 8
# The paper's γ: stage 1's objective is 0.1 · CE + (1 − mean cosine).
PAPER_GAMMA = 0.1
# What every evaluation measures; `sim` in stage1 alone.
LOSSES = ("loss", "ce", "token_ce", "sim")
# And of its latents (analysis/alike.py).
LATENT_MEASURES = ("cosine_within", "cosine_between", "share_between", "share_slots", "effective_rank")


def passes_of_block(k: int, latent_passes: int | None) -> int:
    """Passes that a block of k latents adds: k in turn, T together; after k of those no latent changes any more."""
    return k if latent_passes is None else min(k, latent_passes)


def cache_folder(cache_dir: Path | None) -> Path:
    """Where indices of records and kept features lie unless --cache_dir names another folder."""
    return cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mirage_ds"


class _Settings(BaseModel):
    """What every stage has. Field order is the order of `--help`."""

    # what is trained
    model: str | None = Field(None, description="Folder or hub id: Qwen2-VL, 2.5-VL, 3-VL. [this or --load_model_path]")
    load_model_path: Path | None = Field(None, description="Earlier run to start from; --model gives what it lacks.")
    save_model_path: Path = Field(description="Run folder: log, checkpoints and the trained model. [required to train]")
    stage: Stage = Field(
        description="sft (text), scaffold (learned targets), stage1 (latents from helpers), stage2 (own latents), rl."
    )
    task: str | None = Field(None, description="Scoring task, or module:function. [default: each record's, or boxed]")
    latent_size: PositiveInt = Field(4, description="k: latent tokens of a latent block.")
    slots: Slots | None = Field(
        None,
        description="In place of the helper: latents; pause (sft: k pause tokens); marks (sft: the two boundary "
        "tokens alone); auxiliary (stage1: latents that answers do not attend to). [default: latents; sft: nothing]",
    )
    compress_strategy: Compress = Field(
        "average",
        description="How stage 1 compresses the helper's features to k targets: means of bands in raster order (the "
        "paper's), of blocks of a grid, of groups drawn at random, the first k features, or (region) all those of the "
        "input image in a record's box.",
    )
    latent_loss: LatentLoss = Field("cosine", description="Of stage 1's latents: 1 − cosine, or mean squared distance.")
    latent_targets: Path | None = Field(None, description="stage1: targets by the encoder that scaffold saved here.")
    feed: Feed = Field("targets", description="stage1: what latents get as inputs; own: the model's states, as stage2.")
    latent_passes: int | None = Field(None, ge=0, description="A block's latents together in T passes; 0: in parallel.")
    bottleneck: bool = Field(False, description="Text behind latents does not see the input images (stage1, stage2).")
    detach_latents: bool = Field(False, description="No gradient through the states that are fed back (stage2, own).")
    train_targets: bool = Field(False, description="stage1 --train_vision: CE trains the tower through latents.")
    train_vision: bool = Field(False, description="Train the vision tower too; in scaffold a copy of it.")
    lora_rank: PositiveInt | None = Field(
        None, description="Train LoRA adapters of this rank only: `mirage-ds docs lora`."
    )
    lora_alpha: PositiveInt | None = Field(None, description="Scale adapters by alpha / rank. [default: 2 × rank]")
    lora_dropout: float = Field(0, ge=0, lt=1, description="Must be 0: layers are recomputed exactly.")
    lora_targets: list[str] | None = Field(None, description="Layers with an adapter, such as q_proj. [default: all]")

    # data
    data_path: Path | tuple[Path, ...] = Field(
        description="Records: a file (JSON lines, JSON array, CSV, Parquet, Arrow), a folder of such files or of "
        "`datasets`, or a glob pattern in quotes. May be given several times: all records together, or in proportion "
        "as FILE:WEIGHT."
    )
    columns: ColumnsText = Field(None, description=COLUMNS_HELP)
    image_root: Path | None = Field(None, description="Second place where relative image paths are looked for.")
    max_length: PositiveInt = Field(4096, description="Longer rows are dropped and counted, never cut.")
    max_dropped_share: float = Field(0.1, ge=0, le=1, description="Refuse to train if a larger share is dropped.")
    check_images: bool = Field(False, description="Check every image before the first step; index again if changed.")
    confine_paths: bool = Field(False, description="Refuse images outside the records' folder and --image_root.")
    skip_bad_records: bool = Field(False, description="Skip bad records; see --save_model_path/run/skipped.jsonl.")
    max_bad_share: float = Field(0.01, ge=0, le=1, description="Refuse to train if a larger share is faulty.")
    min_pixels: PositiveInt | None = Field(None, description="Smallest input image; the processor's own if not set.")
    max_pixels: PositiveInt | None = Field(None, description="Largest input image; the processor's own if not set.")
    helper_min_pixels: PositiveInt | None = Field(None, description="As --min_pixels, for helper images.")
    helper_max_pixels: PositiveInt | None = Field(None, description="As --max_pixels, for helper images.")
    feature_cache: FeatureCache | None = Field(
        None,
        description="Keep features of the frozen tower on disk for all epochs, stages and runs: of all images, of "
        "helpers alone (their k targets), or none (off). [default: all; off with --train_vision]",
    )
    feature_dir: Path | None = Field(None, description="Features' folder, seen by all hosts. [default: in --cache_dir]")
    num_workers: int = Field(2, ge=0, description="Worker processes per rank.")
    cache_dir: Path | None = Field(
        None, description="Cache of downloads, indices and features. [default: the hub's own, and ~/.cache/mirage_ds]"
    )

    # the optimizer step
    epochs: PositiveFloat = Field(10, description="Passes over the data.")
    max_steps: PositiveInt | None = Field(None, description="Optimizer steps, at most; --epochs may end earlier.")
    global_batch_size: PositiveInt | None = Field(None, description="Rows of a step, all ranks; not rl. [default: 8]")
    gradient_accumulation_steps: PositiveInt | None = Field(
        None, description="The public Mirage code's name of --global_batch_size: rows of a step, not a factor."
    )
    micro_batch_tokens: PositiveInt = Field(8192, description="Tokens in one micro-batch of one rank, at most.")
    micro_batch_size: PositiveInt | None = Field(None, description="Rows in one micro-batch of one rank, at most.")
    micro_batch_patches: PositiveInt | None = Field(
        None, description="Patches (14 or 16 px a side) in one micro-batch, at most; of a tower that runs."
    )
    allow_idle_ranks: bool = Field(False, description="Allow more ranks than a step has rows; some stay idle.")
    reduction: Literal["sample", "token"] = Field("sample", description="Mean of the rows' losses, or over all tokens.")
    ce_weight: float | None = Field(None, ge=0, description="Weight of the CE, γ. [default: 0.1 in stage1, else 1]")
    learning_rate: PositiveFloat = Field(1e-5, description="Peak learning rate of AdamW.")
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field("cosine", description="Decay after the warm-up.")
    warmup_steps: int = Field(10, ge=0, description="Optimizer steps of linear warm-up.")
    adam_beta1: float = Field(0.9, gt=0, lt=1, description="AdamW β1.")
    adam_beta2: float = Field(0.95, gt=0, lt=1, description="AdamW β2.")
    adam_eps: PositiveFloat = Field(1e-8, description="AdamW ε.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay; norms and biases are exempt.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient's global norm to this; 0 switches it off.")
    seed: int = Field(42, ge=0, description="Draws each step's rows and adapters' first values; rl: also samples.")

    # the machine
    deepspeed: Path | None = Field(
        None, description="Path of a JSON; sets the precision. [default: our zero3.json; stage2, rl: zero3_kept.json]"
    )
    attention: Literal["auto", "flash", "torch_varlen", "sdpa"] = Field("auto", description="Attention back end.")
    kernels: Literal["liger"] | None = Field(None, description="Fused RMSNorm and SwiGLU on a GPU. [default: none]")
    gradient_checkpointing: bool = Field(True, description="Recompute each layer in backward, in every pass.")
    loss_chunk_mb: PositiveInt | None = Field(None, description="MiB of a logits chunk. [default: GPU / 128; CPU 256]")

    # what is written
    save_every: PositiveInt | None = Field(None, description="Steps between sharded checkpoints. [default: none]")
    keep_checkpoints: PositiveInt = Field(2, description="Sharded checkpoints that are kept; older ones are deleted.")
    async_save: bool = Field(False, description="Write checkpoints while steps are taken, from a copy in the RAM.")
    max_skipped_steps: PositiveInt = Field(5, description="End after so many steps without a finite loss or gradient.")
    start_timeout: PositiveInt = Field(3600, description="Seconds that a start may stand still, until step 1 is done.")
    collective_timeout: PositiveInt = Field(900, description="Seconds a rank waits for another, from step 2 on.")
    profile_steps: str | None = Field(None, description="Trace rank 0 in steps FIRST:LAST by torch.profiler.")
    log_rows: bool = Field(False, description="Write into log.jsonl which rows each rank ran in each step.")
    resume: Literal["auto", "never"] = Field("never", description="auto: continue from the newest checkpoint, if any.")
    eval_data_path: Path | None = Field(None, description="Records evaluated while training; needs --eval_every.")
    eval_every: PositiveInt | None = Field(None, description="Steps between two evaluations; needs --eval_data_path.")
    eval_decode: int = Field(0, ge=0, description="Answer and score this many evaluation records; 0 answers none.")
    eval_new_tokens: PositiveInt = Field(256, description="Tokens of such an answer, at most.")
    eval_pictures: int = Field(0, ge=0, description="Draw this many records' latents in TensorBoard each time.")
    save_best: str | None = Field(None, description="Keep the best model in best/: by loss, ce, success, correct, …")
    overwrite: bool = Field(False, description="Start over in a --save_model_path that holds an earlier run.")
    log_every: PositiveInt | None = Field(
        None, description="Optimizer steps between two lines on the console. [default: 10; 1 in a run of at most 100]"
    )
    log_file: Path | None = Field(None, description="Also write the log lines to this file.")
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "none"]] = Field(
        ["tensorboard"], description="Where metrics go besides console and log.jsonl: tensorboard, wandb, mlflow, none."
    )
    peak_tflops: PositiveFloat | None = Field(None, description="A GPU's dense peak, for MFU. [default: known GPUs']")


class RunConfig(RlSettings, _Settings):
    """One training run."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("data_path", mode="before")
    @classmethod
    def _one_source_is_no_mixture(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and not value:
            raise ValueError("names no records")
        return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value

    @property
    def records(self) -> Records:
        """What --data_path names; UserError where its weights make no mixture."""
        return records_of(self.data_path)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.model is None and self.load_model_path is None:
            raise ValueError("--model is required: a Qwen2-VL, 2.5-VL or 3-VL, folder or hub id (or --load_model_path)")
        rows, same = self.global_batch_size, self.gradient_accumulation_steps
        if rows and same and rows != same:
            raise ValueError(f"--global_batch_size {rows} and --gradient_accumulation_steps {same}: give one of them")
        if (self.eval_data_path is None) != (self.eval_every is None):
            raise ValueError("--eval_data_path and --eval_every belong together: give both or none")
        for name in ("eval_decode", "eval_pictures", "save_best"):
            if (given := getattr(self, name)) and self.eval_data_path is None:
                raise ValueError(f"--{name} {given} needs records to evaluate: add --eval_data_path and --eval_every")
        if self.eval_pictures and "tensorboard" not in self.report_to:
            raise ValueError(f"--eval_pictures {self.eval_pictures} go to TensorBoard: add --report_to tensorboard")
        if self.eval_pictures and self.stage == "sft":
            raise ValueError(f"--eval_pictures {self.eval_pictures}: --stage sft has no latents to draw; leave it out")
        self._agree_on_targets()
        if self.save_best and self.save_best not in LOSSES and not self.eval_decode:
            there = f"of losses there are {', '.join(LOSSES)}; a metric of the scorer needs --eval_decode"
            raise ValueError(f"--save_best {self.save_best}: {there}")
        if self.trains_tower and (kept := self.feature_cache) in ("all", "targets"):
            raise ValueError(
                f"--train_vision changes the features that --feature_cache {kept} would keep: leave out one"
            )
        for name in ("lora_alpha", "lora_dropout", "lora_targets"):
            if getattr(self, name) and self.lora_rank is None:
                raise ValueError(f"--{name} needs adapters: add --lora_rank, or leave it out")
        if self.lora_dropout:
            raise ValueError(
                "--lora_dropout: recomputed, a layer would draw another mask than its forward; leave it out"
            )
        if self.lora_rank and self.train_vision:
            raise ValueError("--train_vision trains the tower, which no adapter holds: leave out it or --lora_rank")
        allowed = {"sft": ("pause", "marks"), "stage1": ("latents", "auxiliary")}.get(self.stage, ("latents",))
        if self.slots and self.slots not in allowed:
            raise ValueError(f"--slots {self.slots}: --stage {self.stage} takes {', '.join(allowed)}")
        if self.train_targets and not (self.train_vision and self.stage == "stage1"):
            raise ValueError("--train_targets trains the tower of stage1: add --train_vision and --stage stage1")
        if self.profile_steps is not None and not self.profiled:
            raise ValueError(f"--profile_steps {self.profile_steps}: give FIRST:LAST, such as 20:22")
        if self.detach_latents and (self.stage == "rl" or not self.recurrent):
            where = self.stage if self.latent_passes is None else "--latent_passes 0"
            raise ValueError(f"--detach_latents is for --stage stage2: no state is fed back in {where}")
        self._agree_in_rl()
        if self.resume == "auto" and self.overwrite:
            raise ValueError("--resume auto continues a run and --overwrite starts it over: give one of them")
        if self.latent_size > self.max_length:
            above = f"--latent_size {self.latent_size} is above --max_length {self.max_length}"
            raise ValueError(f"{above}: no row with a latent block would fit; lower the first or raise the second")
        if self.max_length > self.micro_batch_tokens:
            above = f"--max_length {self.max_length} is above --micro_batch_tokens {self.micro_batch_tokens}"
            raise ValueError(f"{above}: a row must fit into one micro-batch; lower the first or raise the second")
        return self

    def _agree_on_targets(self) -> None:
        folder, stage = self.latent_targets, self.stage
        if stage == "scaffold":
            for name in ("eval_decode", "eval_pictures"):
                if given := getattr(self, name):
                    raise ValueError(f"--{name} {given}: --stage scaffold trains no model that answers; leave it out")
            if self.lora_rank:
                raise ValueError("--lora_rank: --stage scaffold trains no weight of the model; leave it out")
        if folder and stage != "stage1":
            raise ValueError(f"--latent_targets {folder} is for --stage stage1, this run is {stage}: leave it out")
        if folder and self.train_vision:
            raise ValueError("--train_vision would change the tower that --latent_targets reads; leave out one")
        if folder and self.compress_strategy != "average":
            pooled = f"--compress_strategy {self.compress_strategy} makes targets of features"
            raise ValueError(f"{pooled}, and --latent_targets has its own; leave out one")
        for name, fits in WITH_REGION.items() if self.compress_strategy == "region" else ():
            if (given := getattr(self, name)) not in fits:
                raise ValueError(f"--{name} {given}: not with --compress_strategy region; leave out one of them")
        if self.feed == "own" and stage != "stage1":
            raise ValueError(f"--feed own is for --stage stage1, this run is {stage}: leave it out")
        if self.feed == "own" and self.slots == "auxiliary":
            raise ValueError("--feed own: answers of --slots auxiliary see no latents; leave out one")
        if (passes := self.latent_passes) is not None and stage != "stage2" and self.feed != "own":
            raise ValueError(
                f"--latent_passes {passes} is for stage2 and --feed own, this run is {stage}: leave it out"
            )
        if self.bottleneck and stage not in ("stage1", "stage2"):
            raise ValueError(f"--bottleneck is for --stage stage1 and stage2, this run is {stage}: leave it out")
        if self.bottleneck and self.slots == "auxiliary":
            raise ValueError("--bottleneck: answers of --slots auxiliary see no latents; leave out one")
        if self.feed == "own" and self.train_targets:
            raise ValueError("--train_targets trains the tower by the latents' inputs, which --feed own replaces")

    def _agree_in_rl(self) -> None:
        if self.stage != "rl":
            for name in RL_ONLY:
                if (given := getattr(self, name)) != RlSettings.model_fields[name].default:
                    raise ValueError(f"--{name} {given} is for --stage rl, this run is {self.stage}: leave it out")
            return
        if self.global_batch_size or self.gradient_accumulation_steps:
            raise ValueError("--global_batch_size: a step of --stage rl has its share of --prompts_per_rollout")
        if self.rows_per_step % self.updates:
            raise ValueError(f"--updates {self.updates} does not divide --prompts_per_rollout {self.rows_per_step}")
        if self.clip_low >= 1:
            raise ValueError(f"--clip_low {self.clip_low}: a ratio is never below 0; give less than 1")
        for name in ("save_every", "eval_every", "max_steps"):
            if (given := getattr(self, name)) and given % self.steps_per_rollout:
                raise ValueError(
                    f"--{name} {given}: a rollout has {self.steps_per_rollout} optimizer steps (--updates × "
                    "--num_iterations); give a multiple of that"
                )
        if self.max_completion_length >= self.max_length:
            above = f"--max_completion_length {self.max_completion_length} leaves no room for a prompt"
            raise ValueError(f"{above} in --max_length {self.max_length}; lower the first or raise the second")

    @field_validator("*")
    @classmethod
    def _nameable(cls, value: Any) -> Any:
        """Refuse paths that no file can have and that no settings file can hold."""
        text = str(value) if isinstance(value, Path | str) else ""
        if "\0" in text or not is_text(text):
            raise ValueError("not UTF-8 text, or with a zero byte")
        return value

    @property
    def tolerated_share(self) -> float | None:
        """Share of faulty records that is left out; None where one fault refuses the run."""
        return self.max_bad_share if self.skip_bad_records else None

    @property
    def profiled(self) -> range:
        """The optimizer steps of --profile_steps, from 1."""
        found = re.fullmatch(r"([1-9]\d*):(\d+)", self.profile_steps or "")
        return range(int(found[1]), int(found[2]) + 1) if found else range(0)

    @property
    def rows_per_step(self) -> int:
        """Rows an optimizer step, in rl prompts a rollout (the contract: the same rows on any number of ranks)."""
        if self.stage == "rl":
            return self.prompts_per_rollout or PAPER_BATCH
        return self.global_batch_size or self.gradient_accumulation_steps or PAPER_BATCH

    @property
    def kept_fields(self) -> tuple[str, ...]:
        """Fields of the record whose images' features are kept on disk."""
        if self.trains_tower or self.feature_cache == "off":
            return ()
        # Those that a trained copy of the tower makes change from step to step.
        helped = self.stage in HELPED and self.compress_strategy != "region"
        helpers = ("image_output",) if helped and not self.train_vision else ()
        return helpers if self.feature_cache == "targets" else ("image_input", *helpers)

    @property
    def features_folder(self) -> Path:
        """Where kept features lie."""
        return self.feature_dir or cache_folder(self.cache_dir) / "features"

    @property
    def trains_tower(self) -> bool:
        """Whether the model's own tower is trained; scaffold trains a copy."""
        return self.train_vision and self.stage != "scaffold"

    @property
    def trains_helpers(self) -> bool:
        """Whether a tower is trained through helper images."""
        return self.train_targets or (self.train_vision and self.stage == "scaffold")

    @property
    def recurrent(self) -> bool:
        """Whether states are fed back at latents, in passes."""
        return (self.stage in ("stage2", "rl") or self.feed == "own") and self.latent_passes != 0

    def passes(self, most_runs: int) -> int:
        """Passes of the forward, the same for all ranks' micro-batches of a micro-step (see data.passes.schedule).

        Args:
            most_runs: latent blocks of the row that has most among them.
        """
        if self.recurrent:
            return most_runs * passes_of_block(self.latent_size, self.latent_passes) + 1
        return 2 if self.slots == "auxiliary" else 1

    @property
    def gamma(self) -> float:
        """Weight of the cross-entropy in the objective."""
        if self.ce_weight is not None:
            return self.ce_weight
        return PAPER_GAMMA if self.stage == "stage1" else 1.0
