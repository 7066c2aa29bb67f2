"""Decoding records and scoring the answers with the task's own scorer: one process, or one a GPU.

    mirage-ds evaluate FOLDER --data_path FILE …
    deepspeed --module mirage_ds.evaluate.decoder FOLDER --data_path FILE …

Each rank decodes its share with a whole copy of the model; no collective hides in decoding, and the answers are
gathered once, at the end. N rows of a batch, k latents a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from mirage_ds.config.run import Slots
from mirage_ds.data.batch import collate, to_device
from mirage_ds.data.encode import LATENT_TOKENS, Encoder
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder, load_tokenizer
from mirage_ds.data.loader import check_records
from mirage_ds.data.record import Record, RecordError
from mirage_ds.data.record_files import scan
from mirage_ds.data.sample import Sample
from mirage_ds.engine.installed import versions
from mirage_ds.engine.manifest import entry_of
from mirage_ds.engine.setup import World, everyone, from_rank_zero, shared_fate
from mirage_ds.engine.spelling import read_trained
from mirage_ds.errors import Stopped, UserError
from mirage_ds.evaluate.scoring import Answer, marks, score, summarize, task_of, wilson
from mirage_ds.files import write_atomically
from mirage_ds.model.folder import resolve_folder, weight_files
from mirage_ds.model.forward import MirageModel
from mirage_ds.model.generate import Chooser, Generated, Limits, Pause, generate, greedy, latent_tokens, sampler
from mirage_ds.model.load import Loaded, check_folder, load_model
from mirage_ds.model.vision import FrozenTower

__all__ = ["Answer", "Decoder", "Decoding", "Sampling", "answer_records", "decode", "evaluate_file", "score", "wilson"]

# Ranks wait for the slowest of them: one has the long answers.
PATIENCE_S = 24 * 3600.0

Track = Callable[[Sequence[Any]], Iterable[Any]]


class Sampling(NamedTuple):
    """How tokens are drawn: from the smallest set that holds `top_p` of the probability at this temperature."""

    temperature: float
    top_p: float


# The public code's evaluation: temperature 0.7, top_p 0.9, 1024 new tokens.
PAPER = Sampling(0.7, 0.9)

Decoding = Literal["greedy", "paper"] | Sampling


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

    @property
    def trained(self) -> dict[str, Any]:
        """What the folder says of its training: stage, latent_size, slots, compress_strategy; empty if nothing."""
        return read_trained(self.loaded.config)


def slots_fed(slots: Slots | None, k: int | None) -> int | None:
    """Return how many slots a run has in decoding, of k in training: none where the answer never saw one."""
    return 0 if slots in ("marks", "auxiliary") else k


def need_latents(decoder: Decoder) -> None:
    """Refuse a model that was trained without latents that its answers see.

    Raises:
        UserError: what it was trained on, and what scores it.
    """
    slots = decoder.trained.get("slots") or "latents"
    if slots != "latents":
        raise UserError(
            f"{decoder.folder} was trained with --slots {slots}: its answers see no latents that could be replaced or "
            "looked at; `mirage-ds evaluate` scores it"
        )


def decoding_dtype(stored: object, device: torch.device) -> torch.dtype:
    """Choose the dtype of the weights in decoding: as stored, but bf16 for fp16, in which these models overflow.

    A CPU decodes in float32: bf16 is slow on most, and there is room.

    Args:
        stored: a configuration's `dtype`.
    """
    if device.type == "cpu" or not isinstance(stored, torch.dtype):
        return torch.float32
    return torch.bfloat16 if stored == torch.float16 else stored


def load_decoder(
    folder: Path,
    finder: ImageFinder,
    processor: Path | None = None,
    latents: bool | None = True,
    pixels: tuple[int | None, int | None] = (None, None),
    device: torch.device | None = None,
) -> Decoder:
    """Load a model folder for decoding.

    Args:
        processor: folder that gives the image processor where the model's own has none (the public code saves none).
        latents: False decodes a model that was never trained on latents; None where its tokenizer has no such tokens.
        device: the GPU where there is one, if None.

    Raises:
        UserError: not a model folder, one that contradicts itself, no image processor, or a tokenizer without the
            latent tokens.
    """
    place = resolve_folder(str(folder), "model folder", None)
    folders = [str(place)] + ([str(processor)] if processor else [])
    stored = check_folder(place, [processor] if processor else []).dtype
    tokens = len(load_tokenizer([str(place)], None, add_latents=False).get_vocab().keys() & set(LATENT_TOKENS))
    if latents is None:
        latents = tokens == len(LATENT_TOKENS)
    if latents and tokens < len(LATENT_TOKENS):
        raise UserError(
            f"{folder}: its tokenizer has no latent tokens, so it was never trained on latents; train it first, or "
            "--no_latents to decode it as it is"
        )
    # Prompts are the same in every stage; sft's encoder never looks at a helper image.
    encoder = load_encoder(folders, finder, "sft", 1, pixels)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = decoding_dtype(stored, device)
    loaded = load_model(place, stage="sft", dtype=dtype, device=device, checkpointing=False)
    loaded.model.eval()
    return Decoder(place, loaded, encoder, latents)


def run_limits(
    decoder: Decoder, new_tokens: int, longest_run: int, run_length: str, prefill_tokens: int = Limits.prefill_tokens
) -> Limits:
    """Translate --run_length: "trained" (the k of training, where the folder knows it), "model", or a number.

    Training never shows the model a shorter run, and never supervises the tokens inside one, so whether it would end a
    run early by itself is accident; the trained length is the sane default.
    """
    if run_length == "trained":
        known = decoder.trained
        fixed = slots_fed(known.get("slots"), known.get("latent_size"))
    elif run_length == "model":
        fixed = None
    elif run_length.isdecimal():
        fixed = int(run_length)
    else:
        raise UserError(f"--run_length {run_length}: give 'trained', 'model' or a number of latents")
    return Limits(new_tokens, longest_run, fixed, prefill_tokens)


def chooser_of(decoding: Decoding, seed: int, rows: Sequence[int]) -> Chooser:
    """Make what chooses tokens; a row's draws depend on the seed and its place, not on the rows beside it."""
    drawn = PAPER if decoding == "paper" else decoding
    return sampler(*drawn, [seed * 1_000_003 + row for row in rows]) if isinstance(drawn, Sampling) else greedy


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


