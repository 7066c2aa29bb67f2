"""Adapters on packed rows against PEFT on plain transformers, one row at a time; what is refused, counted and written.

R latent tokens, r rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import OTHERS, write
from test_forward import (
    HELPED,
    ROWS,
    Plain,
    Task,
    assert_same_gradients,
    counts_of,
    encoder_of,
    gradients,
    sharpen,
    step,
)

from mirage_ds.data.encode import LATENT_TOKENS
from mirage_ds.model.load import Loaded, expected_shapes, read_config
from mirage_ds.model.lora import Lora, find_targets

STAGES = (("sft", ROWS), ("stage1", HELPED), ("stage2", ROWS))
RANK, ALPHA = 3, 12


def lora_of(task: Task, **changes: Any) -> Lora:
    encoder = encoder_of(task.folder, task.data, task.stage, task.k)
    targets = find_targets(expected_shapes(read_config(task.folder)), None)
    tokens = tuple(encoder.id_of(token) for token in LATENT_TOKENS)
    return Lora(RANK, ALPHA, targets, tokens)._replace(**changes)


def scramble(loaded: Loaded) -> None:
    """Move what is trained away from its start: B is not 0, and the rows are not those of the base."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if parameter.requires_grad:
                spread = 0.03 if "lora" in name else 0.1
                parameter.add_(spread * torch.randn(parameter.shape, generator=draw))


class PlainAdapted(Plain):
    """The plain model with PEFT's own adapters and rows (trainable_token_indices) around it."""

    def __init__(self, task: Task, lora: Lora):
        from peft import LoraConfig, get_peft_model

        super().__init__(task)
        tied = self.model.config.tie_word_embeddings
        rows = {module: list(lora.tokens) for module in ["embed_tokens"] + ["lm_head"] * (not tied)}
        config = LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.pattern, trainable_token_indices=rows
        )
        # In place: self.model is adapted.
        get_peft_model(self.model, config)

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """By MirageModel's names."""
        renamed = {
            "language_model.embed_tokens.token_adapter.trainable_tokens_delta.default": "rows.weight",
            "lm_head.token_adapter.trainable_tokens_delta.default": "head.rows",
        }
        named = [(n.removeprefix("model."), p) for n, p in self.model.named_parameters() if p.requires_grad]
        return {renamed.get(name, name): parameter for name, parameter in named}


def compare(task: Task, rows: tuple[int, ...], **options: Any) -> None:
    """Loss and gradients of all that is trained, packed against row by row."""
    samples, lora = task.samples(rows), lora_of(task)
    loaded, plain = task.load(lora=lora, **options), PlainAdapted(task, lora)
    scramble(loaded)
    mine = {name: p for name, p in loaded.model.named_parameters() if p.requires_grad}
    assert mine.keys() == plain.trained().keys()
    with torch.no_grad():
        for name, parameter in plain.trained().items():
            parameter.copy_(mine[name])
    wanted, _ = plain.loss(samples, "sample")
    wanted.backward()
    loss = step(task, loaded, task.pack(samples), counts_of(samples))
    assert abs(loss - wanted) <= 1e-5
    got, asked = gradients(loaded.model), {name: p.grad for name, p in plain.trained().items()}
    # No frozen weight has one.
    assert got.keys() == mine.keys()
    # Text alone has no latent token in it: a head of its own learns not to say them, an embedding learns nothing.
    idle = {name for name in got if not got[name].any()}
    assert idle == ({"rows.weight"} if task.stage == "sft" and "head.rows" in mine else set())
    for name in idle:
        assert not asked.pop(name).any()
        del got[name]
    assert_same_gradients(got, asked)


@pytest.fixture(scope="session")
def bases(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small models of each family, sharpened; one whose head is a matrix of its own."""
    folder = tmp_path_factory.mktemp("bases")
    made = {name: write(name, folder / name) for name in ("nano", *OTHERS, "nano-untied")}
    for one in made.values():
        sharpen(one)
    return made


@pytest.mark.parametrize(("stage", "rows"), STAGES)
@pytest.mark.parametrize("name", ["nano", "nano-untied", *OTHERS])
def test_loss_and_gradients_are_those_of_peft_on_the_plain_model(
    bases: dict[str, Path], mixed: Path, name: str, stage: str, rows: tuple[int, ...]
) -> None:
    compare(Task(bases[name], mixed, stage, 2), rows)
