"""A model folder in Python: `from mirage_ds import load`.

    mirage = load("runs/stage2")
    answer = mirage.generate("<image>Fewest moves to the goal?", images=["map.png"])
    rows = mirage.rows("data.jsonl", stage="stage2")
    mirage.loss(mirage.batch(rows[:4])).loss.backward()

One process, one device, nothing sharded: for looking, for notebooks, for small experiments. T tokens of the packed
batch, N rows, S emitted tokens, k latents a latent block, H hidden.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from safetensors.torch import save
from torch.utils.data import Dataset

from mirage_ds.config.columns import parse_columns
from mirage_ds.config.run import Compress, Slots, Stage
from mirage_ds.data.asked import Picture, as_records, several
from mirage_ds.data.batch import Batch
from mirage_ds.data.encode import Encoder
from mirage_ds.data.frames import rows_of_frame
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record import Record, blamed, make_record
from mirage_ds.data.record_files import read_records
from mirage_ds.data.sample import IGNORE, Sample
from mirage_ds.errors import UserError, shown
from mirage_ds.evaluate.decoder import (
    Decoder,
    Decoding,
    answer_of,
    chooser_of,
    load_decoder,
    run_limits,
    save_decoder,
    tokens_and_feed,
)
from mirage_ds.evaluate.prompts import pack, prompts_of
from mirage_ds.files import write_atomically
from mirage_ds.model.forward import MirageModel
from mirage_ds.model.generate import generate
from mirage_ds.model.loss import StepCounts, objective
from mirage_ds.model.rows import Generated
from mirage_ds.model.slots import Latents


class Answer(NamedTuple):
    """What `Mirage.generate` returns for one question.

    Attributes:
        text: without latent blocks and special tokens; marked: with `[k latents]` where a block stood.
        ids: (S,) emitted tokens, the last one included.
        runs: (place among the emitted tokens, k) of each latent block.
        latents: one (k, H) tensor a block: what was fed at its slots.
        hidden: (S, H) final-norm hidden states, each that of the position that the token was chosen at.
    """

    text: str
    marked: str
    ids: list[int]
    runs: list[tuple[int, int]]
    latents: list[torch.Tensor]
    hidden: torch.Tensor


class Losses(NamedTuple):
    """What `Mirage.loss` returns: scalars with gradient, but for `rows`.

    Attributes:
        loss: γ · ce + sim, the mean over rows that training minimizes (arXiv 2506.17218, equation 3).
        ce: cross-entropy; sim: 1 − cosine of stage 1, 0 elsewhere.
        rows: (N,) each row's, without γ.
    """

    loss: torch.Tensor
    ce: torch.Tensor
    sim: torch.Tensor
    rows: torch.Tensor


class Token(NamedTuple):
    """One place of an encoded row, for people.

    Attributes:
        place: from 0; text: of the token; learnt: whether it is a label; kind: "text", "image" or "latent".
    """

    place: int
    text: str
    learnt: bool
    kind: str


def _feed(vectors: torch.Tensor) -> Latents:
    """Feed the vectors (k, H) at the slots of every latent block of every row."""
    return lambda slots, own: vectors.to(own)[[one.slot for one in slots]]


class Rows(Dataset[Sample], Sequence[Sample]):
    """Records as encoded rows: `rows[3]` is a Sample, `rows[:4]` a list of them, `rows.record(3)` what was written.

    A torch Dataset: pictures are opened as rows are asked for.
    """

    def __init__(self, records: Sequence[Record], encoder: Encoder):
        self.records, self.encoder = records, encoder

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, at: int) -> Sample: ...

    @overload
    def __getitem__(self, at: slice) -> list[Sample]: ...

    def __getitem__(self, at: int | slice) -> Sample | list[Sample]:
        if isinstance(at, slice):
            return [self[i] for i in range(len(self))[at]]
        place = range(len(self))[at]
        with blamed("record on "):
            return self.encoder.encode(self.records[place], place)

    def record(self, at: int) -> Record:
        """Return a row as it was written."""
        return self.records[at]

    def tokens(self, at: int) -> list[Token]:
        """Spell a row out, token by token."""
        sample = self[at]
        images = set(sample.image_positions.tolist())
        latents = {start + i for start, k in sample.runs for i in range(k)}
        found = []
        for place, (token, label) in enumerate(zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True)):
            kind = "image" if place in images else "latent" if place in latents else "text"
            found.append(Token(place, str(self.encoder.tokenizer.decode([token])), label != IGNORE, kind))
        return found


class Mirage:
    """A model folder, loaded whole on one device; made by `load`.

    Attributes:
        model: the module that trains: `forward(Batch)` → LossSums; an ordinary nn.Module.
        latent_size: k.
        trained: what the folder says of its training; empty for a public model.
    """

    def __init__(self, decoder: Decoder, latent_size: int | None = None):
        self._decoder = decoder
        self.latent_size = latent_size or int(decoder.trained.get("latent_size") or 4)
        self.model: MirageModel = decoder.loaded.model
        self.trained: Mapping[str, Any] = decoder.trained

    @property
    def folder(self) -> Path:
        """Where it came from."""
        return self._decoder.folder

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.model.head.weight.device

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer, with the latent tokens."""
        return self._decoder.encoder.tokenizer

    def __repr__(self) -> str:
        count = sum(p.numel() for module in (self.model, self._decoder.tower.tower) for p in module.parameters())
        stage = self.trained.get("stage", "never trained by mirage_ds")
        return f"<Mirage {self.folder}: {stage}, k {self.latent_size}, {count:,} parameters on {self.device}>"

    def generate(self, question: str, images: Picture | Sequence[Picture] = (), **options: Any) -> Answer:
        """Answer a question.

        Args:
            question: with `<image>` where an image stands; without, images stand first.
            images: one picture or a list: paths, bytes of image files, PIL images, arrays (frames.from_pixels).
            options: those of generate_all.

        Raises:
            UserError: an image is missing or broken, or the numbers of images and marks differ.
        """
        return self.generate_all([question], [images], **options)[0]

    def generate_all(
        self,
        questions: Sequence[str],
        images: Sequence[Picture | Sequence[Picture]] = (),
        *,
        max_new_tokens: int = 1024,
        run_length: str | int = "trained",
        longest_run: int = 8,
        decoding: Decoding = "greedy",
        seed: int = 42,
        latents: torch.Tensor | None = None,
    ) -> list[Answer]:
        """Answer several questions together.

        Args:
            questions, images: see generate; for each question a picture or a list of them, or none at all.
            run_length: latents a block: "trained" (latent_size where the folder was never trained), "model" (it ends a
                block itself, at the latest after longest_run), or a number.
            decoding: "greedy", "paper" (temperature 0.7, top_p 0.9) or evaluate.Sampling(temperature, top_p).
            seed: of the draws.
            latents: (k, H), fed at the slots of every block in place of the model's own states; a block then has k.

        Raises:
            UserError: see generate; or latents that are not (k, H), or beside another run_length.
        """
        if latents is not None:
            width = self.model.head.weight.shape[1]
            if latents.ndim != 2 or not len(latents) or latents.shape[1] != width:
                raise UserError(f"latents: {tuple(latents.shape)} is not (k, {width}); give a row for each slot")
            if str(run_length) not in ("trained", str(len(latents))):
                raise UserError(f"run_length {run_length}: {len(latents)} latents a block are given; leave it out")
            run_length = len(latents)
        if isinstance(questions, str):
            raise UserError(f"questions: a string, {shown(questions)}; give a list of them, or call generate")
        pictures = [several(own) for own in several(images)] or [[]] * len(questions)
        if len(pictures) != len(questions):
            raise UserError(f"images: {len(pictures)} lists for {len(questions)} questions; give one each")
        with blamed("question on "):
            finder, records = as_records(questions, pictures)
            encoder = replace(self._decoder.encoder, finder=finder)
            samples = [encoder.encode_prompt(record, place) for place, record in enumerate(records)]
        if run_length == "trained" and not self.trained:
            run_length = self.latent_size
        limits = run_limits(self._decoder, max_new_tokens, longest_run, str(run_length))
        tokens, feed = tokens_and_feed(self.model, encoder, self._decoder.latents, self.trained.get("slots"))
        if latents is not None:
            feed = _feed(latents)
        choose = chooser_of(decoding, seed, range(len(samples)))
        prompts = prompts_of(self.model, self._decoder.tower, encoder, samples)
        made = generate(self.model, prompts, tokens, limits, choose, trace=True, latents=feed)
        return [self._answer(one) for one in made]

    def _answer(self, made: Generated) -> Answer:
        plain = answer_of(made, self._decoder.encoder)
        blocks = made.blocks()
        # inputs[0] is the prompt's last token: what is fed at an emitted token stands one further.
        latents = [torch.stack(made.inputs[start + 1 : start + 1 + k]) for start, k in blocks]
        marked = plain.marked(self._decoder.encoder)
        return Answer(plain.text, marked, made.ids, blocks, latents, hidden=torch.stack(made.hidden))

    def rows(
        self,
        data: Any,
        stage: Stage = "stage2",
        *,
        latent_size: int | None = None,
        slots: Slots | None = None,
        compress_strategy: Compress = "average",
        bottleneck: bool = False,
        image_root: str | Path | None = None,
        columns: str | None = None,
    ) -> Rows:
        """Encode records as a stage trains on them.

        Args:
            data: a file or folder that training reads, a pandas frame, a data set of `datasets`, or dicts
                (data/README.md); relative paths are from the file, or from the working directory.
            columns: the names of its own columns, "question=…,answer=…,image=…,helper=…"; obvious ones are recognised.
            latent_size: k; the folder's own if None. The rest as the settings of a run of these names.

        Raises:
            UserError: the first faulty record; auxiliary slots, whose passes only a run knows.
        """
        if slots == "auxiliary":
            raise UserError("slots: auxiliary rows are packed by a training run alone; take another value")
        root, names = Path(image_root) if image_root else None, parse_columns(columns)
        if isinstance(data, (str, Path)):
            records, finder = read_records(Path(data), columns=names), ImageFinder.beside(Path(data), root)
        else:
            with blamed("record on "):
                records = [make_record(one, line, columns=names) for line, one in enumerate(rows_of_frame(data), 1)]
            finder = ImageFinder(tuple(one.resolve() for one in (root, Path.cwd()) if one))
        k, encoder = latent_size or self.latent_size, self._decoder.encoder
        settings: Any = dict(stage=stage, slots=slots, compress=compress_strategy, bottleneck=bottleneck)
        return Rows(records, replace(encoder, finder=finder, latent_size=k, **settings))

    def batch(self, samples: Sample | Sequence[Sample]) -> Batch:
        """Pack Samples, or a single one, into one Batch, on the model's device and with the features of their images.

        Rows of stage 1, which have helpers, get one pass; rows of stage 2 one more than the deepest has latents.
        """
        # A Sample is itself a tuple.
        samples = [samples] if isinstance(samples, Sample) else samples
        helped = any(len(sample.helper_groups) for sample in samples)
        return pack(self.model, self._decoder.tower, self._decoder.encoder, samples, recurrent=not helped)

    def loss(self, batch: Batch, ce_weight: float | None = None) -> Losses:
        """Compute the loss that the batch's stage minimizes, with gradient where torch records it.

        Args:
            ce_weight: γ; 0.1 in stage 1 and 1 elsewhere if None, as in training.
        """
        # Only rows of stage 1 come with targets.
        grounded = len(batch.pool_size) > 0
        self.model.how.grounded, self.model.how.region = grounded, grounded and not len(batch.helper_grid_thw)
        sums = self.model(batch)
        counted = batch.weight > 0
        counts = StepCounts(int(counted.sum()), int(batch.label_count[counted].sum()), int(batch.latent_count.sum()))
        gamma = ce_weight if ce_weight is not None else 0.1 if grounded else 1.0
        loss, ce, sim = objective(sums, counts, gamma, "sample")
        return Losses(loss, ce, sim, sums.rows)

    def save(self, folder: str | Path, stage: Stage | None = None) -> Path:
        """Write the model as a folder that `load`, the commands and plain transformers open; return the folder.

        Weights have the dtype that they have here: float32 on a CPU.

        Args:
            folder: a new one.
            stage: what it was trained in here; the folder then says so, with k. If None, what its own folder says.

        Raises:
            UserError: the folder exists or cannot be written; nothing is left of it.
        """
        trained = dict(self.trained) | (dict(stage=stage, latent_size=self.latent_size) if stage else {})
        save_decoder(self._decoder, Path(folder), trained)
        return Path(folder)

    def evaluate(self, data: str | Path, task: str | Callable[..., Any] | None = None, **flags: Any) -> dict[str, Any]:
        """Answer and score a file; task: its name, or a function (docs/tasks.md). More: evaluate.report.evaluate."""
        from mirage_ds.evaluate.report import evaluate

        return evaluate(self._decoder, data, task, flags)