def decode_samples(
    model: MirageModel,
    tower: FrozenTower,
    encoder: Encoder,
    samples: Sequence[Sample],
    limits: Limits,
    latents: bool = True,
    decoding: Decoding = "greedy",
    seed: int = 42,
    asked: Callable[[], bool] = lambda: False,
    slots: Slots | None = None,
) -> list[Answer]:
    """Answer a batch of prompts.

    Args:
        model: plain, not sharded.
        samples: prompts (Encoder.encode_prompt); `row` seeds the sampling, so that a row's answer does not depend on
            the rows beside it.
        latents: whether the model may open latent runs.
        asked: whether somebody wants this process to stop; looked at before each token.
        slots: what the model was trained with, as config.RunConfig.slots.

    Raises:
        Stopped: somebody does.
    """
    device = model.head.weight.device
    batch = to_device(tower.attach(collate(samples, 1, encoder.dummy(0))), device)
    tokens = latent_tokens(encoder)
    if not latents:
        tokens = tokens._replace(start=-1)
    choose = chooser_of(decoding, seed, [sample.row for sample in samples])

    def choose_or_stop(logits: torch.Tensor, step: int) -> torch.Tensor:
        if asked():
            raise Stopped
        return choose(logits, step)

    fed = Pause(model, tokens.pad) if slots == "pause" else None
    return [answer_of(row, encoder) for row in generate(model, batch, tokens, limits, choose_or_stop, latents=fed)]


def decode(
    decoder: Decoder,
    samples: Sequence[Sample],
    limits: Limits,
    decoding: Decoding = "greedy",
    seed: int = 42,
) -> list[Answer]:
    """Answer a batch of prompts with a loaded folder; see decode_samples."""
    loaded = decoder.loaded
    assert loaded.tower is not None
    return decode_samples(
        *(loaded.model, loaded.tower, decoder.encoder, samples, limits, decoder.latents, decoding, seed),
        slots=decoder.trained.get("slots"),
    )


def answer_records(
    decoder: Decoder,
    records: Sequence[Record],
    limits: Limits,
    decoding: Decoding = "greedy",
    seed: int = 42,
    batch_size: int = 32,
    track: Track = iter,
    rows: Sequence[int] | None = None,
) -> list[Answer]:
    """Answer every record, in the order given; rows of like length share a batch.

    Args:
        rows: the records' places in their file, which seed the sampling; 0, 1, … if None.

    Raises:
        UserError: a record's image is missing or broken (before anything is decoded), or the GPU's memory is too small
            for a batch.
    """
    places = range(len(records)) if rows is None else rows
    encoder = decoder.encoder
    faults, measures = check_records(list(records), encoder)
    if faults:
        raise UserError(f"record on {faults[min(faults)]}")
    # The prompt is what is no label; helpers take no part in it (load_decoder's encoder is sft's).
    order = sorted(range(len(records)), key=lambda i: measures[i].tokens - measures[i].labels)
    answers: dict[int, Answer] = {}
    for part in track([order[at : at + batch_size] for at in range(0, len(order), batch_size)]):
        try:
            # Here and not before: the pixels of a whole file do not fit into memory.
            samples = [encoder.encode_prompt(records[i], places[i]) for i in part]
            found = decode(decoder, samples, limits, decoding, seed)
        except RecordError as error:
            raise UserError(f"record on {error}") from None
        except torch.OutOfMemoryError:
            raise UserError(
                f"--batch_size {batch_size}: {len(part)} rows at a time do not fit into the GPU's memory; lower it, "
                "--prefill_tokens, --max_new_tokens or --max_pixels"
            ) from None
        answers |= dict(zip(part, found, strict=True))
    return [answers[i] for i in range(len(records))]


