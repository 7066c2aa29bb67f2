"""The private parts of DeepSpeed that engine/private.py uses: still there, and doing what is said of them."""

from __future__ import annotations

import deepspeed.ops
import pytest
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.torch import build_shm_op

from mirage_ds.engine.private import use_plain_gloo


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
