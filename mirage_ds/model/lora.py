"""LoRA: adapters on the decoder's linear layers, by PEFT, and the rows of the latent tokens, which are trained whole.

T tokens of the packed batch, V vocabulary rows, H hidden, R latent tokens, r rank.

A public checkpoint has no learnt rows for the latent tokens, neither in the embedding nor in the head, and an adapter
of a linear layer cannot make any: R rows of each are parameters here. PEFT's own layer for that
(trainable_token_indices) copies all V rows in every forward, and under ZeRO-3 it takes a weight that is not gathered;
what is saved has its format (engine/adapter.py).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from mirage_ds.errors import UserError, closest
from mirage_ds.model.gathered import gathered
from mirage_ds.model.layers import DecoderLayers


class Lora(NamedTuple):
    """What is trained in place of all weights.

    Attributes:
        rank: r; alpha: adapters count alpha / r times.
        targets: the last part of a linear layer's name, such as "q_proj", in the decoder.
        tokens: ids of the tokens whose rows are trained.
        seed: chooses A's first values; B is 0.
    """

    rank: int
    alpha: int
    targets: tuple[str, ...]
    tokens: tuple[int, ...]
    seed: int = 0

    @property
    def scale(self) -> float:
        """What B · A is multiplied by."""
        return self.alpha / self.rank

    @property
    def pattern(self) -> str:
        """The adapted layers in a whole model of transformers; the tower's may have the same last part."""
        return rf".*language_model\.layers\.\d+\.\w+\.({'|'.join(self.targets)})"


def find_targets(shapes: Mapping[str, Sequence[int]], wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Return the linear layers to adapt, in the model's order, each by the last part of its name.

    Args:
        shapes: of a model's parameters (load.expected_shapes).
        wanted: --lora_targets; all where it is None.

    Raises:
        UserError: names one that the decoder does not have, and those it has.
    """
    found = [re.fullmatch(r"model\.layers\.0\.\w+\.(\w+)\.weight", name) for name in shapes]
    known = [one[1] for one in found if one and len(shapes[one[0]]) == 2]
    for name in wanted or ():
        if name not in known:
            raise UserError(
                f"--lora_targets {name}: the decoder has no such linear layer{closest(name, known)}; it has "
                f"{', '.join(known)}"
            )
    return tuple(name for name in known if wanted is None or name in wanted)


def trained_shapes(shapes: Mapping[str, Sequence[int]], lora: Lora) -> list[tuple[int, int]]:
    """Shapes of what is trained of a model: A and B of each adapter, then the rows of embedding and head."""
    made: list[tuple[int, int]] = []
    for name, shape in shapes.items():
        if re.fullmatch(rf"model\.layers\.\d+\.\w+\.({'|'.join(lora.targets)})\.weight", name):
            made += [(lora.rank, shape[1]), (shape[0], lora.rank)]
    rows = [name for name in ("lm_head.weight", "model.embed_tokens.weight") if name in shapes]
    return [*made, *((len(lora.tokens), shapes[name][1]) for name in rows)]


def add_adapters(language_model: Any, lora: Lora) -> None:
    """Put an adapter around each target of a text model, in place, and freeze everything else.

    A is drawn as PEFT draws it, from the seed alone: the same on every rank.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lora.seed)
        inject_adapter_in_model(config, language_model)


@contextmanager
def adapters_off(layers: DecoderLayers) -> Iterator[None]:
    """Let layers compute without their adapters: what they are made of then is the start's weights.

    Adapters are new in every run (load.load_model), and a folder holds them merged: their effect at the start is none.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    calls: Any = layers.calls
    bodies = [body for call in calls for body in call.bodies.values()]
    adapted = [one for body in bodies for one in body.modules() if isinstance(one, BaseTunerLayer)]
    for one in adapted:
        one.enable_adapters(False)
    yield
    # Not after an error, which ends the run.
    for one in adapted:
        one.enable_adapters(True)


class TokenRows(nn.Module):
    """Rows that are trained in place of a frozen matrix's own.

    Args:
        matrix: (V, H), whose rows they begin as; all ranks give it where it is sharded.
        tokens: which rows.
        device: of the ids; DeepSpeed moves no buffer of a model that is loaded in shards.

    Attributes:
        weight: (R, H) in the dtype of the matrix; ids: (R,).
    """

    ids: torch.Tensor

    def __init__(self, matrix: nn.Parameter, tokens: Sequence[int], device: torch.device):
        super().__init__()
        self.register_buffer("ids", torch.tensor(tokens, device=device), persistent=False)
        with gathered([matrix]):
            self.weight = nn.Parameter(matrix.detach()[list(tokens)].clone())

    def forward(self, embeddings: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Put the rows where their tokens stand.

        Args:
            embeddings: (T, H) of all tokens; input_ids: (T,).
        """
        here = input_ids[:, None] == self.ids
        # Chosen, not multiplied: an exact copy under torch_autocast too.
        own = functional.embedding(here.int().argmax(dim=1), self.weight)
        return torch.where(here.any(dim=1, keepdim=True), own, embeddings)
