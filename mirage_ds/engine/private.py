"""The only place that touches what DeepSpeed and torch do not promise.

tests/unit/engine/test_private.py notices when it changes. For what happens in a save and in a step
tests/dist/test_reliability.py does, for two backwards of a forward tests/dist/test_zero3.py (with a trained tower), for
a load on another number of ranks tests/dist/test_world_size.py.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_map_only

from mirage_ds.files import sync

# Where ZeRO-3, and ZeRO-1 and 2 with an offloaded optimizer, sum a step's gradients: parameter → this rank's part.
GRADIENT_SUMS = ("_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition", "accumulated_grads_in_cpu")


@contextmanager
def unheard() -> Iterator[None]:
    """Keep what DeepSpeed's tools print off stdout: stderr has it, on a terminal or where MIRAGE_LOG_LEVEL is set."""
    if sys.stderr.isatty() or "MIRAGE_LOG_LEVEL" in os.environ:
        with redirect_stdout(sys.stderr):
            yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def use_plain_gloo() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives on CPU.

    `init_distributed` compiles `deepspeed_shm_comm` (44 s, minutes under load) whatever the run needs; without it the
    collectives go through gloo with the same results. A no-op on GPUs, where the extension is not used.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def set_collective_timeout(seconds: float) -> None:
    """Bound every collective of every process group that exists, DeepSpeed's own included.

    torch takes the bound when a group is made: then the first step, which may compile and fill caches for many minutes,
    has the same one as all that follow.
    """
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def store_of_group(seconds: float) -> Any:
    """Return the store through which the ranks found each other, with this bound for its own waits."""
    from torch.distributed import distributed_c10d

    store = distributed_c10d._get_default_store()
    # NCCL fetches the address of a new communicator from it, in the first collective of each group.
    store.set_timeout(timedelta(seconds=seconds))
    return store


def elements_to_gather(parameter: Any) -> int:
    """Count the elements that a rank needs beyond its own part to have a parameter whole; 0 where it is not sharded."""
    if not hasattr(parameter, "ds_id"):
        return 0
    part = parameter.ds_tensor
    # The part may lie elsewhere than the whole would, in the host's memory; it has padding.
    return int(parameter.ds_numel + (part.ds_numel if part.device != parameter.device else 0))


def held_whole(parameters: Sequence[Any]) -> bool:
    """Gather what is missing of parameters that ZeRO-3 keeps from step to step; False if it keeps not all of these.

    DeepSpeed gathers them at the end of a step. Before the first one, and after a save or an evaluation, they are not
    there. All ranks call it.
    """
    if not all(p.ds_persist for p in parameters):
        return False
    missing = [p for p in parameters if p.ds_status is type(p.ds_status).NOT_AVAILABLE]
    if missing:
        missing[0].all_gather(param_list=missing)
    return True


def backward(engine: Any, loss: torch.Tensor, earlier: torch.Tensor | None) -> None:
    """Run a micro-batch's backward: that of the loss, then that of `earlier` (loss.LossSums), which adds to it."""
    # One rank under ZeRO-0 has its mean; DeepSpeed would copy all gradients into a buffer and back.
    alone = engine.zero_optimization_stage() == 0 and dist.get_world_size() == 1
    with engine.no_sync() if alone else nullcontext():
        _backward(engine, loss, earlier)


def _backward(engine: Any, loss: torch.Tensor, earlier: torch.Tensor | None) -> None:
    if earlier is None:
        engine.backward(loss)
        return
    optimizer, at_boundary = engine.optimizer, engine.is_gradient_accumulation_boundary()
    # At the boundary ZeRO-0 and 1 reduce, once; an offloaded ZeRO-3 hands its optimizer the sums of what a backward
    # reaches, of a head of its own in this one alone.
    engine.set_gradient_accumulation_boundary(at_boundary and engine.zero_optimization_stage() == 3)
    engine.backward(loss)
    # ZeRO-3 takes all backwards of a forward for one, and would put this one's gradients in place of the others'.
    if hasattr(optimizer, "clear_backward_seen_flag"):
        optimizer.clear_backward_seen_flag()
    engine.set_gradient_accumulation_boundary(at_boundary)
    engine.backward(earlier)


def empty_sums(engine: Any) -> None:
    """Empty what a step's gradients were summed in, once the optimizer has stepped.

    A step's first backward overwrites these sums, its others add. What the first one does not reach would begin with
    the last step's: of two backwards the embedding and the tower, which only the second one has.
    """
    for name in GRADIENT_SUMS:
        for total in getattr(engine.optimizer, name, {}).values():
            total.zero_()


