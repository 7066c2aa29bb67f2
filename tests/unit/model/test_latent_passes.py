"""Latents that are made together (--latent_passes T) against plain transformers, one row at a time, without a cache.

T passes, k latents a run, p first latent of a run, H hidden.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_forward import (  # noqa: F401  # sharp and doubled are fixtures
    CPU,
    Plain,
    Task,
    assert_same_gradients,
    counts_of,
    doubled,
    encoder_of,
    gradients,
    sharp,
)
from test_generate import Generated, World, by_plan, quickly, world_of
from test_latent_generate import TRAINED, saved
from torch import nn
from transformers import AutoModelForImageTextToText

from mirage_ds.analysis.bench import Bench
from mirage_ds.config.run import RunConfig
from mirage_ds.data.batch import Batch, collate
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record_files import scan
from mirage_ds.data.sample import Sample
from mirage_ds.engine.save import change_rows
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import answer_records, load_decoder, run_limits, save_decoder
from mirage_ds.model.choose import Turn
from mirage_ds.model.latents import INPUTS, LatentInputs, load_inputs
from mirage_ds.model.load import Loaded
from mirage_ds.model.loss import objective
from mirage_ds.model.slots import Limits, Slot
from mirage_ds.run.settings import check_together

K = 3
# Two runs, one, two neighbours, none.
ROWS = (0, 1, 2, 3)


def inputs_of(width: int, k: int, passes: int, dtype: torch.dtype = torch.float32) -> LatentInputs:
    """Inputs that differ from slot to slot, as training makes them."""
    drawn = torch.randn(k, width, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return LatentInputs((0.3 * drawn).to(dtype), passes)


def load(task: Task, passes: int, **options: Any) -> Loaded:
    loaded = task.load(**options)
    loaded.model.latent_inputs = inputs_of(loaded.model.head.weight.shape[1], task.k, passes)
    return loaded


def pack(task: Task, samples: Sequence[Sample], passes: int, runs: int = 2) -> Batch:
    count = runs * min(passes, task.k) + 1
    dummy = encoder_of(task.folder, task.data, task.stage, task.k).dummy(runs if count > 1 else 0)
    return collate(samples, count, dummy, latent_passes=passes)


def together(
    states: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    p: int,
    own: torch.Tensor,
    passes: int,
    fed: Callable[[torch.Tensor], torch.Tensor] = lambda state: state,
) -> torch.Tensor:
    """What the slots of the run at p of a row x (length, H) are fed at last, (k, H): T whole passes from nothing."""
    slots = own
    for _ in range(passes):
        slots = fed(states(torch.cat([x[:p], slots]))[p - 1 : p - 1 + len(own)])
    return slots


def slow_row(plain: Plain, sample: Sample, own: torch.Tensor, passes: int, **how: Any) -> torch.Tensor:
    """The final-norm hidden states of a row."""
    x = plain.embed(sample)
    for p, k in sample.runs:
        slots = together(lambda x: plain.states(x, sample), x, p, own, passes, **how)
        x = torch.cat([x[:p], slots, x[p + k :]])
    return plain.states(x, sample)


def backward(loaded: Loaded, batch: Batch, samples: Sequence[Sample], gamma: float, split: bool) -> torch.Tensor:
    loaded.model.how.split = split
    loaded.model.zero_grad()
    sums = loaded.model(batch)
    loss, _, _ = objective(sums, counts_of(samples), gamma, "sample")
    loss.backward()
    if sums.earlier is not None:
        sums.earlier.backward()
    loaded.model.layers.round.check()
    return loss.detach()


def assert_trained(got: dict, wanted: dict, own: torch.Tensor, idle: bool) -> None:
    """Compare gradients; those of learned inputs are zero where no latent depends on them any more."""
    got, slope = dict(got), wanted.get(INPUTS, own.grad)
    mine = got.pop(INPUTS)
    if idle:
        assert mine.norm() == 0
        assert slope is None or slope.norm() == 0
    else:
        assert slope.norm() > 0
        got, wanted = got | {INPUTS: mine}, wanted | {INPUTS: slope}
    assert_same_gradients(got, wanted)


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("passes", [0, 1, 2, K, K + 2])
def test_stage2_equals_whole_passes_from_nothing(sharp: Path, doubled: Path, passes: int) -> None:  # noqa: F811
    task = Task(sharp, doubled, "stage2", K)
    samples, plain = task.samples(ROWS), Plain(task)
    own = inputs_of(plain.model.config.text_config.hidden_size, K, passes).weight
    states = [slow_row(plain, sample, own, passes) for sample in samples]
    wanted = sum(plain.ce(one, sample).mean() for one, sample in zip(states, samples, strict=True)) / len(samples)
    wanted.backward()
    loaded = load(task, passes, checkpointing=passes == 2)
    batch = task.attach(loaded, pack(task, samples, passes))
    assert len(batch.passes) == 2 * min(passes, K) + 1
    with torch.no_grad():
        _, traced = loaded.model.trace(batch)
    torch.testing.assert_close(traced.hidden, torch.cat(states).detach(), rtol=0, atol=1e-5)
    for split in (False, True):
        assert abs(backward(loaded, batch, samples, 1.0, split) - wanted) <= 1e-5
        assert_trained(gradients(loaded.model), plain.gradients(), own, passes >= K)


def test_as_many_passes_as_latents_are_the_recurrence(sharp: Path, doubled: Path) -> None:  # noqa: F811
    """The fixed point of Jacobi: the sequential schedule, its loss and its gradients."""
    task = Task(sharp, doubled, "stage2", K)
    samples, loaded = task.samples(ROWS), task.load()
    batch = task.attach(loaded, task.pack(samples, 2))
    wanted = backward(loaded, batch, samples, 1.0, False)
    sequential = gradients(loaded.model)
    for passes in (K, K + 3):
        other = load(task, passes)
        got = backward(other, task.attach(other, pack(task, samples, passes)), samples, 1.0, True)
        assert abs(got - wanted) <= 1e-6
        assert_trained(gradients(other.model), sequential, other.model.latent_inputs.weight, idle=True)
    # One pass less is not.
    other = load(task, K - 1)
    assert abs(backward(other, task.attach(other, pack(task, samples, K - 1)), samples, 1.0, True) - wanted) > 1e-4


@pytest.mark.parametrize("passes", [0, 1, 2, K])
@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_states_of_the_last_pass_are_pulled_to_the_targets(
    sharp: Path,  # noqa: F811
    doubled: Path,  # noqa: F811
    distance: str,
    passes: int,
) -> None:
    task, gamma = Task(sharp, doubled, "stage1", K), 0.5
    samples, plain = task.samples((0, 1, 2)), Plain(task)
    own = inputs_of(plain.model.config.text_config.hidden_size, K, passes).weight
    rows = []
    for sample in samples:
        hidden, far = slow_row(plain, sample, own, passes), []
        for target, (p, k) in zip(plain.targets(sample), sample.runs, strict=True):
            for z, g in zip(hidden[p - 1 : p - 1 + k], target, strict=True):
                far.append((z - g).square().mean() if distance == "l2" else 1 - z @ g / (z.norm() * g.norm()))
        rows.append(gamma * plain.ce(hidden, sample).mean() + torch.stack(far).mean())
    wanted = sum(rows) / len(rows)
    wanted.backward()
    loaded = load(task, passes, latent_loss=distance, feed="own", checkpointing=passes == 1)
    batch = task.attach(loaded, pack(task, samples, passes))
    for split in (False, True):
        assert abs(backward(loaded, batch, samples, gamma, split) - wanted) <= 1e-5 * max(1.0, float(wanted))
        assert_trained(gradients(loaded.model), plain.gradients(), own, passes >= K)


def test_detached_states_pass_no_gradient(sharp: Path, doubled: Path) -> None:  # noqa: F811
    task = Task(sharp, doubled, "stage2", K)
    samples, plain = task.samples(ROWS), Plain(task)
    own = inputs_of(plain.model.config.text_config.hidden_size, K, 2).weight
    states = [slow_row(plain, sample, own, 2, fed=torch.Tensor.detach) for sample in samples]
    (sum(plain.ce(one, sample).mean() for one, sample in zip(states, samples, strict=True)) / len(ROWS)).backward()
    loaded = load(task, 2, detach_latents=True)
    backward(loaded, task.attach(loaded, pack(task, samples, 2)), samples, 1.0, True)
    # What is fed at last comes through a state.
    assert_trained(gradients(loaded.model), plain.gradients(), own, idle=True)


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_a_row_beside_deeper_ones_of_another_rank_is_the_row_alone(
    sharp: Path,  # noqa: F811
    doubled: Path,  # noqa: F811
    passes: int,
) -> None:
    task, found = Task(sharp, doubled, "stage2", K), []
    (one,) = task.samples((1,))
    for rows, runs in (([one], 1), ([one], 2), ([], 1)):
        loaded = load(task, passes)
        batch = task.attach(loaded, pack(task, rows, passes, runs))
        assert all(len(each.tokens) for each in batch.passes)
        found.append((backward(loaded, batch, [one], 1.0, False), gradients(loaded.model)))
    (alone, wanted), (beside, got), (idle, none) = found
    assert abs(alone - beside) <= 1e-6
    assert_same_gradients(got, wanted)
    assert idle == 0
    assert none.keys() == wanted.keys()
    assert all(gradient.norm() == 0 for gradient in none.values())


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_latents_of_an_evaluation_are_states_of_the_last_pass(
    sharp: Path,  # noqa: F811
    doubled: Path,  # noqa: F811
    passes: int,
) -> None:
    task = Task(sharp, doubled, "stage2", K)
    samples, plain, loaded = task.samples(ROWS), Plain(task), load(task, passes)
    own = loaded.model.latent_inputs.weight
    with torch.no_grad():
        found = loaded.model.eval()(task.attach(loaded, pack(task, samples, passes))).latents
        hidden = [slow_row(plain, sample, own, passes) for sample in samples]
    wanted = [one[p - 1 : p - 1 + k] for one, sample in zip(hidden, samples, strict=True) for p, k in sample.runs]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=0, atol=1e-5)


def test_new_inputs_are_the_pads_embedding_and_others_are_refused(nano: Path, tmp_path: Path) -> None:
    embedding = nn.Parameter(torch.randn(9, 4))
    made = load_inputs(nano, False, 2, K, embedding, 5, CPU)
    assert torch.equal(made.weight, embedding[5].expand(K, 4))
    assert made.weight.requires_grad
    with pytest.raises(UserError, match="holds no inputs of 3 latents of width 4; copy the model's own"):
        load_inputs(tmp_path, True, 2, K, embedding, 5, CPU)


# ----------------------------------------------------------------------------------------------------------- decoding


@pytest.fixture(scope="module")
def world(nano: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return world_of(nano, mixed, tmp_path_factory.mktemp("models") / "together")


@torch.no_grad()
def slowly(
    world: World,
    sample: Sample,
    limit: int,
    choose: Callable[[torch.Tensor, int], int],
    replaced: Callable[[int, torch.Tensor], torch.Tensor] = lambda run, own: own,
) -> Generated:
    """One row, whole and anew for each token, and for each pass of a run."""
    model, (pad, start, end, stops), out = world.plain, world.tokens, Generated([])
    inputs, embed = world.loaded.model.latent_inputs, model.get_input_embeddings()
    x, positions = embed(sample.input_ids), sample.position_ids
    if len(sample.image_grid_thw):
        features = model.model.get_image_features(sample.pixel_values, sample.image_grid_thw, return_dict=True)
        x[sample.input_ids == model.config.image_token_id] = torch.cat(list(features.pooler_output))
    out.inputs.append(x[-1])

    def states(x: torch.Tensor) -> torch.Tensor:
        more = torch.arange(1, 1 + len(x) - positions.shape[1]) + positions.max()
        whole = torch.cat([positions, more.expand(3, -1)], dim=1)[:, None, : len(x)]
        return model.model.language_model(inputs_embeds=x[None], position_ids=whole, use_cache=False).last_hidden_state[
            0
        ]

    run, k, inside = -1, len(inputs.weight), False
    while True:
        hidden = states(x)
        out.hidden += hidden[len(sample.input_ids) - 1 + len(out.hidden) :].unbind()
        token, opens = choose(model.lm_head(hidden[-1:]), len(out.ids)), out.ids[-1:] == [start]
        # A run is taken whole, and ends where it ends, whatever is chosen.
        out.ids += [pad] * min(k, limit - len(out.ids)) if opens else [end if inside else token]
        inside = opens
        if out.ids[-1] in stops or len(out.ids) == limit:
            return out
        if opens:
            run += 1
            fed = replaced(run, together(states, x, len(x), inputs.weight, inputs.passes))
        else:
            fed = embed(torch.tensor(out.ids[-1:]))
        out.fed += "H" * k if opens else "E"
        x = torch.cat([x, fed])
        out.inputs += fed.unbind()


def assert_same(got: Generated, wanted: Generated) -> None:
    assert got.ids == wanted.ids
    assert got.fed == wanted.fed
    assert len(got.hidden) == len(got.inputs) == len(wanted.hidden) == 1 + len(got.fed)
    for one, other in ((got.hidden, wanted.hidden), (got.inputs, wanted.inputs)):
        torch.testing.assert_close(torch.stack(one), torch.stack(other), rtol=0, atol=1e-5)


def compare(world: World, plans: Sequence[dict[int, int]], limit: int, passes: int, **given: Any) -> list[Generated]:
    """All rows at once = each row alone = the slow loop."""
    width = world.loaded.model.head.weight.shape[1]
    world.loaded.model.latent_inputs = inputs_of(width, K, passes, torch.float64)
    samples, found = world.samples[: len(plans)], []
    both = quickly(world, samples, Limits(limit), by_plan(plans), record=True, **given)
    for row, (got, sample, plan) in enumerate(zip(both, samples, plans, strict=True)):

        def choose(logits: torch.Tensor, step: int, plan: dict[int, int] = plan) -> int:
            return int(by_plan([plan])(logits, [Turn(0, step)]))

        if not given:
            alone = quickly(world, [sample], Limits(limit), by_plan([plan]))[0]
            assert_same(alone, got)
        more = [lambda run, own, row=row: own / 2 + given["latents"].vectors[row, run]] if given else []
        wanted = slowly(world, sample, limit, choose, *more)
        assert_same(got, wanted)
        fed = [state for kind, state in zip(wanted.fed, wanted.inputs[1:], strict=True) if kind == "H"]
        assert len(fed) == len(got.latents)
        if fed:
            torch.testing.assert_close(torch.stack(got.latents), torch.stack(fed), rtol=0, atol=1e-5)
        found.append(got)
    return found


def plans_of(world: World) -> list[dict[int, int]]:
    """Runs at several moments: two in a row, none, one at once, one that the limit cuts, one beside text."""
    start, stop = world.tokens.start, world.tokens.stops[0]
    word = int(world.samples[0].input_ids[5])
    return [
        {0: start, 5: start},
        {0: word, 1: word, 2: start},
        {},
        {0: word, 1: start, 6: word, 7: stop},
        {9: start},
        {0: start, 5: word, 6: start},
    ]


@pytest.mark.parametrize("passes", [0, 1, 2, K, K + 1])
def test_decoding_is_whole_passes_from_nothing(world: World, passes: int) -> None:
    found = compare(world, plans_of(world), 12, passes)
    _, start, end, _ = world.tokens
    pad = world.tokens.pad
    assert found[0].ids[:10] == [start, *[pad] * K, end] * 2
    assert found[0].fed[:9] == "EHHHEEHHH"
    # The limit cuts a run: what was not fed is not there.
    assert found[4].ids[9:] == [start, pad, pad]
    assert len(found[4].fed) == 10


def test_as_many_passes_as_latents_decode_as_the_recurrence(world: World) -> None:
    plans, limits = plans_of(world), Limits(12, fixed_run=K)
    world.loaded.model.latent_inputs = None
    wanted = quickly(world, world.samples, limits, by_plan(plans))
    world.loaded.model.latent_inputs = inputs_of(world.loaded.model.head.weight.shape[1], K, K, torch.float64)
    found = quickly(world, world.samples, limits, by_plan(plans))
    for got, one in zip(found, wanted, strict=True):
        assert got.ids == one.ids
        # But where the limit cut a run.
        count = len(got.hidden)
        torch.testing.assert_close(torch.stack(got.hidden), torch.stack(one.hidden[:count]), rtol=0, atol=1e-5)


class Halves:
    """A vector of its own for every row, run and slot; to it half of what the row would be fed."""

    def __init__(self, width: int):
        self.vectors = torch.randn(6, 2, K, width, generator=torch.Generator().manual_seed(3)).double()
        self.asked: list[Slot] = []

    def __call__(self, slots: Sequence[Slot], own: torch.Tensor) -> torch.Tensor:
        self.asked.extend(slots)
        return torch.stack([self.vectors[one] + state / 2 for one, state in zip(slots, own, strict=True)])


@pytest.mark.parametrize("passes", [0, 2])
def test_what_is_replaced_are_the_slots_inputs_in_the_last_pass(world: World, passes: int) -> None:
    halves = Halves(world.loaded.model.head.weight.shape[1])
    compare(world, plans_of(world), 12, passes, latents=halves)
    assert [one[1:] for one in halves.asked if one.row == 0] == [(run, slot) for run in range(2) for slot in range(K)]


def test_rows_that_wait_answer_as_all_at_once(world: World) -> None:
    """Rows enter and leave while others are in a run; a cache of blocks that others have left."""
    world.loaded.model.latent_inputs = inputs_of(world.loaded.model.head.weight.shape[1], K, 1, torch.float64)
    choose = by_plan(plans_of(world))
    wanted = quickly(world, world.samples, Limits(12), choose)
    for got, one in zip(quickly(world, world.samples, Limits(12, rows=2), choose), wanted, strict=True):
        assert_same(got, one)


# ------------------------------------------------------------------------------------------------ the bench, the folder


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_the_bench_feeds_what_the_last_pass_was_fed(sharp: Path, doubled: Path, passes: int) -> None:  # noqa: F811
    """Own latents of the controls: fed as known vectors in one pass, they give the states that they were made with."""
    task = Task(sharp, doubled, "stage2", K)
    samples, plain, loaded = task.samples((0, 1, 2)), Plain(task), load(task, passes)
    encoder = replace(encoder_of(sharp, doubled, "stage2", K), latent_passes=passes)
    bench, own = Bench(loaded.model.eval(), loaded.tower, encoder), loaded.model.latent_inputs.weight
    with torch.no_grad():
        batch, inputs, hidden = bench.fed_back(samples)
        states = [slow_row(plain, sample, own, passes) for sample in samples]
        rows = [
            together(
                lambda x, s=sample: plain.states(x, s), inputs[start : start + len(sample.input_ids)], p, own, passes
            )
            for sample, start in zip(samples, batch.cu_seqlens.tolist(), strict=False)
            for p, _ in sample.runs
        ]
        torch.testing.assert_close(hidden, torch.cat(states), rtol=0, atol=1e-5)
        torch.testing.assert_close(inputs[batch.latents], torch.cat(rows), rtol=0, atol=1e-5)
        one, (_, deep) = bench.batch(samples), bench.inputs(batch)
        assert len(one.passes) == 1
        torch.testing.assert_close(bench.hidden(one, inputs, deep), hidden, rtol=0, atol=1e-5)


def test_a_folder_keeps_inputs_and_passes_and_is_decoded_by_them(nano: Path, mixed: Path, tmp_path: Path) -> None:
    decoder, _ = saved(nano, mixed, tmp_path)
    width, encoder = decoder.loaded.model.head.weight.shape[1], decoder.encoder
    decoder.loaded.model.latent_inputs = inputs_of(width, K, 1)
    folder = tmp_path / "together"
    save_decoder(decoder, folder, TRAINED | dict(latent_passes=1))
    other = load_decoder(folder, ImageFinder.beside(mixed, None))
    found = other.loaded.model.latent_inputs
    assert (found.passes, other.encoder.latent_passes) == (1, 1)
    assert torch.equal(found.weight, decoder.loaded.model.latent_inputs.weight)
    assert json.loads((folder / "config.json").read_text())["mirage"].keys() >= {"latent_passes", "latent_tokens"}
    assert "latent_heads" not in json.loads((folder / "config.json").read_text())["mirage"]
    records = [scan(mixed)[0][row] for row in (0, 1, 2)]
    limits = run_limits(other, 16, 8, "trained")
    answers = answer_records(other, records, limits)
    runs = [length for one in answers for length in one.runs]
    assert runs
    assert set(runs) <= {K}
    # Without the latents of training it is another model.
    decoder.loaded.model.latent_inputs = None
    assert decoder.encoder is encoder
    turn = answer_records(decoder, records, limits)
    assert [one.ids for one in turn] != [one.ids for one in answers]
    assert run_limits(other, 16, 8, str(K)).fixed_run == K
    for length in ("model", "2"):
        with pytest.raises(UserError, match=f"--run_length {length}: .* makes its {K} latents together; leave it out"):
            run_limits(other, 16, 8, length)
    with pytest.raises(UserError, match=f"2 latents a block: .* makes its {K} together; leave the number out"):
        other.latent_encoder("stage2", 2)
    assert other.latent_encoder("stage2", K).latent_passes == 1
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    with pytest.raises(ValueError, match="trained with latents made together, which are not known here"):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=2)
    change_rows(folder, tmp_path / "more", other.loaded.config.text_config.vocab_size + 8, 0)
    again = load_decoder(tmp_path / "more", ImageFinder.beside(mixed, None))
    assert torch.equal(again.loaded.model.latent_inputs.weight, found.weight)
    assert load_decoder(folder, ImageFinder.beside(mixed, None), latents=False).loaded.model.latent_inputs is None


@pytest.mark.parametrize(
    ("trained", "sentence"),
    [
        ({"latent_heads": "gaussian"}, "--latent_passes 2: m has heads that draw latents in turn; start from what rl"),
        (
            {"latent_passes": 0, "latent_size": 3},
            "--latent_passes 2: m has learned inputs of 3 slots; give --latent_size 3",
        ),
    ],
)
def test_starts_that_cannot_be_made_together_are_refused(trained: dict[str, Any], sentence: str) -> None:
    given: Any = dict(model="m", stage="stage2", data_path="d", save_model_path="s", latent_passes=2)
    with pytest.raises(UserError) as caught:
        check_together(RunConfig(**given), trained, Path("m"))
    assert str(caught.value).startswith(sentence)
    check_together(RunConfig(**given), {"latent_passes": 0, "latent_size": 4}, Path("m"))
