"""MirageModel: Batch in, LossSums out. The only module that the engine sees.

T tokens of the packed batch, N samples, M labelled tokens, k latents a block, F image features, H hidden, V vocabulary.

It walks transformers' own decoder layers; weights, names and files stay those of its whole models (family.py).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from mirage_ds.config.run import LatentLoss
from mirage_ds.data.batch import Batch
from mirage_ds.model.images import place_images
from mirage_ds.model.latents import compress, grounding, in_order, run_passes
from mirage_ds.model.layers import Cut, DecoderLayers
from mirage_ds.model.lora import Lora, TokenRows
from mirage_ds.model.loss import LossHead, LossSums, label_scales, loss_sums
from mirage_ds.model.vision import trained_features


class Traced(NamedTuple):
    """What a forward computed on its way, for tests and parity checks.

    Attributes:
        hidden: (T, H) final-norm hidden states.
        inputs: (T, H) input embeddings of stage1 and sft; in stage2 latents hold the embedding they do not use.
        total: Σ of the cross-entropies as loss.label_scales weighs them.
        ce: (M,) cross-entropies in the order of batch.targets, without gradient.
        one_minus_cosine: (N_runs · k,) in stage1, perhaps none; None in the other stages.
    """

    hidden: torch.Tensor
    inputs: torch.Tensor
    total: torch.Tensor
    ce: torch.Tensor
    one_minus_cosine: torch.Tensor | None


@dataclass
class Forward:
    """How a forward runs.

    Attributes:
        grounded: stage1, where a trained tower also encodes the helpers.
        reduction: "sample" or "token" (see loss.LossSums).
        attention: back end, resolved by attention.choose_backend.
        checkpointing: recompute layers in backward.
        latent_loss: how stage1 measures a latent against its target.
        detach_latents: no gradient through the states that stage2 feeds back.
        kernels: "liger", or None for transformers' own norms and MLPs (kernels.py).
        split: stage2's last pass has a backward of its own (LossSums.earlier).
        train_targets: stage1's cross-entropy also reaches a trained tower through the targets that stand as inputs.
    """

    grounded: bool
    reduction: str
    attention: str
    checkpointing: bool
    latent_loss: LatentLoss = "cosine"
    detach_latents: bool = False
    train_targets: bool = False
    split: bool = False
    kernels: str | None = None


class MirageModel(nn.Module):
    """The trainable part of a vision-language model with Mirage's forward.

    Args:
        language_model: transformers' text model; head: the loss head over the model's output matrix.
        visual: the vision tower where it is trained, else None (features then come with the batch).
        lora: what the adapters in `language_model` are, if there are any; rows: what is trained of the embedding then.
    """

    def __init__(
        self,
        language_model: Any,
        head: LossHead,
        visual: nn.Module | None,
        how: Forward,
        lora: Lora | None = None,
        rows: TokenRows | None = None,
    ):
        super().__init__()
        self.language_model: Any = language_model
        # Before the head, which may have the same.
        self.rows = rows
        self.head = head
        self.visual = visual
        self.how = how
        self.layers = DecoderLayers(language_model.layers, how.kernels)
        self.lora = lora

    def forward(self, batch: Batch) -> LossSums:
        """Compute the sums of the micro-batch's losses."""
        return self._run(batch)[0]

    def trace(self, batch: Batch) -> tuple[LossSums, Traced]:
        """As forward, with what was computed on the way."""
        sums, hidden, traced = self._run(batch)
        return sums, traced._replace(hidden=in_order(hidden, batch.passes))

    def _run(self, batch: Batch) -> tuple[LossSums, list[torch.Tensor], Traced]:
        embeddings = self.language_model.embed_tokens(batch.input_ids)
        if self.rows is not None:
            embeddings = self.rows(embeddings, batch.input_ids)
        images, helpers = self._features(batch)
        embeddings, deep = place_images(embeddings, images, batch.image_positions)
        targets = None
        if self.how.grounded:
            # Also on a rank whose rows have no helper: ranks whose graphs differ hang ZeRO-3.
            # Teacher forcing: the targets are the latents' input embeddings.
            targets = compress(helpers, batch, embeddings.shape[1]).to(embeddings.dtype)
            embeddings = embeddings.index_copy(0, batch.latents, targets)
        cut = Cut() if self.how.split and len(batch.passes) > 1 and torch.is_grad_enabled() else None
        hidden = run_passes(
            self.language_model,
            self.layers,
            embeddings,
            batch.position_ids,
            batch.passes,
            self.how.attention,
            self.how.checkpointing,
            detach=self.how.detach_latents,
            deep=deep,
            cut=cut,
        )
        chosen = [states.index_select(0, one.labelled) for states, one in zip(hidden, batch.passes, strict=True)]
        if cut is not None:
            chosen[:-1] = [cut(states) for states in chosen[:-1]]
        labelled = torch.cat(chosen)
        total, ce = self.head(labelled, batch.targets, label_scales(batch, self.how.reduction))
        distance = None
        if targets is not None:
            states = hidden[0] if len(hidden) == 1 else in_order(hidden, batch.passes)
            # Targets are what the hidden states are pulled towards: they must not move to meet them.
            distance = grounding(states, targets.detach(), batch, self.how.latent_loss)
        sums = loss_sums(total, ce, distance, batch, self.how.reduction)
        if cut is not None:
            sums = sums._replace(earlier=cut.root())
        return sums, hidden, Traced(hidden[0], embeddings, total, ce, distance)

    def _features(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if self.visual is None:
            if batch.image_features is None or batch.helper_features is None:
                raise ValueError("the tower is frozen: run FrozenTower.attach on the batch first")
            return batch.image_features, batch.helper_features
        images = trained_features(self.visual, batch.pixel_values, batch.image_grid_thw)
        if not self.how.grounded:
            return images, images[:0]
        with torch.set_grad_enabled(self.how.train_targets and torch.is_grad_enabled()):
            helpers = trained_features(self.visual, batch.helper_pixel_values, batch.helper_grid_thw)
        return images, helpers
