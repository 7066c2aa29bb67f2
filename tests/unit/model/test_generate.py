"""Decoding against plain transformers: no cache, one row at a time, the whole growing row anew for every token.

P prompt tokens of a row, H hidden, V vocabulary. A plan says what a row's model "emits" at some steps; elsewhere it is
the likeliest token.
"""

from __future__ import annotations

import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import OTHERS, deep_inputs, write
from transformers import AutoConfig, AutoModelForImageTextToText

from mirage_ds.data.encode import Encoder
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.record_files import scan
from mirage_ds.data.sample import Sample
from mirage_ds.evaluate.decoder import chooser_of
from mirage_ds.evaluate.prompts import prompts_of
from mirage_ds.evaluate.spec import Sampling
from mirage_ds.model.choose import NotFinite, Turn, greedy, sampler
from mirage_ds.model.generate import generate, neighbours
from mirage_ds.model.load import Loaded, load_model
from mirage_ds.model.rows import Generated
from mirage_ds.model.slots import LatentTokens, Limits, Slot, latent_tokens
from mirage_ds.model.vision import CALL_PATCHES

# With and without image, of different lengths.
ROWS = (0, 1, 2, 3, 6, 11)
Plan = dict[int, int]


class World(NamedTuple):
    """The same folder twice, and its prompts."""

    plain: Any
    loaded: Loaded
    encoder: Encoder
    samples: list[Sample]
    tokens: LatentTokens


