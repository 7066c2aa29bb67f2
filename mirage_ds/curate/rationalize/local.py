"""Rationales from a model folder: decoded as `mirage-ds evaluate` decodes, batch by batch.

T tokens of a request.

The request is encoded as any other question (data/encode.py), its helper images among the input images, so what a text
spells out stays text. A batch is always the same rows with the same random numbers: what is written does not depend on
where an earlier command was cut off.
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch

from mirage_ds.chat import Reply
from mirage_ds.config.run import cache_folder
from mirage_ds.curate.rationalize.journal import Job
from mirage_ds.curate.rationalize.prompt import Questions
from mirage_ds.data.encode import IMAGE_PAD, LATENT_TOKENS
from mirage_ds.data.record import IMAGE_MARK, Record
from mirage_ds.data.sample import Sample
from mirage_ds.data.sources import content_hash
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import Decoding, Sampling, batches, decode_samples, load_decoder
from mirage_ds.model.choose import NotFinite
from mirage_ds.model.folder import resolve_folder, weight_files
from mirage_ds.model.load import check_folder
from mirage_ds.model.slots import Limits, latent_tokens


def weights_hash(name: str) -> str:
    """SHA-256 of a model's weight files, remembered in the cache for as long as they stay as they are.

    Raises:
        UserError: no such model, or one that contradicts itself.
    """
    folder = resolve_folder(name, "--model", None)
    check_folder(folder)
    hashes = [content_hash(file, cache_folder(None)) for file in weight_files(folder)]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


class Local:
    """Writes with a model of this machine."""

    def __init__(self, questions: Questions):
        self.questions, self.spec = questions, questions.spec
        folder, pixels = Path(str(self.spec.model)), (None, self.spec.max_pixels)
        self.decoder = load_decoder(folder, questions.source.finder, latents=False, pixels=pixels)

    def replies(self, jobs: Collection[Job]) -> Iterator[tuple[Job, Reply]]:
        """Write what is asked for; a batch of which anything is asked for is written whole."""
        jobs = set(jobs)
        for block in batches(range(len(self.questions.judges)), self.spec.batch_size):
            for sample in range(self.spec.samples):
                wanted = [(row, sample) in jobs for row in block]
                if any(wanted):
                    for row, reply, asked in zip(block, self._write(block, sample), wanted, strict=True):
                        if asked:
                            yield (row, sample), reply

    def request(self, row: int) -> Sample:
        """Encode a row's request, up to the first token that is to be written.

        Raises:
            UserError: an image is missing or does not decode.
        """
        parts, source = self.questions.request(row), self.questions.source
        text = "".join(part if isinstance(part, str) else IMAGE_MARK for part in parts)
        images = tuple(part.path for part in parts if not isinstance(part, str))
        asked = Record(source.records[row].line, text, "", images, ())
        with source.told(asked):
            sample = self.decoder.encoder.encode_prompt(asked, row)
        # The chat template ends the head of an answer with a line break; the encoder leaves it to who answers.
        ids = self.decoder.encoder.tokenizer("\n", add_special_tokens=False)["input_ids"]
        return sample.answered(ids)

    def _write(self, block: Sequence[int], number: int) -> list[Reply]:
        """Write to each row of a batch the reply of this number.

        Raises:
            UserError: the logits of a row are not finite, or the batch does not fit into the GPU's memory.
        """
        samples = [self.request(row) for row in block]
        model, tower, encoder = self.decoder.loaded.model, self.decoder.tower, self.decoder.encoder
        # From all tokens.
        drawn: Decoding = Sampling(self.spec.temperature, 1.0) if self.spec.temperature else "greedy"
        limits, seed = Limits(self.spec.max_new_tokens), 1000 * (self.spec.seed or 0) + number
        # They are no text; a folder that was trained on latents would begin its reply with them.
        banned = [token for token in map(encoder.id_of, (*LATENT_TOKENS, IMAGE_PAD)) if token < len(model.head.weight)]
        try:
            answers = decode_samples(model, tower, encoder, samples, limits, False, drawn, seed, banned=banned)
        except NotFinite as error:
            with self.questions.source.told(self.questions.source.records[error.row]):
                raise
        except torch.OutOfMemoryError:
            what = f"{len(block)} rows at a time do not fit into the GPU's memory"
            how = "lower it, --max_new_tokens or --max_pixels"
            raise UserError(f"--batch_size {self.spec.batch_size}: {what}; {how}") from None
        stops = latent_tokens(encoder).stops
        return [
            Reply(answer.text, answer.ids[-1] not in stops, tokens=(len(sample.input_ids), len(answer.ids)))
            for sample, answer in zip(samples, answers, strict=True)
        ]
