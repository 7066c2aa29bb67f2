"""--profile_steps: what rank 0 does in some steps, as a trace of torch.profiler that TensorBoard and Perfetto open."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.profiler import ProfilerAction, profile, tensorboard_trace_handler

from mirage_ds.run.settings import Run


@contextmanager
def profiling(run: Run, start: int) -> Iterator[Callable[[], None]]:
    """Yield what is to be called after each step; those that are asked for are traced, on rank 0.

    A run that ends among them leaves a trace of those it has taken.

    Args:
        start: optimizer steps already taken.
    """
    steps = run.config.profiled[max(0, start + 1 - run.config.profiled.start) :]
    if run.world.rank > 0 or not steps:
        yield lambda: None
        return

    def during(number: int) -> ProfilerAction:
        step = start + 1 + number
        if step in steps:
            return ProfilerAction.RECORD_AND_SAVE if step == steps[-1] else ProfilerAction.RECORD
        # The profiler's own start takes a while: it is not in the trace.
        return ProfilerAction.WARMUP if step + 1 == steps.start else ProfilerAction.NONE

    name = f"steps_{steps.start}-{steps[-1]}_rank0"
    write = tensorboard_trace_handler(str(run.folder / "profile"), name, use_gzip=True)
    with profile(schedule=during, on_trace_ready=write) as profiler:
        yield profiler.step
