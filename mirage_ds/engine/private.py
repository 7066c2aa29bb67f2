"""The only place that touches what DeepSpeed and torch do not promise.

tests/unit/test_private.py notices when it changes; for what happens in a save and in a step,
tests/dist/test_reliability.py does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from mirage_ds.files import sync


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


class Written(NamedTuple):
    """What a rank's part of `engine.save_checkpoint` came to: the files it wrote, and why others failed."""

    written: list[Path]
    failed: list[str]


class _Collecting:
    """A checkpoint engine that notes a file it cannot write and goes on.

    An exception on one rank in the middle of `engine.save_checkpoint` leaves the others waiting in its barriers.
    """

    def __init__(self, inner: Any, outcome: Written):
        self._inner = inner
        self._outcome = outcome

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def save(self, state_dict: Any, path: str) -> None:
        try:
            self._inner.save(state_dict, path)
            sync(Path(path))
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError of its zip writer.
            reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
            self._outcome.failed.append(f"{path}: {reason}")
        else:
            self._outcome.written.append(Path(path))


@contextmanager
def collected_write_errors(engine: Any) -> Iterator[Written]:
    """While it lasts, `engine.save_checkpoint` raises nothing for files that cannot be written, but notes them."""
    outcome = Written([], [])
    inner = engine.checkpoint_engine
    engine.checkpoint_engine = _Collecting(inner, outcome)
    try:
        yield outcome
    finally:
        engine.checkpoint_engine = inner


def skip_steps_that_are_not_finite(engine: Any) -> None:
    """Let the optimizer refuse a step whose gradient norm is not finite, whatever ZeRO stage and dtype.

    ZeRO-3 and bf16 do so by themselves. ZeRO-1 and 2 in fp32 have it switched off; ZeRO-0 in fp32 has no such check,
    and the training loop looks at its whole gradients.
    """
    if hasattr(engine.optimizer, "check_grad_overflow"):
        engine.optimizer.check_grad_overflow = True