@pytest.fixture(scope="module")
def world(nano: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Nano with attention that chooses and an output matrix of its own: no ties, no echo, and a wrong key shows."""
    return world_of(nano, mixed, tmp_path_factory.mktemp("models") / "sharp")


def world_of(model: Path, mixed: Path, folder: Path) -> World:
    """Sharpen a copy of a model, open it, and encode prompts."""
    sharpen(model, folder)
    encoder = load_encoder([str(folder)], ImageFinder.beside(mixed, None), "sft", 1)
    records = scan(mixed)[0]
    samples = [encoder.encode_prompt(records[row], row) for row in ROWS]
    assert len({len(sample.input_ids) for sample in samples}) == len(ROWS)
    return World(*both(folder), encoder, samples, latent_tokens(encoder))


def sharpen(nano: Path, folder: Path) -> None:
    """Copy nano into a folder, its weights drawn anew."""
    shutil.copytree(nano, folder)
    torch.manual_seed(1)
    weights = load_file(folder / "model.safetensors")
    # Drawn anew, whatever a nano starts from: sharper than that, rounding alone leads the rows apart.
    for name, weight in weights.items():
        sharp = 0.1 if "q_proj" in name or "k_proj" in name or name.endswith("bias") else 0.02
        weight.normal_(0, 0.06 if "embed_tokens" in name else sharp)
        if weight.ndim == 1 and not name.endswith("bias"):
            weight.mul_(10).add_(1)
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    config.save_pretrained(folder)
    (embedding,) = (name for name in weights if "embed_tokens" in name)
    weights["lm_head.weight"] = torch.randn_like(weights[embedding])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def both(folder: Path) -> tuple[Any, Loaded]:
    """Open a folder in plain transformers and in mirage_ds."""
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    # In float64: in float32 the rounding of eight fed-back states alone comes to 1e-5 on some processors.
    loaded = load_model(folder, stage="sft", dtype=torch.float64, device=torch.device("cpu"), checkpointing=False)
    loaded.model.eval()
    return plain, loaded


@torch.no_grad()
def slowly(
    world: World,
    sample: Sample,
    limits: Limits,
    choose: Callable,
    feed: Callable = lambda run, slot, own: own,
    see: Callable[[list[int]], dict] = lambda ids: {},
) -> Generated:
    """One row by the rules as they are written down; `feed` says what a slot of a run is fed, `see` a pass's mask."""
    model, (pad, start, end, stops), out = world.plain, world.tokens, Generated([])
    embed = model.get_input_embeddings()
    x, positions = embed(sample.input_ids), sample.position_ids
    out.inputs.append(embed(sample.input_ids[-1]))
    if len(sample.image_grid_thw):
        features = model.model.get_image_features(sample.pixel_values, sample.image_grid_thw, return_dict=True)
        x[sample.input_ids == model.config.image_token_id] = torch.cat(list(features.pooler_output))
    latents, run = None, -1
    for step in range(limits.new_tokens):
        states = model.model.language_model(
            inputs_embeds=x[None],
            position_ids=positions[:, None],
            use_cache=False,
            **deep_inputs(model, sample, len(x)),
            **see([*sample.input_ids.tolist(), *out.ids]),
        ).last_hidden_state[0]
        out.hidden.append(states[-1])
        token, fed = int(choose(model.lm_head(states[-1:]), step)), None
        if latents is None:
            latents = 0 if token == start else None
        else:
            if limits.fixed_run is None:
                ends = token == end or latents == limits.longest_run
            else:
                ends = latents == limits.fixed_run
            # Runs without a slot do not count.
            run += latents == 0 and not ends
            token, fed = (end, None) if ends else (pad, feed(run, latents, states[-1]))
            latents = None if ends else latents + 1
        out.ids.append(token)
        if token in stops or len(out.ids) == limits.new_tokens:
            return out
        out.fed += "E" if fed is None else "H"
        x = torch.cat([x, (embed(torch.tensor(token)) if fed is None else fed)[None]])
        out.inputs.append(x[-1])
        positions = torch.cat([positions, (positions.max() + 1).expand(3, 1)], dim=1)
    return out


def quickly(
    world: World, samples: Sequence[Sample], limits: Limits, choose: Callable = greedy, **options
) -> list[Generated]:
    model, tower = world.loaded.model, world.loaded.tower
    assert tower is not None
    prompts = prompts_of(model, tower, world.encoder, samples)
    return generate(model, prompts, world.tokens, limits, choose, trace=True, **options)


def by_plan(plans: Sequence[Plan]) -> Callable:
    def choose(logits: torch.Tensor, turns: Sequence[Turn]) -> torch.Tensor:
        likeliest = logits.argmax(-1).tolist()
        return torch.tensor([plans[row].get(step, one) for (row, step), one in zip(turns, likeliest, strict=True)])

    return choose


def assert_same(got: Generated, wanted: Generated) -> None:
    assert got.ids == wanted.ids
    assert got.fed == wanted.fed
    assert len(got.hidden) == len(got.inputs) == len(wanted.hidden) == len(got.ids)
    for one, other in ((got.hidden, wanted.hidden), (got.inputs, wanted.inputs)):
        torch.testing.assert_close(torch.stack(one), torch.stack(other), rtol=0, atol=1e-5)


def compare(world: World, plans: Sequence[Plan], limits: Limits, rows: Sequence[int] = range(6)) -> list[Generated]:
    """All rows in one batch = each row alone = the slow loop."""
    samples = [world.samples[row] for row in rows]
    found = quickly(world, samples, limits, by_plan(plans))
    for got, sample, plan in zip(found, samples, plans, strict=True):
        assert_same(
            got,
            slowly(
                world, sample, limits, lambda logits, step, plan=plan: int(by_plan([plan])(logits, [Turn(0, step)]))
            ),
        )
        assert_same(quickly(world, [sample], limits, by_plan([plan]))[0], got)
    return found


def test_greedy_batch_equals_row_by_row_equals_growing_full_passes(world: World) -> None:
    found = compare(world, [{}] * 6, Limits(12))
    # The rows are not all alike, nor is a row one token over and over.
    assert len({tuple(row.ids) for row in found}) == 6
    assert len({token for row in found for token in row.ids}) > 6


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_decode_as_their_growing_full_passes(name: str, mixed: Path, tmp_path: Path) -> None:
    other = world_of(write(name, tmp_path / "model"), mixed, tmp_path / "sharp")
    start, end = other.tokens.start, other.tokens.end
    found = compare(other, [{}, {0: start}, {1: start, 4: end}, {}, {2: start}, {0: start, 1: end}], Limits(8))
    assert len({tuple(row.ids) for row in found}) == 6
    for tokens in (1, 200):
        some = quickly(other, other.samples, Limits(8, prefill_tokens=tokens))
        for got, wanted in zip(some, quickly(other, other.samples, Limits(8)), strict=True):
            assert_same(got, wanted)


@pytest.mark.parametrize("tokens", [1, 100, 200])
def test_prompts_that_run_a_few_at_a_time_go_on_to_the_same_tokens(world: World, tokens: int) -> None:
    whole = quickly(world, world.samples, Limits(10))
    calls = []
    hook = world.loaded.model.language_model.layers[0].register_forward_pre_hook(
        lambda layer, given: calls.append(given[0].shape[1])
    )
    some = quickly(world, world.samples, Limits(10, prefill_tokens=tokens))
    hook.remove()
    for got, wanted in zip(some, whole, strict=True):
        assert_same(got, wanted)
    lengths = [len(sample.input_ids) for sample in world.samples]
    parts = [sum(lengths[first:end]) for first, end in neighbours(lengths, tokens)]
    # The steps behind the prompts run a token a row.
    assert calls == [*parts, *[len(lengths)] * 9]
    assert 1 < len(parts) <= len(lengths)


@pytest.mark.parametrize(("most", "calls"), [(0, 3), (300, 2), (CALL_PATCHES, 1)])
def test_the_tower_sees_images_of_later_prompts_in_one_call(
    world: World, monkeypatch: pytest.MonkeyPatch, most: int, calls: int
) -> None:
    wanted, tower, seen = quickly(world, world.samples, Limits(6)), world.loaded.tower, []
    assert tower is not None
    real = tower._call
    monkeypatch.setattr(tower, "call_patches", most)
    monkeypatch.setattr(tower, "_call", lambda pixels, grids: seen.append(grids) or real(pixels, grids))
    for got, one in zip(quickly(world, world.samples, Limits(6, rows=1)), wanted, strict=True):
        assert_same(got, one)
    assert torch.equal(torch.cat(seen), torch.cat([sample.image_grid_thw for sample in world.samples]))
    assert len(seen) == calls


@pytest.mark.parametrize(
    ("lengths", "tokens", "parts"),
    [
        ([5], 1, [(0, 1)]),
        ([5, 5, 5], 10, [(0, 2), (2, 3)]),
        ([5, 5, 5], 9, [(0, 1), (1, 2), (2, 3)]),
        ([30, 1, 1, 30, 2], 10, [(0, 1), (1, 3), (3, 4), (4, 5)]),
    ],
)
def test_rows_go_together_up_to_the_budget(lengths: list[int], tokens: int, parts: list[tuple[int, int]]) -> None:
    assert list(neighbours(lengths, tokens)) == parts


@pytest.mark.parametrize("choose", [greedy, sampler(0.7, 0.9, range(6))], ids=["greedy", "sampled"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 5])
def test_logits_that_are_not_finite_name_their_record(world: World, choose: Callable, value: float, step: int) -> None:
    """One row of six meets a word that is broken: in its prompt, or in the middle of its answer."""
    embedding, bad, samples = world.loaded.model.language_model.embed_tokens.weight, 4, list(world.samples)
    word = next(one for one in range(len(embedding)) if all(one not in sample.input_ids for sample in samples))
    if step == 0:
        samples[bad] = samples[bad]._replace(input_ids=samples[bad].input_ids.clone())
        samples[bad].input_ids[1] = word
    seen: list[int] = []

    def by_hand(logits: torch.Tensor, turns: Sequence[Turn]) -> torch.Tensor:
        (at,) = {turn.step for turn in turns}
        seen.append(at)
        assert logits.isfinite().all()
        by_word = torch.tensor([word if turn.row == bad else 5 for turn in turns])
        return by_word if at == step - 1 else choose(logits, turns)

    kept = embedding[word].clone()
    with torch.no_grad():
        embedding[word] = value
    try:
        with pytest.raises(NotFinite, match=f"^the logits of record {ROWS[bad] + 1} are not finite: ") as error:
            quickly(world, samples, Limits(12), by_hand)
    finally:
        with torch.no_grad():
            embedding[word] = kept
    # It ends at once, and ranks can send it to each other.
    assert seen[-1] == step
    assert pickle.loads(pickle.dumps(error.value)).row == ROWS[bad]


@pytest.mark.parametrize("longest", [1, 3, 8])
def test_rows_enter_and_leave_runs_by_themselves(world: World, longest: int) -> None:
    pad, start, end, (stop, _) = world.tokens
    word = int(world.samples[0].input_ids[5])
    plans: list[Plan] = [
        # Forced end at `longest`; the words inside are replaced.
        {0: start, **dict.fromkeys(range(1, 12), word)},
        # Ends itself after two latents (or is forced before), and enters again at once.
        {2: start, 3: word, 4: word, 5: end, 6: start, 7: start, 8: pad, 9: end},
        # No run: pad and end outside one are tokens like any other.
        {1: pad, 3: end},
        # Leaves without a latent; a second run is cut by the limit.
        {1: start, 2: end, 11: start, 12: word, 13: word},
        # A stop token inside a run is replaced; outside it ends the row.
        {3: start, 4: stop, 5: stop, 6: end, 8: stop, 13: stop},
        {5: start, 6: start, 7: start, 8: end, 9: word},
    ]
    found = compare(world, plans, Limits(14, longest_run=longest))
    runs = [[len(part) for part in "".join(row.fed).replace("E", " ").split()] for row in found]
    assert runs == [[longest], [min(longest, 2)] * 2, [], [1], [min(longest, 2)], [min(longest, 2)]]
    # Never is a hidden state fed for anything but a pad inside a run.
    for row in found:
        assert all(token == pad for token, fed in zip(row.ids, row.fed, strict=False) if fed == "H")
    assert found[3].ids[1:3] == [start, end]


@pytest.mark.parametrize("fixed", [0, 2, 4])
def test_fixed_run_has_its_length_whatever_is_emitted(world: World, fixed: int) -> None:
    pad, start, end, (stop, _) = world.tokens
    word = int(world.samples[0].input_ids[5])
    plans: list[Plan] = [
        {0: start, **dict.fromkeys(range(1, 7), end), 7: start, **dict.fromkeys(range(8, 14), word)},
        {3: start, 4: stop, 5: end, 6: word, 7: pad, 8: word, 9: word},
        {},
    ]
    found = compare(world, plans, Limits(14, longest_run=1, fixed_run=fixed), rows=(0, 1, 2))
    run = [start, *[pad] * fixed, end]
    assert found[0].ids[: fixed + 2] == found[0].ids[7 : 9 + fixed] == run
    assert found[1].ids[3 : 5 + fixed] == run
    assert [row.fed.count("H") for row in found] == [2 * fixed, fixed, 0]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5])
