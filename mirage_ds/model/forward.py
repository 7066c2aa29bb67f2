"""MirageModel: Batch in, LossSums or Scores out. The only module that the engine sees.

T tokens of the packed batch, N samples, M labelled tokens, k latents a block, L latents of all blocks, F image
features, H hidden, V vocabulary.

It walks transformers' own decoder layers; weights, names and files stay those of its whole models (family.py).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from mirage_ds.config.run import LatentLoss
from mirage_ds.data.batch import Batch
from mirage_ds.model.images import Deep, place_images
from mirage_ds.model.latent_heads import LatentHeads, gaussian_logp, vlpo_logp
from mirage_ds.model.latents import LatentInputs, before_latents, compress, grounding, in_order, run_passes
from mirage_ds.model.layers import Cut, DecoderLayers
from mirage_ds.model.lora import Lora, TokenRows, adapters_off
from mirage_ds.model.loss import LossHead, LossSums, label_scales, loss_sums
from mirage_ds.model.target_encoder import TargetEncoder
from mirage_ds.model.vision import trained_features


class Scoring(NamedTuple):
    """Asks MirageModel.forward for Scores.

    Attributes:
        temperature: that answers were sampled at.
        density: what recorded latents are scored under: "gaussian" by the model's LatentHeads, "vlpo" by `sigma`; None
            gives them no score.
        adapters: False scores without what LoRA has trained, to be called without gradients.
    """

    temperature: float = 1.0
    density: Literal["gaussian", "vlpo"] | None = None
    sigma: float = 10.0
    adapters: bool = True


class Scores(NamedTuple):
    """How likely a policy makes the answers of a micro-batch. A NamedTuple for the reason of loss.LossSums.

    Attributes:
        logp: (M,) float32 log-probabilities of batch.targets at the temperature, with gradient; entropy: (M,) of the
            distributions that they are from, in nats, with gradient. Batch order, target_sample tells whose.
        latent_logp: (L,) float64 logarithms of the density of batch.fed, with gradient, in the order of batch.latents;
            zeros where there is no density.
        states: (L, H) final-norm hidden states at the positions before the latents, without gradient.
        earlier: as LossSums.earlier.
    """

    logp: torch.Tensor
    entropy: torch.Tensor
    latent_logp: torch.Tensor
    states: torch.Tensor
    earlier: torch.Tensor | None = None


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
        own: stage1 feeds the model's own states at the latents (--feed own), in stage2's passes.
        region: stage1's targets are features of the input images themselves (--compress_strategy region).
        others: parameters that the earlier passes' backward does not reach and gives zeros to, for an optimizer that
            takes of a step's gradients only what the last backward reaches (ZeRO-2, offloaded).
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
    own: bool = False
    region: bool = False
    others: Sequence[nn.Parameter] = ()


class MirageModel(nn.Module):
    """The trainable part of a vision-language model with Mirage's forward.

    Args:
        language_model: transformers' text model; head: the loss head over the model's output matrix.
        visual: the vision tower where it is trained, else None (features then come with the batch).
        lora: what the adapters in `language_model` are, if there are any; rows: what is trained of the embedding then.
        latent_heads: where latents are drawn (rl's policy "gaussian").
        target_encoder: in scaffold, what alone is trained.

    Attributes:
        latent_inputs: where a block's latents are made together; who loads the model sets it.
    """

    def __init__(
        self,
        language_model: Any,
        head: LossHead,
        visual: nn.Module | None,
        how: Forward,
        lora: Lora | None = None,
        rows: TokenRows | None = None,
        latent_heads: LatentHeads | None = None,
        target_encoder: TargetEncoder | None = None,
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
        self.latent_heads = latent_heads
        self.target_encoder = target_encoder
        self.latent_inputs: LatentInputs | None = None

    @property
    def encodes_helpers(self) -> bool:
        """Whether helpers go through a tower that is trained for them alone, so that they come as pixels."""
        return self.target_encoder is not None and self.target_encoder.visual is not None

    def forward(self, batch: Batch, scoring: Scoring | None = None) -> LossSums | Scores:
        """Compute the sums of the micro-batch's losses, or how likely its answers are.

        Scores come in either of two ways. Without batch.fed the model makes its own latents: batch.passes is stage2's
        schedule (passes of the micro-step as RunConfig.passes) and gradients run through the recurrence. With it the
        recorded latents are fed, without gradient to them, in one pass (collate with passes = 1).
        """
        return self._run(batch)[0] if scoring is None else self._score(batch, scoring)

    def trace(self, batch: Batch) -> tuple[LossSums, Traced]:
        """As forward, with what was computed on the way."""
        sums, hidden, traced = self._run(batch)
        return sums, traced._replace(hidden=in_order(hidden, batch.passes))

    def feed(self, states: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Return what is fed at a latent for the final-norm hidden state h before it, (L, H) of the same dtype.

        That is h itself, or where the model has LatentHeads the mean h + μ(h), with `noise` ε the draw h + μ + σ ε.

        Args:
            noise: (L, H); nothing is drawn where there are no heads.
        """
        if self.latent_heads is None:
            return states
        mean, log_sigma = self.latent_heads(states)
        return (mean if noise is None else mean + log_sigma.exp() * noise).to(states.dtype)

    def _run(self, batch: Batch) -> tuple[LossSums, list[torch.Tensor], Traced]:
        embeddings, deep, targets = self._inputs(batch)
        hidden, labelled, cut = self._hidden(batch, embeddings, deep)
        total, ce = self.head(labelled, batch.targets, label_scales(batch, self.how.reduction))
        distance = latents = None
        if targets is not None or not self.training:
            before = before_latents(hidden, batch, cut)
        if not self.training:
            # What an encoder that is trained makes stands among the inputs.
            own = self.feed(before) if self.target_encoder is None else embeddings.index_select(0, batch.latents)
            latents = own.detach()
        if targets is not None:
            # Targets are what the hidden states are pulled towards: they must not move to meet them.
            distance = grounding(before, targets.detach(), self.how.latent_loss)
        sums = loss_sums(total, ce, distance, batch, self.how.reduction)._replace(latents=latents)
        if cut is not None:
            sums = sums._replace(earlier=cut.root())
        return sums, hidden, Traced(hidden[0], embeddings, total, ce, distance)

    def _score(self, batch: Batch, scoring: Scoring) -> Scores:
        embeddings, deep, _ = self._inputs(batch, scoring.adapters)
        with nullcontext() if scoring.adapters else adapters_off(self.layers):
            hidden, labelled, cut = self._hidden(batch, embeddings, deep)
        logp, entropy = self.head(labelled, batch.targets, None, scoring.temperature, scoring.adapters)
        states = before_latents(hidden, batch)
        latent_logp = states.new_zeros(len(states), dtype=torch.float64)
        if scoring.density is not None:
            if batch.fed is None or (scoring.density == "gaussian" and self.latent_heads is None):
                raise ValueError(f"{scoring.density} needs recorded latents, and gaussian the model's heads")
            # Also on a rank whose rows have no latent: ranks whose graphs differ hang ZeRO-3.
            if self.latent_heads is not None and scoring.density == "gaussian":
                latent_logp = gaussian_logp(batch.fed, *self.latent_heads(states))
            else:
                latent_logp = vlpo_logp(batch.fed, self.feed(states), scoring.sigma)
        return Scores(logp, entropy, latent_logp, states.detach(), None if cut is None else cut.root())

    def _inputs(self, batch: Batch, adapters: bool = True) -> tuple[torch.Tensor, Deep | None, torch.Tensor | None]:
        """Return input embeddings (T, H), what is added behind layers, and stage1's targets (L, H) among the former."""
        embeddings = self.language_model.embed_tokens(batch.input_ids)
        if self.rows is not None and adapters:
            embeddings = self.rows(embeddings, batch.input_ids)
        images, helpers = self._features(batch)
        embeddings, deep = place_images(embeddings, images, batch.image_positions)
        targets = None
        if self.latent_inputs is not None:
            embeddings = self.latent_inputs(embeddings, batch.latents)
        if self.target_encoder is not None:
            made = self.target_encoder(helpers, batch.helper_grid_thw)
            embeddings = embeddings.index_copy(0, batch.latents, made.to(embeddings.dtype))
        elif self.how.grounded:
            # Also on a rank whose rows have no helper: ranks whose graphs differ hang ZeRO-3.
            targets = compress(helpers, batch, embeddings.shape[1]).to(embeddings.dtype)
            if not self.how.own:
                # Teacher forcing: the targets are the latents' input embeddings.
                embeddings = embeddings.index_copy(0, batch.latents, targets)
        elif batch.fed is not None:
            embeddings = embeddings.index_copy(0, batch.latents, batch.fed.to(embeddings.dtype))
        return embeddings, deep, targets

    def _hidden(
        self, batch: Batch, embeddings: torch.Tensor, deep: Deep | None
    ) -> tuple[list[torch.Tensor], torch.Tensor, Cut | None]:
        """Return the hidden states of each pass, those before labels (M, H), and where the graph was cut."""
        cut = Cut(self.how.others) if self.how.split and len(batch.passes) > 1 and torch.is_grad_enabled() else None
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
            feed=self.feed,
        )
        chosen = [states.index_select(0, one.labelled) for states, one in zip(hidden, batch.passes, strict=True)]
        if cut is not None:
            chosen[:-1] = [cut(states) for states in chosen[:-1]]
        return hidden, torch.cat(chosen), cut

    def _features(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if self.visual is None:
            found, encoder = batch.helper_features, self.target_encoder
            if encoder is not None and encoder.visual is not None:
                found = trained_features(encoder.visual, batch.helper_pixel_values, batch.helper_grid_thw)
            if batch.image_features is None or found is None:
                raise ValueError("the tower is frozen: run FrozenTower.attach on the batch first")
            return batch.image_features, batch.image_features if self.how.region else found
        images = trained_features(self.visual, batch.pixel_values, batch.image_grid_thw)
        if not self.how.grounded:
            return images, images[:0]
        if self.how.region:
            return images, images if self.how.train_targets else images.detach()
        with torch.set_grad_enabled(self.how.train_targets and torch.is_grad_enabled()):
            helpers = trained_features(self.visual, batch.helper_pixel_values, batch.helper_grid_thw)
        return images, helpers
