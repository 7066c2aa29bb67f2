"""A model with its encoder, ready to be given rows, prompts and latents.

T tokens of the packed rows, N rows, R latent blocks of a row, k latents a block, F image features, H hidden, A
scored tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mirage_ds.data.batch import Batch
from mirage_ds.data.encode import Encoder
from mirage_ds.data.record import Record
from mirage_ds.data.sample import IGNORE, Sample
from mirage_ds.evaluate.decoder import pack, prompt_of
from mirage_ds.model.forward import MirageModel
from mirage_ds.model.generate import Chooser, Generated, Latents, LatentTokens, Limits, generate, greedy
from mirage_ds.model.latents import compress
from mirage_ds.model.vision import FrozenTower


class Row(NamedTuple):
    """A record with its answer and its latent blocks.

    Attributes:
        sample: the encoded row; its images are features already.
        scored: (A,) places of the answer's text behind the first latent block: the likelihood is of these.
        targets: (R, k, H) the helpers' compressed features, where the encoder is stage1's.
    """

    sample: Sample
    scored: torch.Tensor
    targets: torch.Tensor | None


def scored_places(sample: Sample, tokens: LatentTokens) -> torch.Tensor:
    """Places of the text behind the first latent block, up to the token that ends the answer; no latent tokens."""
    ids, (start, k) = sample.input_ids, sample.runs[0]
    places = torch.arange(len(ids))
    last = places[torch.isin(ids, torch.tensor(tokens.stops))].max()
    latent = torch.isin(ids, torch.tensor([tokens.pad, tokens.start, tokens.end]))
    return places[(places >= start + k) & (places <= last) & ~latent & (sample.labels != IGNORE)]


def without_blocks(row: Row, tokens: LatentTokens) -> Row:
    """Leave a row's latent blocks out, start and end tokens too; what follows moves up, positions with it."""
    sample = row.sample
    latent = torch.isin(sample.input_ids, torch.tensor([tokens.pad, tokens.start, tokens.end]))
    # Blocks stand in the answer, where all is text: one place a token on all three axes.
    before = latent.cumsum(0)
    shorter = sample._replace(
        input_ids=sample.input_ids[~latent],
        labels=sample.labels[~latent],
        position_ids=(sample.position_ids - before)[:, ~latent],
        runs=(),
    )
    return row._replace(sample=shorter, scored=row.scored - before[row.scored])


@dataclass(frozen=True)
class Bench:
    """All that is the same for every row and condition.

    Attributes:
        model: plain, not sharded, evaluating.
        tower: its frozen tower.
        encoder: of stage1 where the helpers' targets are wanted, else of stage2; its latent_size is the slots of
            a block.
        tokens: ids of the latent tokens.
        limits: with a fixed_run of latent_size.
    """

    model: MirageModel
    tower: FrozenTower
    encoder: Encoder
    tokens: LatentTokens
    limits: Limits

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.head.weight.device

    def batch(self, samples: Sequence[Sample], passes: int = 1) -> Batch:
        """Pack rows, with the features of their images."""
        return pack(self.model, self.tower, self.encoder, samples, passes)

    @torch.no_grad()
    def rows(self, records: Sequence[Record], places: Sequence[int]) -> list[Row]:
        """Encode records and run the tower on their images.

        Args:
            places: the records' places in their file.

        Raises:
            RecordError: an image does not decode.
        """
        samples = [self.encoder.encode(record, place) for record, place in zip(records, places, strict=True)]
        batch = self.batch(samples)
        assert batch.image_features is not None
        assert batch.helper_features is not None
        features = batch.image_features.split([len(sample.image_positions) for sample in samples])
        targets: list[torch.Tensor | None] = [None] * len(samples)
        if self.encoder.stage == "stage1":
            width = self.model.head.weight.shape[1]
            blocks = compress(batch.helper_features, batch, width).cpu().unflatten(0, (-1, self.encoder.latent_size))
            targets = list(blocks.split([len(sample.runs) for sample in samples]))
        return [
            Row(_seen(sample, own), scored_places(sample, self.tokens), target)
            for sample, own, target in zip(samples, features, targets, strict=True)
        ]

    def decode(self, rows: Sequence[Row], latents: Latents | None = None, choose: Chooser = greedy) -> list[Generated]:
        """Answer the rows' questions, with the slots fed by `latents`."""
        batch = self.batch([prompt_of(row.sample) for row in rows])
        return generate(self.model, batch, self.tokens, self.limits, choose, latents=latents)


def _seen(sample: Sample, features: torch.Tensor) -> Sample:
    """Give a row the features (F, H) of its images in place of pixels; helpers have done their part."""
    return sample._replace(
        image_features=features,
        pixel_values=sample.pixel_values[:0],
        helper_pixel_values=sample.helper_pixel_values[:0],
        helper_grid_thw=sample.helper_grid_thw[:0],
        helper_groups=sample.helper_groups[:0],
    )
