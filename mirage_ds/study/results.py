"""What a study's runs came to, read back from disk: the input of its report. Imports no torch.

An arm is a setting of the study; a cell is an arm under one seed, that is a chain of training stages with the
evaluations of its last model.

Results travel: a study may run in parts, on two clusters, or over days on machines that forget. `mirage-ds ablate
export` writes what is finished into one small file, `mirage-ds ablate report --with` takes it where its own is missing.
Chains and evaluations are known by the keys of their runs, which are hashes of content: one whose settings or records
differ is never taken for another, and a renamed arm or another evaluation beside it changes nothing.
"""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from mirage_ds.errors import UserError, reason
from mirage_ds.files import write_atomically
from mirage_ds.study.spec import ReportSpec, first_fault

SCORES, CONTROLS = "scores", "controls"


@dataclass(frozen=True)
class StageResult:
    """One trained stage of a chain.

    Attributes:
        name: of the stage in the study; key: of its run folder.
        stage: sft, stage1, stage2 or rl.
        steps: optimizer steps; rows, tokens: that went through the forward; flops: of the model, forward and backward.
        seconds: of all steps; samples_s: rows a second of its steps' time; peak_gb: highest memory of a rank, in GB;
            None where the run did not measure it.
        curve: {"step": …, "loss": …} of some steps, "reward" in rl; entries of older exports have more, or no loss.
        rollouts: in rl of the first and the last, {"rollout": its number, "said": examples.told's Markdown, "picture":
            the prompt's, a PNG in Base64, or None}.
    """

    name: str
    key: str
    stage: str
    steps: int
    rows: int
    tokens: int
    flops: float
    seconds: float
    samples_s: float
    peak_gb: float | None
    curve: Sequence[Mapping[str, float]] = ()
    rollouts: Sequence[Mapping[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Scores:
    """The scores of N records in one evaluation.

    Attributes:
        records: (N,) what tells a record from the others of its file, the same for every arm.
        levels: (N,) of the records; "?" where they have none.
        metrics: name → (N,) values, NaN where a record has none; the first is the task's success.
        said: record → {"answer", "latents": how many it holds, "score"} of one of the best and one of the worst; older
            exports have none.
    """

    records: Sequence[str]
    levels: Sequence[str]
    metrics: Mapping[str, Sequence[float]]
    said: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One arm under one seed.

    Attributes:
        arm: its name; seed: what pairs it with other arms' cells.
        settings: what the study varies in arms of these stages, name → value ("latent_size": 4), also where it is the
            default; the report draws scores against them.
        stages: in the order of the chain; all that finished.
        scores: evaluation name → its Scores.
        controls: evaluation name → the report of `mirage-ds controls` (conditions, answers, perhaps path).
        problem: why it has not all of its scores, in a sentence; None where it has.
        chain: key of its last stage, which stands for the whole chain; keys: SCORES or CONTROLS, a space and an
            evaluation's name → key of that run. By these other machines know it.
    """

    arm: str
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    stages: Sequence[StageResult] = ()
    scores: Mapping[str, Scores] = field(default_factory=dict)
    controls: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    problem: str | None = None
    chain: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_scored(self) -> bool:
        """Whether any record of any evaluation has been scored."""
        return any(one.records for one in self.scores.values())

    @property
    def results(self) -> dict[str, Any]:
        """What there is of its evaluations, under the titles of `keys`."""
        return {f"{SCORES} {name}": one for name, one in self.scores.items()} | {
            f"{CONTROLS} {name}": one for name, one in self.controls.items()
        }


def parted(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return scores and controls apart, by the names of their evaluations; the opposite of Cell.results."""
    pairs = [(title.partition(" "), one) for title, one in results.items()]
    return [{name: one for (own, _, name), one in pairs if own == kind} for kind in (SCORES, CONTROLS)]


@dataclass(frozen=True)
class Results:
    """A whole study.

    Attributes:
        name, question: of the study.
        arms: in the order of the study, name → what it is, in a line.
        cells: of all arms and seeds, missing ones too (with their problem).
        report: the contrasts, and the margin within which a difference counts as none (in units of the metric: 0.02
            is two points).
        made: date, commit, machine, versions: what the report says of itself.
        chance, examples, unseen: what is shown of the records, see collect.with_records.
    """

    name: str
    question: str
    arms: Mapping[str, str]
    cells: Sequence[Cell]
    report: ReportSpec = field(default_factory=lambda: ReportSpec.model_validate({}))
    made: Mapping[str, str] = field(default_factory=dict)
    chance: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    examples: Sequence[Mapping[str, Any]] = ()
    unseen: Sequence[str] = ()


class Export(BaseModel):
    """What is in a file."""

    format: Literal[2] = 2
    study: str
    made: dict[str, str]
    cells: list[Cell]


def export(results: Results, file: Path) -> int:
    """Write the cells that have scores, the same bytes for the same results; return how many.

    Raises:
        UserError: there is none.
    """
    cells = [replace(cell, settings={}) for cell in results.cells if cell.stages and cell.results]
    if not cells:
        raise UserError("no arm of the study has been evaluated under any seed; run it first")
    whole = Export(study=results.name, made=dict(results.made), cells=cells).model_dump()
    controls = [own for cell in whole["cells"] for own in cell["controls"].values()]
    for answer in (one for own in controls for one in own.get("answers", [])):
        # Of the controls the report reads metrics alone, not what answers said.
        answer["conditions"] = {name: {"metrics": one["metrics"]} for name, one in answer["conditions"].items()}
    write_atomically(file, gzip.compress(json.dumps(whole).encode(), mtime=0))
    return len(cells)


def load(file: Path) -> list[Cell]:
    """Read what `export` wrote.

    Raises:
        UserError: no such file, or another kind of file.
    """
    try:
        return Export.model_validate(json.loads(gzip.decompress(file.read_bytes()))).cells
    except ValidationError as error:
        why = first_fault(error)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        why = reason(error)
    raise UserError(f"{file}: not a file of this version's `mirage-ds ablate export` ({why}); export it anew")


def _filled(cell: Cell, others: Sequence[Cell]) -> Cell:
    """Return a cell with what it lacks and others have, the first of them that does; itself where there is nothing."""
    known = {other.keys[title]: one for other in reversed(others) for title, one in other.results.items()}
    new = {title: known[key] for title, key in cell.keys.items() if key in known and title not in cell.results}
    if not new:
        return cell
    found = cell.results | new
    scores, controls = parted(found)
    chains = {other.chain: other.stages for other in reversed(others)}
    return replace(
        cell,
        stages=chains.get(cell.chain, cell.stages),
        scores=scores,
        controls=controls,
        problem=None if len(found) == len(cell.keys) else cell.problem,
    )


def merge(results: Results, files: Sequence[Path]) -> tuple[Results, list[str]]:
    """Take results from other machines where this one has none.

    Returns:
        The results, and a line for each file that says how many of its cells the study has and were of use.
    """
    said, chains = [], {cell.chain for cell in results.cells}
    for file in files:
        found, before = load(file), results.cells
        results = replace(results, cells=[_filled(cell, found) for cell in before])
        taken = sum(one is not other for one, other in zip(results.cells, before, strict=True))
        strangers = sum(one.chain not in chains for one in found)
        others = f", {strangers} are of other settings or records than this study's" if strangers else ""
        said.append(f"{file}: {len(found)} cell(s), {taken} of the study filled{others}")
    return results, said
