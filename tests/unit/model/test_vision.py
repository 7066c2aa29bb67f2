"""The frozen tower's features: a function of the image alone, computed once, in few calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from gpu.watch import WAITING
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mirage_ds.data.batch import collate
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.record_files import scan
from mirage_ds.evaluate.prompts import pack
from mirage_ds.model.attention import BACKENDS, SEGMENTS_NAME
from mirage_ds.model.family import FAMILIES
from mirage_ds.model.load import attend_in_segments, load_tower, read_config
from mirage_ds.model.presets import PRESETS
from mirage_ds.model.vision import CALL_PATCHES, FrozenTower, features_of, trained_features
from mirage_ds.run import step
from mirage_ds.run.setup import Learner

CPU, META = torch.device("cpu"), torch.device("meta")
# Windows whole and cut off at one edge and at two, and images of less than a window; of one and of two merged features,
# alone these are multiplied by other kernels than among others.
SIZES = ((2, 2), (18, 20), (8, 4), (16, 8), (2, 4))
# What a neighbour may change of an image's features, relative: docs/inside.md says so.
NEIGHBOURS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# A picture of 1,024² pixels, in patches.
PICTURE = (72, 72)


def drawn(preset: str, **other: Any) -> Any:
    """A random tower of a preset's shape, as transformers makes it."""
    described = PRESETS[preset]
    family = FAMILIES[described.get("model_type", "qwen2_5_vl")]
    config = family.config_class()(vision_config=described["vision_config"] | other).vision_config
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return family.tower_class()(config).eval()


def frozen(tower: Any, call_patches: int = 0) -> FrozenTower:
    attend_in_segments(tower, "auto", CPU)
    made = FrozenTower(tower)
    made.call_patches = call_patches
    return made


def images(tower: Any, *sizes: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (P, C) and grids (n, 3)."""
    grids = torch.tensor([[1, height, width] for height, width in sizes])
    generator = torch.Generator().manual_seed(0)
    return torch.randn(int(grids.prod(-1).sum()), 6 * tower.config.patch_size**2, generator=generator), grids


def each(tower: Any, encode: Callable[..., torch.Tensor], pixels: torch.Tensor, grids: torch.Tensor) -> Any:
    """Features of each image, one by one."""
    parts = zip(pixels.split(grids.prod(-1).tolist()), grids.split(1), strict=True)
    return [encode(*part) for part in parts]


def apart(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("dtype", NEIGHBOURS)
@pytest.mark.parametrize("name", ["nano", "nano-qwen2-vl", "nano-qwen3-vl", "deep"])
def test_features_are_plain_transformers_image_by_image(name: str, dtype: torch.dtype) -> None:
    # As deep as the 7B's, where what differs has grown the most.
    shape = dict(depth=32, hidden_size=64, num_heads=2, intermediate_size=96, fullatt_block_indexes=[7, 15, 23, 31])
    exact = drawn("nano", **shape) if name == "deep" else drawn(name)
    tower, plain = copy.deepcopy(exact).to(dtype), copy.deepcopy(exact).to(dtype)
    pixels, grids = images(tower, *SIZES)
    with torch.no_grad():
        wanted = each(plain, lambda *image: features_of(plain, *image), pixels, grids)
        truth = each(exact, lambda *image: features_of(exact, *image), pixels, grids)
    one_by_one = frozen(tower).features(pixels, grids).split([len(part) for part in wanted])
    together = frozen(tower, CALL_PATCHES).features(pixels, grids).split([len(part) for part in wanted])
    for plainly, truly, alone, beside in zip(wanted, truth, one_by_one, together, strict=True):
        assert apart(alone, plainly) <= NEIGHBOURS[dtype] / 10
        assert apart(beside, plainly) <= NEIGHBOURS[dtype]
        # In bf16 rounding alone is as far; the one way is no nearer to float32 than the other.
        assert apart(beside, truly) <= 1.3 * apart(plainly, truly) + 1e-5
    # Not for want of a difference: another image's features are others.
    assert apart(together[0], together[-1][:1]) > 10 * NEIGHBOURS[dtype]


def test_on_a_cpu_neighbours_change_no_bit() -> None:
    tower = frozen(drawn("nano"))
    pixels, grids = images(tower.tower, *SIZES)
    alone = torch.cat(each(tower, tower.features, pixels, grids))
    assert FrozenTower(tower.tower).call_patches == 0
    assert torch.equal(tower.features(pixels, grids), alone)


@pytest.mark.parametrize(("most", "calls"), [(0, 5), (136, 4), (168, 3), (364, 2), (CALL_PATCHES, 1)])
def test_a_call_is_bounded_in_patches(most: int, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tower, seen = frozen(drawn("nano"), most), []
    real = tower._call
    monkeypatch.setattr(tower, "_call", lambda *call: seen.append(call[1].prod(-1).tolist()) or real(*call))
    features = tower.features(*images(tower.tower, *SIZES))
    assert [*chain(*seen)] == [height * width for height, width in SIZES]
    assert len(features) == sum(chain(*seen)) // 4
    assert all(len(one) == 1 or sum(one) <= most for one in seen)
    assert len(seen) == calls


# ------------------------------------------------------------------------------------------------- calls and waits


class Reads(TorchFunctionMode):
    """Counts what on a GPU makes the host wait: values read, and operators whose size is one."""

    def __init__(self) -> None:
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        named = name in {"tolist", "item", "cpu", "numpy", "__int__", "__index__", "__bool__", "__float__", "__iter__"}
        self.count += named or name in WAITING
        return func(*args, **(kwargs or {}))


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Queries of each call of attention, which computes nothing; a kernel for packed rows is one call."""
    seen: list[int] = []

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        seen.append(q.shape[-2])
        return v

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)
    monkeypatch.setitem(BACKENDS, "torch_varlen", attention)
    return seen