def host_copy(state: Any) -> Any:
    """Copy what a checkpoint file holds into the host's memory, tensors that share a storage again as views of one."""
    storages: dict[int, torch.UntypedStorage] = {}
    copies: dict[int, Any] = {}
    for tensor in filter(torch.is_tensor, tree_leaves(state)):
        whole = tensor.untyped_storage()
        if whole.data_ptr() not in storages:
            storages[whole.data_ptr()] = torch.UntypedStorage(whole.nbytes()).copy_(whole)
        view = storages[whole.data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride()
        copies[id(tensor)] = torch.empty(0, dtype=tensor.dtype).set_(*view)
    # It copies all else, and takes from its memo what is there: else tensors of a GPU would be copied on the GPU.
    return deepcopy(state, copies)


class Collecting:
    """A checkpoint engine that notes a file it cannot write and goes on.

    An exception on one rank in the middle of `engine.save_checkpoint` leaves the others waiting in its barriers.

    Args:
        later: copy what is to be written; `write` writes it, in a thread of its own.

    Attributes:
        written: the files of this rank; failed: why others are none.
    """

    def __init__(self, inner: Any, later: bool):
        self._inner, self._later = inner, later
        self._copies: list[tuple[Any, str]] = []
        self.written: list[Path] = []
        self.failed: list[str] = []

    def __getattr__(self, name: str) -> Any:
        """Be the other one in all else."""
        return getattr(self._inner, name)

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file, down to the disk, or copy what it will hold."""
        with self._noted(path):
            if self._later:
                self._copies.append((host_copy(state_dict), path))
            else:
                self._write(state_dict, path)

    def write(self) -> None:
        """Write what was copied, and free it."""
        while self._copies:
            state_dict, path = self._copies.pop(0)
            with self._noted(path):
                self._write(state_dict, path)

    def _write(self, state_dict: Any, path: str) -> None:
        self._inner.save(state_dict, path)
        sync(Path(path))
        self.written.append(Path(path))

    @contextmanager
    def _noted(self, path: str) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError of its zip writer, and memory that is not there as another.
            reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
            self.failed.append(f"{path}: {reason}")


@contextmanager
def collected_write_errors(engine: Any, later: bool) -> Iterator[Collecting]:
    """While it lasts, `engine.save_checkpoint` raises nothing for files that cannot be written, but notes them."""
    inner = engine.checkpoint_engine
    engine.checkpoint_engine = collecting = Collecting(inner, later)
    try:
        yield collecting
    finally:
        engine.checkpoint_engine = inner


def skip_steps_that_are_not_finite(engine: Any) -> None:
    """Let the optimizer refuse a step whose gradient norm is not finite, whatever ZeRO stage and dtype.

    ZeRO-3 and bf16 do so by themselves. ZeRO-1 and 2 in fp32 have it switched off; ZeRO-0 in fp32 has no such check,
    and the training loop looks at its whole gradients.
    """
    if hasattr(engine.optimizer, "check_grad_overflow"):
        engine.optimizer.check_grad_overflow = True


@contextmanager
def own_groups_and_steps(engine: Any) -> Iterator[None]:
    """Fix at its end what DeepSpeed's loader of a universal checkpoint does to AdamW under ZeRO-3 while it lasts.

    It gives every parameter group the settings of the first one, so that norms and biases begin to decay; and all
    sub-groups one and the same tensor that counts the steps, which torch's AdamW then raises once for each of them in
    every step. The learning rate is the same in all groups and stays as loaded.
    """
    optimizer = engine.optimizer.optimizer
    groups = optimizer.param_groups
    own = [{name: value for name, value in group.items() if name not in ("params", "lr")} for group in groups]
    yield
    for group, settings in zip(groups, own, strict=True):
        group.update(settings)
    for state in optimizer.state.values():
        # DeepSpeed's own Adam counts with an int.
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def shards_into_tensors(source: Path, target: Path, workers: int) -> None:
    """Turn ZeRO's shards into one file a parameter and state: DeepSpeed's universal form.

    Args:
        source: a folder with the shards and nothing else. `target`: an empty folder. DeepSpeed reads their paths as
            patterns, so they must have letters, digits, `_`, `-` and `/` only.
        workers: processes at a time; each holds the whole shard of a rank.
    """
    from argparse import Namespace

    from deepspeed.checkpoint import ds_to_universal

    # It writes `latest_universal` beside `target`.
    ds_to_universal.main(
        Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=workers,
            num_merge_workers=workers,
            keep_temp_folder=False,
            strict=True,
            # ZeRO-1 and 2 write what it looks for only where tensor parallelism is on.
            inject_missing_state=True,
        )
    )
    state = target / "zero" / "optimizer_state.pt"
    # Of ZeRO-3 it copies rank 0's shard whole, which every rank would read: 12 bytes an element, over the ranks.
    # Every tensor of more than one element is emptied; the steps that AdamW counts are tensors of one.
    small, whole = target / "zero" / ".optimizer_state.pt", torch.load(state, map_location="cpu", weights_only=False)
    kept = tree_map_only(torch.Tensor, lambda one: one if one.numel() == 1 else one.new_empty(0), whole)
    torch.save(kept, small)
    small.replace(state)
