"""Decoding records and scoring the answers with the task's own scorer.

N rows of a batch, k latents a run.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from mirage_ds.data.batch import collate, to_device
from mirage_ds.data.encode import LATENT_PAD, LATENT_START, LATENT_TOKENS, Encoder, Sample
from mirage_ds.data.load import load_encoder, load_tokenizer
from mirage_ds.data.record import ImageFinder, Record, RecordError, scan
from mirage_ds.engine.export import TRAINED_KEY
from mirage_ds.errors import UserError
from mirage_ds.files import write_atomically
from mirage_ds.model.generate import Generated, Limits, generate, greedy, latent_tokens, sampler
from mirage_ds.model.load import Loaded, load_model, read_config, resolve_folder
from mirage_ds.tasks import get_task, task_name

# The public code's evaluation: temperature 0.7, top_p 0.9, 1024 new tokens.
PAPER_TEMPERATURE, PAPER_TOP_P = 0.7, 0.9

Decoding = Literal["greedy", "paper"]
Track = Callable[[Sequence[Any]], Iterable[Any]]


class Answer(NamedTuple):
    """A decoded answer: its text with the latent runs left out, the length of each run, and the emitted ids."""

    text: str
    runs: list[int]
    ids: list[int]

    def marked(self, encoder: Encoder) -> str:
        """Return the answer with each latent run written as `[k latents]` where it stands."""
        text = str(encoder.tokenizer.decode(self.ids, skip_special_tokens=False))
        for length in self.runs:
            text = text.replace(LATENT_START + LATENT_PAD * length, f"[{length} latents]", 1)
        for token in encoder.special_tokens:
            text = text.replace(token, "")
        return text.strip()


@dataclass(frozen=True)
class Decoder:
    """A model folder ready to answer questions.

    Attributes:
        folder: where the model came from.
        loaded: the unsharded model and its tower.
        encoder: turns records into prompts.
        latents: whether the model may open latent runs.
    """

    folder: Path
    loaded: Loaded
    encoder: Encoder
    latents: bool


def load_decoder(
    folder: Path,
    finder: ImageFinder,
    processor: Path | None = None,
    latents: bool = True,
    pixels: tuple[int | None, int | None] = (None, None),
) -> Decoder:
    """Load a model folder for decoding, on the GPU where there is one.

    Args:
        processor: folder that gives the image processor where the model's own has none (the public code saves none).
        latents: False decodes a model that was never trained on latents.

    Raises:
        UserError: not a model folder, no image processor, or a tokenizer without the latent tokens.
    """
    place = resolve_folder(str(folder), "model folder", None)
    folders = [str(place)] + ([str(processor)] if processor else [])
    tokens = len(load_tokenizer([str(place)], None, add_latents=False).get_vocab().keys() & set(LATENT_TOKENS))
    if latents and tokens < len(LATENT_TOKENS):
        raise UserError(
            f"{folder}: its tokenizer has no latent tokens, so it was never trained on latents; train it first, or "
            "--no_latents to decode it as it is"
        )
    # Prompts are the same in every stage; sft's encoder never looks at a helper image.
    encoder = load_encoder(folders, finder, "sft", 1, pixels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stored = read_config(place).dtype
    dtype = stored if isinstance(stored, torch.dtype) else torch.float32
    if device.type == "cpu":
        dtype = torch.float32
    loaded = load_model(place, stage="sft", dtype=dtype, device=device, checkpointing=False)
    loaded.model.eval()
    return Decoder(place, loaded, encoder, latents)


def run_limits(decoder: Decoder, new_tokens: int, longest_run: int, run_length: str) -> Limits:
    """Translate --run_length: "trained" (the k of training, where the folder knows it), "model", or a number.

    Training never shows the model a shorter run, and never supervises the tokens inside one, so whether it would end a
    run early by itself is accident; the trained length is the sane default.
    """
    if run_length == "trained":
        known = getattr(decoder.loaded.config, TRAINED_KEY, None) or {}
        return Limits(new_tokens, longest_run, known.get("latent_size"))
    if run_length == "model":
        return Limits(new_tokens, longest_run, None)
    if not run_length.isdecimal():
        raise UserError(f"--run_length {run_length}: give 'trained', 'model' or a number of latents")
    return Limits(new_tokens, longest_run, int(run_length))


def answer_of(row: Generated, encoder: Encoder) -> Answer:
    """Split emitted ids into text and latent runs."""
    pad, start, _ = (encoder.id_of(token) for token in LATENT_TOKENS)
    runs: list[int] = []
    for token in row.ids:
        if token == start:
            runs.append(0)
        elif token == pad and runs:
            runs[-1] += 1
    text = encoder.tokenizer.decode(row.ids, skip_special_tokens=True)
    return Answer(str(text).strip(), runs, row.ids)


def decode(
    decoder: Decoder,
    samples: Sequence[Sample],
    limits: Limits,
    decoding: Decoding = "greedy",
    seed: int = 42,
) -> list[Answer]:
    """Answer a batch of prompts.

    Args:
        samples: prompts (Encoder.encode_prompt); `row` seeds the sampling, so that a row's answer does not depend on
            the rows beside it.
    """
    loaded, encoder = decoder.loaded, decoder.encoder
    assert loaded.tower is not None
    device = next(loaded.model.parameters()).device
    batch = to_device(loaded.tower.attach(collate(samples, 1, encoder.dummy(0))), device)
    tokens = latent_tokens(encoder)
    if not decoder.latents:
        tokens = tokens._replace(start=-1)
    seeds = [seed * 1_000_003 + sample.row for sample in samples]
    choose = greedy if decoding == "greedy" else sampler(PAPER_TEMPERATURE, PAPER_TOP_P, seeds)
    return [answer_of(row, encoder) for row in generate(loaded.model, batch, tokens, limits, choose)]


def answer_records(
    decoder: Decoder,
    records: Sequence[Record],
    limits: Limits,
    decoding: Decoding = "greedy",
    seed: int = 42,
    batch_size: int = 32,
    track: Track = iter,
) -> list[Answer]:
    """Answer every record, in the order given; rows of like length share a batch.

    Raises:
        UserError: a record's image is missing or broken.
    """
    try:
        samples = [decoder.encoder.encode_prompt(record, row) for row, record in enumerate(records)]
    except RecordError as error:
        raise UserError(f"record on {error}") from None
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].input_ids))
    answers: dict[int, Answer] = {}
    for part in track([order[at : at + batch_size] for at in range(0, len(order), batch_size)]):
        found = decode(decoder, [samples[i] for i in part], limits, decoding, seed)
        answers |= dict(zip(part, found, strict=True))
    return [answers[i] for i in range(len(samples))]


def wilson(successes: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (JASA 22, 1927); 95 % by default."""
    if not count:
        return 0.0, 1.0
    share, spread = successes / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def task_of(records: Sequence[Record], file: Path, named: str | None) -> str:
    """Return the task of a file, from --task or from its records' `task`.

    Raises:
        UserError: none is named, or the records are of another task.
    """
    written = {str(record.extra["task"]) for record in records if "task" in record.extra}
    wanted = task_name(named) if named else None
    if wanted is None and len(written) != 1:
        raise UserError(f"{file}: its records name {len(written)} tasks; say which scorer to use with --task")
    found = wanted or task_name(next(iter(written)))
    others = {task_name(name) for name in written} - {found}
    if others:
        raise UserError(f"{file}: holds records of {', '.join(sorted(others))}, not of --task {found}")
    return found


