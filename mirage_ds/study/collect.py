"""From the folders of a study to its Results, with what is shown of the records behind them. Imports no torch."""

import base64
import json
import math
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from mirage_ds.cluster.status.facts import json_lines, split_log
from mirage_ds.config.columns import parse_columns
from mirage_ds.data.images import ImageFinder, png_of
from mirage_ds.data.messages import HELPER_MARK, IMAGE_MARK
from mirage_ds.data.record import Record, RecordError
from mirage_ds.data.record_files import read_records
from mirage_ds.engine.versions import versions
from mirage_ds.errors import UserError
from mirage_ds.plan.formulas import flops
from mirage_ds.plan.shape import read_shape, sizes
from mirage_ds.rl.examples import FILE, picture_of, small, told
from mirage_ds.study.nodes import CellPlan, Node, Study
from mirage_ds.study.results import Cell, Results, Scores, StageResult, parted
from mirage_ds.study.spec import EvaluationSpec
from mirage_ds.study.store import Store
from mirage_ds.tasks import DEFAULT, get_task, level_of, named_task, seen_by_scorer

# Points of a learning curve: more cannot be seen.
POINTS = 300
# Of the records' own answers, the commonest so many are tried.
TRIED = 10


def curve_of(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Thin a log out to a learning curve: of neighbouring steps the mean loss, or reward, at the last one's number."""
    name = "reward" if steps and "reward" in steps[0] else "loss"
    log = pd.DataFrame(steps, columns=["step", name], dtype=float)
    parts = log.groupby(log.index // max(1, -(-len(log) // POINTS)))
    return parts.agg({"step": "last", name: "mean"}).dropna().to_dict("records")


def rollouts_of(folder: Path, image_root: Path | None) -> list[dict[str, Any]]:
    """Return StageResult.rollouts of a run's own folder; nothing where it has no answers."""
    lines, found = json_lines(folder / FILE), []
    for number in dict.fromkeys(one["rollout"] for one in lines[:1] + lines[-1:]):
        first, said = told([one for one in lines if one["rollout"] == number])
        image = picture_of(first, image_root)
        picture = image and base64.b64encode(png_of(image)).decode()
        found.append({"rollout": number, "said": said, "picture": picture})
    return found


def stage_result(node: Node, store: Store) -> StageResult:
    """Read what a training stage came to."""
    model, config = store.model(node), node.config
    steps, _ = split_log(json_lines(model / "run" / "log.jsonl"))
    shape = sizes(read_shape(str(model / "config.json")))
    rows, tokens = sum(line["rows"] for line in steps), sum(line["tokens"] for line in steps)
    labelled = sum(line.get("labels", 0) for line in steps)
    seconds = sum(line["seconds"] for line in steps)
    memory = [line["memory_gb"] for line in steps if line.get("memory_gb") is not None]
    return StageResult(
        name=node.name,
        key=store.place(node).name,
        stage=config.stage,
        steps=len(steps),
        rows=rows,
        tokens=tokens,
        # A token attends to half a row on the average.
        flops=flops(shape, tokens, labelled, tokens / max(1, rows) / 2, config.gradient_checkpointing),
        seconds=seconds,
        samples_s=rows / seconds if seconds else 0.0,
        peak_gb=max(memory, default=None),
        curve=curve_of(steps),
        rollouts=rollouts_of(model / "run", config.image_root),
    )


@lru_cache
def records_of(spec: EvaluationSpec) -> list[Record]:
    """Read the records of an evaluation, once."""
    return read_records(spec.data_path, False, parse_columns(spec.columns), spec.most)


def _result(node: Node, store: Store) -> Any:
    """Read what `mirage-ds controls` or `mirage-ds evaluate` wrote; of the latter, its Scores."""
    found = json.loads(store.result(node).read_text(encoding="utf-8"))
    if node.kind == "controls":
        return found
    assert node.evaluation is not None
    answers, levels = found["answers"], {one.line: level_of(one) for one in records_of(node.evaluation)}
    names = dict.fromkeys(name for one in answers for name in one["metrics"])
    return Scores(
        records=[str(one["line"]) for one in answers],
        levels=[levels[one["line"]] for one in answers],
        metrics={name: [float(one["metrics"].get(name, math.nan)) for one in answers] for name in names},
        said=_said(answers),
    )


def _said(answers: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Keep two answers for the report: the first of those with the highest score, and of those with the lowest."""
    scored = [(float(next(iter(one["metrics"].values()))), one) for one in answers if one["metrics"]]
    pair = [pick(scored, key=lambda one: one[0]) for pick in (max, min)] if scored else []
    return {
        str(one["line"]): {"answer": one["text"], "latents": int(one["metrics"].get("latents", 0)), "score": score}
        for score, one in pair
    }


def _cell(plan: CellPlan, study: Study, store: Store, settings: Mapping[str, Any]) -> Cell:
    nodes = {key: study.nodes[key] for key in plan.nodes}
    done = {key: node for key, node in nodes.items() if store.is_done(node)}
    problem = None
    if undone := [node for key, node in nodes.items() if key not in done]:
        attempts = store.attempts(undone[0])
        problem = f"{undone[0].folder} has not been run"
        if attempts:
            last = attempts[-1]["why"]
            problem = f"{undone[0].folder} failed {len(attempts)} time(s), at last with {last}"
    scores, controls = parted({title: _result(done[key], store) for title, key in plan.results.items() if key in done})
    return Cell(
        arm=plan.arm,
        seed=plan.seed,
        settings=settings,
        stages=[stage_result(done[key], store) for key in plan.stages if key in done],
        scores=scores,
        controls=controls,
        problem=problem,
        chain=plan.stages[-1],
        keys=plan.results,
    )


def stated(study: Study) -> list[dict[str, Any]]:
    """Return each cell's settings, with what other arms of the same stages vary and it leaves at its default.

    So the arm that all others of a sweep are measured against has a place on their axis.
    """
    chains = [tuple(study.nodes[key].name for key in cell.stages) for cell in study.cells]
    varied: dict[tuple[str, ...], dict[str, None]] = {}
    for cell, names in zip(study.cells, chains, strict=True):
        varied.setdefault(names, {}).update(dict.fromkeys(cell.settings))
    found = []
    for cell, names in zip(study.cells, chains, strict=True):
        nodes = [study.nodes[key] for key in cell.stages]
        own = {key: _default(key, nodes) for key in varied[names] if key not in cell.settings}
        found.append({**cell.settings, **{key: value for key, value in own.items() if value is not None}})
    return found


def _default(key: str, nodes: Sequence[Node]) -> str | float | None:
    """Return a setting of a chain as its runs have it: of the stage before the dot, or of the last one."""
    stage, _, name = key.rpartition(".")
    config = next((node.config for node in reversed(nodes) if node.name == stage or not stage), None)
    value = getattr(config, name, None)
    return value if isinstance(value, (str, int, float)) else None


def collect(study: Study, store: Store) -> Results:
    """Read everything that is there of a study."""
    cells = [_cell(plan, study, store, own) for plan, own in zip(study.cells, stated(study), strict=True)]
    found = versions()
    return Results(
        name=study.spec.name,
        question=study.spec.question,
        arms={cell.arm: study.spec.arms[cell.arm.partition("[")[0]].about for cell in cells},
        cells=cells,
        report=study.spec.report,
        made={
            "date": time.strftime("%Y-%m-%d"),
            "commit": str(found.get("git_commit")),
            "machine": f"{platform.machine()}, {platform.system()}",
            **{name: str(found[name]) for name in ("torch", "transformers", "deepspeed")},
        },
    )


def with_records(results: Results, evaluations: Mapping[str, EvaluationSpec]) -> Results:
    """Look into the records behind the scores: add `chance`, `examples`, and to `unseen` why one is not there."""
    chance: dict[str, dict[str, float]] = {}
    unseen: list[str] = []
    examples: list[dict[str, Any]] = []
    first = results.report.primary
    arm, evaluation = (first.arm, first.evaluation) if first else (None, None)

    @contextmanager
    def told(hole: str) -> Iterator[None]:
        try:
            yield
        except (KeyError, RecordError, UserError) as error:
            unseen.append(f"{hole} ({error})")

    # Two answers of the primary arm in its evaluation, where there are such.
    said = [(cell, name) for cell in results.cells for name, scores in cell.scores.items() if scores.said]
    shown, where = min(said, key=lambda one: (one[0].arm != arm, one[1] != evaluation), default=(None, None))
    for name in dict.fromkeys(name for cell in results.cells for name in cell.scores):
        spec = evaluations[name]
        with told(f"evaluation {name}: its records are not shown"):
            by_line = {str(one.line): one for one in records_of(spec)}
            with told(f"evaluation {name}: its chance level is not shown"):
                if best := best_constant(list(by_line.values()), spec.task):
                    chance[name] = dict(zip(by_line, best, strict=True))
            if shown and name == where:
                own = {"arm": shown.arm, "seed": shown.seed, "evaluation": name}
                answers = shown.scores[name].said.items()
                examples = [{**own, **_example(by_line[line], spec), **answer} for line, answer in answers]
    return replace(results, chance=chance, examples=examples, unseen=unseen)


def _example(record: Record, spec: EvaluationSpec) -> dict[str, Any]:
    """Return a record's line, question, answer and first picture, a PNG of at most SIDE pixels."""
    picture = None
    if record.image_input:
        finder = ImageFinder.beside(Path(spec.data_path), spec.image_root)
        image = finder.load(record, "image_input", record.image_input[0])
        picture = png_of(small(image))
    question, right = record.text_input.replace(IMAGE_MARK, ""), record.text_output.replace(HELPER_MARK, "")
    return {"line": record.line, "question": question, "right": right, "picture": picture}


def best_constant(records: Sequence[Record], task: str | None) -> list[float]:
    """Give every record the one answer that scores best: chance, what looks at no question would get.

    Args:
        task: as --task; None for the records' own.

    Returns:
        The task's first metric of each of the N records; nothing where no record has an answer of its own.

    Raises:
        UserError: the task cannot be imported. KeyError: a record lacks what the scorer needs.
    """
    named = next(filter(None, (named_task(one, task) for one in records)), DEFAULT)
    scorer = get_task(named).score_record
    known = [seen_by_scorer(one) for one in records]
    common = Counter(one.text_output.replace(HELPER_MARK, "") for one in records if one.text_output)
    scores = [[float(next(iter(scorer(text, one).values()))) for one in known] for text, _ in common.most_common(TRIED)]
    return max(scores, key=sum, default=[])
