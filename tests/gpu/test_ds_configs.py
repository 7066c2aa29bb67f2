"""One optimizer step on one GPU, through the trainer's functions, with each recipe that one rank can run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.extensions import compiled, use_folder
from support.group import Group
from torch.utils.cpp_extension import CUDA_HOME

from gpu.engine import SETTINGS, Stepped, alone, planned_states, take
from mirage_ds.engine import ds_config as ds

# cuBLAS keeps workspaces, and the allocator rounds up.
WORKSPACES = 128 << 20
STAGES = ("sft", "stage1", "stage2")
Take = Callable[[str, str], Stepped]


@pytest.fixture(scope="module")
def helped(mixed: Path) -> Path:
    """The rows of `mixed` that stage1 can use."""
    rows = [line for line in mixed.read_text().splitlines() if "image_output" in json.loads(line)]
    path = mixed.parent / "helped_alone.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


def taker(nano: Path, mixed: Path, helped: Path, scratch: Path) -> Iterator[Take]:
    """Steps on one rank in a process of its own; after a failure the next gets a new process."""
    use_folder()
    group = Group(1, fresh=True)

    def run(name: str, stage: str) -> Stepped:
        settings = SETTINGS | dict(
            model=str(nano), stage=stage, data_path=helped if stage == "stage1" else mixed,
            deepspeed=ds.shipped_folder() / f"{name}.json",
            save_model_path=scratch / "run", cache_dir=scratch / "cache",
        )  # fmt: skip
        return group.run(take, settings, timeout_s=240)[0]

    yield run
    group.stop()


@pytest.fixture(scope="module")
def on_gpu(nano: Path, mixed: Path, helped: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Take]:
    with pytest.MonkeyPatch.context() as patch:
        # tests/conftest.py keeps every other suite on the CPU.
        patch.setenv("DS_ACCELERATOR", "cuda")
        yield from taker(nano, mixed, helped, tmp_path_factory.mktemp("on_gpu"))


@pytest.fixture(scope="module")
def on_cpu(nano: Path, mixed: Path, helped: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Take]:
    yield from taker(nano, mixed, helped, tmp_path_factory.mktemp("on_cpu"))


@pytest.mark.parametrize(("name", "stage"), [("zero3_kept", "stage2"), ("zero2", "stage1")])
def test_the_same_step_on_the_cpu(name: str, stage: str, on_cpu: Take) -> None:
    # Not a GPU's test: it runs this file's body where there is none.
    taken = on_cpu(name, stage)
    assert math.isfinite(taken.loss)
    assert taken.norm > 0
    assert taken.applied
    assert (taken.dtype, taken.backend, taken.held) == ("torch.float32", "sdpa", 0)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", alone())
def test_one_step_is_taken(name: str, stage: str, on_gpu: Take, nano: Path) -> None:
    if name.endswith("_offload"):
        if CUDA_HOME is None:
            pytest.skip("no CUDA toolkit with nvcc is here: DeepSpeed cannot compile its CPU Adam")
        compiled("CPUAdamBuilder")
    taken = on_gpu(name, stage)
    assert math.isfinite(taken.loss)
    assert math.isfinite(taken.norm)
    assert taken.norm > 0
    assert taken.applied
    assert taken.dtype == "torch.bfloat16"
    assert taken.backend in ("flash", "torch_varlen")
    computed = sum(planned_states(nano, ds.shipped_folder() / f"{name}.json").gpu.values())
    print(f"{stage} with {name}: {taken.held:,} bytes on the GPU between two steps, planned {computed:,}")
    assert taken.held <= computed + WORKSPACES