def test_limit_inside_a_run_ends_all_rows(world: World, limit: int) -> None:
    pad, start, _, _ = world.tokens
    plans = [{1: start, 2: 5, 3: 5, 4: 5}, {0: start, 1: 5, 2: 5, 3: 5, 4: 5}, {}]
    found = compare(world, plans, Limits(limit), rows=(0, 3, 5))
    assert [len(row.ids) for row in found] == [limit] * 3
    assert found[1].ids == [start, pad, pad, pad, pad][:limit]
    assert [len(row.fed) for row in found] == [limit - 1] * 3


def test_slots_are_fed_what_latents_says(world: World) -> None:
    _, start, end, (stop, _) = world.tokens
    word = int(world.samples[0].input_ids[5])
    plans: list[Plan] = [
        {0: start, **dict.fromkeys(range(1, 12), word)},
        {2: start, 3: word, 4: word, 5: end, 6: start, 7: start, 8: word, 9: end},
        {1: start, 2: end, 3: start, 4: word, 7: end, 8: stop},
        {},
    ]
    limits, samples = Limits(12, longest_run=5), world.samples[:4]
    # A vector of its own for every row, run and slot; to it half of the row's own state.
    vectors = torch.randn(4, 2, 5, world.loaded.tower.width, generator=torch.Generator().manual_seed(3)).double()
    asked: list[Slot] = []

    def latents(slots: Sequence[Slot], own: torch.Tensor) -> torch.Tensor:
        asked.extend(slots)
        return torch.stack([vectors[one] + state / 2 for one, state in zip(slots, own, strict=True)])

    found = quickly(world, samples, limits, by_plan(plans), latents=latents)
    for row, (got, sample, plan) in enumerate(zip(found, samples, plans, strict=True)):
        wanted = slowly(
            world,
            sample,
            limits,
            lambda logits, step, plan=plan: int(by_plan([plan])(logits, [Turn(0, step)])),
            lambda run, slot, own, row=row: vectors[row, run, slot] + own / 2,
        )
        assert_same(got, wanted)
    # Once for each slot, in order; a block without a slot does not count.
    assert [[one[1:] for one in asked if one.row == row] for row in range(4)] == [
        [(0, slot) for slot in range(5)],
        [(0, 0), (0, 1), (1, 0), (1, 1)],
        [(0, slot) for slot in range(3)],
        [],
    ]
    plain = quickly(world, samples, limits, by_plan(plans))
    kept = quickly(world, samples, limits, by_plan(plans), latents=lambda slots, own: own)
    assert all(torch.equal(torch.stack(a.hidden), torch.stack(b.hidden)) for a, b in zip(plain, kept, strict=True))
    assert not torch.equal(torch.stack(plain[0].hidden), torch.stack(found[0].hidden))


