"""Ask, note down, and write the rows: the whole of `mirage-ds data rationalize`."""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from mirage_ds.curate.rationalize.form import MEANINGS, Outcome, Reply
from mirage_ds.curate.rationalize.journal import Job, Journal
from mirage_ds.curate.rationalize.prompt import Questions
from mirage_ds.curate.spec import RationalizeSpec
from mirage_ds.data.progress import track
from mirage_ds.data.sources import hash_of_records
from mirage_ds.files import check_output
from mirage_ds.tasks.write import whole_or_nothing

# Of a reply that is shown as an example.
_SHOWN = 1000


def rationalize(file: Path, spec: RationalizeSpec) -> dict[str, Any]:
    """Write `spec.out`/data.jsonl: for each row its accepted rationales, each a row, in the file's order.

    Returns:
        What rationalize.json holds: rows, replies, counts of outcomes, the first example of each, tokens, settings.

    Raises:
        UserError: a record that cannot be used, a folder of another command, a server that refuses or is gone.
    """
    check_output(spec.out, "--out", folder=True)
    questions = Questions.read(file, spec)
    setup = _setup(file, questions)
    # A server costs nothing yet, and what is wrong with its flags is said before anything is written.
    replies = _replies(questions) if spec.endpoint is not None else None
    with closing(Journal(spec.out, setup)) as journal:
        jobs = [(row, sample) for row in range(len(questions.judges)) for sample in range(spec.samples)]
        missing = [job for job in jobs if journal.pending(job)]
        if missing:
            written = (replies or _replies(questions))(missing)
            for job, reply in track(written, "rationales: replies", len(missing)):
                judge = questions.judges[job[0]]
                journal.note(job, judge.record.line, judge.outcome(reply), reply)
        return _finish(questions, setup, {job: journal.noted[job] for job in jobs})


def _replies(questions: Questions) -> Callable[[Collection[Job]], Iterator[tuple[Job, Reply]]]:
    """Load what writes; return what asks it for jobs."""
    if questions.spec.endpoint is not None:
        from mirage_ds.curate.rationalize.server import Server

        return Server(questions).replies
    from mirage_ds.curate.rationalize.local import Local

    return Local(questions).replies


def _setup(file: Path, questions: Questions) -> dict[str, Any]:
    """Return what the replies follow from, by the names that a user knows."""
    spec = questions.spec
    made: dict[str, Any] = {"FILE": hash_of_records(file), "--prompt": questions.digest}
    if spec.columns:
        made["--columns"] = spec.columns
    if spec.endpoint is not None:
        made["--model_name"] = spec.model_name
    else:
        from mirage_ds.curate.rationalize.local import weights_hash

        # 1, which no folder names, was transformers' `generate`: it drew other texts from the same seed.
        made |= {"--model": weights_hash(str(spec.model)), "--batch_size": spec.batch_size, "decoder": 2}
    names = ("temperature", "max_new_tokens", "seed", "max_pixels", "task")
    return made | {f"--{name}": getattr(spec, name) for name in names}


def _finish(questions: Questions, setup: dict[str, Any], noted: dict[Job, dict[str, Any]]) -> dict[str, Any]:
    """Write data.jsonl, if a reply was accepted, and rationalize.json; return the latter.

    Args:
        noted: of each job what came of it. The journal may have more, of a command with a larger --most or --samples.
    """
    spec, out = questions.spec, questions.spec.out.resolve()
    counts: Counter[Outcome] = Counter()
    examples: dict[Outcome, dict[str, Any]] = {}
    reasoned = set()
    with whole_or_nothing(spec.out) as work:
        with (work / "data.jsonl").open("w", encoding="utf-8", newline="\n") as lines:
            for (row, sample), values in noted.items():
                outcome: Outcome = values["outcome"]
                counts[outcome] += 1
                said = str(values.get("text", values.get("why", "")))[:_SHOWN]
                examples.setdefault(outcome, {"line": values["line"], "sample": sample, "said": said})
                if outcome == "accepted":
                    reasoned.add(row)
                    lines.write(_line(questions, row, sample, values, out))
        if not reasoned:
            # A records file without a record is none.
            (work / "data.jsonl").unlink()
        summary = {
            "rows": len(questions.judges),
            "rows with a rationale": len(reasoned),
            "replies": len(noted),
            "counts": {outcome: counts[outcome] for outcome in ("accepted", *MEANINGS)},
            "examples": examples,
            "tokens": {name: sum(one.get(name, 0) for one in noted.values()) for name in ("asked", "written")},
            "endpoint": spec.endpoint and str(spec.endpoint),
            "model": spec.model_name or spec.model,
            "samples": spec.samples,
            "setup": setup,
            "prompt": questions.template,
        }
        # ASCII: an example may hold half a surrogate pair.
        (work / "rationalize.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def _line(questions: Questions, row: int, sample: int, values: dict[str, Any], out: Path) -> str:
    """Write the row that an accepted reply makes; `rationale` keeps how its text was made."""
    spec, judge = questions.spec, questions.judges[row]
    given = questions.source.row(judge.record)
    model, served = spec.model_name or spec.model, values["served"]
    made: dict[str, Any] = {"model": model} | ({"served": served} if served not in ("", model) else {})
    made |= {"prompt": questions.digest, "sample": sample}
    made |= {name: getattr(spec, name) for name in ("temperature", "max_new_tokens", "seed")}
    return given._replace(text_output=judge.composed(values["text"]), extra=given.extra | {"rationale": made}).line(out)
