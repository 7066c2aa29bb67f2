"""Adapters under ZeRO on two ranks: what is trained and kept, resumed, merged, and read by plain PEFT."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from support.group import Group
from support.on_disk import log_of
from transformers import AutoModelForImageTextToText

from mirage_ds import train
from mirage_ds.config.run import RunConfig
from mirage_ds.data.encode import LATENT_TOKENS
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.engine.save import export_folder
from mirage_ds.engine.versions import RECOMPUTES_FROZEN
from mirage_ds.errors import UserError
from mirage_ds.files import TRAINED_KEY
from mirage_ds.model.load import check_folder
from mirage_ds.run.settings import Run

pytestmark = pytest.mark.skipif(
    Version(version("deepspeed")) < Version(RECOMPUTES_FROZEN),
    reason=f"adapters under ZeRO-3 need deepspeed>={RECOMPUTES_FROZEN}",
)
REPO = Path(__file__).parents[2]
K, STEPS, RANK = 2, 4, 4
BASE: dict[str, Any] = dict(
    latent_size=K, stage="stage2", global_batch_size=3, micro_batch_size=1, max_steps=STEPS, warmup_steps=0,
    learning_rate=1e-2, num_workers=0, report_to=["none"], save_every=2, lora_rank=RANK,
)  # fmt: skip


def _train(world: Any, settings: dict[str, Any]) -> dict[str, Any] | str:
    """Train; elements of all parameters, of those trained, and of AdamW's moments on this rank; or the refusal."""
    config = RunConfig(**settings)
    try:
        run = Run(config, world)
        data, learner = train.open_run(run)
    except UserError as error:
        return str(error)
    train.train(run, data, learner)
    named = [(p, getattr(p, "ds_numel", p.numel())) for p in learner.engine.module.parameters()]
    inner = getattr(learner.engine.optimizer, "optimizer", learner.engine.optimizer)
    states = [tensor for state in inner.state.values() for tensor in state.values() if isinstance(tensor, torch.Tensor)]
    found = dict(
        all=sum(size for _, size in named),
        trained=sum(size for p, size in named if p.requires_grad),
        moments=sum(tensor.numel() for tensor in states if tensor.numel() > 1),
        gradients=[p.grad is not None for p, _ in named if not p.requires_grad],
    )
    learner.engine.destroy()
    return found


class Runs:
    def __init__(self, group: Group, base: dict[str, Any], scratch: Path):
        self.group, self.base, self.scratch = group, base, scratch

    def train(self, out: Path, **settings: Any) -> Any:
        return self.group.run(_train, self.base | dict(save_model_path=out) | settings, timeout_s=200)