def test_stop_tokens_end_each_row_at_its_own_step(world: World) -> None:
    _, start, _, (stop, other) = world.tokens
    plans = [{0: stop}, {4: other}, {2: start, 6: stop, 13: stop}, {9: stop, 10: start}, {1: stop, 2: other}, {}]
    found = compare(world, plans, Limits(16, longest_run=3))
    assert [len(row.ids) for row in found] == [1, 5, 14, 10, 2, 16]
    assert [row.ids[-1] for row in found[:5]] == [stop, other, stop, stop, stop]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_of_equally_likely_tokens_is_chosen(dtype: torch.dtype) -> None:
    """On 16 rows as long as a real vocabulary, with three largest logits each, numpy's argmax is the oracle."""
    logits = torch.randn(16, 151_668, generator=torch.Generator().manual_seed(0)).to(dtype)
    places = torch.randint(logits.shape[-1], (16, 3), generator=torch.Generator().manual_seed(1))
    logits.scatter_(1, places, 50.0)
    assert greedy(logits, ()).tolist() == logits.float().numpy().argmax(-1).tolist() == places.amin(1).tolist()


def test_sampled_row_does_not_depend_on_its_neighbours(world: World) -> None:
    seeds, limits = [100 + row for row in range(6)], Limits(12, longest_run=3)
    # Everything about as likely as the start of a run, so that some rows have runs.
    together = quickly(world, world.samples, limits, sampler(3.0, 0.95, seeds))
    assert len({tuple(row.ids) for row in together}) == 6
    turned = quickly(world, world.samples[::-1], limits, sampler(3.0, 0.95, seeds[::-1]))[::-1]
    for row, sample in enumerate(world.samples):
        alone = quickly(world, [sample], limits, sampler(3.0, 0.95, [seeds[row]]))[0]
        assert alone.ids == together[row].ids == turned[row].ids
    # The seed matters.
    others = quickly(world, world.samples, limits, sampler(3.0, 0.95, [seed + 1 for seed in seeds]))
    assert all(one.ids != other.ids for one, other in zip(together, others, strict=True))


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 0.9), (1.0, 0.62), (2.0, 0.97), (1.0, 1e-6), (0.3, 1.0)])
def test_draws_follow_the_kept_set(temperature: float, top_p: float) -> None:
    draws = 4000
    logits = torch.tensor([0.3, 2.0, -1.0, 1.4, 0.9, -3.0, 1.1])
    weights = {token: float(torch.exp(logits[token].double() / temperature)) for token in range(len(logits))}
    total = sum(weights.values())
    kept: dict[int, float] = {}
    for token in sorted(weights, key=weights.get, reverse=True):
        if sum(kept.values()) >= top_p:
            break
        kept[token] = weights[token] / total
    turns = [Turn(row, 0) for row in range(draws)]
    drawn = Counter(sampler(temperature, top_p, range(draws))(logits.expand(draws, -1), turns).tolist())
    assert drawn.keys() <= kept.keys()
    for token, share in kept.items():
        wanted = share / sum(kept.values())
        assert abs(drawn[token] / draws - wanted) <= 4 * (wanted * (1 - wanted) / draws) ** 0.5 + 1e-9


