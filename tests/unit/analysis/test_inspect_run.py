"""Latents and attention against plain transformers: one row at a time, no cache, the row anew for every latent.

T tokens of a row, k latents a run, Q queries, H hidden, L layers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mirage_ds.analysis.bench import Bench
from mirage_ds.analysis.inspect.look import PARTS, Look, Thought, attention, decoded, figures, see, taught
from mirage_ds.analysis.inspect.measure import targets
from mirage_ds.data.encode import Encoder
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.record import Record, RecordError
from mirage_ds.data.record_files import scan
from mirage_ds.data.sample import Sample
from mirage_ds.model.choose import NotFinite
from mirage_ds.model.load import Loaded, load_model
from mirage_ds.model.slots import Limits

K = 3
# As tests/unit/model/test_generate.py: transformers' norms and its eager softmax are float32 inside.
CLOSE = 1e-5


class World(NamedTuple):
    """The same folder twice, float64, and records with no, one and two latent runs."""

    folder: Path
    plain: Qwen2_5_VLForConditionalGeneration
    loaded: Loaded
    encoder: Encoder
    records: list[Record]
    file: Path

    def bench(self, **changes: Any) -> Bench:
        """The loaded model with this encoder, or another one or limits."""
        assert self.loaded.tower is not None
        return Bench(self.loaded.model, self.loaded.tower, **{"encoder": self.encoder, **changes})


@pytest.fixture(scope="module")
def world(nano: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Nano with attention that chooses and an output matrix of its own, which opens a latent run wherever it can."""
    folder = tmp_path_factory.mktemp("models") / "eager"
    shutil.copytree(nano, folder)
    torch.manual_seed(3)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        sharp = 0.1 if "q_proj" in name or "k_proj" in name or name.endswith("bias") else 0.02
        weight.normal_(0, 0.06 if "embed_tokens" in name else sharp)
        if weight.ndim == 1 and not name.endswith("bias"):
            weight.mul_(10).add_(1)
    config = Qwen2_5_VLConfig.from_pretrained(folder)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    config.save_pretrained(folder)
    weights["lm_head.weight"] = torch.randn_like(weights["model.embed_tokens.weight"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    loaded = load_model(folder, stage="stage1", dtype=torch.float64, device=torch.device("cpu"), checkpointing=True)
    rows = [
        {"text_output": "First <output_image>then left <output_image>up.", "image_output": ["out1.png", "out2.png"]},
        {"text_output": "Then <output_image>right and right.", "image_output": "out3.png"},
        {"text_output": "<output_image>Down and out."},
        {"text_output": "Up."},
    ]
    for number, row in enumerate(rows):
        row |= {"text_input": f"Where <image>{' to' * number}?", "image_input": f"in{number}.png"}
    rows[2]["text_input"], rows[2]["image_input"] = "From <image> to <image>?", ["in1.png", "in3.png"]
    file = mixed.parent / "inspected.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = load_encoder([str(folder)], ImageFinder.beside(file, None), "stage2", K)
    return World(folder, plain, loaded, encoder, scan(file)[0], file)


def start_inputs(world: World, sample: Sample) -> torch.Tensor:
    """Embeddings of a row with its images in place, by plain transformers."""
    x = world.plain.get_input_embeddings()(sample.input_ids).detach().clone()
    if len(sample.image_grid_thw):
        found = world.plain.model.get_image_features(sample.pixel_values, sample.image_grid_thw, return_dict=True)
        x[sample.input_ids == world.plain.config.image_token_id] = torch.cat(list(found.pooler_output)).detach()
    return x


@torch.no_grad()
def states(world: World, inputs: torch.Tensor, position_ids: torch.Tensor, **options: bool):
    return world.plain.model.language_model(
        inputs_embeds=inputs[None], position_ids=position_ids[:, None], use_cache=False, **options
    )


def slowly(world: World, sample: Sample) -> torch.Tensor:
    """Feed one latent after the other; the row's inputs (T, H)."""
    x = start_inputs(world, sample)
    for start, k in sample.runs:
        for place in range(start, start + k):
            x[place] = states(world, x[:place], sample.position_ids[:, :place]).last_hidden_state[0, -1]
    return x


def run(world: World, rows: Sequence[int] = (0, 1, 2)) -> tuple[list[Sample], list[Thought]]:
    samples = [world.encoder.encode(world.records[row], row) for row in rows]
    return samples, taught(world.bench(), samples)


def test_latents_are_fed_back_as_in_stage_2_also_by_a_model_of_stage_1(world: World) -> None:
    samples, thoughts = run(world)
    for sample, thought in zip(samples, thoughts, strict=True):
        slow = slowly(world, sample)
        torch.testing.assert_close(thought.inputs, slow, rtol=0, atol=CLOSE)
        assert thought.runs == sample.runs
        for (start, k), latents in zip(sample.runs, thought.latents, strict=True):
            assert k == len(latents) == K
            torch.testing.assert_close(latents, slow[start : start + k], rtol=0, atol=CLOSE)


def test_attention_is_that_of_eager_transformers(world: World) -> None:
    _, thoughts = run(world)
    for thought in thoughts:
        queries = torch.tensor([5, len(thought.ids) - 1, thought.runs[0][0] + 1])
        found = attention(world.loaded.model, thought, queries)
        slow = states(world, thought.inputs, thought.position_ids, output_attentions=True).attentions
        expected = torch.stack([layer[0].mean(0)[queries] for layer in slow])
        # The recording is float32.
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:2]))
        assert not found[:, 0, 6:].any()


