"""The flags of `mirage-ds plan`. Imports little, so that the command line's `--help` is quick."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mirage_ds.config.rl import LatentPolicy
from mirage_ds.config.run import Feed, Stage


class PlanSpec(BaseModel, extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False):
    """What is planned. The run's own flags keep their names and meaning. GB are 10⁹ bytes, speeds go one direction."""

    # what is trained
    model: str = Field(description="Folder, config.json, public shape (qwen2.5-vl-3b, -7b, -32b, -72b) or its hub id.")
    stage: Stage = Field(description="As for a run.")
    feed: Feed = Field("targets", description="stage1: own makes latents in passes, as stage2.")
    bottleneck: bool = Field(False, description="As for a run.")
    latent_size: PositiveInt = Field(4, description="k, latents a block; of regions their mean.")
    latent_passes: NonNegativeInt | None = Field(None, description="As for a run: own latents made together.")
    latent_runs: PositiveInt = Field(1, description="Latent blocks of a row, at most.")
    deepspeed: Path | None = Field(None, description="Plan this JSON alone. [default: all that ship]")
    micro_batch_tokens: PositiveInt = Field(8192, description="Tokens packed into one micro-batch of one rank.")
    micro_steps: PositiveInt = Field(1, description="Micro-steps of an optimizer step.")
    row_tokens: PositiveInt = Field(500, description="Tokens of a row: prompt, images and answer.")
    labelled: float = Field(0.2, gt=0, le=1, description="Share of a row that is its answer, latents included.")
    images: NonNegativeInt = Field(1, description="Input images of a row.")
    image_tokens: PositiveInt = Field(256, description="Merged features of an image; 256 are 448 x 448 pixels.")
    rows: PositiveInt = Field(3000, description="Records, for the size of the kept features.")
    feature_cache: Literal["all", "targets", "off"] = Field("all", description="As for a run.")
    gradient_checkpointing: bool = Field(True, description="Recompute each layer in backward.")
    async_save: bool = Field(False, description="As for a run: a copy of a checkpoint lies in the hosts' RAM.")
    attention: Literal["flash", "torch_varlen", "sdpa"] = Field("flash", description="Attention back end.")
    loss_chunk_mb: PositiveInt | None = Field(None, description="MiB of a logits chunk. [default: GPU / 128; CPU 256]")

    prompts_per_rollout: PositiveInt = Field(8, description="rl: prompts of a rollout, of all ranks.")
    num_generations: PositiveInt = Field(8, description="rl: answers of a prompt.")
    max_completion_length: PositiveInt = Field(256, description="rl: tokens of an answer.")
    latent_policy: LatentPolicy = Field("through", description="rl: as for a run; gaussian counts its heads.")
    rollout_rows: PositiveInt | None = Field(None, description="rl: answers that a rank decodes at a time.")
    beta: NonNegativeFloat = Field(0.0, description="rl: above 0 the start's weights are held too, sharded.")

    # the machines
    nodes: PositiveInt = Field(1, description="Hosts.")
    gpus_per_node: PositiveInt = Field(8, description="GPUs of a host.")
    gpu: Literal["h100", "a100", "h200", "b200"] = Field("h100", description="Fills what is not given below.")
    gpu_memory: PositiveFloat | None = Field(None, description="GB of a GPU. [default: 80, 40, 141, 180]")
    tflops: PositiveFloat | None = Field(None, description="Its dense bf16 TFLOP/s. [default: 989.4, 312, 989.4, 2250]")
    hbm: PositiveFloat | None = Field(None, description="GB/s of a GPU's memory. [default: 3350, 1555, 4800, 8000]")
    nvlink: PositiveFloat | None = Field(None, description="GB/s of a GPU inside a host. [default: 450, 300, 450, 900]")
    network: PositiveFloat | None = Field(
        None, description="GB/s of all network adapters of a host together (3,200 Gb/s: 400). [default: 400; a100: 50]"
    )
    host_memory: PositiveFloat = Field(1000, description="GB of RAM of a host.")
    pcie: PositiveFloat = Field(25, description="GB/s between a GPU and its host.")
    host_bandwidth: PositiveFloat = Field(200, description="GB/s of a host's RAM, for an offloaded optimizer.")
    storage: PositiveFloat = Field(10, description="GB/s of the file system that checkpoints go to.")

    # assumptions
    reserve: NonNegativeFloat = Field(
        5, description="GB of a GPU kept for the CUDA context, NCCL's buffers and the allocator's losses."
    )
    used: float = Field(0.4, gt=0, le=1, description="Share of the peak FLOP/s that is reached.")
    operator_us: PositiveFloat = Field(7, description="Microseconds in which a host issues one operator.")
    achieved: float = Field(0.8, gt=0, le=1, description="Share of the link speeds that collectives reach.")

    @property
    def recurrent(self) -> bool:
        """Whether latents are made in passes."""
        through = self.stage == "rl" and self.latent_policy == "through"
        return (self.stage == "stage2" or self.feed == "own" or through) and self.latent_passes != 0

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.feed == "own" and self.stage != "stage1":
            raise ValueError(f"--feed own is for --stage stage1, this plan is of {self.stage}: leave it out")
        if self.latent_passes is not None and self.stage != "stage2" and self.feed != "own":
            given = f"--latent_passes {self.latent_passes} is for stage2 and --feed own"
            raise ValueError(f"{given}, this plan is of {self.stage}: leave it out")
        if self.bottleneck and self.stage not in ("stage1", "stage2"):
            raise ValueError(
                f"--bottleneck is for --stage stage1 and stage2, this plan is of {self.stage}: leave it out"
            )
        if self.row_tokens > self.micro_batch_tokens:
            raise ValueError(
                f"--row_tokens {self.row_tokens} is above --micro_batch_tokens {self.micro_batch_tokens}: a row must "
                "fit into one micro-batch; lower the first or raise the second"
            )
        latents = self.latent_runs * (self.latent_size + 1) + 1
        prompt = int(self.row_tokens * (1 - self.labelled))
        if prompt < 1 or self.row_tokens - prompt < latents:
            raise ValueError(
                f"--row_tokens {self.row_tokens} with --labelled {self.labelled} leaves no room for a prompt and "
                f"{self.latent_runs} block(s) of {self.latent_size} latents; raise --row_tokens"
            )
        if self.images * self.image_tokens > prompt:
            raise ValueError(
                f"{self.images} image(s) of --image_tokens {self.image_tokens} do not fit into the {prompt} tokens "
                "before a row's answer; raise --row_tokens or lower --image_tokens"
            )
        return self