def test_at_the_lowest_temperature_the_likeliest_is_drawn_and_any_seed_is_one() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    choose = chooser_of(Sampling(1e-38, 0.9), 10**18, range(4))
    assert choose(logits, [Turn(row, 0) for row in range(4)]).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.8, 0.9)])
def test_rounding_of_the_logits_changes_no_draw(temperature: float, top_p: float) -> None:
    """As it differs with the rows that are computed together; tokens that are nearly alike must not change places."""
    logits = torch.randn(400, 3000, generator=torch.Generator().manual_seed(0))
    turns = [Turn(row, 0) for row in range(400)]
    rounded = logits * (1 + 1e-6 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)))
    one, other = (sampler(temperature, top_p, range(400))(given, turns) for given in (logits, rounded))
    assert torch.equal(one, other)
    assert len(set(one.tolist())) > 300


def test_a_seed_draws_on_from_step_to_step() -> None:
    logits = torch.zeros(2, 50)
    choose = sampler(1.0, 1.0, [7, 8])
    steps = [choose(logits, [Turn(0, step), Turn(1, step)]).tolist() for step in range(100)]
    again = sampler(1.0, 1.0, [7])
    assert [one for one, _ in steps] == [again(logits[:1], [Turn(0, step)]).item() for step in range(100)]
    # Also beyond the numbers that are drawn at a time.
    assert len({one for one, _ in steps[:6]}) > 3 < len({one for one, _ in steps[64:70]})
    assert [one for one, _ in steps[64:]] != [one for one, _ in steps[:36]]