@contextmanager
def counted(attended: list[int]) -> Iterator[SimpleNamespace]:
    attended.clear()
    found = SimpleNamespace()
    with Reads() as reads, torch.no_grad():
        yield found
    found.calls, found.reads = len(attended), reads.count


def as_deep(depth: int) -> Any:
    """Layers and windows of the 7B's tower, its first `depth`; narrow."""
    full = [7, 15, 23, 31]
    return drawn("qwen2.5-vl-7b", depth=depth, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=8,
                 fullatt_block_indexes=full)  # fmt: skip


def test_a_picture_costs_one_call_of_attention_a_layer(attended: list[int]) -> None:
    tower = as_deep(32)
    picture = images(tower, PICTURE)
    with counted(attended) as before:
        features_of(tower, *picture)
    # 81 windows in each of 28 layers, and 4 that see all.
    assert before.calls == 81 * 28 + 4
    with counted(attended) as now:
        frozen(tower).features(*picture)
    assert now.calls == 32


def test_a_kernel_is_called_once_a_layer_for_all_images_and_no_layer_waits(attended: list[int]) -> None:
    def cost(depth: int, implementation: str, *sizes: tuple[int, int]) -> SimpleNamespace:
        tower = as_deep(depth).bfloat16()
        made = frozen(tower, CALL_PATCHES)
        tower.config._attn_implementation = implementation
        with counted(attended) as found:
            made.features(*images(tower, *sizes))
        return found

    kernel = SEGMENTS_NAME + "torch_varlen"
    one, several = cost(16, kernel, PICTURE), cost(16, kernel, (74, 74), (36, 30), (4, 4))
    assert one.calls == several.calls == 16
    # By transformers' own way three a layer, and so many for each image.
    assert cost(16, "sdpa", PICTURE).reads >= one.reads + 3 * 14
    # What is left is of the call, some of it on the host: as many for any depth, one more for each image.
    assert one.reads == cost(9, kernel, PICTURE).reads <= 16
    assert several.reads <= one.reads + 2


def test_without_a_kernel_it_is_one_call_a_layer_and_length(attended: list[int]) -> None:
    tower = as_deep(8)
    with counted(attended) as found:
        frozen(tower, CALL_PATCHES).features(*images(tower, (36, 30), (30, 36)))
    # Windows of 8 × 8 patches, cut off at one edge (8 × 4, 8 × 6) and at both (4 × 6).
    assert found.calls == 7 * 4 + 1


