"""What `mirage-ds doctor` is asked: its flags."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from mirage_ds.config.mixture import parse_part


class DoctorSpec(BaseModel):
    """What is looked at. The run's own flags keep their names and meaning; all are optional."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    hostfile: Path | None = Field(None, description="The hostfile of `deepspeed --hostfile`; hosts are asked over ssh.")
    slurm: bool = Field(False, description="Look at the nodes of the Slurm job that this is called in.")
    model: str | None = Field(None, description="The run's model folder or hub id.")
    load_model_path: Path | None = Field(None, description="The run's start weights.")
    data_path: Path | tuple[Path, ...] | None = Field(None, description="The run's records, all of them.")
    eval_data_path: Path | None = Field(None, description="The records whose loss the run measures.")
    image_root: Path | None = Field(None, description="Second place where relative image paths are looked for.")
    save_model_path: Path | None = Field(None, description="The run folder: shared, free space, write speed.")
    cache_dir: Path | None = Field(None, description="The run's cache of hub downloads.")
    deepspeed: Path | None = Field(None, description="The run's DeepSpeed JSON.")
    keep_checkpoints: PositiveInt = Field(2, description="Sharded checkpoints that stay on the disk.")
    master_port: int = Field(29500, ge=1, lt=65535, description="Port of rank 0, as given to the launcher.")
    master_addr: str | None = Field(None, description="Address of rank 0. [default: what DeepSpeed would take]")
    bandwidth: bool = Field(True, description="Start a rank on every slot and measure between them.")
    timeout_s: PositiveFloat = Field(12, description="Seconds a host has to answer; bandwidth has its own limit.")
    only: list[str] = Field([], description="Run these checks alone, by the names of the table.")

    def wants(self, check: str) -> bool:
        """Whether a check is to be run."""
        return not self.only or check in self.only

    def models(self) -> dict[str, str]:
        """Return flag → model folder or hub id; the one that gives the weights first."""
        named = {"--load_model_path": self.load_model_path, "--model": self.model}
        return {flag: str(name) for flag, name in named.items() if name is not None}

    def files(self) -> dict[str, Path]:
        """Return flag → file that every host reads."""
        parts = self.data_path if isinstance(self.data_path, tuple) else (self.data_path,)
        files = {"--eval_data_path": self.eval_data_path, "--deepspeed": self.deepspeed, "--data_path": parts[0]}
        if len(parts) > 1:
            del files["--data_path"]
            # Weights are the training's business.
            files |= {f"--data_path {number}": parse_part(str(part)).file for number, part in enumerate(parts, 1)}
        return {flag: path for flag, path in files.items() if path is not None}
