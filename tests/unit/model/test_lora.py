"""Adapters on packed rows against PEFT on plain transformers, one row at a time; what is refused, counted and written.

R latent tokens, r rank.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from support.families import OTHERS, write
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
from transformers import AutoModelForImageTextToText

from mirage_ds.config.run import RunConfig
from mirage_ds.data.encode import LATENT_TOKENS
from mirage_ds.engine.save import Parts, save_model
from mirage_ds.engine.spelling import read_base
from mirage_ds.engine.whole import whole_model
from mirage_ds.errors import UserError
from mirage_ds.model.load import Loaded, expected_shapes, read_config
from mirage_ds.model.lora import Lora, find_targets, trained_shapes
from mirage_ds.model.presets import preset

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


def test_recomputed_layers_give_the_same_gradients(bases: dict[str, Path], mixed: Path) -> None:
    compare(Task(bases["nano"], mixed, "stage2", 3), ROWS, checkpointing=True)


@pytest.mark.parametrize(("stage", "rows"), STAGES)
def test_it_starts_from_the_base_models_loss(bases: dict[str, Path], mixed: Path, stage: str, rows: tuple) -> None:
    task = Task(bases["nano-untied"], mixed, stage, 2)
    samples = task.samples(rows)
    batch, counts = task.pack(samples), counts_of(samples)
    base, adapted = task.load(), task.load(lora=lora_of(task))
    torch.testing.assert_close(step(task, adapted, batch, counts), step(task, base, batch, counts), rtol=0, atol=1e-6)
    # B is 0, so that only it learns at first; A is drawn.
    norms = {name: float(p.grad.norm()) for name, p in adapted.model.named_parameters() if "lora_" in name}
    assert all((norm > 0) == ("lora_B" in name) for name, norm in norms.items())


def test_the_seed_alone_draws_the_adapters(bases: dict[str, Path], mixed: Path) -> None:
    task = Task(bases["nano"], mixed, "sft", 2)

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(torch.seed())
        return torch.cat([p.detach().flatten() for p in task.load(lora=lora_of(task, seed=seed)).model.parameters()])

    before = torch.random.get_rng_state()
    task.load(lora=lora_of(task))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize("name", ["nano", "nano-untied", *OTHERS])
def test_the_saved_folder_is_what_was_trained_for_transformers_and_for_peft(
    bases: dict[str, Path], mixed: Path, tmp_path: Path, name: str
) -> None:
    from peft import PeftModel

    task = Task(bases[name], mixed, "sft", 2)
    lora = lora_of(task, targets=("q_proj", "up_proj"))
    loaded, encoder = task.load(lora=lora), encoder_of(*task)
    scramble(loaded)
    out = tmp_path / "out"
    save_model(
        loaded.model,
        loaded.tower.tower,
        out,
        0,
        Parts(read_base(task.folder, encoder.tokenizer), encoder.tokenizer, encoder.images, task.folder, {}),
    )
    (sample,) = task.samples([3])
    with torch.no_grad():
        _, traced = loaded.model.trace(task.attach(loaded, task.pack([sample])))
    # A head that has rows of its own.
    matrix = load_file(out / "model.safetensors").get("lm_head.weight")
    inputs = dict(input_ids=sample.input_ids[None], attention_mask=torch.ones_like(sample.input_ids)[None])
    merged = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    base = AutoModelForImageTextToText.from_pretrained(task.folder, dtype=torch.float32).eval()
    assert (matrix is None) == base.config.tie_word_embeddings
    with torch.no_grad():
        found = merged(**inputs, output_hidden_states=True)
        torch.testing.assert_close(
            found.hidden_states[-1][0], traced.hidden[: len(sample.input_ids)], rtol=0, atol=1e-5
        )
        before = base(**inputs).logits
        adapted = PeftModel.from_pretrained(base, out / "adapter")
        torch.testing.assert_close(adapted(**inputs).logits, found.logits, rtol=0, atol=1e-5)
    assert (found.logits - before).abs().max() > 1e-2
    # The tower has layers of the same names.
    assert not [n for n, m in adapted.named_modules() if "visual" in n and hasattr(m, "lora_A")]


@pytest.mark.parametrize("name", ["nano", "nano-untied"])
def test_the_plain_model_that_decodes_in_training_has_them_merged(
    bases: dict[str, Path], mixed: Path, name: str
) -> None:
    task = Task(bases[name], mixed, "stage2", 2)
    loaded, samples = task.load(lora=lora_of(task)), task.samples(ROWS)
    scramble(loaded)
    batch = task.attach(loaded, task.pack(samples))
    engine = SimpleNamespace(module=loaded.model, empty_partition_cache=lambda: None)
    with torch.no_grad(), whole_model(engine) as plain:
        sums, traced = plain.trace(batch)
        wanted, told = loaded.model.trace(batch)
        torch.testing.assert_close(traced.hidden, told.hidden, rtol=0, atol=1e-5)
        torch.testing.assert_close(sums.ce, wanted.ce, rtol=1e-5, atol=0)
        assert not [one for one, _ in plain.named_parameters() if "lora" in one or "rows" in one]


@pytest.mark.parametrize("name", ["nano", "nano-untied", *OTHERS])
def test_what_is_trained_is_counted_without_the_model(bases: dict[str, Path], mixed: Path, name: str) -> None:
    task = Task(bases[name], mixed, "sft", 2)
    lora = lora_of(task)
    real = [tuple(p.shape) for p in task.load(lora=lora).model.parameters() if p.requires_grad]
    assert sorted(trained_shapes(expected_shapes(read_config(task.folder)), lora)) == sorted(real)


def test_docs_count_the_7b() -> None:
    from transformers import Qwen2_5_VLConfig

    shapes = expected_shapes(Qwen2_5_VLConfig(**preset("qwen2.5-vl-7b")))
    lora = Lora(16, 32, find_targets(shapes, None), (1, 2, 3))
    adapters = sum(math.prod(shape) for shape in trained_shapes(shapes, lora))
    frozen = sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("visual."))
    assert (adapters, frozen) == (40_391_680, 7_615_616_512)
    text = (Path(__file__).parents[3] / "docs/lora.md").read_text()
    assert f"{adapters:,}" in text
    assert f"{frozen:,}" in text


def test_a_layer_that_the_decoder_lacks_is_refused(bases: dict[str, Path]) -> None:
    shapes = expected_shapes(read_config(bases["nano-qwen3-vl"]))
    # In the model's order; norms of queries and keys are no linear layers.
    assert find_targets(shapes, ["up_proj", "q_proj"]) == ("q_proj", "up_proj")
    with pytest.raises(UserError) as caught:
        find_targets(shapes, ["q_proj", "qkv"])
    assert str(caught.value) == (
        "--lora_targets qkv: the decoder has no such linear layer; it has q_proj, k_proj, "
        "v_proj, o_proj, gate_proj, up_proj, down_proj"
    )


def config_of(**settings: Any) -> RunConfig:
    needed = dict(model="m", stage="stage2", data_path="d.jsonl", save_model_path="out")
    return RunConfig(**needed | settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lora_alpha": 8}, "--lora_alpha needs adapters: add --lora_rank, or leave it out"),
        ({"lora_targets": ["q_proj"]}, "--lora_targets needs adapters: add --lora_rank, or leave it out"),
        ({"lora_rank": 4, "lora_dropout": 0.1}, "would draw another mask than its forward"),
        ({"lora_rank": 4, "train_vision": True}, "--train_vision trains the tower, which no adapter holds"),
        ({"lora_rank": 0}, "greater than 0"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        config_of(**settings)


def test_runs_without_adapters_keep_their_keys(mixed: Path, tmp_path: Path) -> None:
    from mirage_ds.study.nodes import _train_node

    def material(**settings: Any) -> dict[str, Any]:
        config = config_of(data_path=mixed, **settings)
        return _train_node(config, "one", None, None, tmp_path).material["settings"]

    assert not [name for name in material() if name.startswith("lora_")]
    assert material(lora_rank=4)["lora_rank"] == 4
