"""A plain model with its tower and an encoder: what rows are packed, run and decoded with.

T tokens of the packed rows, N rows, k latents a block, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mirage_ds.data.batch import Batch
from mirage_ds.data.encode import Encoder
from mirage_ds.data.sample import Sample
from mirage_ds.evaluate.prompts import pack, prompts_of
from mirage_ds.model.forward import MirageModel
from mirage_ds.model.generate import Prompts
from mirage_ds.model.images import Deep, place_images
from mirage_ds.model.latents import in_order, run_passes
from mirage_ds.model.slots import LatentTokens, Limits, latent_tokens
from mirage_ds.model.targets import Targets
from mirage_ds.model.vision import FrozenTower


@dataclass(frozen=True)
class Bench:
    """All that is the same for every row.

    Attributes:
        model: plain, not sharded, evaluating; its stage does not matter.
        tower: its frozen tower.
        encoder: of the model's tokenizer; its latent_size is the slots of a block.
        limits: of answers.
        targets: learned ones, in place of pooled features of helpers.
    """

    model: MirageModel
    tower: FrozenTower
    encoder: Encoder
    limits: Limits = field(default_factory=Limits)
    targets: Targets | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.head.weight.device

    @property
    def tokens(self) -> LatentTokens:
        """Ids of the latent tokens."""
        return latent_tokens(self.encoder)

    def batch(self, samples: Sequence[Sample], recurrent: bool = False) -> Batch:
        """Pack rows, with the features of their images."""
        return pack(self.model, self.tower, self.encoder, samples, recurrent, self.targets)

    def prompts(self, samples: Sequence[Sample]) -> Prompts:
        """Make encoded prompts ready for the decoder."""
        return prompts_of(self.model, self.tower, self.encoder, samples)

    def inputs(self, batch: Batch) -> tuple[torch.Tensor, Deep | None]:
        """Input embeddings (T, H) with the images in place; a slot holds its pad token's, or its LatentInputs."""
        embeddings = self.model.language_model.embed_tokens(batch.input_ids)
        assert batch.image_features is not None
        if self.model.latent_inputs is not None:
            embeddings = self.model.latent_inputs(embeddings, batch.latents)
        return place_images(embeddings, batch.image_features, batch.image_positions)

    def hidden(self, batch: Batch, inputs: torch.Tensor, deep: Deep | None) -> torch.Tensor:
        """Final-norm hidden states (T, H) of the packed rows, in the batch's passes."""
        return in_order(self._walked(batch, inputs, deep), batch.passes)

    def _walked(self, batch: Batch, inputs: torch.Tensor, deep: Deep | None) -> list[torch.Tensor]:
        model, passes = self.model, batch.passes
        walked = (model.language_model, model.layers, inputs, batch.position_ids, passes, model.how.attention)
        return run_passes(*walked, checkpointing=False, deep=deep, feed=model.feed)

    def fed_back(self, samples: Sequence[Sample]) -> tuple[Batch, torch.Tensor, torch.Tensor]:
        """Run rows with their answers given and every block fed the states before its slots, as stage 2 does.

        Returns:
            The batch, what was fed (T, H), at latents in their last runs, and final-norm hidden states (T, H) of these.
        """
        batch = self.batch(samples, recurrent=True)
        inputs, deep = self.inputs(batch)
        hidden = self._walked(batch, inputs, deep)
        for states, one in zip(hidden, batch.passes[1:], strict=False):
            inputs = inputs.index_copy(0, one.tokens[one.fed], self.model.feed(states[one.sources]))
        return batch, inputs, in_order(hidden, batch.passes)
