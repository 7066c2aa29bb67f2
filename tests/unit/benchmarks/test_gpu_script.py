"""What benchmarks/gpu makes of its parts and of a trace; tests/slow/test_gpu_script.py runs the whole on a CPU."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu.__main__ import Asking, Part, parts_of, result_of
from benchmarks.gpu.nano import near
from benchmarks.trace import OTHERS, covered, kind_of, table


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", "attention"),
        ("nvjet_tst_192x192_64x3_2x1_v_bz_coopB_NNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "products"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, MulFunctor>", OTHERS),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::addmm", "products"),
        ("aten::mul", OTHERS),
    ],
)
def test_a_kernel_is_told_by_its_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_what_overlaps_is_busy_once() -> None:
    spans = [("gemm", 5.0, 6.0), ("gemm", 0.0, 2.0), ("mul", 1.0, 3.0), ("mul", 1.5, 1.6), ("mul", 2.5, 2.9)]
    assert covered(spans) == 4
    found = table(spans, covered(spans), 10)
    assert found["gaps_s"] == 6
    assert found["seconds"] == pytest.approx({**found["seconds"], "products": 3, OTHERS: 2.5})
    assert list(found["largest"]) == ["gemm", "mul"]


@pytest.mark.parametrize(
    ("said", "result"),
    [
        ('{"a": 1}\nsome warning', {"a": 1}),
        ("...\n3 passed, 2 skipped, 1 warning in 4.05s", {"passed": 3, "skipped": 2, "warning": 1}),
        ("1 failed in 4.05s", {"failed": 1}),
        ("Traceback\nIt broke", {"last_lines": ["Traceback", "It broke"]}),
        ("", {"last_lines": []}),
    ],
)
def test_result_of_a_part(said: str, result: dict[str, Any]) -> None:
    assert result_of(said) == result


def lives(pid: int) -> bool:
    """A killed process that nobody has waited for is still listed."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path: Path) -> None:
    asking = Asking(tmp_path, 3, dict(os.environ))
    hangs = "import subprocess; child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); child.wait()"
    codes = {"fails": (50, "print('why'); exit(3)"), "hangs": (3, hangs), "good": (50, "print('{\"x\": 1}')")}
    lines = [asking.ask(Part(name, limit, (sys.executable, "-c", code))) for name, (limit, code) in codes.items()]
    assert [line["ok"] for line in lines] == [False, False, True]
    (child,) = lines[1]["result"]["last_lines"]
    assert not lives(int(child))
    assert [lines[0]["result"], lines[2]["result"]] == [{"last_lines": ["why"]}, {"x": 1}]
    assert lines[0]["code"] == 3
    assert "within 3 s" in lines[1]["code"]
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()] == lines
    assert all(f"=== {name}: " in (tmp_path / "log.txt").read_text() for name in codes)


def test_no_part_begins_when_the_time_is_up(tmp_path: Path) -> None:
    line = Asking(tmp_path, 0, {}).ask(Part("late", 60, ("false",)))
    assert (line["ok"], line["code"]) == (False, "not done within 0 s")


@pytest.mark.parametrize("call", ["first", "second"])
def test_a_call_makes_the_model_unless_it_is_there(call: str, tmp_path: Path) -> None:
    made, *others = parts_of(call, "nano", tmp_path / "none", False)
    assert made.name == "model"
    assert str(tmp_path / "none") in made.command
    assert [part.name for part in parts_of(call, "nano", tmp_path, False)] == [part.name for part in others]


@pytest.mark.parametrize(
    ("got", "exact", "good"),
    [
        ([6.0, 5.0], True, True),
        ([6.0, 5.1], True, False),
        ([6.0, 5.1], False, True),
        ([6.1, 5.0], False, False),
        ([6.0, 5.5], False, False),
        ([6.0], False, False),
        ([], True, False),
    ],
)
def test_losses_are_near_those_of_the_cpu(got: list[float], exact: bool, good: bool) -> None:
    assert near(got, [6.0, 5.0], exact) == good
