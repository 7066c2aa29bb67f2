"""What lmms-eval and VLMEvalKit write a sample, as a file of scores: `mirage-ds compare` pairs it."""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mirage_ds.errors import UserError, reason, strict_json

# Of a sample's score: column of VLMEvalKit, or key in what a task of lmms-eval logs for a metric.
SCORES = ("hit", "score", "is_correct", "gpt_score", "true_false")
# Both write it as the answer to a request that failed, and score it as a wrong one.
FAILED = re.compile(r"\[LMMS_EVAL_\w+|Failed to obtain answer via API")
WRITTEN = {
    ".jsonl": ("per-sample log of lmms-eval", "`lmms-eval --log_samples --output_path FOLDER`"),
    ".tsv": ("result table of VLMEvalKit (…_result.tsv)", "its run with PRED_FORMAT=tsv and --judge"),
}


def read_harness(file: Path) -> dict[str, Any]:
    """Read a per-sample log of lmms-eval (.jsonl) or a result table of VLMEvalKit (.tsv).

    Returns:
        The keys of a file of scores that a comparison reads. Where an API counted latents, they are a metric too.

    Raises:
        UserError: it is something else, has several answers or none for a sample, or requests that failed.
    """
    what, how = WRITTEN[file.suffix]
    try:
        text = file.read_text(encoding="utf-8")
        answers = _logged(text) if file.suffix == ".jsonl" else _tabled(text)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or reason(error)})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{file}: is no {what}; {how} writes one") from None
    if failed := sum(bool(FAILED.match(one.pop("text"))) for one in answers):
        raise UserError(f"{file}: {failed} of {len(answers)} requests failed, and are scored as wrong; run them again")
    if not all(one["metrics"] for one in answers):
        raise UserError(f"{file}: has no score of each sample ({', '.join(SCORES)}), and cannot be paired")
    (line, times), *_ = Counter(one["line"] for one in answers).most_common(1) or [(0, 1)]
    if times > 1:
        raise UserError(f"{file}: sample {line} is there {times} times; give a file of one run, with one filter")
    task = re.sub(r"^.*_samples_", "", file.stem) if file.suffix == ".jsonl" else "VLMEvalKit"
    return {"task": task, "hashes": {"data": ""}, "answers": sorted(answers, key=lambda one: one["line"])}


def _score(value: Any) -> float | None:
    """Return a sample's score, which may lie among other things that a task logs for a metric."""
    if isinstance(value, Mapping):
        value = next((value[name] for name in SCORES if name in value), None)
    return float(value) if isinstance(value, bool | int | float) else None


def _logged(text: str) -> list[dict[str, Any]]:
    answers = []
    for sample in map(strict_json, filter(None, text.splitlines())):
        answer = sample["filtered_resps"]
        metrics = {name: value for name, own in sample.items() if (value := _score(own)) is not None}
        line = int(metrics.pop("doc_id"))
        counts: Iterable[Mapping[str, int] | None] = sample["token_counts"]
        latents = [one["reasoning_tokens"] for one in counts if one and "reasoning_tokens" in one]
        if metrics and latents:
            metrics["latents"] = float(sum(latents))
        # Its doc_hash is the same for all samples (0.7.3).
        prompt = [sample["input"], sample["target"]]
        answers.append({"line": line, "prompt": prompt, "metrics": metrics, "text": str(answer)})
    return answers


def _tabled(text: str) -> list[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    answers = []
    for row in csv.DictReader(io.StringIO(text), delimiter="\t"):
        metrics = {name: float(row[name]) for name in SCORES if name in row}
        # The options' columns are called A, B, C …
        prompt = [row["question"], row["answer"], *(value for name, value in row.items() if len(name) == 1)]
        answers.append({"line": int(row["index"]), "prompt": prompt, "metrics": metrics, "text": row["prediction"]})
    return answers
