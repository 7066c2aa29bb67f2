"""Answering and scoring a file of records: one process, or one a GPU, and the report of it.

    mirage-ds evaluate FOLDER --data_path FILE …
    deepspeed --module mirage_ds.evaluate FOLDER --data_path FILE …

Each rank decodes its share with a whole copy of the model; no collective hides in decoding, and the answers are
gathered once, at the end.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mirage_ds.config.columns import parse_columns
from mirage_ds.config.flags import build_model
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record import Record, blamed
from mirage_ds.data.record_files import read_records
from mirage_ds.data.sources import hash_of_records
from mirage_ds.engine.manifest import entry_of
from mirage_ds.engine.setup import World, everyone, from_rank_zero, shared_fate
from mirage_ds.engine.versions import versions
from mirage_ds.errors import UserError, shown
from mirage_ds.evaluate.decoder import Decoder, Track, answer_records, check_prompts, run_limits
from mirage_ds.evaluate.samples import means, sampled
from mirage_ds.evaluate.scoring import marks, summarize, task_of
from mirage_ds.evaluate.spec import PAPER, EvaluateSpec, FolderSpec, RecordsSpec
from mirage_ds.files import write_atomically
from mirage_ds.model.folder import weight_files
from mirage_ds.model.slots import Limits

Result = TypeVar("Result")

# Ranks wait for the slowest of them: one has the long answers.
PATIENCE_S = 24 * 3600.0


# Records to answer, their task, the file's SHA-256.
Asked = tuple[list[Record], str, str]


def read_asked(spec: RecordsSpec, answers: bool = False) -> Asked:
    """Read the records to answer. What the scorer lacks in one is said now, before a model is loaded.

    Args:
        answers: whether they must have their own.
    """
    file = spec.data_path
    records = read_records(file, answers, parse_columns(spec.columns), spec.most)
    return records, task_of(records, file, spec.task), hash_of_records(file)


def on_first(make: Callable[[], Result], world: World | None) -> Result:
    """Run `make` on rank 0, or in a single process, and give every rank its result."""
    return from_rank_zero(make, world) if world else make()


def prompt_hash(record: Record, finder: ImageFinder) -> str:
    """SHA-256 of a question: of the JSON list [text_input, SHA-256 of each input image's file …, turns before].

    Raises:
        UserError: an image is missing.
    """
    with blamed("record on "):
        places = [finder.find(record, "image_input", path) for path in record.image_input]
    whole: list[Any] = [record.text_input, *(hashlib.sha256(place.read_bytes()).hexdigest() for place in places)]
    if record.turns_before:
        whole.append(record.turns_before)
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


def settings_of(decoder: Decoder, spec: EvaluateSpec, limits: Limits, ranks: int) -> dict[str, Any]:
    """Write down all that the answers follow from, besides records and weights."""
    drawn: Any = {"greedy": (None, None), "paper": PAPER}.get(spec.decoding, spec.chosen)
    pixels: Any = decoder.encoder.images.size
    weight = decoder.loaded.model.head.weight
    return {
        "decoding": spec.decoding,
        "temperature": drawn[0],
        "top_p": drawn[1],
        "seed": spec.seed,
        "max_new_tokens": limits.new_tokens,
        "prefill_tokens": limits.prefill_tokens,
        "cache_gb": limits.cache_gb,
        "samples": spec.samples,
        "longest_run": limits.longest_run,
        # None: the model decides.
        "run_length": limits.fixed_run,
        "latents": decoder.latents,
        "slots": decoder.trained.get("slots"),
        "min_pixels": int(pixels["shortest_edge"]),
        "max_pixels": int(pixels["longest_edge"]),
        "batch_size": spec.batch_size,
        "ranks": ranks,
        "device": weight.device.type,
        "dtype": str(weight.dtype).removeprefix("torch."),
    }


def evaluate_file(
    decoder: Decoder, spec: EvaluateSpec, track: Track = iter, world: World | None = None, asked: Asked | None = None
) -> dict[str, Any]:
    """Answer and score a file of records; rows need no output fields beyond what the scorer reads.

    Args:
        spec: which records, and how they are answered.
        asked: the records, where they have been read already.
        world: the ranks that share the records; all of them call it. None for a single process.

    Returns:
        On every rank: what `summarize` returns, with the task, the settings, the versions, hashes of data and weights,
        and every answer in the order of the file.

    Raises:
        UserError: on every rank, whichever has met it.
    """
    rank, size = (world.rank, world.size) if world else (0, 1)
    records, name, digest = asked or on_first(partial(read_asked, spec), world)
    own = range(rank, len(records), size)
    files = weight_files(decoder.folder)[rank::size]
    with shared_fate(world):
        room = spec.model_dump(include={"prefill_tokens", "cache_gb"})
        limits = run_limits(decoder, spec.max_new_tokens, spec.longest_run, spec.run_length, **room)
        share, n = [records[i] for i in own], spec.samples
        lengths = check_prompts(decoder, share, limits, own, n)
    # No rank decodes for hours before it learns of another's record.
    with shared_fate(world):
        how: Any = limits, spec.chosen, spec.seed, spec.batch_size, track, own, n, lengths
        found = answer_records(decoder, share, *how)
        heads = decoder.latents and decoder.loaded.model.latent_heads is not None
        drawn = answer_records(replace(decoder, drawn=True), share, *how) if heads else []
        # Behind a record's own answers those with latents that were drawn.
        answers = [found[at : at + n] + drawn[at : at + n] for at in range(0, len(found), n)]
        prompts = [prompt_hash(record, decoder.encoder.finder) for record in share]
    made = list(zip(own, answers, prompts, strict=True))
    weights = [tuple(entry_of(decoder.folder, file)) for file in files]
    if world:
        made, weights = everyone(made, world), everyone(weights, world)
    made.sort(key=lambda one: one[0])
    each = [answer for _, several, _ in made for answer in several]
    per = len(each) // len(records)
    scored = partial(marks, [record for record in records for _ in range(per)], each, name)
    # Once, whatever a scorer of one's own costs.
    flat = on_first(scored, world)
    marked = [flat[at : at + per] for at in range(0, len(flat), per)]
    written = []
    for record, (row, several, prompt), metrics in zip(records, made, marked, strict=True):
        one = {"line": record.line, "row": row, **({"id": record.extra["id"]} if "id" in record.extra else {})}
        whole = [answer._asdict() | {"metrics": own} for answer, own in zip(several, metrics, strict=True)]
        # The first answer where a single one stands; the metrics are the mean of all.
        more = {"metrics": means(metrics[:n]), "samples": whole[:n]} if n > 1 else {}
        more |= {"drawn": whole[n:]} if per > n else {}
        written.append(one | {"prompt": prompt, **whole[0], **more})
    return {
        "task": name,
        "model": str(decoder.folder),
        "data": str(spec.data_path),
        **({"columns": spec.columns} if spec.columns else {}),
        "settings": settings_of(decoder, spec, limits, size),
        "hashes": {"data": digest, "model": {part: own_digest for part, _, own_digest in sorted(weights)}},
        "versions": versions(),
        **summarize(records, [one["metrics"] for one in written]),
        **({"drawn": summarize(records, [means(own[n:]) for own in marked])} if per > n else {}),
        **({"samples": sampled([several[:n] for _, several, _ in made], [own[:n] for own in marked])} if n > 1 else {}),
        "answers": written,
    }


def evaluate(
    decoder: Decoder, data: str | Path, task: str | Callable[..., Any] | None, flags: Mapping[str, Any]
) -> dict[str, Any]:
    """Be `Mirage.evaluate`: what `mirage-ds evaluate` does, in a program of one's own.

    Args:
        task: a name, or a function that its module has by its name; that of a notebook is `__main__`.
        flags: of the command, by name; not those that say how the model is opened, or what is written.

    Returns:
        What the command writes with --out.

    Raises:
        UserError: what the command refuses too.
    """
    if idle := flags.keys() & {*FolderSpec.model_fields, "no_latents", "latents", "out"}:
        raise UserError(f"evaluate: {min(idle)} is for `load` or the command `mirage-ds evaluate`; leave it out")
    if callable(task) and not hasattr(task, "__qualname__"):
        raise UserError(f"evaluate: {shown(task)} has no name of its own; write def score(answer, record)")
    name = f"{task.__module__}:{task.__qualname__}" if callable(task) else task
    spec = build_model(EvaluateSpec, {"task": name}, {**flags, "data_path": data}, source="evaluate")
    finder = ImageFinder.beside(spec.data_path, spec.image_root)
    return evaluate_file(replace(decoder, encoder=replace(decoder.encoder, finder=finder)), spec)


def write_report(report: dict[str, Any], file: Path) -> None:
    """Write a report as JSON, an answer a line."""
    head = json.dumps({key: value for key, value in report.items() if key != "answers"}, indent=1)
    lines = ",\n  ".join(json.dumps(answer) for answer in report["answers"])
    write_atomically(file, f'{head[:-2]},\n "answers": [\n  {lines}\n ]\n}}\n')
