"""Rows that come and go: whoever is beside a row, it answers as it does alone, in any room that it fits into.

n rows, B tokens of a block, H hidden. That a row alone is right is what test_generate.py shows, by the slow loop.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_generate import World, world_of
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from mirage_ds.analysis.controls.conditions import Given
from mirage_ds.errors import UserError
from mirage_ds.evaluate.prompts import prompts_of
from mirage_ds.model import generate as decoding
from mirage_ds.model import kv_cache
from mirage_ds.model.attention import Ends, varlen_attention
from mirage_ds.model.choose import Chooser, NotFinite, Turn, greedy, sampler
from mirage_ds.model.generate import Loop, Prompts, decode, generate
from mirage_ds.model.kv_cache import BlockCache, bytes_of_block
from mirage_ds.model.rows import Generated
from mirage_ds.model.slots import Latents, Limits

# Answers: some longer than a block, with several latent blocks; each of its own length.
LENGTHS = (3, 17, 9, 14, 6, 12)
LIMITS = Limits(18, longest_run=4)


@pytest.fixture(scope="module")
def world(nano: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return world_of(nano, mixed, tmp_path_factory.mktemp("models") / "sharp")


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[BlockCache]:
    """The caches that decodings make."""
    made: list[BlockCache] = []

    class Kept(BlockCache):
        def __init__(self, *given: Any):
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(decoding, "BlockCache", Kept)
    return made


def asked(world: World, rows: Sequence[int], answers: int = 1) -> Prompts:
    tower = world.loaded.tower
    assert tower is not None
    samples = [world.samples[row] for row in rows]
    return prompts_of(world.loaded.model, tower, world.encoder, samples)._replace(answers=answers)


def lively(world: World, rows: Sequence[int], drawn: bool, answers: int = 1) -> Chooser:
    """Choose by row as ever, but open a latent block at some steps of the row and end it at its length.

    Args:
        rows: of each answer; answers: the draws of so many neighbours differ.
    """
    _, start, end, (stop, _) = world.tokens
    inner = sampler(2.0, 0.9, [100 * row + at % answers for at, row in enumerate(rows)]) if drawn else greedy

    def choose(logits: torch.Tensor, turns: Sequence[Turn]) -> torch.Tensor:
        chosen = inner(logits, turns).tolist()
        for at, (number, step) in enumerate(turns):
            row = rows[number]
            if step in (row % 3, row + 5):
                chosen[at] = start
            elif step == row + 8:
                chosen[at] = end
            elif step >= LENGTHS[row] - 1:
                chosen[at] = stop
        return torch.tensor(chosen)

    return choose


def vectors(world: World) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randn(1 + row % 2, 4, len(world.loaded.model.head.weight[0]), generator=draw) for row in range(6)]


def latents_of(world: World, rows: Sequence[int], given: bool) -> Latents | None:
    return Given([vectors(world)[row] for row in rows]) if given else None


def alone(world: World, row: int, drawn: bool, given: bool) -> Generated:
    made = generate(
        world.loaded.model, asked(world, [row]), world.tokens, LIMITS, lively(world, [row], drawn), trace=True,
        latents=latents_of(world, [row], given),
    )  # fmt: skip
    return made[0]


@pytest.fixture(scope="module")
def single(world: World) -> Callable[..., Generated]:
    known: dict[Any, Generated] = {}

    def one(row: int, drawn: bool, given: bool) -> Generated:
        key = (row, drawn, given)
        return known.get(key) or known.setdefault(key, alone(world, *key))

    return one


def assert_alike(got: Generated, wanted: Generated) -> None:
    assert (got.ids, got.fed) == (wanted.ids, wanted.fed)
    # Rows that are computed together round otherwise.
    torch.testing.assert_close(torch.stack(got.hidden), torch.stack(wanted.hidden), rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_a_row_answers_as_it_does_alone_whoever_is_beside_it(
    world: World, single: Callable, caches: list[BlockCache], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    drawn, given = bool(seed % 2), bool(seed // 2 % 2)
    # Before the schedule is drawn: those alone have room.
    wanted = [single(row, drawn, given) for row in range(6)]
    draw = random.Random(seed)
    rows = [draw.randrange(6) for _ in range(draw.randint(4, 9))]
    monkeypatch.setattr(kv_cache, "BLOCK", draw.choice([8, 16, 64]))
    model, lengths = world.loaded.model, [len(world.samples[row].input_ids) for row in rows]
    most = -(-(max(lengths) + LIMITS.new_tokens) // kv_cache.BLOCK) + draw.randint(0, 30)
    limits = replace(
        LIMITS, prefill_tokens=draw.choice([1, 150, 8192]), rows=draw.choice([None, 2, 3]),
        cache_gb=draw.choice([None, (most + 0.5) * bytes_of_block(model) / 1e9]),
    )  # fmt: skip
    caches.clear()
    found = generate(
        model, asked(world, rows), world.tokens, limits, lively(world, rows, drawn), trace=True,
        latents=latents_of(world, rows, given),
    )  # fmt: skip
    for row, got in zip(rows, found, strict=True):
        assert_alike(got, wanted[row])
    (cache,) = caches
    # Nothing is kept at the end, and never was there more than may be.
    assert (cache.reserved, len(cache._free)) == (0, len(cache.keys[0]))
    assert limits.cache_gb is None or len(cache.keys[0]) <= most


@pytest.mark.parametrize("rows", [None, 2])
def test_a_prompt_is_read_once_for_all_its_answers(
    world: World, caches: list[BlockCache], monkeypatch: pytest.MonkeyPatch, rows: int | None
) -> None:
    monkeypatch.setattr(kv_cache, "BLOCK", 16)
    model, chosen = world.loaded.model, [0, 3, 1]
    read: list[int] = []
    hook = model.language_model.layers[0].register_forward_pre_hook(
        lambda layer, given: read.append(given[0].shape[1]) if given[0].shape[1] > 9 else None
    )
    limits = replace(LIMITS, rows=rows)
    each = [row for row in chosen for _ in range(3)]
    found = generate(
        model, asked(world, chosen, 3), world.tokens, limits, lively(world, each, True, 3), trace=True
    )  # fmt: skip
    hook.remove()
    assert sum(read) == sum(len(world.samples[row].input_ids) for row in chosen)
    apart = generate(model, asked(world, each), world.tokens, LIMITS, lively(world, each, True, 3), trace=True)
    for got, wanted in zip(found, apart, strict=True):
        assert_alike(got, wanted)
    assert len({tuple(one.ids) for one in found}) > 6
    # A prompt's blocks are there once; each answer has a copy of the last one, and what follows.
    tokens = [len(world.samples[row].input_ids) for row in chosen]
    wanted_blocks = sum(-(-one // 16) + 3 * (-(-(one + 18) // 16) - one // 16) for one in tokens)
    blocks = len(caches[0].keys[0])
    assert blocks == wanted_blocks if rows is None else blocks < wanted_blocks
    assert (caches[0].reserved, len(caches[0]._free)) == (0, blocks)


@torch.no_grad()
def test_rows_come_while_others_decode_and_can_be_dropped(world: World, single: Callable) -> None:
    rows, answers = [0, 1, 1, 2, 2, 3, 4], {0: 1, 1: 2, 3: 2, 5: 1, 6: 1}
    sizes: list[int] = []

    def read(numbers: Sequence[int]) -> Any:
        sizes.append(len(numbers))
        places = [rows[number] for number in numbers]
        return asked(world, places).read(0, len(places))

    loop = Loop(world.loaded.model, replace(LIMITS, rows=4), read, trace=True)
    # Dropped: an answer of two, both of a prompt, and one that still waits.
    drops, found = {2: {1}, 3: {3, 4}, 4: {6}}, {}
    for step in range(60):
        # Two at first, then one at each step: one always waits, since `enter` takes one at a time.
        for number in sorted(answers)[step + (step > 0) : step + 2]:
            loop.add(number, len(world.samples[rows[number]].input_ids), answers[number], LIMITS.new_tokens)
        loop.drop(drops.get(step, ()))
        loop.enter(1)
        if loop.live:
            found |= {row.number: row.made for row in loop.step(world.tokens, lively(world, rows, False), None)}
    assert {*found} == {0, 2, 5}
    for number, made in found.items():
        assert_alike(made, single(rows[number], False, False))
    assert (loop.cache.reserved, len(loop.cache._free)) == (0, len(loop.cache.keys[0]))
    assert {*sizes} == {1}


@torch.no_grad()
def test_a_broken_row_spoils_nobody(world: World, single: Callable) -> None:
    shows = [bool(len(sample.image_grid_thw)) for sample in world.samples]
    spoilt, others = shows.index(True), [row for row, picture in enumerate(shows) if not picture]
    rows = [others[0], spoilt, spoilt, others[1], others[0]]

    def read(numbers: Sequence[int]) -> Any:
        batch = asked(world, [rows[number] for number in numbers]).read(0, len(numbers))
        batch.image_features.fill_(torch.nan)
        return batch

    loop, found = Loop(world.loaded.model, LIMITS, read, trace=True), {}
    for step in range(40):
        # Those that come later get the blocks that the broken ones had.
        for number in {0: (0, 1), 2: (3, 4)}.get(step, ()):
            length = len(world.samples[rows[number]].input_ids)
            loop.add(number, length, 2 if number == 1 else 1, LIMITS.new_tokens)
        loop.enter()
        if loop.live:
            ended = loop.step(world.tokens, lively(world, rows, False), None)
            found |= {row.number: row for row in ended}
    assert [number for number, row in found.items() if row.broken] == [1, 2]
    for number in (0, 3, 4):
        assert_alike(found[number].made, single(rows[number], False, False))


def test_rows_end_as_they_do_and_others_take_their_place(world: World) -> None:
    rows, looks = [1, 0, 4, 2], []

    def choose(logits: torch.Tensor, turns: Sequence[Turn]) -> torch.Tensor:
        looks.append([turn.row for turn in turns])
        return torch.tensor([world.tokens.stops[turn.step + 1 == LENGTHS[rows[turn.row]]] for turn in turns])

    limits = replace(LIMITS, rows=2)
    tokens = world.tokens._replace(stops=world.tokens.stops[1:])
    ended = [number for number, _ in decode(world.loaded.model, asked(world, rows), tokens, limits, choose)]
    # Of 17, 3, 6 and 9 tokens: two at a time, the next one enters where one has ended.
    assert ended == [1, 2, 0, 3]
    assert looks == [[0, 1]] * 3 + [[0, 2]] * 6 + [[0, 3]] * 8 + [[3]]


def test_a_row_that_never_has_room_is_said_before_anything_is_read(world: World) -> None:
    sizes = [len(sample.input_ids) for sample in world.samples]
    largest, model = sizes.index(max(sizes)), world.loaded.model
    blocks = -(-(max(sizes) + LIMITS.new_tokens) // kv_cache.BLOCK)
    prompts = asked(world, [largest, largest])
    exact = bytes_of_block(model) * blocks / 1e9
    assert len(generate(model, prompts, world.tokens, replace(LIMITS, cache_gb=exact * 1.0001))) == 2
    prompts = prompts._replace(read=lambda first, end: pytest.fail("read"))
    said = (
        f"^record {world.samples[largest].row + 1}: keys and values of its {max(sizes)} prompt tokens and up to 18 of "
        r"an answer take 0\.\d+ GB, and --cache_gb is 0\.\d+; raise it, or lower --max_new_tokens"
    )
    with pytest.raises(UserError, match=said):
        generate(model, prompts, world.tokens, replace(LIMITS, cache_gb=exact * 0.999))


@pytest.mark.parametrize("broken", [0, 3, 5])
def test_what_breaks_in_one_row_breaks_no_other(world: World, monkeypatch: pytest.MonkeyPatch, broken: int) -> None:
    monkeypatch.setattr(kv_cache, "BLOCK", 8)
    rows = sorted(range(6), key=lambda row: -len(world.samples[row].input_ids))
    prompts = asked(world, rows)

    def latents(slots: Sequence[Any], own: torch.Tensor) -> torch.Tensor:
        at = torch.tensor([slot.row == broken for slot in slots])
        return own.masked_fill(at[:, None], torch.nan)

    with pytest.raises(NotFinite) as met:
        generate(
            world.loaded.model, prompts, world.tokens, LIMITS, lively(world, rows, False), latents=latents
        )  # fmt: skip
    assert met.value.row == prompts.rows[broken]


@pytest.mark.parametrize("shared", [0, 2])
def test_blocks_in_bf16_are_as_exact_as_sdpa_and_each_row_is_multiplied_with_its_own_alone(shared: int) -> None:
    n, heads, groups, width, length = 4, 4, 2, 64, 300
    config = SimpleNamespace(
        num_key_value_heads=groups, num_hidden_layers=1, head_dim=width, hidden_size=width * heads,
        num_attention_heads=heads,
    )  # fmt: skip
    model: Any = SimpleNamespace(
        language_model=SimpleNamespace(config=config), how=SimpleNamespace(attention="sdpa"),
        head=SimpleNamespace(weight=torch.zeros(1, 1, dtype=torch.bfloat16)),
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).bfloat16()

    cache, q, before = BlockCache(model), 6 * normal(n, heads, width), normal(2, n, length, groups, width)
    before[:, :, : shared * cache.size] = before[:, :1, : shared * cache.size]
    now = normal(2, n, groups, width)
    cache.reserved = n * cache.blocks(length + 1)
    cache.grow()
    common = cache.take(shared)
    tables = [common + cache.take(cache.blocks(length + 1) - shared) for _ in range(n)]
    cache.write(0, *before.flatten(1, 2), cache.places(tables, [length] * n))
    with FlopCounterMode(display=False) as counter:
        got = cache.step(tables, [length] * n, [()] * n).attend(q, *now, width**-0.5)
    # Two products of a query head with the tokens of each block.
    assert counter.get_total_flops() == 2 * 2 * sum(map(len, tables)) * cache.size * heads * width
    keys, values = torch.cat([before, now[:, :, None]], dim=2).transpose(2, 3)
    wanted = [
        functional.scaled_dot_product_attention(
            *(one.to(dtype) for one in (q[:, :, None], keys, values)), enable_gqa=True
        )
        for dtype in (torch.float64, torch.bfloat16)
    ]
    exact, sdpa = (one[:, :, 0] for one in wanted)
    assert got.dtype == torch.bfloat16
    assert (got - exact).abs().max() <= 1.1 * (sdpa - exact).abs().max()


# ------------------------------------------------------------------------------------------------- kernels for pages


def by_reference(step: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """What a kernel for pages computes, row by row."""
    ends, used, table = step.ends, step.used, step.table
    assert ends.max_k == int(used.max())
    assert ends.cu_k.diff().tolist() == used.tolist()
    keys, values = (
        torch.cat([pages[row].flatten(0, 1)[:count] for row, count in zip(table.long(), used.tolist(), strict=True)])
        for pages in (k, v)
    )
    return varlen_attention(q, keys, values, ends, scale=scale)


class OldOperator:
    """torch's operator as it was before it took a table: packed keys of which each row uses the first."""

    class default:
        _schema = "_flash_attention_forward(… Tensor? seqused_k=None …)"

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int,
        max_k: int, dropout: float, causal: bool, debug: bool, scale: float, seqused_k: torch.Tensor,
    ) -> tuple[torch.Tensor]:  # fmt: skip
        assert (dropout, debug, max_q) == (0.0, False, 1)
        starts = cu_k[:-1].tolist()
        keys, values = (
            torch.cat([one[at : at + count] for at, count in zip(starts, seqused_k.tolist(), strict=True)])
            for one in (k, v)
        )
        cumulative = torch.nn.functional.pad(seqused_k.cumsum(0, dtype=torch.int32), (1, 0))
        return (varlen_attention(q, keys, values, Ends(cu_q, cumulative, 1, max_k), scale=scale),)