def load(
    folder: str | Path,
    *,
    latent_size: int | None = None,
    processor: str | Path | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    device: str | torch.device | None = None,
) -> Mirage:
    """Load a model folder (or hub id) whole onto one device.

    Args:
        latent_size: k; that of the folder's training if None, else 4.
        processor: folder that gives the image processor where the model's own has none.
        min_pixels, max_pixels: of input images; the processor's own if None.
        device: a GPU where there is one, if None. On a CPU weights are float32.

    Raises:
        UserError: no model folder of a known family, or one that contradicts itself.
    """
    finder, place = ImageFinder((Path.cwd().resolve(),)), torch.device(device) if device is not None else None
    other = Path(processor) if processor else None
    pixels = (min_pixels, max_pixels)
    return Mirage(load_decoder(Path(folder), finder, other, latents=None, pixels=pixels, device=place), latent_size)


def save_answer(answer: Answer, file: Path) -> None:
    """Write an answer's tensors: `ids` (S,), `hidden` (S, H), and `latents.0`, `latents.1` … (k, H), one a block.

    The texts and the places of the blocks are in the file's metadata: `text`, `marked`, `runs` as JSON.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {"ids": torch.tensor(answer.ids), "hidden": answer.hidden}
    tensors |= {f"latents.{number}": block for number, block in enumerate(answer.latents)}
    notes = {"text": answer.text, "marked": answer.marked, "runs": json.dumps(answer.runs)}
    write_atomically(file, save({name: one.detach().cpu().contiguous() for name, one in tensors.items()}, notes))


__all__ = ["Answer", "Losses", "Mirage", "Rows", "Token", "load", "save_answer"]
