"""What `mirage-ds doctor` is asked: its flags."""

from pathlib import Path

from pydantic import BaseModel, Field, PositiveFloat, PositiveInt

from mirage_ds.config.columns import COLUMNS_HELP, ColumnsText
from mirage_ds.config.mixture import records_of
from mirage_ds.config.run import Stage
from mirage_ds.data.folders import paths_of


class DoctorSpec(BaseModel, extra="forbid", frozen=True, protected_namespaces=()):
    """What is looked at. The run's own flags keep their names and meaning; all are optional."""

    hostfile: Path | None = Field(None, description="The hostfile of `deepspeed --hostfile`; hosts are asked over ssh.")
    slurm: bool = Field(False, description="Look at the nodes of the Slurm job that this is called in.")
    model: str | None = Field(None, description="The run's model folder or hub id.")
    load_model_path: Path | None = Field(None, description="The run's start weights.")
    data_path: Path | tuple[Path, ...] | None = Field(
        None, description="The run's records; may be given several times."
    )
    eval_data_path: Path | None = Field(None, description="The records whose loss the run measures.")
    columns: ColumnsText = Field(None, description=COLUMNS_HELP)
    image_root: Path | None = Field(None, description="Second place where relative image paths are looked for.")
    stage: Stage | None = Field(None, description="The run's stage: sft and stage2 open no helper image.")
    save_model_path: Path | None = Field(None, description="The run folder: shared, free space, write speed.")
    cache_dir: Path | None = Field(None, description="The run's cache of hub downloads.")
    deepspeed: Path | None = Field(None, description="The run's DeepSpeed JSON.")
    keep_checkpoints: PositiveInt = Field(2, description="Sharded checkpoints that stay on the disk.")
    master_port: int = Field(29500, ge=1, lt=65535, description="Port of rank 0: the launcher's, or MIRAGE_PORT.")
    master_addr: str | None = Field(None, description="Address of rank 0. [default: what DeepSpeed would take]")
    bandwidth: bool = Field(True, description="Start a rank on every slot and measure between them.")
    timeout_s: PositiveFloat = Field(12, description="Seconds a host has to answer; bandwidth has its own limit.")
    only: list[str] = Field([], description="Run these checks alone, by their names in the printed table.")

    def wants(self, check: str) -> bool:
        """Whether a check is to be run."""
        return not self.only or check in self.only

    def models(self) -> dict[str, str]:
        """Return flag → model folder or hub id; the one that gives the weights first."""
        named = {"--load_model_path": self.load_model_path, "--model": self.model}
        return {flag: str(name) for flag, name in named.items() if name is not None}

    def files(self) -> dict[str, Path]:
        """Return flag → file or, of records, source that every host reads; UserError where they make no mixture."""
        named = {"--eval_data_path": self.eval_data_path, "--deepspeed": self.deepspeed}
        files = {flag: path for flag, path in named.items() if path is not None}
        parts = paths_of(records_of(self.data_path)) if self.data_path else []
        for number, part in enumerate(parts, 1):
            files[f"--data_path {number}" if len(parts) > 1 else "--data_path"] = part
        return files
