"""Decoding: a model folder ready to answer questions, and records or encoded prompts → answers.

`mirage-ds evaluate`: command.evaluate → report.evaluate_file → answer_records → decode in model/generate.py, whose
Chooser (greedy, or sampling: model/choose.py) picks each token. n rows that decode at the moment.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mirage_ds.config.run import Compress, Slots, Stage
from mirage_ds.data.encode import LATENT_PAD, LATENT_TOKENS, Encoder
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder, load_tokenizer
from mirage_ds.data.loader import check_records
from mirage_ds.data.record import Record, blamed
from mirage_ds.data.sample import Sample
from mirage_ds.engine.spelling import read_base, read_trained
from mirage_ds.errors import Stopped, UserError, reason
from mirage_ds.evaluate.prompts import prompts_of, reader
from mirage_ds.evaluate.scoring import Prediction
from mirage_ds.evaluate.spec import PAPER, Decoding, Pixels, Sampling
from mirage_ds.files import whole_folder
from mirage_ds.model.choose import Chooser, Turn, greedy, sampler
from mirage_ds.model.folder import resolve_folder
from mirage_ds.model.forward import MirageModel
from mirage_ds.model.generate import Prompts, check_room, decode, generate
from mirage_ds.model.latents import load_inputs
from mirage_ds.model.load import Loaded, check_folder, load_model
from mirage_ds.model.rows import Generated
from mirage_ds.model.slots import Latents, LatentTokens, Limits, latent_tokens, noise, pause
from mirage_ds.model.vision import FrozenTower

Track = Callable[[Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Decoder:
    """A model folder ready to answer questions.

    Attributes:
        folder: where the model came from.
        loaded: the unsharded model and its tower.
        encoder: turns records into prompts.
        latents: whether the model may open latent blocks.
        drawn: whether its LatentHeads draw latents, in place of their mean.
    """

    folder: Path
    loaded: Loaded
    encoder: Encoder
    latents: bool
    drawn: bool = False

    @property
    def trained(self) -> dict[str, Any]:
        """What the folder says of its training: stage, latent_size, slots, compress_strategy; empty if nothing."""
        return read_trained(self.loaded.config)

    @property
    def bottleneck(self) -> bool:
        """Whether text behind latents was trained not to see the images."""
        return bool(self.trained.get("bottleneck"))

    @property
    def tower(self) -> FrozenTower:
        """The frozen tower, which load_decoder always gives."""
        assert self.loaded.tower is not None
        return self.loaded.tower

    def latent_encoder(self, stage: Stage, k: int) -> Encoder:
        """Make an encoder of a stage that has latents, k a block, as the model was trained with.

        Raises:
            UserError: its latents are made together, and are not k.
        """
        if self.encoder.latent_passes is not None and k != (own := self.trained["latent_size"]):
            raise UserError(f"{k} latents a block: {self.folder} makes its {own} together; leave the number out")
        compress = self.trained.get("compress_strategy", "average")
        more = dict(compress=compress, bottleneck=self.bottleneck)
        return replace(self.encoder, stage=stage, latent_size=k, **more)


def slots_fed(slots: Slots | None, k: int | None, compress: Compress = "average") -> int | None:
    """Return how many slots a latent block has in decoding, of k in training: none where the answer never saw one.

    Returns:
        None where the model ends it: regions have different lengths, k at most.
    """
    return None if compress == "region" else 0 if slots in ("marks", "auxiliary") else k


def need_latents(decoder: Decoder, regions: bool = True) -> None:
    """Refuse a model that was trained without latents that its answers see.

    Args:
        regions: False refuses blocks of different lengths too.

    Raises:
        UserError: what it was trained on, and what scores it.
    """
    slots = decoder.trained.get("slots") or "latents"
    if slots != "latents" or not decoder.latents:
        how = f"with --slots {slots}" if decoder.latents else "without latents"
        raise UserError(
            f"{decoder.folder} was trained {how}: its answers see no latents that could be replaced or looked at; "
            "`mirage-ds evaluate` scores it"
        )
    if not regions and decoder.trained.get("compress_strategy") == "region":
        raise UserError(
            f"{decoder.folder} was trained with --compress_strategy region: its blocks differ in length and have no "
            "helper to compare with; leave out what asks for one, or give a model of another strategy"
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
    pixels: Pixels = (None, None),
    helper_pixels: Pixels = (None, None),
    device: torch.device | None = None,
) -> Decoder:
    """Load a model folder for decoding.

    Args:
        processor: folder that gives the image processor where the model's own has none (the public code saves none).
        latents: False decodes a model that was never trained on latents; None where its tokenizer has no such tokens.
        pixels, helper_pixels: (min, max) of input and of helper images; None keeps the processor's own.
        device: the GPU where there is one, if None.

    Raises:
        UserError: not a model folder, one that contradicts itself, no image processor, or a tokenizer without the
            latent tokens.
    """
    place = resolve_folder(str(folder), "model folder", None)
    stored = check_folder(place, [processor] if processor else []).dtype
    tokens = len(load_tokenizer([str(place)], None, add_latents=False).get_vocab().keys() & set(LATENT_TOKENS))
    if latents is None:
        latents = tokens == len(LATENT_TOKENS)
    if latents and tokens < len(LATENT_TOKENS):
        raise UserError(
            f"{folder}: its tokenizer has no latent tokens, so it was never trained on latents; train it first, or "
            "give --no_latents to decode it as it is"
        )
    # Prompts are the same in every stage; sft's encoder never looks at a helper image.
    folders = [str(one) for one in (place, processor) if one is not None]
    encoder = load_encoder(folders, finder, "sft", 1, pixels, helper_pixels)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = decoding_dtype(stored, device)
    loaded = load_model(place, stage="sft", dtype=dtype, device=device, checkpointing=False)
    trained = read_trained(loaded.config)
    if latents and (passes := trained.get("latent_passes")) is not None:
        # What was trained is what is decoded.
        embedding, pad = loaded.model.language_model.embed_tokens.weight, encoder.id_of(LATENT_PAD)
        inputs = load_inputs(place, True, passes, trained["latent_size"], embedding, pad, device)
        loaded.model.latent_inputs, encoder = inputs, replace(encoder, latent_passes=passes)
    loaded.model.eval()
    return Decoder(place, loaded, encoder, latents)


def save_decoder(decoder: Decoder, target: Path, trained: dict[str, Any]) -> None:
    """Write a decoder's model as a model folder, as an export does.

    Args:
        target: a new folder; trained: what it says of its training (engine.save.trained_of).

    Raises:
        UserError: `target` exists or cannot be written; nothing is left of it.
    """
    from mirage_ds.engine.save import Parts, save_model

    if target.exists():
        raise UserError(f"{target} exists already; give a new folder")
    encoder, source = decoder.encoder, decoder.folder
    parts = Parts(read_base(source, encoder.tokenizer), encoder.tokenizer, encoder.images, source, trained)
    try:
        with whole_folder(target) as folder:
            save_model(decoder.loaded.model, decoder.tower.tower, folder, 0, parts)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({reason(error)}); give another folder") from None


def run_limits(decoder: Decoder, new_tokens: int, longest_run: int, run_length: str, **rest: Any) -> Limits:
    """Translate --run_length: "trained" (the k of training, where the folder knows it), "model", or a number.

    Training never shows the model a shorter latent block, and never supervises the tokens inside one, so whether it
    would end a block early by itself is accident: the trained length is the default. Where it learnt regions, their
    lengths differ and each latent says whether another follows, so by default the model ends a block itself, at the
    latest after as many latents as the longest region had. (LVR's public code evaluates with 4, 8 and 16 latents, as
    `--run_length 8` does.)

    Args:
        rest: other Limits.
    """
    if new_tokens < 1:
        raise UserError(f"max_new_tokens {new_tokens}: an answer has at least one token; give more")
    k = decoder.trained.get("latent_size")
    if decoder.encoder.latent_passes is not None and run_length not in ("trained", str(k)):
        raise UserError(f"--run_length {run_length}: {decoder.folder} makes its {k} latents together; leave it out")
    if run_length == "trained":
        compress = decoder.trained.get("compress_strategy", "average")
        fixed = slots_fed(decoder.trained.get("slots"), k, compress)
        longest_run = int(decoder.trained["latent_size"]) if compress == "region" else longest_run
    elif run_length == "model":
        fixed = None
    elif run_length.isdecimal():
        fixed = int(run_length)
    else:
        raise UserError(f"--run_length {run_length}: give 'trained', 'model' or a number of latents")
    return Limits(new_tokens, longest_run, fixed, bottleneck=decoder.bottleneck, **rest)


def seeds_of(seed: int, row: int, samples: int) -> list[int]:
    """Make the seeds of a row's answers."""
    # A generator on a CPU takes the lower 32 bits: 2³² over the golden ratio spreads the samples over all of them.
    return [(seed * 1_000_003 + row + sample * 2_654_435_769) % 2**63 for sample in range(samples)]


