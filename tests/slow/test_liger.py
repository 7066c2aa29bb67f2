"""Liger-Kernel's norms and MLPs against transformers' own, in float32: losses and all gradients.

Where there is no GPU, Triton's interpreter runs the kernels, in a process of its own: it has to be told before Triton
is imported. It knows no float arguments and no libdevice, which the test gives it, and no bf16: tests/gpu has that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import make_nano

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parents[1]
# Sums in another order; a lost factor or a wrong epsilon is 1e-2 and more.
APART = 1e-5

BODY = """
import sys
from pathlib import Path
import torch, triton.language as tl, triton.runtime.interpreter as interpreter
import liger_kernel.ops.rms_norm
from gpu.packed import CPU, Rows, drift, outcome, ready
from mirage_ds.model import load

class Number(float):
    def to(self, dtype):
        return self

converted = interpreter._implicit_cvt
interpreter._implicit_cvt = lambda one: Number(one) if isinstance(one, float) else converted(one)
liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.rsqrt(x)
load.check_device = lambda kernels, device: None
model, records, stage = sys.argv[1:]
rows = Rows(Path(model), Path(records), stage, 2, (0, 2))
found = []
for options in ({}, {"kernels": "liger"}, {"kernels": "liger", "checkpointing": False}):
    made = ready(rows, CPU, torch.float32, "sdpa", **options)
    names = {type(one).__name__ for body in made.model.layers.calls[0].bodies.values() for one in body.modules()}
    assert ("LigerRMSNorm" in names, "LigerSwiGLUMLP" in names) == (bool(options),) * 2, names
    assert not any("Liger" in type(one).__name__ for one in made.model.modules())
    found.append(outcome(made))
print(*(number for one in found[1:] for number in drift(one, found[0])))
"""


@pytest.mark.parametrize("stage", ["sft", "stage1", "stage2"])
@pytest.mark.parametrize("preset", ["nano", "nano-qwen2-vl", "nano-qwen3-vl"])
def test_ligers_kernels_compute_what_transformers_does(preset: str, stage: str, mixed: Path, tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel", reason="the extra liger is not installed")
    pytest.importorskip("triton")
    model = make_nano(tmp_path / preset, layers=2, name=preset)
    ran = subprocess.run(
        [sys.executable, "-c", BODY, model, mixed, stage],
        env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=TESTS, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    apart = [float(number) for number in ran.stdout.splitlines()[-1].split()]
    assert 0 < max(apart) < APART
