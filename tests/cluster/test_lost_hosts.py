"""A host loses its power or its cable, under every launcher: see test_failures.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirage_ds.errors import EXIT_LOST

from .hosts import Cluster
from .jobs import all_end, start_all
from .slurm import Slurm


# The real trainer loses rank 1's host without power in test_requeue.py.
@pytest.mark.parametrize(("rank", "what"), [(1, "cable"), (0, "power"), (0, "cable")])
def test_a_host_is_lost(rank: int, what: str, cluster: Cluster, slurm: Slurm, tmp_path: Path) -> None:
    jobs = start_all(slurm, tmp_path)
    for job in jobs:
        job.wait_for_step(5)
    lost = slurm.nodes[rank]
    # With rank 0's host these two lose their launcher as well: what is left must end all the same.
    gone = [job for job in jobs if rank == 0 and job.launcher in ("pdsh", "mpi")]
    if what == "power":
        lost.power_off()
    else:
        lost.cut_cable()
    try:
        for job in jobs:
            if job.launcher == "pods":
                job.processes = [job.processes[1 - rank]]
        survivors = [job for job in jobs if job not in gone]
        all_end(survivors, f"rank {rank}'s host loses its {what}", EXIT_LOST, "no sign of life")
        for job in gone:
            assert not job.left_behind(20)
    finally:
        if what == "power":
            lost.power_on()
        else:
            lost.mend_cable()
