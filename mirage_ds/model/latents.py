"""The latents: stage 1's targets, what slots hold at first, and the passes that feed hidden states back in stage 2.

T tokens of the packed batch, Tq tokens of one pass, N samples, k latents a block, F helper features, H hidden, L
layers, D head width.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mirage_ds.config.run import LatentLoss
from mirage_ds.data.batch import Batch, Pass
from mirage_ds.errors import UserError
from mirage_ds.files import HEADS
from mirage_ds.model.attention import Ends, Packed, Slopes
from mirage_ds.model.folder import header_of
from mirage_ds.model.gathered import gathered
from mirage_ds.model.images import Deep, embedded
from mirage_ds.model.layers import Body, Cut, DecoderLayers, after

KeysValues = tuple[torch.Tensor, torch.Tensor]
# Name of LatentInputs' weight in a MirageModel, and in the file beside the heads.
INPUTS = "latent_inputs.weight"


class LatentInputs(nn.Module):
    """What the slots of a block are fed before any state is, where its latents are made together (--latent_passes).

    Args:
        weight: (k, H), trained.
        passes: T, in which states then take their place (arXiv 2506.18582); with 0 they stay.
    """

    def __init__(self, weight: torch.Tensor, passes: int):
        super().__init__()
        self.weight, self.passes = nn.Parameter(weight), passes

    def forward(self, embeddings: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Return embeddings (T, H) with them at the places of all latents, (N_blocks · k,)."""
        own = self.weight.repeat(len(latents) // len(self.weight), 1)
        return embeddings.index_copy(0, latents, own.to(embeddings.dtype))


def load_inputs(
    folder: Path, said: bool, passes: int, k: int, embedding: nn.Parameter, pad: int, device: torch.device
) -> LatentInputs:
    """Load a model folder's inputs of k slots; new ones, each the embedding of `<|latent_pad|>`, where it has none.

    Args:
        said: whether its config.json says that it has some (`mirage.latent_passes`).
        embedding: (V, H), perhaps sharded; pad: the token's row.

    Raises:
        UserError: they are not there, or are not those of this model.
    """
    if not said:
        with gathered([embedding]):
            return LatentInputs(embedding[pad].detach().to(device).repeat(k, 1), passes)
    file, shape = folder / HEADS, (k, getattr(embedding, "ds_shape", embedding.shape)[1])
    found = header_of(file).get(INPUTS) if file.is_file() else None
    if found is None or found.shape != shape:
        raise UserError(f"{file}: holds no inputs of {k} latents of width {shape[1]}; copy the model's own")
    return LatentInputs(load_file(file)[INPUTS].to(device, embedding.dtype), passes)


def compress(features: torch.Tensor, batch: Batch, width: int) -> torch.Tensor:
    """Average groups of each helper's features into its k targets (arXiv 2506.17218, equation 2; data/pooling.py).

    Args:
        features: (F, (1 + D) · H) merged visual features of all helpers; a latent imitates the first H numbers of them
            (images.py), which are what the language model gets as input.

        width: H.

    Returns:
        (N_runs · k, H) targets in the dtype of `features`, reduced in float32.
    """
    return averages(embedded(features, width), batch.pool_from, batch.pool_to, batch.pool_size)


def averages(features: torch.Tensor, source: torch.Tensor, target: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Average features (F, H) into targets, in float32: of `source[i]` into `target[i]`, which takes `size` of them.

    Returns:
        (len(size), H) in the dtype of `features`.
    """
    sums = torch.zeros(len(size), features.shape[1], dtype=torch.float32, device=features.device)
    sums = sums.index_add(0, target, features.float().index_select(0, source))
    return (sums / size[:, None]).to(features.dtype)


def grounding(before: torch.Tensor, targets: torch.Tensor, loss: LatentLoss) -> torch.Tensor:
    """Distance of the hidden state before each latent from the latent's target, in float32.

    Args:
        before: (N_runs · k, H), as before_latents returns them; targets: (N_runs · k, H).
        loss: 1 − cosine, or the mean over H of the squared difference.

    Returns:
        (N_runs · k,) float32.
    """
    if loss == "l2":
        return (before.float() - targets.float()).square().mean(dim=-1)
    return 1 - functional.cosine_similarity(before.float(), targets.float(), dim=-1)


def _run_layer(
    call: Callable[..., torch.Tensor],
    body: Body,
    x: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    packed: Packed,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run one decoder layer over one pass; return its output (1, Tq, H) and its keys and values (Tq, Hkv, D)."""
    # `made` is filled anew in each call, so that recomputing the layer in backward stays a pure function.
    packed = packed._replace(made=[])
    output = call(x, body, position_embeddings=rotary, packed=packed)
    return output, *packed.made[0]


def run_passes(
    language_model: Any,
    layers: DecoderLayers,
    embeddings: torch.Tensor,
    position_ids: torch.Tensor,
    passes: Sequence[Pass],
    backend: str,
    checkpointing: bool,
    detach: bool = False,
    deep: Deep | None = None,
    cut: Cut | None = None,
    feed: Callable[[torch.Tensor], torch.Tensor] = lambda states: states,
) -> list[torch.Tensor]:
    """Walk the decoder layers once a pass, each pass seeing the keys and values of all before it.

    The first token of a sample in pass j ≥ 1 is a latent: its input embedding is the final-norm hidden state of the
    position before it, from pass j − 1 (arXiv 2506.17218, equation 4). Where latents are made together, so is each of
    the first ones. Nothing is detached: gradients run through the fed-back states and through the keys and values. (In
    stage 1's auxiliary schedule no pass feeds anything back.)

    Args:
        language_model: transformers' text model (norm, rotary_emb).
        layers: its layers.
        embeddings: (T, H) input embeddings, images already in place.
        position_ids: (3, T).
        passes: the schedule.
        backend: attention back end.
        checkpointing: recompute each layer call in backward. A pass of one token a sample recomputes its attention
            alone, whose copy of all earlier keys and values is large; where layers are gathered for each use (ZeRO-3),
            all of it, or every layer would stay gathered.
        detach: cut the gradient at the fed-back states; it still runs through keys and values.
        deep: what is added behind the first layers, with the images that stand in `embeddings`.
        cut: cuts the graph before the last pass, so that it can have a backward of its own.
        feed: what is fed for a state (MirageModel.feed).

    Returns:
        The final-norm hidden states of each pass, (Tq, H), in the order of its tokens.
    """
    cos, sin = language_model.rotary_emb(embeddings[None], position_ids[:, None])
    made: list[list[KeysValues]] = [[] for _ in layers.calls]
    hidden: list[torch.Tensor] = []
    recorded, resident, end = torch.is_grad_enabled(), layers.resident(), len(passes) - 1
    # Those that leave the gradients of their weights to the first pass.
    later = end if cut is None else end - 1
    if recorded:
        layers.round.begin(later)
    lengths = [len(one.tokens) for one in passes]
    slopes = [Slopes(lengths) if recorded and end else None for _ in layers.calls]
    for number, one in enumerate(passes):
        x = embeddings.index_select(0, one.tokens)
        if len(one.sources):
            fed = feed(hidden[-1].index_select(0, one.sources))
            x = x.index_copy(0, one.fed, fed.detach() if detach else fed)
        if number and recorded:
            x = after(x, hidden[-1])
        if cut is not None and number == end:
            x, deep = cut(x), None if deep is None else deep.map(cut)
            made = [[(k.detach(), v.detach()) for k, v in past] for past in made]
        body: Body = "alone" if number > later or not later else "later" if number else "first"
        rotary = (cos.index_select(-2, one.tokens), sin.index_select(-2, one.tokens))
        x = x[None]
        # At most a token a sample, as between the first pass and the last.
        thin = number > 0 and one.max_q <= 1 and resident
        # One pass whose tokens all see what stands before them has its keys as they are made.
        keys = one.keys if end or len(one.keys) > len(one.tokens) else None
        ends = Ends(one.cu_q, one.cu_k, one.max_q, one.max_k)
        for place, layer in enumerate(layers.calls):
            packed = Packed(list(made[place]), [], keys, ends, backend, slopes[place], thin)
            # Hooks have nothing to gather where all is whole.
            arguments = (layer.forward if resident else layer, body, x, rotary, packed)
            if checkpointing and recorded and not thin:
                x, k, v = checkpoint(_run_layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x, k, v = _run_layer(*arguments)
            if deep is not None:
                x = deep.add(place, x[0], one.tokens)[None]
            if number < end:
                made[place].append((k, v))
        hidden.append((language_model.norm.forward if resident else language_model.norm)(x)[0])
    return hidden


def before_latents(hidden: Sequence[torch.Tensor], batch: Batch, cut: Cut | None = None) -> torch.Tensor:
    """Return the final-norm hidden states at the positions before the latents, (N_runs · k, H).

    Args:
        hidden: of each pass, (Tq, H).
        cut: where the last pass has a backward of its own.
    """
    if len(hidden) == 1:
        return hidden[0].index_select(0, batch.latents - 1)
    place = _last_runs(batch.passes, batch.latents - 1)
    if cut is None:
        return torch.cat(list(hidden)).index_select(0, place)
    earlier = torch.cat(list(hidden[:-1]))
    own = place - len(earlier)
    before = cut(earlier.index_select(0, place.clamp(max=len(earlier) - 1)))
    return before.where(own[:, None] < 0, hidden[-1].index_select(0, own.clamp(min=0)))


def _last_runs(passes: Sequence[Pass], wanted: torch.Tensor) -> torch.Tensor:
    """Return where packed positions have run for the last time, among the states of all passes."""
    tokens, places = torch.cat([one.tokens for one in passes]).sort(stable=True)
    return places[torch.searchsorted(tokens, wanted, right=True) - 1]


def in_order(hidden: Sequence[torch.Tensor], passes: Sequence[Pass]) -> torch.Tensor:
    """Put the hidden states of last runs back into the order of the packed batch: (T, H)."""
    every = torch.cat([one.tokens for one in passes]).unique()
    return torch.cat(list(hidden)).index_select(0, _last_runs(passes, every))