def test_attention_to_hidden_images_is_none(world: World) -> None:
    """By eager transformers with a 4-D mask; text between two blocks is as blind as that behind both."""
    encoder = replace(world.encoder, bottleneck=True)
    sample = encoder.encode(world.records[0], 0)
    (thought,) = taught(replace(world.bench(), encoder=encoder), [sample])
    length, (start, k) = len(sample.input_ids), sample.runs[0]
    hidden, queries = torch.zeros(length, dtype=torch.bool), thought.answer(0)
    hidden[sample.hidden] = True
    assert [encoder.tokenizer.decode(sample.input_ids[at]) for at in sample.hidden[[0, 1, -1]]] == [
        "<|vision_start|>", "<|image_pad|>", "<|vision_end|>",
    ]  # fmt: skip
    places = torch.arange(length)
    blind = (places >= start + k) & ~torch.isin(places, thought.places)
    mask = torch.ones(length, length, dtype=torch.bool).tril() & ~(blind[:, None] & hidden)
    bias = torch.zeros(1, 1, length, length, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    slow = states(world, thought.inputs, thought.position_ids, output_attentions=True, attention_mask=bias).attentions
    found = attention(world.loaded.model, thought, queries)
    torch.testing.assert_close(
        found.double(), torch.stack([layer[0].mean(0)[queries] for layer in slow]), rtol=0, atol=2e-6
    )
    assert not found[..., hidden].any()
    free = states(world, thought.inputs, thought.position_ids, output_attentions=True).attentions[-1][0].mean(0)
    assert (found[-1].double() - free[queries]).abs().max() > 1e-3


def opening(world: World, sample: Sample) -> World:
    """Make the head open a run behind the prompt: its row for the start token lies along the prompt's last state."""
    last = states(world, start_inputs(world, sample), sample.position_ids).last_hidden_state[0, -1]
    with torch.no_grad():
        world.loaded.model.head.weight[world.encoder.id_of("<|latent_start|>")] = last
    return world


def test_decoded_latents_are_what_the_model_fed_back(world: World) -> None:
    prompt = world.encoder.encode_prompt(world.records[2], 2)
    opening(world, prompt)
    limits = Limits(new_tokens=12, fixed_run=2)
    found = decoded(world.bench(limits=limits), prompt)
    prefix = len(prompt.input_ids)
    assert found.runs[0] == (prefix + 1, 2)
    assert len(found.ids) == len(found.inputs) == found.position_ids.shape[1] == prefix + 11
    slow = start_inputs(world, prompt._replace(input_ids=found.ids))
    for place in found.places.tolist():
        slow[place] = states(world, slow[:place], found.position_ids[:, :place]).last_hidden_state[0, -1]
    torch.testing.assert_close(found.inputs, slow, rtol=0, atol=CLOSE)
    assert found.position_ids[:, prefix:].tolist() == 3 * [
        list(range(int(prompt.position_ids.max()) + 1, int(prompt.position_ids.max()) + 12))
    ]
    assert [len(latents) for latents in found.latents] == [k for _, k in found.runs]


def test_a_model_that_opens_no_run_has_no_latents(world: World) -> None:
    prompt = world.encoder.encode_prompt(world.records[1], 1)
    with torch.no_grad():
        world.loaded.model.head.weight[world.encoder.id_of("<|latent_start|>")] = 0
    found = decoded(world.bench(limits=Limits(new_tokens=4)), prompt)
    assert (found.runs, found.latents) == ((), ())


def test_a_look_has_the_numbers_of_its_own_run(world: World) -> None:
    samples, thoughts = run(world, (0,))
    encoder, thought = world.encoder, thoughts[0]
    inputs, helpers = see(world.bench(), world.records[0], thought)
    found = Look(world.bench(), thought, 1, inputs, helpers[1], "second")
    start, k = samples[0].runs[1]
    latents = thought.inputs[start : start + k]
    torch.testing.assert_close(found.norms.double(), latents.pow(2).sum(-1).sqrt(), rtol=1e-5, atol=0)
    features = torch.cat(
        list(
            world.plain.model.get_image_features(
                *encoder.pixels(world.records[0], "image_output", ["out2.png"]), return_dict=True
            ).pooler_output
        )
    ).detach()
    name, picture, cosines = found.similarity[1]
    assert name == "helper image"
    # out2.png is 84 × 112, and a feature is of 28 × 28 pixels: row by row from the top left.
    assert picture.shape == (112, 84, 3)
    assert cosines.shape == (k, 4, 3)
    for row, column in ((0, 0), (1, 2), (3, 1)):
        slow = torch.cosine_similarity(latents, features[3 * row + column][None])
        torch.testing.assert_close(cosines[:, row, column].double(), slow, rtol=0, atol=1e-6)
    means = targets(features.view(4, 3, -1), k).double()
    slow = torch.stack([torch.cosine_similarity(latents[i][None], means) for i in range(k)])
    torch.testing.assert_close(found.to_targets.double(), slow, rtol=0, atol=1e-6)

    answer = list(range(start + k + 1, len(thought.ids)))
    assert "".join(found.answer) == "up.<|im_end|>\\n"
    rows = torch.stack(
        [
            one[0].mean(0)
            for one in states(world, thought.inputs, thought.position_ids, output_attentions=True).attentions
        ]
    )[:, answer]
    torch.testing.assert_close(found.attention.double(), rows[..., start : start + k], rtol=0, atol=2e-6)
    torch.testing.assert_close(found.shares.sum(-1), torch.ones(len(rows)))
    share = dict(zip(PARTS, found.shares.double().unbind(-1), strict=True))
    image = rows[..., samples[0].image_positions].sum(-1).mean(1)
    torch.testing.assert_close(share["images"], image, rtol=0, atol=2e-6)
    torch.testing.assert_close(share["latents"], rows[..., start : start + k].sum(-1).mean(1), rtol=0, atol=2e-6)
    before = rows[..., :start].sum(-1).mean(1) - image
    torch.testing.assert_close(share["text before"], before, rtol=0, atol=2e-6)
    assert found.uniform == pytest.approx(sum(k / (place + 1) for place in answer) / len(answer))


def test_figures_for_a_run_that_trains(world: World) -> None:
    encoder = replace(world.encoder, stage="stage1")
    made = figures(world.bench(encoder=encoder), [world.records[1]])
    assert list(made) == [f"line 2/{kind}" for kind in ("similarity", "words", "norms", "attention")]
    for name, figure in made.items():
        assert figure.get_suptitle().replace("\n", " ").startswith(name.partition("/")[0])


def test_rows_without_latents_and_broken_rows_are_told(world: World) -> None:
    assert figures(world.bench(), [world.records[3]]) == {}
    with pytest.raises(RecordError, match="line 2, image_output"):
        figures(world.bench(), [replace(world.records[1], image_output=("gone.png",))])


def test_a_row_whose_logits_are_not_finite_is_named(world: World) -> None:
    model = world.loaded.model
    samples = [world.encoder.encode(record, row) for row, record in enumerate(world.records[:2])]
    weight = model.language_model.layers[1].mlp.up_proj.weight
    kept = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    try:
        for make in (lambda: taught(world.bench(), samples[1:]), lambda: figures(world.bench(), world.records[1:2])):
            with pytest.raises(NotFinite, match=r"^the logits of record 2 are not finite"):
                make()
    finally:
        with torch.no_grad():
            weight[0, 0] = kept