@pytest.fixture(params=["table", "no table"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kv_cache, "kernel_of", lambda model: "torch_varlen")
    monkeypatch.setattr(kv_cache, "PAGE", 16)
    if request.param == "table":
        monkeypatch.setitem(kv_cache.PAGED, "torch_varlen", by_reference)
    else:
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", OldOperator())
    return


@pytest.mark.parametrize(("hip", "wanted"), [(None, {"num_splits": 1}), ("7.0", {})])
def test_keys_of_a_table_are_not_split(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, wanted: dict[str, int]
) -> None:
    """An operator that has both arguments, as torch 2.13's."""
    given: dict[str, Any] = {}

    class Operator(OldOperator):
        default = torch.ops.aten._flash_attention_forward.default

        def __call__(self, q: torch.Tensor, *more: Any, **options: Any) -> tuple[torch.Tensor]:
            given.update(options)
            return (q,)

    if "num_splits" not in str(Operator.default._schema):
        pytest.skip("an older torch")
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", Operator())
    monkeypatch.setattr(torch.version, "hip", hip)
    one = torch.ones(1, 1, 1)
    step: Any = SimpleNamespace(used=one, table=one, ends=Ends(one, one, 1, 1))
    kv_cache._torch_varlen(step, one, one, one, 1.0)
    assert given.keys() - {"num_splits"} == {"scale", "seqused_k", "block_table"}
    assert {name: given[name] for name in given if name == "num_splits"} == wanted


@pytest.mark.usefixtures("kernel")
def test_what_a_kernel_is_given_leads_to_the_same_answers(world: World, single: Callable) -> None:
    rows, limits = [5, 2, 0, 3, 1], replace(LIMITS, rows=3)
    found = generate(
        world.loaded.model, asked(world, rows), world.tokens, limits, lively(world, rows, True), trace=True
    )
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(kv_cache, "kernel_of", lambda model: None)
        for row, got in zip(rows, found, strict=True):
            assert_alike(got, single(row, True, False))