def chooser_of(decoding: Decoding, seed: int, rows: Sequence[int], samples: int = 1) -> Chooser:
    """Make what chooses tokens; the draws of a row's s-th answer depend on the seed, its place and s alone."""
    drawn = PAPER if decoding == "paper" else decoding
    seeds = [one for row in rows for one in seeds_of(seed, row, samples)]
    return sampler(*drawn, seeds) if isinstance(drawn, Sampling) else greedy


def answer_of(row: Generated, encoder: Encoder) -> Prediction:
    """Split emitted ids into text and the lengths of the latent blocks."""
    pad, start, _ = (encoder.id_of(token) for token in LATENT_TOKENS)
    runs: list[int] = []
    for token in row.ids:
        if token == start:
            runs.append(0)
        elif token == pad and runs:
            runs[-1] += 1
    text = encoder.tokenizer.decode(row.ids, skip_special_tokens=True)
    return Prediction(str(text).strip(), runs, row.ids)


def tokens_and_feed(
    model: MirageModel, encoder: Encoder, latents: bool, slots: Slots | None
) -> tuple[LatentTokens, Latents | None]:
    """Return the latent tokens that the model may emit, and what is fed at the slots if not its own hidden states."""
    tokens = latent_tokens(encoder)
    if not latents:
        tokens = tokens._replace(start=-1)
    return tokens, pause(model, tokens.pad) if slots == "pause" else None


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
    banned: Sequence[int] = (),
    drawn: bool = False,
) -> list[Prediction]:
    """Answer a batch of prompts.

    Args:
        model: plain, not sharded.
        samples: prompts (Encoder.encode_prompt); `row` seeds the sampling, so that a row's answer does not depend on
            the rows beside it.
        latents: whether the model may open latent blocks.
        asked: whether somebody wants this process to stop; looked at before each token.
        slots: what the model was trained with, as config.RunConfig.slots.
        banned: ids of tokens that are never chosen.
        drawn: as Decoder.drawn.

    Raises:
        Stopped: somebody does.
    """
    tokens, fed = tokens_and_feed(model, encoder, latents, slots)
    choose = chooser_of(decoding, seed, [sample.row for sample in samples])

    def choose_or_stop(logits: torch.Tensor, turns: Sequence[Turn]) -> torch.Tensor:
        if asked():
            raise Stopped
        logits[:, list(banned)] = -torch.inf
        return choose(logits, turns)

    prompts = prompts_of(model, tower, encoder, samples)
    draws = noise([one for row in prompts.rows for one in seeds_of(seed, row, 1)]) if drawn else None
    made = generate(model, prompts, tokens, limits, choose_or_stop, latents=fed, noise=draws)
    return [answer_of(row, encoder) for row in made]


