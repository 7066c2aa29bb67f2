"""A process's place among the ranks, as its launcher says it in the environment."""

from collections.abc import Mapping
from typing import NamedTuple

from mirage_ds.errors import UserError, shown

RANK_NAMES, MEETING = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("MASTER_ADDR", "MASTER_PORT")
# (rank, world size, local rank) in the order in which a guard believes them. A batch script under Slurm has
# SLURM_PROCID too, so that it comes last.
NAMES = (
    RANK_NAMES,
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)
LAUNCHERS = "launch/*.sh (`mirage-ds launch --write launch` writes them), torchrun or deepspeed"
# What tells a task that it is one of several: (who started it, its number, how many there are, what starts ranks).
# The nearest to the process comes first: mpirun may have been started by srun.
STARTERS = (
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "launch/mpi.sh"),
    ("mpirun", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "launch/mpi.sh"),
    ("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "launch/pod.sh on every host"),
    ("flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "launch/pod.sh on every host"),
    ("mpiexec or srun", "PMI_RANK", "PMI_SIZE", "launch/mpi.sh, launch/slurm.sbatch"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "launch/slurm.sbatch"),
    ("srun", "SLURM_PROCID", "SLURM_NTASKS", "launch/slurm.sbatch"),
    ("srun", "SLURM_PROCID", "SLURM_NPROCS", "launch/slurm.sbatch"),
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
        return dict(zip((*RANK_NAMES, *MEETING), map(str, self), strict=True))


def _number(environment: Mapping[str, str], name: str, least: int, end: int) -> int:
    text = environment[name].strip()
    value = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
    if not least <= value < end:
        raise UserError(
            f"{name} is {shown(environment[name])}, and has to be a number from {least} to {end - 1}; let the launcher "
            f"set it ({LAUNCHERS})",
            everywhere=False,
        )
    return value


def _place(environment: Mapping[str, str], names: tuple[str, str, str]) -> Place:
    """Read a place whose numbers are all there."""
    rank_name, size_name, local_name = names
    missing = [name for name in MEETING if not environment.get(name)]
    if missing:
        raise UserError(
            f"{rank_name} is set, and {' and '.join(missing)} not: export the name of rank 0's host and a free port to "
            f"all ranks, or start through {LAUNCHERS}",
            everywhere=False,
        )
    size = _number(environment, size_name, 1, 1 << 20)
    return Place(
        _number(environment, rank_name, 0, size),
        size,
        _number(environment, local_name, 0, size),
        environment["MASTER_ADDR"],
        _number(environment, "MASTER_PORT", 1, 1 << 16),
    )


def find_place(environment: Mapping[str, str]) -> Place:
    """Read the place of a process that a guard runs in, from any launcher.

    Raises:
        UserError: no launcher has said it, or not where rank 0 is.
    """
    for names in NAMES:
        if all(name in environment for name in names):
            return _place(environment, names)
    raise UserError(
        "no launcher has set RANK, WORLD_SIZE and LOCAL_RANK (or their OpenMPI, MPICH or Slurm names); start the "
        f"guard through {LAUNCHERS}",
        everywhere=False,
    )


def is_rank(environment: Mapping[str, str]) -> bool:
    """Tell whether a launcher has made this process one rank of several; False where it runs alone.

    Raises:
        UserError: the environment says half of it, or this is one of several tasks that know nothing of each other:
            each of them would do the whole work, in the same folder.
    """
    there = [name for name in RANK_NAMES if environment.get(name)]
    missing = [name for name in (*RANK_NAMES, *MEETING) if not environment.get(name)]
    if not missing:
        _place(environment, RANK_NAMES)
        return True
    if "RANK" in environment or environment.get("WORLD_SIZE", "1") != "1":
        said = " and ".join(there) or "RANK"
        raise UserError(
            f"{', '.join(missing)} not set, beside {said}: start through {LAUNCHERS}, which set "
            f"all of them, or unset {said} to run alone",
            everywhere=False,
        )
    tasks = _tasks(environment)
    if tasks:
        raise UserError(
            f"{tasks}, and RANK is not set: each task would do the whole work alone, in the same folder; start "
            "through the script named (`mirage-ds launch` lists the scripts), or through torchrun, or start one task",
            everywhere=False,
        )
    return False


def _tasks(environment: Mapping[str, str]) -> str:
    """Say who has started this process as one of several; nothing where it is the only one."""
    for who, number, size, script in STARTERS:
        count = environment.get(size, "")
        if number not in environment or not count.isdecimal():
            continue
        in_script = environment.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environment
        if int(count) < 2 or (who == "srun" and in_script and environment[number] == "0"):
            # A batch script has the numbers of its first task, and is no task itself.
            return ""
        return f"{who} started {count} tasks ({number}={environment[number]}; {script} starts ranks)"
    if "PMIX_RANK" in environment:
        return f"a PMIx launcher started this (PMIX_RANK={environment['PMIX_RANK']}; launch/mpi.sh starts ranks)"
    return ""
