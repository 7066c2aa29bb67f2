"""The real trainer; in its third step rank 1 does what is asked for: `python -m tests.cluster.faulty FAULT flags…`.

The faults `walk` and `crawl` make every step longer, so that another job or a time limit finds it at work. A job that
was requeued goes at its own pace.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from mirage_ds import train
from mirage_ds.run import step as step_module

FAULTS = ("kill", "stop", "loader", "skip", "walk", "crawl")
LONGER_S = {"walk": 1.0, "crawl": 7.0}


def late(batches: Iterator[Any]) -> Iterator[Any]:
    """Be a loader that does not come on."""
    time.sleep(1000)
    yield from batches


def main() -> None:
    fault = next(word for word in sys.argv if word in FAULTS)
    sys.argv.remove(fault)
    whole, collectives = train.step, step_module.dist
    longer = LONGER_S.get(fault, 0.0) if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" else 0.0

    def step(run: Any, data: Any, learner: Any, plan: Any, batches: Any) -> Any:
        time.sleep(longer)
        if run.world.rank == 1 and plan.step == 2:
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if fault == "loader":
                batches = late(batches)
            if fault == "skip":
                step_module.dist = SimpleNamespace(all_reduce=lambda totals: None)  # type: ignore[assignment]
        taken = whole(run, data, learner, plan, batches)
        step_module.dist = collectives
        return taken

    train.step = step  # type: ignore[assignment]
    train.main()


if __name__ == "__main__":
    main()