@pytest.fixture(scope="module")
def runs(group: Group, nano: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    scratch = tmp_path_factory.mktemp("lora")
    return Runs(group, BASE | dict(model=str(nano), data_path=mixed, cache_dir=scratch / "cache"), scratch)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> tuple[Path, Any]:
    """The uninterrupted run, with what it decodes on the way, and what it holds."""
    out = runs.scratch / "whole"
    more = dict(eval_data_path=runs.base["data_path"], eval_every=2)
    return out, runs.train(out, **more)


def tokens_of(folder: Path, data: Path) -> list[int]:
    encoder = load_encoder([str(folder)], ImageFinder.beside(data, None), "stage2", K)
    return [encoder.id_of(token) for token in LATENT_TOKENS]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def test_only_adapters_and_rows_are_trained_and_have_states(whole: tuple[Path, Any], nano: Path) -> None:
    _, ranks = whole
    text = AutoModelForImageTextToText.from_pretrained(nano).model.language_model
    linear = [m for name, m in text.named_modules() if name.startswith("layers.") and isinstance(m, torch.nn.Linear)]
    # Tied: one set of rows.
    wanted = sum(RANK * (m.in_features + m.out_features) for m in linear) + 3 * text.config.hidden_size
    assert [one["trained"] for one in ranks] == [wanted, wanted]
    assert ranks[0]["all"] == wanted + sum(p.numel() for p in text.parameters())
    # Two moments, half on each rank, padded by less than an element a parameter and rank.
    assert all(0 <= one["moments"] - wanted < 2 * 2 * (2 * len(linear) + 1) for one in ranks)
    assert not any(flag for one in ranks for flag in one["gradients"])


def test_merged_folder_is_the_base_but_for_what_was_trained(whole: tuple[Path, Any], nano: Path, mixed: Path) -> None:
    out, _ = whole
    # The adapter beside it stands in no one's way.
    check_folder(out)
    before, after = load_file(nano / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    layers = {n for n in before if n.startswith("model.layers.") and before[n].ndim == 2}
    assert moved == layers | {"model.embed_tokens.weight"}
    rows = (before["model.embed_tokens.weight"] != after["model.embed_tokens.weight"]).any(dim=1).nonzero()[:, 0]
    # The pad too: its embedding is never an input, but the head says that it does not follow.
    assert sorted(rows.tolist()) == sorted(tokens_of(nano, mixed))
    said = json.loads((out / "config.json").read_text())[TRAINED_KEY]["lora"]
    assert said["rank"] == RANK
    assert said["alpha"] == 2 * RANK
    assert "LoRA of rank 4, alpha 8, on " in (out / "README.md").read_text()


def test_adapter_on_the_base_in_plain_peft_is_the_merged_model(
    whole: tuple[Path, Any], nano: Path, mixed: Path
) -> None:
    from peft import PeftModel

    out, _ = whole
    tokens = tokens_of(nano, mixed)
    ids = torch.tensor([[5, 9, tokens[1], tokens[0], tokens[2], 11, 40, 7, 3, 100]])
    merged, told = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    base = AutoModelForImageTextToText.from_pretrained(nano)
    plain = logits(base, ids)
    adapted = PeftModel.from_pretrained(base, out / "adapter")
    torch.testing.assert_close(logits(adapted, ids), logits(merged, ids), rtol=0, atol=1e-5)
    assert (logits(merged, ids) - plain).abs().max() > 1e-2
    wrong = [name for name, _ in adapted.named_parameters() if "lora" in name and "visual" in name]
    assert not wrong


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    runs: Runs, whole: tuple[Path, Any], tmp_path: Path
) -> None:
    done, out = whole[0], tmp_path / "stopped"
    place = out / "run/checkpoints/global_step2"
    shutil.copytree(done / "run/checkpoints/global_step2", place)
    (place.parent / "latest").write_text("global_step2")
    kept = (done / "run/log.jsonl").read_text().splitlines(keepends=True)
    (out / "run/log.jsonl").write_text("".join(line for line in kept if json.loads(line)["step"] <= 2))
    more = dict(eval_data_path=runs.base["data_path"], eval_every=2, resume="auto")
    said, _ = runs.train(out, lora_rank=RANK + 1, **more)
    assert "was written with --lora_rank, --lora_alpha, --lora_targets {'rank': 4" in said
    assert not isinstance(runs.train(out, **more)[0], str)
    assert log_of(out, evaluations=None) == log_of(done, evaluations=None)
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (out / file).read_bytes() == (done / file).read_bytes(), file
    # The base's weights are not in it.
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    assert size < (done / "model.safetensors").stat().st_size


def test_exported_checkpoint_equals_the_saved_model(whole: tuple[Path, Any], nano: Path, tmp_path: Path) -> None:
    out, made = whole[0], tmp_path / "made"
    place = out / f"run/checkpoints/global_step{STEPS}"
    export_folder(place, made, None, None)
    for file in (
        "model.safetensors",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "config.json",
    ):
        assert (made / file).read_bytes() == (out / file).read_bytes(), file
    # Another base would give a model that nobody has trained.
    other = tmp_path / "other"
    shutil.copytree(nano, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight in .* is not what .* was trained on"):
        export_folder(place, tmp_path / "new", None, other)
    assert not (tmp_path / "new").exists()


def test_a_base_that_contradicts_itself_is_said_on_both_ranks(runs: Runs, nano: Path, tmp_path: Path) -> None:
    base = shutil.copytree(nano, tmp_path / "base")
    save_file(load_file(nano / "model.safetensors"), base / "more.safetensors")
    said = runs.train(tmp_path / "out", model=str(base))
    assert said[0] == said[1]
    assert said[0].startswith(f"{base}: more.safetensors would not be opened, only model.safetensors; ")
    assert not (tmp_path / "out").exists()


def test_another_base_is_no_run_to_go_on_with(runs: Runs, whole: tuple[Path, Any], nano: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "stopped", tmp_path / "other"
    shutil.copytree(whole[0] / f"run/checkpoints/global_step{STEPS}", out / f"run/checkpoints/global_step{STEPS}")
    (out / "run/checkpoints/latest").write_text(f"global_step{STEPS}")
    shutil.copytree(nano, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    said, _ = runs.train(out, resume="auto", model=str(other))
    assert "language_model.layers.1.mlp.up_proj.base_layer.weight is not that of " in said


JSONS = sorted(file.name for file in (REPO / "ds_configs").glob("*.json"))


# `make test` takes the stages' own JSON and the one with offload.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("zero3.json", "zero3_offload.json") else pytest.mark.slow)
        for name in JSONS
    ],
)
def test_every_shipped_json_trains_adapters_alike(
    runs: Runs, whole: tuple[Path, Any], tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    found = runs.train(out, deepspeed=REPO / "ds_configs" / name, max_steps=2, lr_scheduler="constant", save_every=1)
    assert not isinstance(found[0], str), found[0]
    lines = log_of(out)
    assert lines[1]["loss"] < lines[0]["loss"]
    first = log_of(whole[0])[0]
    assert lines[0]["loss"] == pytest.approx(first["loss"], abs=0.05 if "bf16" in name else 1e-5)
    # The checkpoint holds what the folder was merged from.
    export_folder(out / "run/checkpoints/global_step2", tmp_path / "made", None, None)
    one, other = load_file(out / "model.safetensors"), load_file(tmp_path / "made/model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_second_stage_starts_from_the_merged_folder(runs: Runs, nano: Path, helped: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "stage1", tmp_path / "stage2"
    assert not isinstance(runs.train(first, stage="stage1", data_path=helped, max_steps=2)[0], str)
    # Decoding while it trains merges in memory.
    more = dict(eval_data_path=runs.base["data_path"], eval_every=1, eval_decode=2, eval_new_tokens=4, task="boxed")
    found = runs.train(second, load_model_path=first, max_steps=1, lora_rank=2, **more)
    assert not isinstance(found[0], str), found[0]
    assert json.loads((second / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(first)
    assert json.loads((second / "config.json").read_text())[TRAINED_KEY]["lora"]["rank"] == 2