def score(records: Sequence[Record], answers: Sequence[Answer], task: str) -> dict[str, Any]:
    """Score answers per level and in all.

    Returns:
        {"levels": {level: {metric: mean, "count", "low", "high"}}, "all": …}; low and high are Wilson's interval of the
        task's first metric.

    Raises:
        UserError: a record lacks what the scorer needs.
    """
    scorer = get_task(task).score_record
    groups: dict[str, list[dict[str, float]]] = defaultdict(list)
    for record, answer in zip(records, answers, strict=True):
        try:
            # A question alone has an empty answer, and nothing is to be compared with that.
            own = {"text_output": record.text_output} if record.text_output else {}
            values = scorer(answer.text, {**record.extra, **own})
        except KeyError as error:
            raise UserError(f"record on line {record.line} has no {error}, which {task} is scored by") from None
        for group in (str(record.extra.get("level", _side(record))), "all"):
            groups[group].append({**values, "runs": len(answer.runs), "latents": sum(answer.runs)})
    levels = {name: _summary(rows) for name, rows in sorted(groups.items()) if name != "all"}
    return {"levels": levels, "all": _summary(groups["all"])}


def _side(record: Record) -> str:
    board = record.extra.get("map_desc")
    return str(len(board)) if board and isinstance(board, list) else "?"


def _summary(rows: list[dict[str, float]]) -> dict[str, float]:
    first = next(iter(rows[0]))
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    low, high = wilson(sum(row[first] for row in rows), len(rows))
    return {**means, "count": len(rows), "low": low, "high": high}


def evaluate_file(
    decoder: Decoder,
    file: Path,
    task: str | None,
    limits: Limits,
    decoding: Decoding = "greedy",
    seed: int = 42,
    batch_size: int = 32,
    most: int | None = None,
    track: Track = iter,
) -> dict[str, Any]:
    """Answer and score a file of records; rows need no output fields beyond what the scorer reads.

    Returns:
        What `score` returns, with the task, the settings and every answer.
    """
    records, faults = scan(file, answers=False)
    if faults:
        raise UserError(f"{file}: {faults[0]}; `mirage-ds data check {file}` lists all faults")
    records = records[:most]
    name = task_of(records, file, task)
    answers = answer_records(decoder, records, limits, decoding, seed, batch_size, track)
    return {
        "task": name,
        "model": str(decoder.folder),
        "data": str(file),
        "decoding": decoding,
        "seed": seed,
        "longest_run": limits.longest_run,
        **score(records, answers, name),
        "answers": [
            {"line": record.line, "text": answer.text, "runs": answer.runs}
            for record, answer in zip(records, answers, strict=True)
        ],
    }


def print_report(report: dict[str, Any]) -> None:
    """Print the scores as a table, a row a level."""
    from rich.console import Console
    from rich.table import Table

    first = next(iter(report["all"]))
    others = [name for name in report["all"] if name not in (first, "count", "low", "high", "runs", "latents")]
    table = Table(
        "level", "rows", first, "95 % interval", *others, "latents", title=f"{report['task']}, {report['model']}"
    )
    for name, row in [*report["levels"].items(), ("all", report["all"])]:
        interval = f"{row['low']:.2f}–{row['high']:.2f}"
        extra = [f"{row[other]:.2f}" for other in others]
        table.add_row(name, str(row["count"]), f"{row[first]:.2f}", interval, *extra, f"{row['latents']:.1f}")
    Console().print(table)


def write_report(report: dict[str, Any], file: Path) -> None:
    """Write a report as JSON."""
    write_atomically(file, json.dumps(report, indent=1) + "\n")
