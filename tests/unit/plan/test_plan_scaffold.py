"""What scaffold and stage1 with its own states hold and move, against counts by hand and against the other stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mirage_ds.engine.ds_config import recipes
from mirage_ds.model.load import read_config
from mirage_ds.model.target_encoder import TargetEncoder, size_of
from mirage_ds.plan.activations import total
from mirage_ds.plan.fit import Plan, Question, judge
from mirage_ds.plan.report import as_json, headline
from mirage_ds.plan.shape import encoder_parameters, read_shape, sizes
from mirage_ds.plan.spec import PlanSpec

K = 4


def plan(stage: str, json: str = "zero3", **given: Any) -> tuple[Question, Plan]:
    (path,) = [one for one in recipes() if one.stem == json]
    asked = Question(PlanSpec(model="qwen2.5-vl-7b", stage=stage, deepspeed=path, latent_size=K, **given))
    return asked, judge(asked, path)


def test_the_encoder_has_the_parameters_that_are_planned(nano: Path) -> None:
    with torch.device("meta"):
        encoder = TargetEncoder(size_of(read_config(nano), K))
    found = [[p.numel() for p in encoder.parameters() if (p.ndim > 1) is matrices] for matrices in (True, False)]
    assert encoder_parameters(sizes(read_shape(str(nano))), K) == found


def test_scaffold_holds_the_model_once_and_states_of_the_encoder() -> None:
    asked, found = plan("scaffold")
    _, stage1 = plan("stage1")
    width, ranks = 3584, 8
    encoder = K * width + 3 * width**2 + width
    assert asked.micro.encoder == encoder
    gpu = found.held.states.gpu
    # bf16 weights in eighths; of the encoder gradients, master weights and two moments.
    assert gpu["frozen weights (b Ψ / W under ZeRO-3)"] == 2 * asked.model.text // ranks
    assert gpu["master weights (m Ψ / W)"] == pytest.approx(4 * encoder / ranks, abs=4 * 8)
    assert gpu["moments (2 s Ψ / W)"] == pytest.approx(8 * encoder / ranks, abs=8 * 8)
    assert found.held.checkpoint.all == pytest.approx(12 * encoder, rel=1e-3)
    assert found.held.gpu < stage1.held.gpu
    assert found.step.flops < stage1.step.flops
    # Gathered as in stage1; of gradients the encoder's alone are reduced.
    assert found.step.nvlink_bytes < stage1.step.nvlink_bytes
    # The whole 7B has 8.29 B parameters.
    assert "0.04 B trained, 8.29 B frozen; scaffold, k = 4" in headline(asked)
    assert f'"trained": {encoder}' in as_json(asked, [found], [])


def test_scaffold_keeps_all_features_of_helpers() -> None:
    kept = {stage: plan(stage, rows=10, image_tokens=256)[1].held.kept for stage in ("scaffold", "stage1")}
    feature = 3584 * 2
    assert kept["scaffold"] == 10 * (256 + 256) * feature
    assert kept["stage1"] == 10 * (256 + K) * feature


def test_own_states_cost_the_passes_of_stage2() -> None:
    for json in ("zero3", "zero3_kept"):
        asked, found = plan("stage1", json, feed="own")
        stage2, other = plan("stage2", json)
        assert asked.micro.passes == stage2.micro.passes
        assert (asked.micro.split, asked.micro.handed_on) == (stage2.micro.split, stage2.micro.handed_on)
        assert found.step.seconds == other.step.seconds
        # Beside that only what the latents are compared with.
        more = total(found.held.backward) - total(other.held.backward)
        assert 0 <= more < 64 << 20
    with pytest.raises(ValidationError, match="--feed own is for --stage stage1, this plan is of sft"):
        PlanSpec(model="nano", stage="sft", feed="own")


def test_latents_made_together_cost_their_own_passes() -> None:
    for runs in (1, 2):
        rows = 8192 // 500
        given: dict[str, Any] = dict(latent_runs=runs)
        in_turn, usual = plan("stage2", **given)
        for together in (0, 1, 2, K, K + 5):
            asked, found = plan("stage2", latent_passes=together, **given)
            passes = asked.micro.passes
            assert len(passes) == runs * min(together, K) + 1
            # A slot runs once, and once more in each pass until its input is there for good.
            again = sum(min(together, slot + 1) for slot in range(K))
            assert asked.micro.tokens == rows * (500 + runs * again)
            assert max(max(one.keys) for one in passes) == 500
            assert asked.micro.labelled == in_turn.micro.labelled
            assert f"k = 4 in {together} passes together" in headline(asked)
            # Fewer walks over all weights are gathered.
            assert found.step.nvlink_bytes < usual.step.nvlink_bytes or together >= K
            # By hand: the last pass has a row's last slots, then its text, of which all but the last predict a label.
            behind = 500 - 400 - (K + 50 * (runs - 1))
            wanted = rows * ((100 - K * runs) - behind) if together else 0
            assert asked.micro.handed_on == wanted
    with pytest.raises(ValidationError, match="--latent_passes 2 is for stage2 and --feed own, this plan is of stage1"):
        PlanSpec(model="nano", stage="stage1", latent_passes=2)


def test_hidden_images_cost_keys_and_no_pass() -> None:
    asked, found = plan("stage1", bottleneck=True, images=1, image_tokens=200)
    usual, other = plan("stage1", images=1, image_tokens=200)
    (one,), (whole,) = asked.micro.passes, usual.micro.passes
    rows, length = asked.micro.rows, whole.queries[0]
    first = int(length * 0.8) + K
    # A row's prompt with its latents, then its text, which sees all but 200 features and the two tokens around them.
    assert one.queries == (first, length - first) * rows
    assert one.keys == (first, length - 202) * rows
    # Joined keys and values of a layer, and the smaller part of them beside.
    assert found.held.backward["activations at the height"] > other.held.backward["activations at the height"]
    deep, plain = plan("stage2", bottleneck=True)[0].micro, plan("stage2")[0].micro
    assert [one.tokens for one in deep.passes] == [one.tokens for one in plain.passes]
    assert [deep.fed(number) for number in range(1, K + 1)] == [plain.rows] * K
    with pytest.raises(ValidationError, match="--bottleneck is for --stage stage1 and stage2, this plan is of rl"):
        PlanSpec(model="nano", stage="rl", bottleneck=True)
