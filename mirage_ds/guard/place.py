"""Which rank a process is, from what its launcher says in the environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from mirage_ds.errors import UserError

# (rank, world size, local rank) in the order in which they are believed. A batch script under Slurm has SLURM_PROCID
# too, so that it comes last.
NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


class Place(NamedTuple):
    """A rank among the others, and where they meet."""

    rank: int
    size: int
    local_rank: int
    master: str
    master_port: int

    def variables(self) -> dict[str, str]:
        """Return the variables by which torch and DeepSpeed know the place."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.master,
            "MASTER_PORT": str(self.master_port),
        }


def find_place(environment: Mapping[str, str]) -> Place:
    """Read the place of this process.

    Raises:
        UserError: no launcher has said it, or not where rank 0 is.
    """
    for names in NAMES:
        if all(name in environment for name in names):
            rank, size, local_rank = (int(environment[name]) for name in names)
            break
    else:
        raise UserError(
            "no launcher has set RANK, WORLD_SIZE and LOCAL_RANK (or their OpenMPI, MPICH or Slurm names); start the "
            "guard through launch/*.sh, deepspeed, mpirun or srun"
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not set: export the name of rank 0's host and a free port to all ranks"
        )
    return Place(rank, size, local_rank, environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))
