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
from benchmarks.volumes import LAYER, TWO_LAYERS
from mirage_ds.engine.ds_config import KEEPS_ALL, fill_limits, recipes
from mirage_ds.model.family import FAMILIES
from mirage_ds.model.presets import PRESETS, preset
from mirage_ds.plan.formulas import (
    BF16,
    Machine,
    Walk,
    flops,
    gather_calls,
    network,
    ring_bytes,
    ring_latency,
    traffic,
    volume,
    walk,
)
from mirage_ds.plan.settings import Zero3, two_layers
from mirage_ds.plan.shape import Sizes, describe, read_shape, sizes

REPO = Path(__file__).parents[3]
SEVEN, LARGEST = (sizes(read_shape(f"qwen2.5-vl-{name}")) for name in ("7b", "72b"))
# By DeepSpeed's limits, and as zero3_kept.json does it.
KEPT, STAYS = Zero3(max_live=10**12, reuse=10**12), Zero3(persistence=KEEPS_ALL)
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


def test_seven_billion_has_the_published_total() -> None:
    assert (SEVEN.text + SEVEN.vision, SEVEN.vision) == (8_292_166_656, 676_550_144)


# ------------------------------------------------------------------------------------------------------------ traffic


def test_walks_of_each_stage() -> None:
    assert walk("sft", 4) == walk("stage1", 4, runs=3) == Walk(1, 0)
    assert walk("stage2", 4) == Walk(5, 3)
    assert walk("stage2", 4, runs=2) == Walk(9, 6)
    assert walk("stage2", 1) == Walk(2, 0)


# Gathered over Ψ in one micro-step, counted by `python -m benchmarks.volumes` (DeepSpeed 0.19.8, two gloo ranks).
@pytest.mark.parametrize(
    ("stage", "zero", "counted", "exact"),
    [
        ("sft", NANO_KEPT, 1.00, True),
        ("sft", TWO_LAYERS, 1.78, False),
        ("sft", replace(TWO_LAYERS, max_live=224_000, reuse=224_000), 2.01, False),
        ("sft", replace(TWO_LAYERS, max_live=0, reuse=0), 2.84, True),
        ("stage2", NANO_KEPT, 1.00, True),
        ("stage2", TWO_LAYERS, 9.15, False),
        ("stage2", replace(TWO_LAYERS, max_live=0, reuse=0), 12.97, True),
    ],
)
def test_volumes_bound_what_deepspeed_gathered(stage: str, zero: Zero3, counted: float, exact: bool) -> None:
    model = NANO
    assert (sum(model.matrices), model.text) == (LAYER, 854_144)
    moved = volume(model, walk(stage, 4), zero)
    bound = moved.gathered / model.text
    # What is left of the forward when backward begins: less than the two layers that may stay.
    reused = 0 if exact else 2 * LAYER / model.text
    assert bound - reused - 0.005 <= counted <= bound + 0.005
    assert moved.reduced == model.text


def test_released_volumes_are_two_walks_a_pass() -> None:
    # Counted on a model of four layers, k = 4, all passes checkpointed: 4.84 and 4.70 Ψ.
    moved = volume(LAYERS, walk("stage2", 4), Zero3(max_live=2 * LAYERS.layer, reuse=2 * LAYERS.layer))
    assert [number / LAYERS.text for number in moved] == [5, 5, 1]
    assert 0.9 * moved.forward <= 4.84 * LAYERS.text <= moved.forward
    assert 0.9 * moved.backward <= 4.70 * LAYERS.text <= moved.backward
    # Counted with limits of 0: 4.3 and 6.3 Ψ for k = 4, 7.0 and 10.3 for k = 8. All but a layer's last matrix twice.
    for k, forward, backward in ((4, 4.3, 6.3), (8, 7.0, 10.3)):
        moved = volume(LAYERS, walk("stage2", k), Zero3(max_live=0, reuse=0))
        assert moved.backward == (k + 1) * LAYERS.text * 13 / 7
        assert forward * LAYERS.text <= moved.forward == (k + 1) * LAYERS.text
        assert backward * LAYERS.text <= moved.backward


def test_short_reuse_gathers_the_attention_of_the_largest_twice() -> None:
    walked = walk("stage1", 4)
    assert volume(SEVEN, walked, Zero3()).backward == volume(SEVEN, walked, Zero3()).forward
    shipped, longer = (volume(LARGEST, walked, Zero3(reuse=reuse)).backward for reuse in (10**9, 2 * 10**9))
    # q, k, v, o: their way through the MLP and back is 2 · 3 · 8192 · 29568 = 1.45e9 elements.
    assert shipped - longer == 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024)


