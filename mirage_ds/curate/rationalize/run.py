"""Ask, note down, and write the rows: the whole of `mirage-ds data rationalize`."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirage_ds.curate.rationalize.form import MEANINGS, Judge, Outcome
from mirage_ds.curate.rationalize.job import Job, Rows
from mirage_ds.curate.rationalize.journal import Journal
from mirage_ds.curate.rationalize.prompt import Template
from mirage_ds.curate.rationalize.spec import RationalizeSpec
from mirage_ds.curate.rewrite import line_of, row_of, told
from mirage_ds.data.images import ImageFinder
from mirage_ds.files import check_output
from mirage_ds.tasks.report import Advance
from mirage_ds.tasks.write import whole_or_nothing

if TYPE_CHECKING:
    from mirage_ds.curate.rationalize.local import Local
    from mirage_ds.curate.rationalize.server import Server

# Of a reply that is shown as an example.
_SHOWN = 1000


@dataclass
class Report:
    """What became of the replies.

    Attributes:
        file: data.jsonl; None where no reply was accepted.
        rows: of the records file. written: rows of them that have at least one rationale.
        counts: replies by outcome.
        examples: of each outcome the first in the file's order: line, sample, and the reply or why there is none.
        tokens: asked and written, over all tries of this folder that had a reply; 0 where nobody told.
    """

    file: Path | None
    rows: int
    written: int = 0
    counts: Counter[Outcome] = field(default_factory=Counter)
    examples: dict[Outcome, dict[str, Any]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    @property
    def commonest(self) -> Outcome:
        """What most of the dropped replies have in common."""
        return max((outcome for outcome in self.counts if outcome != "accepted"), key=lambda one: self.counts[one])


def rationalize(file: Path, spec: RationalizeSpec, progress: Advance | None = None) -> Report:
    """Write `spec.out`/data.jsonl: for each row its accepted rationales, each a row, in the file's order.

    Args:
        progress: called with (replies there are, replies in all).

    Raises:
        UserError: a record that cannot be used, a folder of another command, a server that refuses or is gone.
    """
    check_output(spec.out, "--out", folder=True)
    template = Template.load(spec.prompt)
    rows = Rows(file, ImageFinder.beside(file, spec.image_root), spec.task, spec.most)
    count = rows.check()
    total = count * spec.samples
    setup = _setup(file, spec, template)
    # A server costs nothing yet, and what is wrong with its flags is said before anything is written.
    writer = _server(spec, template, rows) if spec.endpoint is not None else None
    with closing(Journal(spec.out, setup)) as journal:
        missing = sum(journal.pending(row, sample) for row in range(count) for sample in range(spec.samples))
        if missing:
            done = total - missing
            if progress is not None:
                progress(done, total)
            for job, found in (writer or _local(spec, template, rows)).replies(spec.samples, journal.pending):
                journal.note(job, found)
                done += 1
                if progress is not None:
                    progress(done, total)
        return _finish(rows, spec, template, setup, journal, count)


def _server(spec: RationalizeSpec, template: Template, rows: Rows) -> Server:
    from mirage_ds.curate.rationalize.server import Server

    return Server(spec, template, rows)


def _local(spec: RationalizeSpec, template: Template, rows: Rows) -> Local:
    from mirage_ds.curate.rationalize.local import Local

    return Local(spec, template, rows)


def _setup(file: Path, spec: RationalizeSpec, template: Template) -> dict[str, Any]:
    """Return what the replies follow from, by the names that a user knows."""
    with file.open("rb") as content:
        records = hashlib.file_digest(content, "sha256").hexdigest()
    made: dict[str, Any] = {"FILE": records, "--prompt": template.digest}
    if spec.endpoint is not None:
        made["--model_name"] = spec.model_name
    else:
        from mirage_ds.curate.rationalize.local import weights_hash

        made |= {"--model": weights_hash(str(spec.model)), "--batch_size": spec.batch_size}
    for name in ("temperature", "max_new_tokens", "seed", "max_pixels", "task"):
        made[f"--{name}"] = getattr(spec, name)
    return made


def _finish(
    rows: Rows, spec: RationalizeSpec, template: Template, setup: dict[str, Any], journal: Journal, count: int
) -> Report:
    """Write data.jsonl and rationalize.json from the journal."""
    out = spec.out.resolve()
    report = Report(None, count, tokens=dict(journal.tokens))
    with whole_or_nothing(spec.out) as work:
        with (work / "data.jsonl").open("w", encoding="utf-8", newline="\n") as lines:
            for row, judge in rows:
                before = report.counts["accepted"]
                for sample in range(spec.samples):
                    values = _count(report, journal, Job(row, sample, judge))
                    if values is not None:
                        made = _made_by(spec, template, sample, values["served"])
                        lines.write(_line(rows, judge, judge.composed(values["text"]), made, out))
                report.written += report.counts["accepted"] > before
        if report.written:
            report.file = out / "data.jsonl"
        else:
            # A records file without a record is none.
            (work / "data.jsonl").unlink()
        (work / "rationalize.json").write_text(_summary(report, spec, template, setup), encoding="utf-8")
    return report


def _count(report: Report, journal: Journal, job: Job) -> dict[str, Any] | None:
    """Count what became of a job; return its line of the journal where the reply was accepted."""
    outcome = journal.noted[job.row, job.sample].outcome
    report.counts[outcome] += 1
    if outcome != "accepted" and outcome in report.examples:
        return None
    values = journal.line(job.row, job.sample)
    said = str(values.get("text", values.get("why", "")))[:_SHOWN]
    report.examples.setdefault(outcome, {"line": job.judge.record.line, "sample": job.sample, "said": said})
    return values if outcome == "accepted" else None


def _made_by(spec: RationalizeSpec, template: Template, sample: int, served: str) -> dict[str, Any]:
    """Return what a row keeps of how its text was made."""
    model = spec.model_name or spec.model
    made: dict[str, Any] = {"model": model} | ({"served": served} if served not in ("", model) else {})
    made |= {"prompt": template.digest, "sample": sample}
    made |= {name: getattr(spec, name) for name in ("temperature", "max_new_tokens", "seed")}
    return made


def _line(rows: Rows, judge: Judge, text: str, made_by: dict[str, Any], out: Path) -> str:
    with told(rows.file, judge.record.line):
        row = row_of(judge.record, rows.finder)
    return line_of(replace(row, text_output=text, extra=row.extra | {"rationale": made_by}), out)


def _summary(report: Report, spec: RationalizeSpec, template: Template, setup: dict[str, Any]) -> str:
    values = {
        "rows": report.rows,
        "rows with a rationale": report.written,
        "replies": report.rows * spec.samples,
        "counts": {outcome: report.counts[outcome] for outcome in ("accepted", *MEANINGS)},
        "examples": report.examples,
        "tokens": report.tokens,
        "endpoint": spec.endpoint,
        "model": spec.model_name or spec.model,
        "samples": spec.samples,
        "setup": setup,
        "prompt": template.text,
    }
    # ASCII: an example may hold half a surrogate pair.
    return json.dumps(values, indent=1) + "\n"
