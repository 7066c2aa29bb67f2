"""A study on Slurm: an array a depth of the chains, each waiting for the one before. Imports no torch.

An array task is `mirage-ds ablate run STUDY --only KEY` in an allocation of its own. It waits for the whole depth
before it, ended well or not (`afterany`): a task whose model is not there ends at once, and the report has a hole.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from mirage_ds.ablate.nodes import Study
from mirage_ds.ablate.store import Store
from mirage_ds.errors import UserError
from mirage_ds.files import write_atomically

SCRIPT = """#!/usr/bin/env bash
#SBATCH --job-name={job}
#SBATCH --array=0-{last}{throttle}
#SBATCH --output={logs}/%A_%a.log
#SBATCH --signal=B:TERM@120
set -euo pipefail
mapfile -t keys < {keys}
hosts=()
if [ "${{SLURM_JOB_NUM_NODES:-1}}" -gt 1 ]; then
    # Runs of several hosts are started over ssh, which the allocation has to allow.
    list={logs}/hosts.$SLURM_JOB_ID
    scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/$/ slots=${{SLURM_GPUS_ON_NODE:-1}}/" > "$list"
    hosts=(--hostfile "$list" --hosts_per_run "$SLURM_JOB_NUM_NODES")
fi
{python} -c 'from mirage_ds.cli import main; main()' ablate run {study} \\
    --only "${{keys[$SLURM_ARRAY_TASK_ID]}}" --jobs 1 "${{hosts[@]}}" &
task=$!
trap 'kill -TERM "$task"' TERM USR1
code=0
wait "$task" || code=$?
# A signal ends the wait, and the task saves before it leaves.
while kill -0 "$task" 2>/dev/null; do code=0; wait "$task" || code=$?; done
exit "$code"
"""


def depths(study: Study, store: Store, wanted: Iterable[str]) -> list[list[str]]:
    """Group the wanted keys that are not done by how many of them stand before that are not done either."""
    depth: dict[str, int] = {}
    for key in wanted:
        node = study.nodes[key]
        if store.state(node) in ("done", "failed"):
            continue
        depth[key] = depth[node.parent] + 1 if node.parent in depth else 0
    return [[key for key in depth if depth[key] == level] for level in range(max(depth.values(), default=-1) + 1)]


def write_scripts(
    study: Study, store: Store, study_file: Path, wanted: Iterable[str], at_once: int | None
) -> list[Path]:
    """Write a script for each depth, with the keys of its array beside it.

    Args:
        wanted: keys, in the order of the study.
        at_once: tasks of an array that run at a time, at most.
    """
    folder = store.root / "slurm"
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    scripts = []
    for level, keys in enumerate(depths(study, store, wanted)):
        listed, script = folder / f"depth{level}.keys", folder / f"depth{level}.sbatch"
        write_atomically(listed, "".join(f"{key}\n" for key in keys))
        text = SCRIPT.format(
            job=f"{study.spec.name}-{level}",
            last=len(keys) - 1,
            throttle=f"%{at_once}" if at_once else "",
            logs=shlex.quote(str(folder / "logs")),
            keys=shlex.quote(str(listed)),
            python=shlex.quote(sys.executable),
            study=shlex.quote(str(study_file.resolve())),
        )
        write_atomically(script, text)
        scripts.append(script)
    return scripts


def submit(scripts: Sequence[Path], options: Sequence[str]) -> list[str]:
    """Hand the scripts to sbatch, each waiting for the one before.

    Args:
        options: of sbatch, for all of them.

    Returns:
        The job numbers.

    Raises:
        UserError: sbatch is missing or refuses.
    """
    jobs: list[str] = []
    for script in scripts:
        after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        words = ["sbatch", "--parsable", *options, *after, str(script)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise UserError("--slurm: no sbatch on this machine; start it where jobs are submitted") from None
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
            submitted = f"; submitted before it: {', '.join(jobs)}" if jobs else ""
            raise UserError(f"--slurm: sbatch refuses {script.name}: {said}{submitted}")
        jobs.append(done.stdout.strip().split(";")[0])
    return jobs