def test_shipped_files_keep_and_release_as_their_page_says() -> None:
    for name in PRESETS:
        config = preset(name)
        config["text_config"]["vocab_size"] = config["text_config"]["vocab_size"] or NANO_ROWS
        model = sizes(describe(config, name))
        limits = {}
        for path in recipes():
            values = json.loads(path.read_text())
            fill_limits(values, two_layers(model))
            zero = values["zero_optimization"]
            if zero["stage"] == 3:
                limit = zero["stage3_param_persistence_threshold"]
                found = Zero3(zero["stage3_max_live_parameters"], zero["stage3_max_reuse_distance"], persistence=limit)
                limits[path.stem] = found
        kept = {"zero3_kept", "zero3_kept_bf16_states"}
        # A small model's matrices are all below the released recipes' 100,000 too: a run on a CPU lowers it.
        assert {file for file, found in limits.items() if found.persistence == KEEPS_ALL and found.keeps(model)} == kept
        for file in limits.keys() - kept:
            # Nothing is gathered twice within a layer's backward.
            assert volume(model, walk("stage1", 4), limits[file]).backward <= model.text * 1.2
            assert limits[file].max_live < model.text


def test_one_limit_alone_does_not_keep() -> None:
    # Counted: 1.33 Ψ with max_live above Ψ and reuse 0, 1.15 Ψ with max_live 0 and reuse 3 Ψ, instead of 1.00.
    assert NANO_KEPT.keeps(NANO)
    for alone in (replace(NANO_KEPT, reuse=0), replace(NANO_KEPT, max_live=0)):
        assert not alone.keeps(NANO)
        assert volume(NANO, walk("stage2", 4), alone).gathered > 9 * NANO.text


def test_small_matrices_stay_whole() -> None:
    model = NANO
    moved = volume(model, Walk(1, 0), replace(TWO_LAYERS, persistence=20_000))
    # Only gate, up, down and the embedding are above the threshold; the embedding is the head too.
    assert moved.forward == 4 * 3 * 128 * 384 + 2 * NANO_ROWS * 128


def test_prefetching_joins_matrices() -> None:
    # 7B: q, k, v, o and gate; up; down: each the first sum above 5e7. Embedding and head are larger by themselves.
    assert gather_calls(SEVEN, walk("stage2", 4), KEPT) == 28 * 3 + 2
    assert gather_calls(SEVEN, walk("stage2", 4), Zero3()) == 2 * (5 * 28 * 3 + 2)


def test_one_rank_moves_nothing() -> None:
    assert traffic(SEVEN, walk("stage2", 4), Zero3(), ranks=1) == (0, 0, 0, 0)
    assert network(traffic(SEVEN, walk("stage2", 4), Zero3(), 1), PLAIN._replace(gpus=1), 1).total == 0
    assert ring_bytes(100, ranks=1) == ring_latency(1, 1) == 0


def test_every_micro_step_gathers_and_reduces() -> None:
    one, four = (traffic(SEVEN, Walk(1, 0), Zero3(), 16, steps) for steps in (1, 4))
    assert four == tuple(4 * number for number in one)
    assert one.everywhere / SEVEN.text == pytest.approx(3, rel=1e-3)
    assert one.everywhere_calls == gather_calls(SEVEN, Walk(1, 0), Zero3()) + 16  # 7.6e9 / 5e8


def test_weights_that_stay_are_gathered_once_a_step() -> None:
    walked = walk("stage2", 4)
    one, three = (traffic(SEVEN, walked, STAYS, ranks=64, micro_steps=steps) for steps in (1, 3))
    matrices = 28 * SEVEN.layer + SEVEN.embedding + SEVEN.head
    assert (one.everywhere, three.everywhere) == (matrices + SEVEN.text, matrices + 3 * SEVEN.text)
    # A call a matrix, whatever prefetching joins.
    assert one.everywhere_calls == 28 * 7 + 2 + 16
    assert volume(SEVEN, walked, STAYS).gathered == gather_calls(SEVEN, walked, STAYS) == 0


def test_hpz_gathers_once_among_all_ranks() -> None:
    walked, matrices = walk("stage2", 4), volume(SEVEN, walk("stage2", 4), KEPT).gathered
    # benchmarks.volumes: kept 1.00 Ψ among all ranks in the first micro-step, 0 + 1.00 in the node in the second;
    # released 1.00 + 8.15, then 9.15 in the node.
    for zero in (KEPT, Zero3()):
        gathered = volume(SEVEN, walked, zero).gathered
        moved = traffic(SEVEN, walked, replace(zero, hpz=8), ranks=64, micro_steps=3)
        assert moved.everywhere == matrices + 3 * SEVEN.text
        assert moved.in_node == 3 * gathered - matrices
    assert traffic(SEVEN, walked, replace(KEPT, hpz=8), 64) == traffic(SEVEN, walked, KEPT, 64)
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
    moved = traffic(LAYERS, Walk(1, 0), Zero3(max_live=0, reuse=3 * LAYERS.layer, hpz=8), ranks=16)
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
    assert thin == pytest.approx(2 * 28 * SEVEN.layer * 2 / 1e12)


# ------------------------------------------------------------------------------------------------------------- memory


def test_memory_of_a_gpu() -> None:
    kept = memory(SEVEN, KEPT, ranks=8)
    assert kept.shard == SEVEN.text * 18 / 8
    assert kept.gathered == 2 * SEVEN.text
    assert kept.gradients == 2 * 5 * 10**8
    assert kept.secondary == 0
    assert kept.total == pytest.approx((17.13 + 15.23 + 1) * 1e9, rel=0.01)
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
