"""The scaling arithmetic against transformers' parameter counts, torch's FLOP counter, a ring passed by hand, and what
DeepSpeed was counted to gather on two ranks (python -m benchmarks.volumes)."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.scaling import break_even_tokens, checkpoint_bytes, compute_seconds, main, memory
from benchmarks.volumes import KEPT as NANO_KEPT
from benchmarks.volumes import LAYER, RELEASED
from mirage_ds.engine.ds_config import KEEPS_ALL, fill_limits, recipes
from mirage_ds.model.family import FAMILIES
from mirage_ds.model.layers import DecoderLayers
from mirage_ds.model.presets import PRESETS, preset
from mirage_ds.plan.activations import splits
from mirage_ds.plan.formulas import (
    BF16,
    Machine,
    Walk,
    flops,
    gather_calls,
    network,
    ring_bytes,
    ring_latency,
    step_calls,
    traffic,
    volume,
    walk,
)
from mirage_ds.plan.settings import Zero3, two_layers
from mirage_ds.plan.shape import Sizes, describe, read_shape, sizes

REPO = Path(__file__).parents[3]
SEVEN = sizes(read_shape("qwen2.5-vl-7b"))
KEPT = Zero3(persistence=10**12)
# Layers alone, as most of a large model is.
LAYERS = Sizes(
    (10**6,) * 7, vectors=0, layers=4, embedding=0, head=0, norm=0, vision=0,
    hidden=1000, inner=1000, heads=1, kv_heads=1, head_width=1000,
)  # fmt: skip
# The nano that benchmarks.volumes runs has as many tokens.
NANO_ROWS = 512
PLAIN = Machine("plain", 8, 1e12, 80e9, 1e12, 4e9, 1e9)


def nano() -> dict[str, Any]:
    config = preset("nano")
    config["text_config"]["vocab_size"] = NANO_ROWS
    return config


NANO = sizes(describe(nano(), "nano"))


def whole(config: dict[str, Any]) -> Any:
    family = FAMILIES[config["model_type"]]
    values = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return family.model_class()(family.config_class()(**values))


# ----------------------------------------------------------------------------------------------------------- elements


@pytest.mark.parametrize("name", PRESETS)
def test_counts_are_those_of_transformers(name: str) -> None:
    config = preset(name)
    config["text_config"]["vocab_size"] = config["text_config"]["vocab_size"] or NANO_ROWS
    model, counted = whole(config), sizes(describe(config, name))
    vision = sum(p.numel() for p in model.model.visual.parameters())
    assert counted.vision == vision
    assert counted.text == model.num_parameters() - vision
    layer = model.model.language_model.layers[0]
    walked = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.o_proj]
    walked += [layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]
    assert counted.matrices == tuple(module.weight.numel() for module in walked)
    assert counted.layer + counted.vectors == sum(p.numel() for p in layer.parameters())
    whole_weights = len(list(model.parameters())) - len(list(model.model.visual.parameters()))
    assert step_calls(counted, KEPT) == whole_weights
    layers = DecoderLayers(model.model.language_model.layers)
    enough = next(tokens for tokens in range(1, 10**5) if splits(counted, tokens))
    assert [layers.defers_more_than_gradients(tokens) for tokens in (enough - 1, enough)] == [False, True]


def test_seven_billion_has_the_published_total() -> None:
    assert (SEVEN.text + SEVEN.vision, SEVEN.vision) == (8_292_166_656, 676_550_144)


# ------------------------------------------------------------------------------------------------------------ traffic


def test_walks_of_each_stage() -> None:
    assert walk("sft", 4) == walk("stage1", 4, runs=3) == Walk(1, 0)
    assert walk("stage2", 4) == Walk(5, 3)
    assert walk("stage2", 4, runs=2) == Walk(9, 6)
    assert walk("stage2", 1) == Walk(2, 0)
    assert [walk("stage2", 4, 2, together) for together in (0, 1, 9)] == [Walk(1, 0), Walk(3, 0), Walk(9, 0)]


# Gathered over Ψ in one micro-step, counted by `python -m benchmarks.volumes` (DeepSpeed 0.19.8, two gloo ranks).
@pytest.mark.parametrize(
    ("stage", "zero", "counted"),
    [
        ("sft", NANO_KEPT, 0.00),
        ("sft", RELEASED, 1.84),
        ("stage2", NANO_KEPT, 0.00),
        ("stage2", RELEASED, 9.21),
        ("stage2", replace(RELEASED, max_live=0, reuse=0), 9.51),
    ],
)
def test_volumes_bound_what_deepspeed_gathered(stage: str, zero: Zero3, counted: float) -> None:
    model = NANO
    assert (sum(model.matrices), model.text) == (LAYER, 854_144)
    moved = volume(model, walk(stage, 4), zero)
    bound = moved.gathered / model.text
    # What is left of the forward when backward begins: less than the two layers that may stay.
    reused = min(bound, zero.reuse / model.text)
    assert bound - reused - 0.005 <= counted <= bound + 0.005
    assert moved.reduced == model.text


def test_released_volumes_are_two_walks_a_pass() -> None:
    for k in (4, 8):
        moved = volume(LAYERS, walk("stage2", k), Zero3())
        assert [number / LAYERS.text for number in moved] == [k + 1, k + 1, 1, 0]


def test_what_both_backwards_have_is_reduced_twice() -> None:
    for model in (SEVEN, NANO):
        walked = walk("stage2", 4)._replace(split=True)
        # A matrix that is embedding and head gets a gradient in each.
        apart = SEVEN.embedding + SEVEN.head if model is SEVEN else 0
        assert volume(model, walked, KEPT).reduced == 2 * model.text - apart


def test_shipped_files_keep_and_release_as_their_page_says() -> None:
    # Of small models no matrix is above the released recipes' threshold, unless a CPU runs them.
    for name in (name for name in PRESETS if name.startswith("qwen")):
        model = sizes(read_shape(name))
        limits = {}
        for path in recipes():
            values = json.loads(path.read_text())
            fill_limits(values, two_layers(model))
            zero = values["zero_optimization"]
            if zero["stage"] == 3:
                limits[path.stem] = Zero3(**zero)
        kept = {"zero3_kept", "zero3_kept_bf16_states"}
        # A small model's matrices are all below the released recipes' 100,000 too: a run on a CPU lowers it.
        assert {
            file for file, found in limits.items() if found.persistence == KEEPS_ALL and found.resident(model)
        } == kept
        for file in limits.keys() - kept:
            assert volume(model, walk("stage1", 4), limits[file]).backward <= model.text * 1.2
            assert limits[file].max_live < model.text


def test_only_all_matrices_together_are_kept() -> None:
    assert NANO_KEPT.resident(NANO)
    assert Zero3(persistence=max(SEVEN.embedding, *SEVEN.matrices)).resident(SEVEN)
    assert not Zero3(persistence=max(SEVEN.matrices)).resident(SEVEN)
    assert not Zero3(max_live=10**12, reuse=10**12).resident(SEVEN)


def test_small_matrices_stay_whole() -> None:
    model = NANO
    moved = volume(model, Walk(1, 0), replace(RELEASED, persistence=20_000))
    # Only gate, up, down and the embedding are above the threshold; the embedding is the head too.
    assert moved.forward == 4 * 3 * 128 * 384 + 2 * NANO_ROWS * 128


def test_a_layer_comes_in_one_call_or_in_several() -> None:
    # Counted by benchmarks.volumes: with a layer ahead, with 0.2 of one, with nothing.
    for ahead, counted in ((LAYER, 42), (LAYER // 5, 110), (0, 44)):
        found = gather_calls(NANO, walk("stage2", 4), replace(RELEASED, prefetch=ahead))
        assert found == pytest.approx(counted, rel=0.06)
    walked, room = walk("stage2", 4), 2 * SEVEN.layer
    visits = 2 * (5 * 28 + 2)
    # Nothing fits beside the present layer; all of the next does; q, k, v, o and gate come first, in backward then up,
    # and the rest when it is needed.
    for ahead, calls in ((0, visits), (10**9, visits), (5 * 10**7, 5 * 28 * (2 + 3) + 4)):
        assert gather_calls(SEVEN, walked, Zero3(max_live=room, prefetch=ahead)) == calls
    assert gather_calls(SEVEN, walked, KEPT) == 0
    # Five vectors a layer and the final norm are whole, kept matrices too.
    assert (step_calls(SEVEN, Zero3()), step_calls(SEVEN, KEPT)) == (28 * 5 + 1, 28 * 12 + 3)


def test_one_rank_moves_nothing() -> None:
    assert traffic(SEVEN, walk("stage2", 4), Zero3(), ranks=1) == (0, 0, 0, 0)
    assert network(traffic(SEVEN, walk("stage2", 4), Zero3(), 1), PLAIN._replace(gpus=1), 1).total == 0
    assert ring_bytes(100, ranks=1) == ring_latency(1, 1) == 0


def test_what_is_kept_is_gathered_once_a_step_and_the_rest_in_each_micro_step() -> None:
    for zero, gathered in ((KEPT, [1, 1]), (Zero3(), [2, 8])):
        one, four = (traffic(SEVEN, Walk(1, 0), zero, 16, steps) for steps in (1, 4))
        for found, steps, wanted in zip((one, four), (1, 4), gathered, strict=True):
            assert found.everywhere / SEVEN.text == pytest.approx(wanted + steps, rel=1e-3)
        # 7.6e9 / 5e8 buckets.
        assert four.everywhere_calls - one.everywhere_calls == 3 * (gather_calls(SEVEN, Walk(1, 0), zero) + 16)
        assert one.everywhere_calls == gather_calls(SEVEN, Walk(1, 0), zero) + step_calls(SEVEN, zero) + 16


def test_hpz_gathers_once_among_all_ranks() -> None:
    walked = walk("stage2", 4)
    # benchmarks.volumes: what is kept always is; of released weights the first gather in the step.
    gathered = volume(SEVEN, walked, Zero3()).gathered
    for zero, inside in ((KEPT, 0), (Zero3(), 3 * gathered - SEVEN.text + volume(SEVEN, walked, Zero3()).step)):
        moved = traffic(SEVEN, walked, replace(zero, hpz=8), ranks=64, micro_steps=3)
        assert (moved.everywhere, moved.in_node) == (4 * SEVEN.text, inside)
    assert traffic(SEVEN, walked, Zero3(hpz=8), 8) == traffic(SEVEN, walked, Zero3(), 8)


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 2), (1, 8), (2, 8), (3, 4)])
def test_ring_passed_by_hand(nodes: int, gpus: int) -> None:
    ranks = nodes * gpus
    held = [{rank} for rank in range(ranks)]
    sent, into_node, hops = [0] * ranks, [0] * nodes, 0
    passing = list(range(ranks))
    while any(len(one) < ranks for one in held):
        passing = [passing[rank - 1] for rank in range(ranks)]
        for rank in range(ranks):
            sent[rank - 1] += 1
            into_node[rank // gpus] += rank % gpus == 0 and nodes > 1
            held[rank].add(passing[rank])
        hops += 1
    elements = 7 * ranks
    assert {number * 7 * BF16 for number in sent} == {ring_bytes(elements, ranks)}
    if nodes > 1:
        assert {number * 7 * BF16 for number in into_node} == {ring_bytes(elements, ranks)}
    # A chunk's way round: one hop less than ranks, one between nodes less than nodes.
    slow = (nodes - 1) * 14e-6
    assert ring_latency(nodes, gpus) == pytest.approx(8.4e-6 + slow + (hops - (nodes - 1)) * 3.4e-6)


def test_seconds_are_bytes_over_the_slowest_link() -> None:
    moved = traffic(LAYERS, Walk(1, 0), Zero3(hpz=8), ranks=16)
    assert (moved.everywhere, moved.in_node) == (2 * LAYERS.text, LAYERS.text)
    took = network(moved, PLAIN, nodes=2, achieved=0.5)
    assert took.transfer == pytest.approx(2 * (56e6 * 2 * 15 / 16 / 1e9 + 28e6 * 2 * 7 / 8 / 4e9))
    one = network(traffic(LAYERS, Walk(1, 0), Zero3(), 8), PLAIN, nodes=1)
    assert one.transfer == pytest.approx(volume(LAYERS, Walk(1, 0), Zero3()).gathered * 2 * 7 / 8 / 4e9 + 0.01225)
    assert took.latency == pytest.approx(
        moved.everywhere_calls * ring_latency(2, 8) + moved.in_node_calls * ring_latency(1, 8)
    )


# --------------------------------------------------------------------------------------------------------- arithmetic


def test_flops_are_those_that_torch_counts() -> None:
    model, tokens = whole(nano()), 48
    language = model.model.language_model
    for layer in language.layers:
        layer.self_attn.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter:
        embeddings = torch.randn(1, tokens, 128, device="meta", requires_grad=True)
        hidden = language(inputs_embeds=embeddings).last_hidden_state
        model.lm_head(hidden[:, :10]).sum().backward()
    # Eager attention computes all keys of the row. Without checkpointing: forward and twice that in backward.
    assert counter.get_total_flops() == flops(NANO, tokens, 10, keys=tokens, checkpointing=False)
    assert flops(SEVEN, 1) == 4 * 2 * 28 * SEVEN.layer
    assert flops(SEVEN, 1, labelled=1) - flops(SEVEN, 1) == 8 * 152_064 * 3584


def test_break_even_is_where_arithmetic_takes_that_long() -> None:
    walked = walk("stage2", 4)
    tokens = break_even_tokens(90.0, SEVEN, walked, PLAIN, labelled=0.2, keys=250, used=0.5)
    assert compute_seconds(SEVEN, walked, PLAIN, tokens, 0.2 * tokens, 250, 0.5) == pytest.approx(90.0)
    assert break_even_tokens(0.05, SEVEN, walked, PLAIN, labelled=0.2, keys=250) == 0
    thin = compute_seconds(SEVEN, walked, PLAIN, 0) / 3
    # Read forward and backward in each of the three; the gradient read and written once.
    assert thin == pytest.approx((2 + 2 / 3) * 28 * SEVEN.layer * 2 / 1e12)


# ------------------------------------------------------------------------------------------------------------- memory


def test_memory_of_a_gpu() -> None:
    kept = memory(SEVEN, KEPT, ranks=8)
    assert kept.shard == SEVEN.text * 18 / 8
    assert kept.gathered == 2 * SEVEN.text
    assert kept.gradients == 2 * 5 * 10**8
    assert kept.secondary == 0
    assert kept.total == pytest.approx(33.4e9, rel=0.01)
    released = memory(SEVEN, Zero3(hpz=8), ranks=64)
    assert (released.gathered, released.gradients) == (2e9, 1e9)
    assert released.secondary == 2 * SEVEN.text / 8


def test_checkpoint_is_master_weights_and_moments() -> None:
    # Nano, two ranks, bf16: two files of 5,130,117 bytes for 854,144 elements.
    assert checkpoint_bytes(NANO) == pytest.approx(2 * 5_130_117, rel=2e-3)


# ----------------------------------------------------------------------------------------------------------- the page


def test_page_holds_what_the_command_prints() -> None:
    printed = CliRunner().invoke(main, ["--markdown", "--nodes", "1,4,32,128"], catch_exceptions=False)
    tables = [part.strip() for part in printed.output.split("\n\n") if part.startswith("|")]
    page = (REPO / "docs/scaling.md").read_text()
    # The page says in words what a call and a checkpoint cost and how many tokens a GPU needs.
    shown = [table for table in tables if table.splitlines()[0] in page]
    assert (len(tables), len(shown)) == (6, 3)
    for table in shown:
        assert table in page


def test_command_draws_and_refuses(tmp_path: Path) -> None:
    file = tmp_path / "figure.png"
    assert CliRunner().invoke(main, ["--nodes", "1,2", "--figure", str(file)]).exit_code == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    refused = CliRunner().invoke(main, ["--nodes", "1,x"])
    assert refused.exit_code == 2
    assert "'1,x' is no list of numbers" in refused.output


def test_command_needs_no_torch() -> None:
    code = "import sys, benchmarks.scaling; print(*sorted({'torch', 'transformers', 'deepspeed'} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
