"""Model FLOPs against torch's own counter on the real forward and backward; peaks against their data sheets."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import OTHERS, write
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mirage_ds.data.batch import collate
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.record_files import scan
from mirage_ds.model.load import Scaffold, load_model, load_tower, read_config, shape_of
from mirage_ds.model.loss import StepCounts, objective
from mirage_ds.model.vision import features_of
from mirage_ds.plan.gpus import A100, H100_SXM, PEAKS
from mirage_ds.plan.mfu import ModelFlops, Tower, peak_flops
from mirage_ds.plan.shape import read_shape
from mirage_ds.run.step import encoding_flops

K = 4
# Image sides in patches: one window, several, and windows cut off at two edges.
GRIDS = [(1, 4, 6), (1, 8, 8), (1, 16, 24), (1, 18, 30)]


def counted(run: Any) -> int:
    """FLOPs of matrix products and attention, by torch. The counter knows SDPA's math kernel alone on a CPU.

    It does not know a product that is added in place, as what later passes leave to a weight's gradient.
    """
    added = {torch.ops.aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1]}
    with FlopCounterMode(display=False, custom_mapping=added) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["nano", *OTHERS])
def test_the_tower_costs_what_torch_counts(nano: Path, tmp_path: Path, name: str, grid: tuple[int, int, int]) -> None:
    folder = nano if name == "nano" else write(name, tmp_path / name)
    config = read_config(folder)
    tower = load_tower(folder, config, torch.float32, torch.device("cpu")).tower
    shape = Tower(shape_of(config, name))
    assert 0 < shape.full < shape.layers or name != "nano"
    pixels = torch.randn(grid[1] * grid[2], 6 * config.vision_config.patch_size**2)
    grids = torch.tensor([grid])
    with torch.no_grad():
        assert counted(lambda: features_of(tower, pixels, grids)) == shape.forward(grid)
    tower.requires_grad_(True)
    both = counted(lambda: features_of(tower, pixels, grids).sum().backward())
    assert both == shape.forward(grid) + shape.backward(grid)


@pytest.mark.parametrize("stage", ["sft", "stage1", "stage2"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_step_costs_what_torch_counts(nano: Path, mixed: Path, stage: str, trained: bool) -> None:
    """SDPA's math kernel also computes the keys that the mask hides; with them the numbers are the same, but for a
    trained tower's blank image (+0.5 %) and stage2's passes, whose queries have fewer hidden keys (−0.7 %)."""
    encoder = load_encoder([str(nano)], ImageFinder.beside(mixed, None), stage, K)
    records = [record for record in scan(mixed)[0] if stage != "stage1" or record.image_output][:4]
    samples = [encoder.encode(record, row) for row, record in enumerate(records)]
    passes = K + 1 if stage == "stage2" else 1
    batch = collate(samples, passes, encoder.dummy(passes))
    device = torch.device("cpu")
    tower = None if trained else load_tower(nano, read_config(nano), torch.float32, device)
    loaded = load_model(
        nano, stage=stage, dtype=torch.float32, device=device, tower=tower, attention="sdpa", checkpointing=False,
        train_vision=trained, reduction="sample", loss_chunk_bytes=1 << 28,
    )  # fmt: skip
    labels = int(batch.label_count.sum())
    counts = StepCounts(len(samples), labels, sum(k for one in samples for _, k in one.runs))

    def run() -> None:
        sums = loaded.model(batch if tower is None else tower.attach(batch))
        objective(sums, counts, 0.1, "sample")[0].backward()

    flops = ModelFlops(read_shape(str(nano)), trained, False)
    lengths = [len(sample.input_ids) for sample in samples]
    ours = flops.of_text(lengths, labels) + encoding_flops(flops, batch)
    hidden = 3 * 4 * flops.text.width * flops.text.layers * sum(t * (t - 1) // 2 for t in lengths)
    found = counted(run)
    assert found == pytest.approx(ours + hidden, rel=0.01 if trained or stage == "stage2" else 1e-12)
    # More than the tolerance: attention counted twice or not at all is seen.
    assert hidden > 0.04 * ours


def test_a_frozen_model_costs_what_torch_counts(nano: Path, mixed: Path) -> None:
    """scaffold: no gradient of the model's weights; what its encoder costs is counted beside."""
    encoder = load_encoder([str(nano)], ImageFinder.beside(mixed, None), "scaffold", K)
    records = [record for record in scan(mixed)[0] if record.image_output][:4]
    samples = [encoder.encode(record, row) for row, record in enumerate(records)]
    loaded = load_model(
        nano, stage="scaffold", dtype=torch.float32, device=torch.device("cpu"), attention="sdpa", checkpointing=False,
        loss_chunk_bytes=1 << 28, scaffold=Scaffold(K, 0),
    )  # fmt: skip
    batch = loaded.tower.attach(collate(samples, 1, encoder.dummy(0)))
    labels = int(batch.label_count.sum())
    counts = StepCounts(len(samples), labels, K * len(samples))

    def run() -> None:
        objective(loaded.model(batch), counts, 1.0, "sample")[0].backward()

    found = counted(run)
    given = batch.helper_features, batch.helper_grid_thw
    found -= counted(lambda: loaded.model.target_encoder(*given).sum().backward())
    flops = ModelFlops(read_shape(str(nano)), False, False, frozen_text=True)
    lengths = [len(sample.input_ids) for sample in samples]
    hidden = 3 * 4 * flops.text.width * flops.text.layers * sum(t * (t - 1) // 2 for t in lengths)
    assert found == pytest.approx(flops.of_text(lengths, labels) + hidden, rel=1e-12)


def test_images_with_kept_features_cost_nothing_and_helpers_have_a_backward_only_where_it_is_asked_for(
    nano: Path,
) -> None:
    shape = read_shape(str(nano))
    tower = Tower(shape)
    grid = (1, 8, 8)
    forward, backward = tower.forward(grid), tower.backward(grid)
    assert ModelFlops(shape, False, False).of_images([], []) == 0
    assert ModelFlops(shape, False, False).of_images([grid], [grid]) == 2 * forward
    assert ModelFlops(shape, True, False).of_images([grid], [grid]) == 2 * forward + backward
    assert ModelFlops(shape, True, True).of_images([grid], [grid]) == 2 * (forward + backward)


def test_windows_are_cut_off_at_the_edges(nano: Path) -> None:
    tower = Tower(read_shape(str(nano)))
    # One layer, windows of 2 × 2 merged tokens of 2 × 2 patches: 6 × 4 patches are windows of 4 × 4 and 2 × 4.
    vars(tower).update(embedding=0, layer=0, layers=1, full=0, width=1, merger=0, merge=2, window=2)
    assert tower.forward((1, 6, 4)) == 4 * (16**2 + 8**2)
    assert tower.forward((3, 6, 4)) == 3 * 4 * (16**2 + 8**2)
    tower.full = 1
    assert tower.forward((1, 6, 4)) == 4 * 24**2


def test_peaks_go_by_the_whole_name() -> None:
    for peak, *names in (
        (H100_SXM, "NVIDIA H100 80GB HBM3", "NVIDIA H200"),
        (A100, "NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
    ):
        for name, precision in product(names, peak._fields):
            assert peak_flops(None, name, precision) == getattr(peak, precision)
    for other in ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 D", "NVIDIA RTX 6000 Ada Generation",
                  "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H20", "cpu"):  # fmt: skip
        assert peak_flops(None, other, "bf16") is None
    for peak in PEAKS.values():
        assert peak.bf16 > 1.9 * peak.tf32 >= 1.9 * peak.fp32


def test_the_settings_win_over_the_table_and_nothing_is_guessed() -> None:
    assert peak_flops(None, "NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_flops(None, "NVIDIA H100 80GB HBM3", "fp32") == pytest.approx(66.9e12)
    assert peak_flops(2, "NVIDIA H100 80GB HBM3", "bf16") == 2e12
    assert peak_flops(0.5, None, "fp32") == 0.5e12
    assert peak_flops(None, None, "fp32") is peak_flops(None, "Some GPU", "bf16") is None