def test_a_tower_that_leaves_the_gpu_leaves_its_kernel_there() -> None:
    tower = as_deep(8)
    given = images(tower, (36, 30), (30, 36))
    wanted, moved = frozen(tower).features(*given), frozen(tower, CALL_PATCHES)
    tower.config._attn_implementation = SEGMENTS_NAME + "torch_varlen"
    moved.to_cpu()
    assert torch.equal(moved.features(*given), wanted)


def test_a_trained_tower_has_the_same_attention(attended: list[int]) -> None:
    tower = as_deep(16)
    attend_in_segments(tower, "auto", CPU)
    with counted(attended) as found:
        trained_features(tower, *images(tower, PICTURE))
    # The picture's windows and the blank image's.
    assert found.calls == 2 * 16


# ------------------------------------------------------------------------------------------------------ to the card


class OnCard(torch.nn.Module):
    """Stands for a tower on a card, which is the meta device here: reading anything from there raises."""

    def __init__(self, like: Any):
        super().__init__()
        self.config, self.dtype, self.spatial_merge_size = like.config, torch.float32, 2
        self.weight = torch.nn.Parameter(torch.zeros(1, device=META))

    def forward(self, pixels: torch.Tensor, grid_thw: torch.Tensor) -> Any:
        assert {pixels.device, grid_thw.device} == {META}
        return SimpleNamespace(pooler_output=pixels.new_empty(len(pixels) // 4, self.config.out_hidden_size))


@pytest.mark.parametrize("way", ["training", "decoding"])
def test_features_stay_on_the_card_and_grids_on_the_host(
    way: str, nano: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder([str(nano)], ImageFinder.beside(mixed, None), "stage1", 2)
    samples = [encoder.encode(record, row) for row, record in enumerate(scan(mixed)[0][:2]) if record.image_output]
    tower, seen = FrozenTower(OnCard(drawn("nano"))), []
    assert tower.call_patches == CALL_PATCHES
    if way == "decoding":
        head = SimpleNamespace(weight=torch.empty(1, device=META))
        seen.append(pack(SimpleNamespace(head=head), tower, encoder, samples))
    else:
        monkeypatch.setattr(step, "objective", lambda *_: ())
        engine = Mock(side_effect=seen.append, module=SimpleNamespace(encodes_helpers=False))
        learner = SimpleNamespace(tower=tower, targets=None, engine=engine)
        learner.attach = partial(Learner.attach, learner)
        run = SimpleNamespace(world=SimpleNamespace(device=META), config=SimpleNamespace(gamma=1, reduction="token"))
        step.forward(run, learner, collate(samples, 1, encoder.dummy(0)), None)
    (batch,) = seen
    assert {batch.image_features.device, batch.helper_features.device, batch.input_ids.device} == {META}
    assert len(batch.image_features) == len(batch.image_positions)


# ------------------------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_is_that_of_weights_configuration_and_way(nano: Path) -> None:
    def tower(dtype: torch.dtype = torch.float32, window: int = 112) -> FrozenTower:
        config = read_config(nano)
        config.vision_config.window_size = window
        return load_tower(nano, config, dtype, CPU)

    assert tower().fingerprint() == tower().fingerprint()
    changed, together, kernel = tower(), tower(), tower()
    with torch.no_grad():
        changed.tower.merger.ln_q.weight[3] += 1e-6
    together.call_patches = CALL_PATCHES
    kernel.tower.config._attn_implementation = SEGMENTS_NAME + "flash"
    others = (changed, tower(torch.bfloat16), tower(window=56), together, kernel)
    assert len({one.fingerprint() for one in (tower(), *others)}) == 6


def test_no_image_gives_no_features() -> None:
    tower = frozen(drawn("nano"))
    none = tower.features(torch.empty(0, 1176), torch.empty(0, 3, dtype=torch.int64))
    assert none.shape == (0, tower.tower.config.out_hidden_size)
