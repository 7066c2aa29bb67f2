"""The flags of `mirage-ds doctor`. Imports little, so that the command line's `--help` is quick."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt


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
    master_port: PositiveInt = Field(29500, le=65535, description="Port of rank 0, as given to the launcher.")
    master_addr: str | None = Field(None, description="Address of rank 0. [default: what DeepSpeed would take]")
    bandwidth: bool = Field(True, description="Measure between the ranks; about the time that importing torch takes.")
    timeout_s: PositiveFloat = Field(12, description="Seconds a host has to answer; bandwidth has its own minute.")
    only: list[str] = Field([], description="Run these checks alone, by the names of the table.")

    def wants(self, *checks: str) -> bool:
        """Whether one of the checks is to be run."""
        return not self.only or any(check in self.only for check in checks)