def batches(order: Sequence[int], size: int) -> list[Sequence[int]]:
    """Cut rows into batches."""
    return [order[at : at + size] for at in range(0, len(order), size)]


@contextmanager
def batches_fit(batch_size: int) -> Iterator[None]:
    """Turn what goes wrong in a batch into a user's sentence."""
    try:
        with blamed("record on "):
            yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"--batch_size {batch_size}: so many rows at a time do not fit into the GPU's memory; lower it, "
            "--prefill_tokens, --max_new_tokens or --max_pixels"
        ) from None


def check_prompts(
    decoder: Decoder, records: Sequence[Record], limits: Limits, rows: Sequence[int], samples: int = 1
) -> list[int]:
    """Return the tokens of the records' prompts; `rows` and `samples` as in answer_records.

    Raises:
        UserError: a record's image is missing or broken, or a record is too long for --cache_gb.
    """
    # The prompt is what is no label; helpers take no part in it (load_decoder's encoder is sft's).
    lengths = [one.tokens - one.labels for one in check_records(records, decoder.encoder)]
    check_room(decoder.loaded.model, lengths, rows, limits, samples)
    return lengths


def answer_records(
    decoder: Decoder,
    records: Sequence[Record],
    limits: Limits,
    decoding: Decoding = "greedy",
    seed: int = 42,
    batch_size: int = 32,
    track: Track = iter,
    rows: Sequence[int] | None = None,
    samples: int = 1,
    lengths: Sequence[int] | None = None,
) -> list[Prediction]:
    """Answer every record, in the order given.

    Args:
        batch_size: answers that decode at a time.
        rows: the records' places in their file, which seed the sampling; 0, 1, … if None.
        samples: answers a record, which stand one behind the other in what is returned.
        lengths: what check_prompts returns, where it has been called already.

    Raises:
        UserError: a record's image is missing or broken, or a record is too long for --cache_gb (before anything is
            decoded), or the GPU's memory is too small.
    """
    places = range(len(records)) if rows is None else rows
    encoder, model, tower = decoder.encoder, decoder.loaded.model, decoder.tower
    lengths = check_prompts(decoder, records, limits, places, samples) if lengths is None else lengths
    # The longest first: short ones fill up the end, and the cache grows once.
    order = sorted(range(len(records)), key=lambda i: -lengths[i])

    def prompt(place: int) -> Sample:
        return encoder.encode_prompt(records[order[place]], places[order[place]])

    read = reader(model, tower, encoder, len(order), prompt)
    prompts = Prompts([lengths[i] for i in order], [places[i] for i in order], read, samples)
    tokens, fed = tokens_and_feed(model, encoder, decoder.latents, decoder.trained.get("slots"))
    choose = chooser_of(decoding, seed, prompts.rows, samples)
    draws = noise([one for row in prompts.rows for one in seeds_of(seed, row, samples)]) if decoder.drawn else None
    made = decode(model, prompts, tokens, replace(limits, rows=batch_size), choose, latents=fed, noise=draws)
    answers: dict[int, Prediction] = {}
    with batches_fit(batch_size):
        # One by one: the bar moves as answers end.
        for _ in track(range(len(order) * samples)):
            number, row = next(made)
            answers[order[number // samples] * samples + number % samples] = answer_of(row, encoder)
    return [answers[i] for i in range(len(answers))]
