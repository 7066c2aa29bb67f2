"""The private parts of DeepSpeed that engine/private.py uses: still there, and doing what is said of them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import deepspeed.ops
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.torch import build_shm_op

from mirage_ds.engine.private import backward, use_plain_gloo
from mirage_ds.run.step import apply_gradients


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The extensions that DeepSpeed would compile, noted instead of compiled; as on a machine where it could."""
    noted: list[str] = []
    builder = type(get_accelerator().create_op_builder("ShareMemCommBuilder"))
    monkeypatch.setattr(builder, "load", lambda self, verbose=True: noted.append(self.NAME))
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", True)
    return noted


def test_deepspeed_would_compile_its_shared_memory_collectives(loads: list[str]) -> None:
    build_shm_op()
    assert loads == ["deepspeed_shm_comm"]


def test_plain_gloo_keeps_it_from_that_and_changes_no_other_extension(loads: list[str]) -> None:
    before = dict(deepspeed.ops.__compatible_ops__)
    use_plain_gloo()
    assert build_shm_op() is None
    assert loads == []
    assert before | {"deepspeed_shm_comm": False} == deepspeed.ops.__compatible_ops__


class Engine:
    """What of an engine backward and apply_gradients use, around a model of one number whose gradient is 10."""

    def __init__(self, stage: int = 0, clipping: float = 0.0):
        self.module, self.synced, self.inside = torch.nn.Linear(1, 1, bias=False), [], False
        self.zero_optimization_stage, self.gradient_clipping = lambda: stage, lambda: clipping
        self.step, self.was_step_applied = lambda: None, lambda: True

    @contextmanager
    def no_sync(self) -> Any:
        self.inside = True
        yield
        self.inside = False

    def backward(self, loss: torch.Tensor) -> None:
        self.synced.append(not self.inside)
        loss.backward()


@pytest.mark.parametrize(
    ("stage", "ranks", "reduced"), [(0, 1, False), (0, 2, True), (1, 1, True), (2, 1, True), (3, 1, True)]
)
def test_a_single_rank_under_zero0_reduces_nothing(
    stage: int, ranks: int, reduced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    engine = Engine(stage)
    backward(engine, 10 * engine.module.weight.sum(), None)
    assert engine.synced == [reduced]
    assert not engine.inside


@pytest.mark.parametrize(
    ("most", "clipping", "left"), [(4.0, 0.0, 4.0), (20.0, 0.0, 10.0), (0.0, 0.0, 10.0), (4.0, 4.0, 10.0)]
)
def test_gradients_are_clipped_where_deepspeed_was_not_told_to(most: float, clipping: float, left: float) -> None:
    engine = Engine(clipping=clipping)
    engine.module.weight.grad = torch.full((1, 1), 10.0)
    assert apply_gradients(engine, most) == (True, 10.0)
    assert float(engine.module.weight.grad) == pytest.approx(left)
