"""Offloading: the arithmetic against DeepSpeed's own functions, each sentence at its edge, whose files are cleared."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mirage_ds.engine import offload
from mirage_ds.engine.offload import (
    Disk,
    Host,
    faults,
    lockable_bytes,
    look_at,
    memory_to_be_had,
    missing_for_swapping,
)
from mirage_ds.engine.offload_bytes import Files, HostMemory, files_of, memory_of, read_keys, sub_groups
from mirage_ds.engine.swap_folders import FOLDER, GATE_FILE, Swap, clear, in_folders

JSON = Path("nvme.json")
# Two groups, as weight_decay_groups makes them: matrices, one of them odd in size, and vectors.
GROUPS = [[3_000_001, 600_000, 600_000, 1_200_000, 100], [128, 128]]
W = 2
LARGEST = 1_500_001
# Of one decoder layer, in the order of its walk.
LAYER = [600_000, 100, 600_000, 1_200_000]


def values(param: str = "nvme", optimizer: str = "nvme", **changed: Any) -> dict[str, Any]:
    """Return a resolved JSON; keys of `changed` are written as block__key."""
    zero: dict[str, Any] = {
        "stage": 3,
        "sub_group_size": 1_000_000,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0,
    }
    zero["offload_param"] = {"device": param, "nvme_path": "/nvme", "buffer_size": LARGEST, "max_in_cpu": 0}
    zero["offload_optimizer"] = {"device": optimizer, "nvme_path": "/nvme"}
    made: dict[str, Any] = {"zero_optimization": zero}
    for name, value in changed.items():
        block, _, key = name.rpartition("__")
        place = {"": made, "zero": zero}.get(block) if block in ("", "zero") else zero.get(block, made.get(block))
        if place is None:
            place = made.setdefault(block, {})
        place[key] = value
    return made


def host(**changed: Any) -> Host:
    """Return a host that has enough of everything."""
    plenty = Host("node1", 2, 10**12, None, None, [Disk(Path("/nvme"), None, 1, 10**12)])
    return plenty._replace(**changed)


def said(made: dict[str, Any], on: Host | None = None, checkpoints: bool = False) -> list[str]:
    return faults(read_keys(made), JSON, GROUPS, LAYER, W, on or host(), checkpoints)


# -------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("size", [1, 299_999, 300_000, 1_000_000, 1_500_001, 2_000_000, 2_700_150, 10**9])
@pytest.mark.parametrize("group", [*GROUPS, [5], [10**6] * 7])
def test_sub_groups_are_those_of_deepspeed(size: int, group: list[int]) -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    class Parameter:
        def __init__(self, elements: int):
            self.elements = elements

        def partition_numel(self) -> int:
            return -(-self.elements // W)

    theirs = DeepSpeedZeroOptimizer_Stage3._create_fp16_sub_groups(
        SimpleNamespace(sub_group_size=size),
        [Parameter(n) for n in group],
    )
    wanted = [[p.elements for p in one] for one in theirs]
    assert sub_groups(group, size, W) == wanted


def test_files_by_hand() -> None:
    # Parts of two ranks: 1,500,001; 300,000; 300,000; 600,000; 50; and 64, 64. fp32, files in units of 1,024 bytes,
    # nothing below 1 MiB = 262,144 elements. Sub-groups, closed at 10⁶: [1,500,001], [300,000 300,000 600,000], [50].
    weights = 6_000_640 + 2 * 1_200_128 + 2_400_256
    states = 3 * (6_000_640 + 4_800_512)
    gradients = 5_999_616 + 2 * 1_199_104 + 2_399_232
    assert files_of(read_keys(values()), GROUPS, W) == Files(weights, states, gradients)
    assert files_of(read_keys(values(param="cpu")), GROUPS, W) == Files(0, states, gradients)
    assert files_of(read_keys(values(optimizer="cpu")), GROUPS, W) == Files(weights, 0, 0)


def test_files_in_bf16_and_in_larger_blocks() -> None:
    # bf16 weights of 300,000 elements are below 1 MiB; the states stay fp32.
    bf16 = values(bf16__enabled=True)
    assert files_of(read_keys(bf16), GROUPS, W).weights == 3_000_320 + 1_200_128
    assert files_of(read_keys(bf16), GROUPS, W).states == files_of(read_keys(values()), GROUPS, W).states
    bf16["bf16"]["bf16_master_weights_and_grads"] = True
    assert files_of(read_keys(bf16), GROUPS, W).states == 3 * (3_000_320 + 2_400_256)
    # Blocks of 2 MiB keep 300,000 fp32 elements in memory; four threads make units of 4,096 bytes.
    blocks = values(aio__block_size=2 << 20, aio__intra_op_parallelism=4)
    assert files_of(read_keys(blocks), GROUPS, W).weights == 6_000_640 + 2_400_256


def test_memory_by_hand() -> None:
    own = 1_500_001 + 300_000 + 300_000 + 600_000 + 50 + 64 + 64
    cpu = values(param="cpu", optimizer="cpu")
    assert memory_of(read_keys(cpu), GROUPS, W) == HostMemory(own * (4 + 4 + 12 + 4), 0)
    cpu["bf16"] = {"enabled": True}
    assert memory_of(read_keys(cpu), GROUPS, W).total == own * (2 + 2 + 12 + 4)
    cpu["data_types"] = {"grad_accum_dtype": "fp32"}
    assert memory_of(read_keys(cpu), GROUPS, W).total == own * (2 + 4 + 12 + 4)
    # 5 buffers of the largest part, the largest sub-group's whole weights, 4 buffers of its part.
    locked = 5 * 6_000_640 + 12_000_256 + 4 * 6_000_640
    assert memory_of(read_keys(values()), GROUPS, W) == HostMemory(locked + 4 * own, locked)
    assert memory_of(read_keys(values(offload_param__max_in_cpu=10**9)), GROUPS, W).locked == locked - 12_000_256
    assert memory_of(read_keys(values(param="none", optimizer="none")), GROUPS, W) == HostMemory(0, 0)


# ---------------------------------------------------------------------------------------------------------- refusals


def test_what_can_run_is_not_refused() -> None:
    assert said(values()) == []
    assert said(values(zero__stage3_prefetch_bucket_size=1, zero__stage3_max_live_parameters=0)) == []
    assert said(values(param="cpu", optimizer="cpu"), checkpoints=True) == []
    assert said(values(param="none", optimizer="none"), host(memory=0), checkpoints=True) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (dict(offload_param__buffer_size=LARGEST - 1), ["buffer_size' is 1500000", "write 1500001 or more"]),
        (dict(offload_param__buffer_count=1), ["offload_param.buffer_count' is 1", "write 2 or more"]),
        (dict(zero__stage3_prefetch_bucket_size=1), ["prefetch_bucket_size' is 1", "write 0"]),
        (dict(offload_optimizer__buffer_count=3), ["buffer_count' is 3", "write 4 or more"]),
        (dict(offload_optimizer__pipeline_read=True, offload_optimizer__buffer_count=7), ["is 7", "write 8 or more"]),
        (dict(zero__stage=2), ["stage' is 2", "write 3"]),
        (dict(offload_param__nvme_path=None), ["offload_param' is on NVMe without a folder", "nvme_path"]),
        (dict(offload_optimizer__fast_init=True, zero__sub_group_size=10**9), ["fast_init", "2700051", "1500001"]),
    ],
)
def test_keys_that_cannot_work(changed: dict[str, Any], words: list[str]) -> None:
    found = said(values(**changed))
    assert len(found) == 1
    assert all(word in found[0] for word in ["nvme.json", *words])


def test_kept_weights_need_a_buffer_each() -> None:
    # Four of the seven are large enough to be swapped.
    kept = values(zero__stage3_max_reuse_distance=5 * sum(map(sum, GROUPS)), offload_param__buffer_count=4)
    assert said(kept) == []
    kept["zero_optimization"]["offload_param"]["buffer_count"] = 3
    (sentence,) = said(kept)
    assert "each rank needs 4; write 4 or more" in sentence


@pytest.mark.parametrize(
    ("reuse", "needed"),
    # From a matrix to the end of the layer and back are 3,600,200, 3,600,000, 2,400,000 elements; the last one stays
    # whatever `reuse` is, the second is too small to be swapped, and the next weight needs one more.
    [(0, 2), (2_400_000, 2), (2_400_001, 3), (3_600_200, 3), (3_600_201, 4)],
)
def test_buffers_of_released_weights(reuse: int, needed: int) -> None:
    made = values(zero__stage3_max_reuse_distance=reuse, offload_param__buffer_count=needed)
    assert said(made) == []
    made["zero_optimization"]["offload_param"]["buffer_count"] = needed - 1
    (sentence,) = said(made)
    assert f"needs {needed}; write" in sentence


def test_buffers_for_no_more_sub_groups_than_there_are() -> None:
    both = dict(offload_optimizer__pipeline_read=True, offload_optimizer__pipeline_write=True)
    # Two sub-groups are swapped: the third would be a third of buffers nobody asks for.
    assert said(values(**both, offload_optimizer__buffer_count=8)) == []
    (sentence,) = said(values(**both, offload_optimizer__buffer_count=11, zero__sub_group_size=300_000))
    assert "write 12 or more" in sentence


def test_checkpoints_go_with_memory_alone() -> None:
    for made in (values(), values(param="none"), values(optimizer="cpu")):
        (sentence,) = said(made, checkpoints=True)
        assert "--save_every" in sentence
    assert said(values(optimizer="cpu", offload_param__max_in_cpu=10**9), checkpoints=True) == []


def test_the_largest_part_counts_only_where_it_is_swapped() -> None:
    # Nothing of a model this small reaches 1 MiB on a rank.
    made = values(offload_param__buffer_size=1)
    assert faults(read_keys(made), JSON, [[400_000]], [400_000], W, host(), False) == []


def test_buffer_edge_is_that_of_deepspeed() -> None:
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper

    def ask(size: int) -> None:
        swapper = SimpleNamespace(available_swap_in_buffers=lambda: 1, elements_per_buffer=size)
        AsyncPartitionedParameterSwapper.get_buffer(swapper, SimpleNamespace(ds_id=0), LARGEST)

    with pytest.raises(AssertionError, match="More elements 1500001 than buffer size 1500000"):
        ask(LARGEST - 1)
    # One more and it goes on, to what this stand-in has not.
    with pytest.raises(AttributeError):
        ask(LARGEST)


def test_too_little_disk() -> None:
    needed = 2 * sum(files_of(read_keys(values()), GROUPS, W))
    disk = host().disks[0]
    assert said(values(), host(disks=[disk._replace(free=needed)])) == []
    (sentence,) = said(values(), host(disks=[disk._replace(free=needed - 1)]))
    assert "/nvme on node1 has" in sentence
    assert f"write {needed / 1e6:.1f} MB" in sentence


def test_two_folders_share_a_disk_or_do_not() -> None:
    made = values(offload_optimizer__nvme_path="/other")
    files = files_of(read_keys(made), GROUPS, W)
    weights, optimizer = 2 * files.weights, 2 * files.optimizer

    def on(second: int, *free: int) -> list[str]:
        disks = [Disk(Path("/nvme"), None, 1, free[0]), Disk(Path("/other"), None, second, free[1])]
        return said(made, host(disks=disks))

    assert on(1, weights + optimizer, weights + optimizer) == []
    assert len(on(1, weights + optimizer - 1, weights + optimizer - 1)) == 1
    assert on(2, weights, optimizer) == []
    assert "/other" in on(2, weights, optimizer - 1)[0]
    assert "/nvme" in on(2, weights - 1, optimizer)[0]


def test_too_little_memory() -> None:
    for made in (values(), values(param="cpu", optimizer="cpu")):
        needed = 2 * memory_of(read_keys(made), GROUPS, W).total
        assert said(made, host(memory=needed)) == []
        (sentence,) = said(made, host(memory=needed - 1))
        assert f"{needed / 1e6:.1f} MB" in sentence
        assert "2 rank(s) of node1" in sentence


def test_too_little_lockable_memory() -> None:
    locked = memory_of(read_keys(values()), GROUPS, W).locked
    assert said(values(), host(lockable=locked)) == []
    (sentence,) = said(values(), host(lockable=locked - 1))
    assert "ulimit -l" in sentence


def test_what_the_host_lacks_is_said() -> None:
    trouble = Disk(Path("/nvme"), "is no folder; make it on the NVMe disk", -1, 0)
    found = said(values(), host(swapper="libaio is missing", disks=[trouble]))
    assert found == [
        "node1: libaio is missing",
        f"{JSON}: nvme_path /nvme on node1 is no folder; make it on the NVMe disk",
    ]


# ---------------------------------------------------------------------------------------------------------- the host


def test_memory_and_locks_as_linux_says_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory_to_be_had(tmp_path) > 1 << 20
    (tmp_path / "memory.max").write_text("1048576\n")
    assert memory_to_be_had(tmp_path) == 1 << 20
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_to_be_had(tmp_path) > 1 << 20
    monkeypatch.setattr(offload.resource, "getrlimit", lambda _: (8 << 20, 8 << 20))
    status = tmp_path / "status"
    status.write_text("Name:\tx\nCapEff:\t0000000000000000\n")
    assert lockable_bytes(status) == 8 << 20
    status.write_text(f"CapEff:\t{1 << 14:016x}\n")
    assert lockable_bytes(status) is None


def test_what_async_io_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    assert "libaio-dev" in str(missing_for_swapping())
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "g++" in str(missing_for_swapping())


def test_folders_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = look_at(tmp_path)
    assert good.trouble is None
    assert good.free > 0
    assert list(tmp_path.glob(".mirage_ds-??*")) == [tmp_path / GATE_FILE.format(os.getuid())]
    assert "is no folder" in str(look_at(tmp_path / "absent").trouble)
    assert "cannot be used" in str(look_at(Path("/proc/self")).trouble)

    def no_direct_io(path: Any, flags: int, *mode: int, real: Any = os.open, **where: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *mode, **where)

    monkeypatch.setattr(offload.os, "open", no_direct_io)
    assert "takes no direct I/O" in str(look_at(tmp_path).trouble)


# ------------------------------------------------------------------------------------------------------ whose files

HOLD = "import sys; from pathlib import Path; from mirage_ds.engine.swap_folders import Swap; \
hold = Swap([Path(sys.argv[1])]); print('held', flush=True); sys.stdin.read()"


def test_files_of_ended_runs_are_cleared_and_of_living_ones_not(tmp_path: Path) -> None:
    folder = tmp_path / f"{FOLDER}other"
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    (folder / "0.tensor.swp").write_bytes(b"1234")
    foreign = tmp_path / "zero_stage_3"
    foreign.mkdir()
    assert clear(tmp_path) == []
    assert (folder / "0.tensor.swp").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert clear(tmp_path) == [folder]
    assert not folder.exists()
    assert foreign.exists()
    # One that was ended between making its folder and its lock.
    folder.mkdir()
    assert clear(tmp_path) == [folder]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a folder another user's")
def test_folders_of_other_users_stay(tmp_path: Path) -> None:
    folder = tmp_path / f"{FOLDER}theirs"
    folder.mkdir()
    os.chown(folder, 1000, 1000)
    assert clear(tmp_path) == []
    os.chown(folder, 0, 0)
    assert clear(tmp_path) == [folder]


def test_the_last_rank_removes_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / f"{FOLDER}own"
    first, second = Swap([folder]), Swap([folder])
    first.release()
    assert folder.exists()
    first.release()
    assert clear(tmp_path) == []
    second.release()
    assert not folder.exists()


def test_only_paths_on_nvme_are_changed() -> None:
    made = values(param="cpu")
    changed = in_folders(made, "1234")
    assert changed["zero_optimization"]["offload_optimizer"]["nvme_path"] == "/nvme/mirage_ds-1234"
    assert changed["zero_optimization"]["offload_param"] == made["zero_optimization"]["offload_param"]
    assert made == values(param="cpu")
