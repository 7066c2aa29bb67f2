"""A study on Slurm: arrays of training runs and of evaluations, each waiting for the one before. Imports no torch.

An array task is `mirage-ds ablate run STUDY --only KEY` in an allocation of its own. Training runs of one depth of the
chains are an array, the evaluations of their models another, which may ask for fewer GPUs. Both wait for the training
array before them, ended well or not (`afterany`): a task whose model is not there ends at once, and the report has a
hole.
"""

import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import jinja2

from mirage_ds.errors import UserError
from mirage_ds.files import write_atomically
from mirage_ds.study.nodes import Study
from mirage_ds.study.store import Store

SCRIPT = Path(__file__).with_name("array.sbatch.jinja")


class Array(NamedTuple):
    """One script to submit.

    Attributes:
        script: its file; keys: of its nodes, a task each; evaluates: rather than trains; after: place of the array that
            it waits for in the list it stands in; None for none.
    """

    script: Path
    keys: tuple[str, ...]
    evaluates: bool
    after: int | None


def arrays(study: Study, store: Store, wanted: Iterable[str]) -> list[Array]:
    """Put the wanted nodes that are not done into arrays, by how many of their chain stand before them undone."""
    depth: dict[str, int] = {}
    for key in wanted:
        node = study.nodes[key]
        if store.state(node) not in ("done", "failed"):
            depth[key] = max((depth.get(one.key, -1) + 1 for one in node.needs), default=0)
    found: list[Array] = []
    trained: dict[int, int] = {}
    place = {key: (level, study.nodes[key].kind != "train") for key, level in depth.items()}
    for (level, evaluates), keys in groupby(sorted(depth, key=place.__getitem__), place.__getitem__):
        name = f"{'evaluate' if evaluates else 'train'}{level}.sbatch"
        if not evaluates:
            trained[level] = len(found)
        found.append(Array(store.root / "slurm" / name, tuple(keys), evaluates, trained.get(level - 1)))
    return found


def write_scripts(
    study: Study, store: Store, study_file: Path, wanted: Iterable[str], at_once: int | None
) -> list[Array]:
    """Write the script of each array. It holds its keys: sbatch keeps a copy, and the next study may write over it.

    Args:
        wanted: keys, in the order of the study.
        at_once: tasks of an array that run at a time, at most.
    """
    logs = store.root / "slurm" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    script = jinja2.Template(SCRIPT.read_text(), keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    found = arrays(study, store, wanted)
    for one in found:
        text = script.render(
            job=f"{study.spec.name}-{one.script.stem}",
            last=len(one.keys) - 1,
            throttle=f"%{at_once}" if at_once else "",
            logs=shlex.quote(str(logs)),
            keys=" ".join(one.keys),
            python=shlex.quote(sys.executable),
            study=shlex.quote(str(study_file.resolve())),
        )
        write_atomically(one.script, text)
    return found


def submit(found: Sequence[Array], options: Sequence[str], for_evaluations: Sequence[str]) -> list[str]:
    """Hand the scripts to sbatch.

    Args:
        options: of sbatch; for_evaluations: those of arrays that evaluate.

    Returns:
        The job numbers.

    Raises:
        UserError: sbatch is missing or refuses.
    """
    jobs: list[str] = []
    for one in found:
        own = for_evaluations if one.evaluates else options
        after = [] if one.after is None else [f"--dependency=afterany:{jobs[one.after]}"]
        words = ["sbatch", "--parsable", *own, *after, str(one.script)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise UserError("--slurm: no sbatch on this machine; start it where jobs are submitted") from None
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
            submitted = f"; submitted before it: {', '.join(jobs)}" if jobs else ""
            raise UserError(f"--slurm: sbatch refuses {one.script.name}: {said}{submitted}")
        jobs.append(done.stdout.strip().split(";")[0])
    return jobs
