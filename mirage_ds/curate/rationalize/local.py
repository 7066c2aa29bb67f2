"""Rationales from a model folder, by transformers' own `generate`, batch by batch.

B rows of a batch, T tokens of its longest request, P patches of all its images, n images.

The request is encoded as any other question (data/encode.py), its helper images among the input images, so what a text
spells out stays text. A batch is always the same rows with the same random numbers: what is written does not depend on
where an earlier command was cut off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from mirage_ds.config.run import cache_folder
from mirage_ds.curate.rationalize.form import Judge
from mirage_ds.curate.rationalize.job import Job, Lost, Pending, Reply, Rows
from mirage_ds.curate.rationalize.prompt import Template
from mirage_ds.curate.rationalize.spec import RationalizeSpec
from mirage_ds.curate.rewrite import told
from mirage_ds.data.encode import IMAGE_PAD, LATENT_TOKENS, Encoder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.record import IMAGE_MARK, Record
from mirage_ds.data.sample import Sample
from mirage_ds.data.sources import content_hash
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import decoding_dtype
from mirage_ds.model.family import FAMILIES
from mirage_ds.model.folder import resolve_folder, weight_files
from mirage_ds.model.generate import check_finite
from mirage_ds.model.load import check_folder, check_vocabulary, open_weights

END, PAD = "<|im_end|>", "<|endoftext|>"


def weights_hash(name: str) -> str:
    """SHA-256 of a model's weight files, remembered in the cache for as long as they stay as they are.

    Raises:
        UserError: no such model, or one that contradicts itself.
    """
    folder = resolve_folder(name, "--model", None)
    check_folder(folder)
    hashes = [content_hash(file, cache_folder(None)) for file in weight_files(folder)]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


@dataclass
class Local:
    """Writes with a model of this machine."""

    spec: RationalizeSpec
    template: Template
    rows: Rows

    def __post_init__(self) -> None:
        from transformers import GenerationConfig

        folder = resolve_folder(str(self.spec.model), "--model", None)
        config = check_folder(folder)
        pixels = (None, self.spec.max_pixels)
        self.encoder: Encoder = load_encoder([str(folder)], self.rows.finder, "sft", 1, pixels)
        check_vocabulary(config, {IMAGE_PAD: self.encoder.id_of(IMAGE_PAD)})
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = decoding_dtype(config.dtype, self.device)
        whole = FAMILIES[config.model_type].model_class()
        self.model = open_weights(whole, folder, dtype=dtype, attn_implementation="sdpa").to(self.device).eval()
        # What the settings leave open, `generate` takes from here; published folders hold top_k 1 or a penalty.
        self.model.generation_config = GenerationConfig()

    def replies(self, samples: int, pending: Pending) -> Iterator[tuple[Job, Reply | Lost]]:
        """Write what is pending; a batch of which anything is pending is written whole."""
        waiting = iter(self.rows)
        number = 0
        while block := list(islice(waiting, self.spec.batch_size)):
            for sample in range(samples):
                wanted = [pending(row, sample) for row, _ in block]
                if any(wanted):
                    written = self._write(block, f"{self.spec.seed or 0}/{number}/{sample}")
                    for (row, judge), reply, asked in zip(block, written, wanted, strict=True):
                        if asked:
                            yield Job(row, sample, judge), reply
            number += 1

    def request(self, judge: Judge, row: int) -> Sample:
        """Encode a record's request, up to the first token that is to be written.

        Raises:
            UserError: an image is missing or does not decode.
        """
        parts = self.template.fill(judge.record, judge.boxed)
        text = "".join(part if isinstance(part, str) else IMAGE_MARK for part in parts)
        images = tuple(part.path for part in parts if not isinstance(part, str))
        with told(self.rows.file, judge.record.line):
            asked = Record(judge.record.line, text, "", images, ())
            if text.count(IMAGE_MARK) != len(images):
                raise asked.fault("text_output", f"the answer holds {IMAGE_MARK}", "leave the mark out")
            return self.encoder.encode_prompt(asked, row)

    def _write(self, block: Sequence[tuple[int, Judge]], seed: str) -> list[Reply]:
        """Write one reply to each of a batch of (row, judge of its record).

        Raises:
            NotFinite: a row's logits are not. UserError: the batch does not fit into the GPU's memory.
        """
        from transformers import GenerationConfig

        inputs = self._collate([self.request(judge, row) for row, judge in block])
        width = inputs["input_ids"].shape[1]
        end, pad = self.encoder.id_of(END), self.encoder.id_of(PAD)
        known = self.model.get_input_embeddings().num_embeddings
        settings = GenerationConfig(
            max_new_tokens=self.spec.max_new_tokens,
            do_sample=self.spec.temperature > 0,
            temperature=self.spec.temperature or None,
            # From all tokens; None would be 50.
            top_k=0 if self.spec.temperature else None,
            eos_token_id=[end, pad],
            pad_token_id=pad,
            # They are no text; a folder that was trained on latents would open a latent block.
            suppress_tokens=[t for t in map(self.encoder.id_of, (*LATENT_TOKENS, IMAGE_PAD)) if t < known],
        )
        torch.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7]))
        rows = [row for row, _ in block]
        # `generate` itself would write "!!!!" out of logits that are not finite.
        head = self.model.get_output_embeddings()
        check = head.register_forward_hook(lambda _module, _given, logits: check_finite(logits[:, -1], rows))
        try:
            with torch.inference_mode(), check:
                ids = self.model.generate(**inputs, generation_config=settings)
        except torch.OutOfMemoryError:
            raise UserError(
                f"--batch_size {self.spec.batch_size}: {len(block)} rows at a time do not fit into the GPU's memory; "
                "lower it, --max_new_tokens or --max_pixels"
            ) from None
        asked = inputs["attention_mask"].sum(1).tolist()
        return [
            self._reply(new, tokens, (end, pad)) for new, tokens in zip(ids[:, width:].tolist(), asked, strict=True)
        ]

    def _reply(self, ids: list[int], asked: int, ends: tuple[int, int]) -> Reply:
        stop = next((at for at, token in enumerate(ids) if token in ends), None)
        text = self.encoder.tokenizer.decode(ids[:stop], skip_special_tokens=True)
        return Reply(str(text).strip(), cut=stop is None, tokens=(asked, len(ids) if stop is None else stop + 1))

    def _collate(self, samples: Iterable[Sample]) -> dict[str, torch.Tensor]:
        """Return what `generate` takes, padded on the left.

        input_ids, attention_mask, mm_token_type_ids (1 at an image's tokens): (B, T); pixel_values: (P, 1176);
        image_grid_thw: (n, 3).
        """
        given = list(samples)
        # The chat template ends the head of an answer with a line break; the encoder leaves it to who answers.
        newline = torch.tensor(self.encoder.tokenizer("\n", add_special_tokens=False)["input_ids"])
        texts = [torch.cat([sample.input_ids, newline]) for sample in given]
        width = max(map(len, texts))
        pad = self.encoder.id_of(PAD)
        ids = torch.stack([torch.nn.functional.pad(text, (width - len(text), 0), value=pad) for text in texts])
        lengths = torch.tensor([len(text) for text in texts])
        made = {
            "input_ids": ids,
            "attention_mask": (torch.arange(width) >= width - lengths[:, None]).long(),
            "mm_token_type_ids": (ids == self.encoder.id_of(IMAGE_PAD)).int(),
            "pixel_values": torch.cat([sample.pixel_values for sample in given]).to(self.model.dtype),
            "image_grid_thw": torch.cat([sample.image_grid_thw for sample in given]),
        }
        return {name: tensor.to(self.device) for name, tensor in made.items()}
