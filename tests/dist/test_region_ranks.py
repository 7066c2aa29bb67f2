"""stage1 on regions of the input image as runs: ZeRO-3 on two ranks against one, kept or not, and what follows it.

Every run is train.py's own `train`; what is compared is what it leaves on the disk.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.group import Group
from support.on_disk import log_of
from support.pictures import noise
from support.records import write_jsonl
from test_resume import _train

STEPS = 4
# 6 rows, 3 a step, one a micro-step: on two ranks one is idle in every other micro-step.
BASE: dict[str, Any] = dict(
    stage="stage1", compress_strategy="region", latent_loss="l2", global_batch_size=3, micro_batch_size=1,
    max_steps=STEPS, warmup_steps=1, learning_rate=3e-3, adam_eps=1e-3, num_workers=0, report_to=["none"],
)  # fmt: skip


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose regions have 1, 2, 3, 4, 6 and 9 cells of 28 px."""
    folder = tmp_path_factory.mktemp("boxed")
    rows = []
    for number, (across, down) in enumerate(((1, 1), (2, 1), (1, 3), (2, 2), (3, 2), (3, 3))):
        noise((84, 84), 60 + number, number).save(folder / f"a{number}.png")
        row = {"text_input": f"Where{' to' * number}?", "text_output": r"\boxed{L}", "image_input": f"a{number}.png"}
        rows.append(row | {"region": [0, 0, 28 * across, 28 * down]})
    return write_jsonl(folder / "boxed.jsonl", rows)


@pytest.fixture(scope="module")
def base(nano: Path, boxed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return BASE | dict(model=str(nano), data_path=boxed, cache_dir=tmp_path_factory.mktemp("region") / "cache")


def run(group: Group, base: dict[str, Any], out: Path, **settings: Any) -> str | None:
    said = group.run(_train, base | dict(save_model_path=out) | settings, timeout_s=180)
    assert len(set(said)) == 1
    return said[0]


@pytest.mark.parametrize("reduction", ["sample", "token"])
def test_two_ranks_are_one_kept_or_not(
    group: Group, one_rank: Group, base: dict[str, Any], tmp_path: Path, reduction: str
) -> None:
    two, one, off = (tmp_path / name for name in ("two", "one", "off"))
    assert run(group, base, two, reduction=reduction) is None
    assert run(one_rank, base, one, reduction=reduction) is None
    assert run(group, base, off, reduction=reduction, feature_cache="off") is None
    assert (off / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    first, second = load_file(two / "model.safetensors"), load_file(one / "model.safetensors")
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=1e-5, msg=name)
    for line, other in zip(log_of(two), log_of(one), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert line["loss"] == pytest.approx(0.1 * line["ce"] + line["sim"], rel=1e-5)


def test_the_folder_says_the_longest_region_and_nothing_feeds_it_back(
    group: Group, base: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    eval_ = dict(eval_data_path=base["data_path"], eval_every=2, eval_decode=2, eval_new_tokens=12)
    assert run(group, base, out, max_steps=2, **eval_) is None
    trained = json.loads((out / "config.json").read_text())["mirage"]
    assert (trained["compress_strategy"], trained["latent_size"]) == ("region", 9)
    (line,) = log_of(out, evaluations=True)
    assert line["eval_loss"] == pytest.approx(0.1 * line["eval_ce"] + line["eval_sim"], rel=1e-5)
    # Blocks of different lengths are not measured together.
    assert not any("rank" in name or "cosine" in name for name in line)
    again = dict(load_model_path=out, compress_strategy="average", latent_loss="cosine")
    said = run(group, base, tmp_path / "next", **again, stage="stage2")
    assert said == (
        f"{out} was trained with --compress_strategy region, and --stage stage2 feeds back k latents a block; start "
        "from a model of another strategy"
    )
    assert not (tmp_path / "next").exists()


def test_a_row_without_a_region_is_said(group: Group, base: dict[str, Any], mixed: Path, tmp_path: Path) -> None:
    said = run(group, base, tmp_path / "out", data_path=mixed)
    # The six others have no picture, which is another fault.
    assert "region: missing, and its features are what the latents learn in 6 of 12 records" in said
    assert "write [left, top, right, bottom] in pixels of the first input image" in said
    assert not (tmp_path / "out").exists()