# ---------------------------------------------------------------------------------------------------------- over ranks


def _read(file: Path, task: str | None, most: int | None) -> tuple[list[Record], str, str]:
    """Read the records to answer: they, their task, the file's SHA-256. What the scorer lacks in one is said now."""
    records, faults = scan(file, answers=False)
    if faults:
        raise UserError(f"{file}: {faults[0]}; `mirage-ds data check {file}` lists all faults")
    records = records[:most]
    name = task_of(records, file, task)
    marks(records, [Answer("", [], [])] * len(records), name)
    return records, name, hashlib.sha256(file.read_bytes()).hexdigest()


def prompt_hash(record: Record, finder: ImageFinder) -> str:
    """SHA-256 of a question: of the JSON list [text_input, SHA-256 of each input image's file …, turns before].

    Raises:
        UserError: an image is missing.
    """
    try:
        places = [finder.find(record, "image_input", path) for path in record.image_input]
    except RecordError as error:
        raise UserError(f"record on {error}") from None
    images = [hashlib.sha256(place.read_bytes()).hexdigest() for place in places]
    whole = [record.text_input, *images, *([record.turns_before] if record.turns_before else [])]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


def settings_of(
    decoder: Decoder, limits: Limits, decoding: Decoding, seed: int, batch_size: int, ranks: int
) -> dict[str, Any]:
    """Write down all that the answers follow from, besides records and weights."""
    drawn = PAPER if decoding == "paper" else decoding
    images: Any = decoder.encoder.images
    return {
        "decoding": "sampled" if isinstance(decoding, Sampling) else decoding,
        "temperature": drawn.temperature if isinstance(drawn, Sampling) else None,
        "top_p": drawn.top_p if isinstance(drawn, Sampling) else None,
        "seed": seed,
        "max_new_tokens": limits.new_tokens,
        "prefill_tokens": limits.prefill_tokens,
        "longest_run": limits.longest_run,
        # None: the model decides.
        "run_length": limits.fixed_run,
        "latents": decoder.latents,
        "slots": decoder.trained.get("slots"),
        "min_pixels": int(images.size["shortest_edge"]),
        "max_pixels": int(images.size["longest_edge"]),
        "batch_size": batch_size,
        "ranks": ranks,
        "device": str(decoder.loaded.model.head.weight.device.type),
        "dtype": str(decoder.loaded.model.head.weight.dtype).removeprefix("torch."),
    }


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
    world: World | None = None,
) -> dict[str, Any]:
    """Answer and score a file of records; rows need no output fields beyond what the scorer reads.

    Args:
        world: the ranks that share the records; all of them call it. None for a single process.

    Returns:
        On every rank: what `summarize` returns, with the task, the settings, the versions, hashes of data and weights,
        and every answer in the order of the file.

    Raises:
        UserError: on every rank, whichever has met it.
    """
    rank, size = (world.rank, world.size) if world else (0, 1)
    read = partial(_read, file, task, most)
    records, name, digest = from_rank_zero(read, world) if world else read()
    own = range(rank, len(records), size)
    files = weight_files(decoder.folder)[rank::size]
    with shared_fate(world):
        share = [records[i] for i in own]
        answers = answer_records(decoder, share, limits, decoding, seed, batch_size, track, own)
        prompts = [prompt_hash(record, decoder.encoder.finder) for record in share]
    made = list(zip(own, answers, prompts, strict=True))
    weights = [tuple(entry_of(decoder.folder, file)) for file in files]
    if world:
        made, weights = everyone(made, world), everyone(weights, world)
    made.sort(key=lambda one: one[0])
    marked = marks(records, [answer for _, answer, _ in made], name)
    return {
        "task": name,
        "model": str(decoder.folder),
        "data": str(file),
        "settings": settings_of(decoder, limits, decoding, seed, batch_size, size),
        "hashes": {
            "data": digest,
            "model": {part: own_digest for part, _, own_digest in sorted(weights)},
        },
        "versions": versions(),
        **summarize(records, marked),
        "answers": [
            {
                "line": record.line,
                "row": row,
                **({"id": record.extra["id"]} if "id" in record.extra else {}),
                "prompt": prompt,
                "text": answer.text,
                "runs": answer.runs,
                "ids": answer.ids,
                "metrics": values,
            }
            for record, (row, answer, prompt), values in zip(records, made, marked, strict=True)
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
    """Write a report as JSON, an answer a line."""
    head = json.dumps({key: value for key, value in report.items() if key != "answers"}, indent=1)
    lines = ",\n  ".join(json.dumps(answer) for answer in report["answers"])
    write_atomically(file, f'{head[:-2]},\n "answers": [\n  {lines}\n ]\n}}\n')
