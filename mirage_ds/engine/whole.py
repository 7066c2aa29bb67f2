"""The trained model, whole and plain, in the middle of training: for decoding, which walks the layers for each token.

Ψ elements of the parameters, W ranks, N rows of a batch, V vocabulary rows.

DeepSpeed's hooks gather a module's parameters in each of its forwards: Ψ a token. Here they are gathered once, and a
second tree of modules without hooks is made around the same memory.
"""

import copy
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mirage_ds.engine.adapter import Adapter, adapter_name, trained_adapter
from mirage_ds.engine.offload import memory_to_be_had
from mirage_ds.engine.private import elements_to_gather
from mirage_ds.engine.setup import World, everyone
from mirage_ds.errors import UserError
from mirage_ds.model.forward import MirageModel
from mirage_ds.model.gathered import gathered
from mirage_ds.model.kv_cache import bytes_of_block, tokens_of_block
from mirage_ds.model.latent_heads import LatentHeads
from mirage_ds.model.latents import LatentInputs
from mirage_ds.model.load import public_name
from mirage_ds.model.loss import LossHead
from mirage_ds.model.slots import Limits


@contextmanager
def whole_model(engine: Any) -> Iterator[MirageModel]:
    """Yield a plain MirageModel around the engine's weights, whole on this rank while it lasts. All ranks call it.

    It is for reading alone, and knows neither gradients nor checkpointing. Between the beginning and the end nothing is
    sent: a rank may use it as often as it likes, or not at all.

    Args:
        engine: between two optimizer steps.
    """
    # What an evaluation has prefetched may still be on its way.
    engine.empty_partition_cache()
    model: MirageModel = engine.module
    with gathered(list(model.parameters())):
        plain = _plain_model(model)
        try:
            yield plain
        finally:
            # Whoever still holds the modules must not hold the memory.
            plain.to_empty(device="meta")
            del plain.layers


def _plain_model(model: MirageModel) -> MirageModel:
    """Build the same modules anew, around the same tensors; adapters are merged into new ones."""
    adapter = trained_adapter(model, keep=True, whole=True)
    language_model: Any = _plain(model.language_model, adapter)
    matrix = model.head.weight.data
    if adapter:
        tied = model.head.weight is model.language_model.embed_tokens.weight
        matrix = language_model.embed_tokens.weight.data if tied else adapter.merged("lm_head.weight", matrix)
    head = LossHead(nn.Parameter(matrix, requires_grad=False), model.head.chunk_bytes)
    visual = None if model.visual is None else _plain(model.visual)
    heads = model.latent_heads
    if heads is not None:
        tensors = {name: tensor.data for name, tensor in heads.state_dict().items()}
        heads = LatentHeads(matrix.shape[1], torch.device("meta"))
        heads.load_state_dict(tensors, assign=True)
    how = replace(model.how, checkpointing=False)
    plain = MirageModel(language_model, head, visual, how, latent_heads=heads)
    if (inputs := model.latent_inputs) is not None:
        plain.latent_inputs = LatentInputs(inputs.weight.data, inputs.passes)
    return plain.requires_grad_(False).eval()


def _plain(module: Any, adapter: Adapter | None = None) -> nn.Module:
    """Build one of transformers' models from its configuration, around the tensors of `module`.

    Args:
        adapter: of a text model that has one.
    """
    config = copy.deepcopy(module.config)
    attention = config._attn_implementation
    # The tower's sounds like a package's, which making a model looks for (load.attend_in_segments).
    config._attn_implementation = "eager"
    with torch.device("meta"):
        plain: nn.Module = type(module)(config)
    config._attn_implementation = attention
    tensors = {name: tensor.data for name, tensor in module.state_dict().items()}
    if adapter:
        own = {name: f"language_model.{name}" for name in tensors}
        tensors = {
            name.replace(".base_layer.", "."): adapter.merged(public_name(own[name]), tensor)
            for name, tensor in tensors.items()
            if adapter_name(own[name]) is None
        }
    plain.load_state_dict(tensors, assign=True)
    # What no checkpoint holds: rotary frequencies.
    for name, buffer in module.named_buffers():
        owner, _, own = name.rpartition(".")
        setattr(plain.get_submodule(owner), own, buffer)
    return plain


def bytes_to_decode(model: MirageModel, rows: int, prompt: int, limits: Limits) -> int:
    """Bytes that a rank needs to decode, beyond what training holds; pictures, their encoding and features, left out.

    Args:
        rows: N; prompt: tokens of the longest prompt.

    Returns:
        Ψ weights where they are sharded (and this rank's part of them, where it lies elsewhere), Ψ more where adapters
        are merged; keys and values of N rows in whole blocks; and the larger of what the prompts' forward has in work
        and of the logits (N, V) with what choosing from them takes.
    """
    text: Any = model.language_model
    size, layer = model.head.weight.element_size(), text.layers[0]
    weights = sum(elements_to_gather(p) * p.element_size() for p in model.parameters())
    if model.lora is not None:
        weights += sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())
    queries, kv = (getattr(layer.self_attn, name).out_features for name in ("q_proj", "k_proj"))
    cache = rows * -(-(prompt + limits.new_tokens) // tokens_of_block(model)) * bytes_of_block(model)
    # The layer's input, the sum after attention, its norm, keys, values, cos and sin stand beside gate, up and product;
    # before, input and norm stand beside q, k, v and what rotating them takes.
    hidden, inner = text.config.hidden_size, layer.mlp.gate_proj.out_features
    at_mlp = 3 * hidden + 3 * inner + 2 * kv + 2 * layer.self_attn.head_dim
    at_once = min(rows * prompt, max(prompt, limits.prefill_tokens))
    work = at_once * max(at_mlp, 2 * hidden + 6 * queries + 4 * kv) * size
    return weights + cache + max(work, rows * text.config.vocab_size * (size + 4))


def free_bytes(world: World) -> int:
    """Bytes that this rank can still have: of its GPU's memory, or its share of the host's. All ranks call it."""
    hosts = everyone([socket.gethostname()], world)
    if world.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(world.device)
        return free + torch.cuda.memory_reserved(world.device) - torch.cuda.memory_allocated(world.device)
    return memory_to_be_had() // hosts.count(socket.gethostname())


# What to do where there is no room for an evaluation in training.
APART = (
    "evaluation is a job of its own here; leave the flag out (with --overwrite, since this run's folder is made) and "
    "run `mirage-ds evaluate` on a saved model"
)


def check_room(engine: Any, rows: int, prompt: int, limits: Limits, world: World, flag: str, how: str = APART) -> None:
    """Refuse to decode while training where a rank has no room for the whole model. All ranks call it.

    Args:
        rows, prompt, limits: of a batch of answers, as bytes_to_decode takes them.
        flag: what the user asked for; how: what helps.

    Raises:
        UserError: on every rank.
    """
    needed, free = bytes_to_decode(engine.module, rows, prompt, limits), free_bytes(world)
    short = everyone([(free, world.rank)] if needed > free else [], world)
    if short:
        least, rank = min(short)
        raise UserError(
            f"{flag}: to decode, each rank needs the whole model, its keys and values, {needed / 1e9:.2f} GB, and rank "
            f"{rank} has {least / 1e9:.2f} GB free: {how}"
        )
