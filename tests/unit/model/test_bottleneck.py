"""Text behind latents that does not see the images, against plain transformers with a 4-D attention mask.

T tokens of a row, H hidden, k latents a block, p first latent of a block.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import deep_inputs
from test_forward import (  # noqa: F401  # sharp and doubled are fixtures
    Plain,
    Task,
    assert_same_gradients,
    counts_of,
    doubled,
    gradients,
    sharp,
)
from test_generate import World, assert_same, quickly, slowly, world_of
from test_latent_passes import backward
from torch.nn import functional

from mirage_ds.analysis.bench import Bench
from mirage_ds.analysis.controls import teach
from mirage_ds.data.batch import collate
from mirage_ds.data.encode import Encoder
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.record_files import scan
from mirage_ds.data.sample import Sample
from mirage_ds.engine.save import trained_of
from mirage_ds.evaluate.decoder import load_decoder, run_limits
from mirage_ds.evaluate.prompts import prompts_of
from mirage_ds.model import kv_cache
from mirage_ds.model.choose import Turn, greedy, sampler
from mirage_ds.model.generate import generate
from mirage_ds.model.loss import objective
from mirage_ds.model.slots import Limits

K, GAMMA = 3, 0.5


def sees(ids: Sequence[int], encoder: Encoder, closed: int | None = None) -> torch.Tensor:
    """(T, T) bool: which token (row) sees which, token by token; from `closed` on all is behind a block."""
    pad, start, end = (encoder.id_of(token) for token in ("<|latent_pad|>", "<|latent_start|>", "<|latent_end|>"))
    opens, shuts = encoder.id_of("<|vision_start|>"), encoder.id_of("<|vision_end|>")
    picture, blind, inside, open_, done = [], [], False, False, False
    for at, token in enumerate(ids):
        inside |= token == opens
        picture.append(inside)
        inside &= token != shuts
        if open_ and token == end:
            open_, done = False, True
        blind.append((done or at == closed) and not (open_ and token == pad))
        done |= at == closed
        open_ |= token == start
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    for i in range(len(ids)):
        for j in range(len(ids)):
            if picture[j] and blind[i]:
                mask[i, j] = False
    return mask


def masked(mask: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        "attention_mask": torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)[None, None]
    }


class Hidden(Plain):
    """Plain transformers, with the mask."""

    encoder: Encoder

    def states(self, x: torch.Tensor, sample: Sample) -> torch.Tensor:
        mask = sees(sample.input_ids.tolist(), self.encoder)[: len(x), : len(x)]
        found = self.model.model.language_model(
            inputs_embeds=x[None],
            position_ids=sample.position_ids[:, None, : len(x)],
            use_cache=False,
            **deep_inputs(self.model, sample, len(x)),
            **masked(mask, x.dtype),
        )
        return found.last_hidden_state[0]


@pytest.fixture(scope="module")
def pictured(doubled: Path) -> Path:  # noqa: F811
    """Rows with two blocks and with one, the second with two images, the last without a block; one without image."""
    rows = [json.loads(line) for line in doubled.read_text().splitlines()]
    rows[1] |= {"text_input": "From <image> to <image>?", "image_input": ["in1.png", "in3.png"]}
    rows[2] = {key: value for key, value in rows[2].items() if key != "image_input"} | {"text_input": "Where to?"}
    path = doubled.parent / "pictured.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def encoder_of(folder: Path, data: Path, stage: str) -> Encoder:
    return load_encoder([str(folder)], ImageFinder.beside(data, None), stage, K, bottleneck=True)


def slow_losses(plain: Hidden, samples: list[Sample], stage: str, feed: str) -> torch.Tensor:
    found = []
    for sample in samples:
        if stage == "stage2" or feed == "targets":
            hidden, ce, far = plain.row(sample)
        else:
            hidden, _ = plain.recur(sample)
            ce = plain.ce(hidden, sample)
            pairs = zip(plain.targets(sample), sample.runs, strict=True)
            far = torch.cat([1 - functional.cosine_similarity(hidden[p - 1 : p - 1 + k], own) for own, (p, k) in pairs])
        found.append((1.0 if stage == "stage2" else GAMMA) * ce.mean() + (far.mean() if len(far) else 0))
    return torch.stack(found)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("stage", "feed", "rows"),
    [("stage1", "targets", (0, 1, 2)), ("stage1", "own", (0, 1, 2)), ("stage2", "targets", (0, 1, 2, 3))],
)
def test_loss_and_gradients_are_those_of_a_masked_row(
    sharp: Path,  # noqa: F811
    pictured: Path,
    stage: str,
    feed: str,
    rows: tuple[int, ...],
    checkpointing: bool,
) -> None:
    task, encoder, records = Task(sharp, pictured, stage, K), encoder_of(sharp, pictured, stage), scan(pictured)[0]
    samples = [encoder.encode(records[row], row) for row in rows]
    assert [len(sample.hidden) for sample in samples[1:3]] == [2 * 2 + len(samples[1].image_positions), 0]
    plain = Hidden(task)
    plain.encoder = encoder
    each = slow_losses(plain, samples, stage, feed)
    wanted = each.mean()
    wanted.backward()
    loaded = task.load(checkpointing=checkpointing, feed=feed)
    recurrent = stage == "stage2" or feed == "own"
    gamma = 1.0 if stage == "stage2" else GAMMA
    batch = loaded.tower.attach(collate(samples, 2 * K + 1 if recurrent else 1, encoder.dummy(2 * recurrent)))
    for split in (False, True) if recurrent else (False,):
        assert abs(backward(loaded, batch, samples, gamma, split) - wanted) <= 1e-5
        assert_same_gradients(gradients(loaded.model), plain.gradients())
    # The row that has no image is the one without the mask; those with images are not.
    with torch.no_grad():
        free = slow_losses(Plain(task), samples, stage, feed)
    assert ((each - free).abs() > 1e-4).tolist() == [bool(len(one.image_positions) and one.runs) for one in samples]


def test_a_row_beside_deeper_ones_of_another_rank_is_the_row_alone(sharp: Path, pictured: Path) -> None:  # noqa: F811
    task, encoder = Task(sharp, pictured, "stage2", K), encoder_of(sharp, pictured, "stage2")
    sample, found = encoder.encode(scan(pictured)[0][1], 1), []
    for passes in (K + 1, 2 * K + 1):
        loaded = task.load()
        batch = loaded.tower.attach(collate([sample], passes, encoder.dummy(passes // K)))
        assert len(batch.passes) == passes
        loss, _, _ = objective(loaded.model(batch), counts_of([sample]), 1.0, "sample")
        loss.backward()
        found.append((loss.detach(), gradients(loaded.model)))
    assert abs(found[0][0] - found[1][0]) <= 1e-6
    assert_same_gradients(found[1][1], found[0][1])


# ------------------------------------------------------------------------------------------------------------ decoding


@pytest.fixture(scope="module")
def world(nano: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return world_of(nano, mixed, tmp_path_factory.mktemp("models") / "sharp")


def see_of(world: World, closed: int | None = None) -> Callable[[list[int]], dict[str, Any]]:
    return lambda ids: masked(sees(ids, world.encoder, closed), torch.float64)


def lively(world: World, drawn: bool) -> Callable:
    """Open blocks at some steps of each row, one behind the other; leave the first of row 3 without a latent."""
    _, start, end, (stop, _) = world.tokens
    inner = sampler(3.0, 0.95, [70 + row for row in range(6)]) if drawn else greedy

    def choose(logits: torch.Tensor, turns: Sequence[Turn]) -> torch.Tensor:
        chosen = inner(logits, turns).tolist()
        for at, (row, step) in enumerate(turns):
            if step in (row % 3, row % 3 + 7):
                chosen[at] = start
            elif step == row % 3 + 3 - 2 * (row == 3):
                chosen[at] = end
            elif row == 5 and step == 12:
                chosen[at] = stop
        return torch.tensor(chosen)

    return choose


@pytest.mark.parametrize("drawn", [False, True])
def test_decoding_is_the_growing_masked_pass(world: World, monkeypatch: pytest.MonkeyPatch, drawn: bool) -> None:
    """Rows of several lengths side by side, some without an image, with two blocks each."""
    monkeypatch.setattr(kv_cache, "BLOCK", 16)
    limits, choose = Limits(16, longest_run=4, bottleneck=True, prefill_tokens=300), lively(world, drawn)
    found, free = (quickly(world, world.samples, one, choose) for one in (limits, replace(limits, bottleneck=False)))
    for row, (got, sample) in enumerate(zip(found, world.samples, strict=True)):
        one: Callable = lambda logits, step, row=row: int(choose(logits, [Turn(row, step)]))  # noqa: E731
        wanted = slowly(world, sample, limits, one, see=see_of(world))
        assert_same(got, wanted)
        seen = torch.equal(torch.stack(got.hidden), torch.stack(free[row].hidden))
        assert seen == (not len(sample.image_grid_thw))
    # A second block, and text behind it.
    assert all("HE" in row.fed[row.fed.index("H") :].split("H", 1)[1] for row in found)
    assert sum(row.fed.count("EH") == 2 for row in found) >= 4


def test_answers_of_one_prompt_share_what_they_saw(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "BLOCK", 8)
    limits, choose, sample = Limits(14, longest_run=4, bottleneck=True), lively(world, True), world.samples[0]
    assert len(sample.image_grid_thw)
    model, tower = world.loaded.model, world.loaded.tower
    prompts = prompts_of(model, tower, world.encoder, [sample])._replace(answers=6)
    found = generate(model, prompts, world.tokens, replace(limits, rows=4), choose, trace=True)
    for row, got in enumerate(found):
        one: Callable = lambda logits, step, row=row: int(choose(logits, [Turn(row, step)]))  # noqa: E731
        assert_same(got, slowly(world, sample, limits, one, see=see_of(world)))
    assert len({tuple(one.ids) for one in found}) == 6


# -------------------------------------------------------------------------------------------------- folder and controls


def test_a_folder_says_how_its_answers_see(sharp: Path, mixed: Path, tmp_path: Path) -> None:  # noqa: F811
    for name, said in (("masked", {"bottleneck": True}), ("free", {})):
        state = {"stage": "stage1", "latent_size": K, **said}
        assert trained_of(state).get("bottleneck") == said.get("bottleneck")
        (tmp_path / name).mkdir()
        for file in sharp.iterdir():
            (tmp_path / name / file.name).symlink_to(file)
        config = json.loads((sharp / "config.json").read_text()) | {"mirage": {"latent_size": K, **said}}
        (tmp_path / name / "config.json").unlink()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        decoder = load_decoder(tmp_path / name, ImageFinder.beside(mixed, None))
        assert run_limits(decoder, 9, 8, "trained") == Limits(9, 8, K, bottleneck=bool(said))
        assert decoder.latent_encoder("stage2", K).bottleneck == bool(said)


@torch.no_grad()
def test_controls_without_latents_hide_the_images_all_the_same(world: World, pictured: Path) -> None:
    """Of `off` in teaching: behind the place of the first block; in decoding: from the answer's first token."""
    limits = Limits(8, fixed_run=K, bottleneck=True)
    encoder = replace(world.encoder, finder=ImageFinder.beside(pictured, None), stage="stage2", latent_size=K)
    bench = Bench(world.loaded.model, world.loaded.tower, replace(encoder, bottleneck=True), limits)
    records, (pad, start, end, _) = scan(pictured)[0][:2], world.tokens
    rows = teach.rows_of(bench, records, range(2))
    samples = [encoder.encode(record, row) for row, record in enumerate(records)]
    text, likelihoods = world.plain.model.language_model, teach.off(bench, rows)
    for row, sample, got in zip(rows, samples, likelihoods, strict=True):
        kept = torch.tensor([one not in (pad, start, end) for one in sample.input_ids.tolist()])
        begins = int((~kept).nonzero()[0])
        x = world.plain.get_input_embeddings()(sample.input_ids)
        found = world.plain.model.get_image_features(sample.pixel_values, sample.image_grid_thw, return_dict=True)
        x[sample.input_ids == world.plain.config.image_token_id] = torch.cat(list(found.pooler_output))
        mask = sees(sample.input_ids.tolist(), encoder)[kept][:, kept]
        places = sample.position_ids[:, kept].clone()
        places[:, begins:] = places[:, begins - 1 : begins] + 1 + torch.arange(places.shape[1] - begins)
        hidden = text(
            inputs_embeds=x[kept][None], position_ids=places[:, None], use_cache=False, **masked(mask, x.dtype)
        ).last_hidden_state[0]
        logits = world.plain.lm_head(hidden)
        logits[:, [pad, start, end]] = -torch.inf
        ids = sample.input_ids[kept]
        scored = torch.tensor([at for at, place in enumerate(kept.nonzero()[:, 0].tolist()) if place in row.scored])
        wanted = logits.log_softmax(-1)[scored - 1].gather(1, ids[scored, None]).mean()
        assert got == pytest.approx(float(wanted), abs=1e-5)
    prompts = [encoder.encode_prompt(record, row) for row, record in enumerate(records)]
    answers = teach.decode(bench, rows, [None, None], off=1)[1]

    def choose(logits: torch.Tensor, step: int) -> int:
        return int(logits[0].index_fill(0, torch.tensor([pad, start, end]), -torch.inf).argmax())

    for got, prompt in zip(answers, prompts, strict=True):
        ways = (see_of(world, len(prompt.input_ids)), see_of(world))
        wanted, free = (slowly(world, prompt, limits, choose, see=one) for one in ways)
        assert got.ids == wanted.ids
        assert (wanted.hidden[-1] - free.hidden[-1]).abs().max() > 1e-4
