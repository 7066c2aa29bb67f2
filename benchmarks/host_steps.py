"""Steps of a run for benchmarks/host.py, out of whatever checkout of the project PYTHONPATH names.

    PYTHONPATH=CHECKOUT python -P benchmarks/host_steps.py SOCKET

Whoever connects to the socket gets a process of its own, a fork of one that has imported everything. It is told a
rank's place and settings, and then what to do next. So that one file serves the commit before the benchmark was written
too, it imports nothing of `benchmarks`.

k latents a run.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

# Latents of the two batches whose difference is what thin passes cost.
FEW, MANY = 4, 8
# Imported before the first fork: all that a run imports until its first step.
EARLY = (
    "mirage_ds.train",
    "deepspeed",
    # DeepSpeed's first engine imports both.
    "torch._dynamo.repro.after_dynamo",
    "torch._inductor.compile_fx",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
)


def opened(settings: dict[str, Any]) -> Iterator[float]:
    """Open a run as training does; give the loss of each of its steps as it is taken."""
    from mirage_ds.engine.setup import join

    try:
        from mirage_ds.config.run import RunConfig
        from mirage_ds.run.settings import Run
        from mirage_ds.run.step import step
        from mirage_ds.train import first_step_done, open_run
    except ModuleNotFoundError:
        yield from _opened_before(settings)
        return
    run = Run(RunConfig(**settings), join())
    data, learner = open_run(run)
    yield 0.0
    for plan, batches in data.loader.steps(0, data.steps):
        yield step(run, data, learner, plan, batches).metrics["loss"]
        if plan.step == 0:
            first_step_done(run)


def _opened_before(settings: dict[str, Any]) -> Iterator[float]:
    """As `opened`, with the names of b24ddd1."""
    from mirage_ds.prepare import prepare
    from mirage_ds.step import step

    from mirage_ds.config import RunConfig
    from mirage_ds.engine.setup import join

    config = RunConfig(**settings)
    prepared = prepare(config, join())
    yield 0.0
    for plan, batches in prepared.loader.steps(0, prepared.steps):
        yield step(config, prepared, plan, batches).metrics["loss"]


def timed(steps: Iterator[float]) -> tuple[float, ...]:
    """Take a step; return its loss, seconds, and processor seconds of this thread and of the whole process.

    This thread asks for the operators, in backward too: with one thread and on a CPU, nobody else computes. What the
    process needs besides is gloo's, which carries the collectives.
    """
    clocks = time.perf_counter, time.thread_time, time.process_time
    begun = [clock() for clock in clocks]
    loss = next(steps)
    return loss, *(clock() - before for clock, before in zip(clocks, begun, strict=True))


def operators(work: Callable[[], object]) -> int:
    """Count the operators that torch dispatches, in backward too."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return function(*args, **(kwargs or {}))

    with Counting() as counting:
        work()
    return counting.count


def python_calls(work: Callable[[], object]) -> int:
    """Count the calls of Python functions, in backward too: on a CPU it runs in the thread that asks for it."""
    seen: Counter[str] = Counter()
    sys.setprofile(lambda frame, event, argument: seen.update((event,)))
    try:
        work()
    finally:
        sys.setprofile(None)
    return seen["call"]


def thin_operators(model: Path, records: Path, rows: int) -> float:
    """Count the operators, forward and backward, that one more pass of a token a row costs a layer on a GPU.

    In bf16, with torch's varlen kernel, checkpointing on and all weights whole. Nothing is computed: the tensors are on
    torch's meta device.
    """
    import torch

    from mirage_ds.data.batch import collate, to_device
    from mirage_ds.data.images import ImageFinder
    from mirage_ds.data.load import load_encoder
    from mirage_ds.data.record_files import scan
    from mirage_ds.model.load import load_model, load_tower, read_config

    meta, dtype = torch.device("meta"), torch.bfloat16
    tower = load_tower(model, read_config(model), dtype, torch.device("cpu"))
    loaded = load_model(model, stage="stage2", dtype=dtype, device=meta, attention="sdpa", tower=tower)
    text, how = loaded.model.language_model, getattr(loaded.model, "how", loaded.model)
    # Of the kernel a machine without a GPU has the shapes alone.
    how.attention = "torch_varlen"
    if hasattr(loaded.model, "layers"):
        # To go to the meta device, parameters are replaced; those of the calls would still be the old ones.
        loaded.model.layers = type(loaded.model.layers)(text.layers)
    counts = {}
    for k in (FEW, MANY):
        encoder = load_encoder([str(model)], ImageFinder.beside(records, None), "stage2", k)
        samples = [encoder.encode(record, row) for row, record in enumerate(scan(records)[0][:rows])]
        batch = to_device(tower.attach(collate(samples, k + 1, encoder.dummy(1))), meta)
        counts[k] = operators(lambda batch=batch: loaded.model(batch).ce.backward())
    return (counts[MANY] - counts[FEW]) / (MANY - FEW) / len(text.layers)


def serve(pipe: Connection) -> None:
    """Be one rank: open what is asked for, then take a step for each word that comes; or count thin passes."""
    environment, settings = pipe.recv()
    os.environ |= environment
    if "stage" not in settings:
        pipe.send(thin_operators(**settings))
        return
    steps = opened(settings)
    pipe.send(next(steps))
    ways: dict[str, Callable[[], object]] = {
        "step": lambda: timed(steps),
        "python_calls": lambda: python_calls(lambda: next(steps)),
        "operators": lambda: operators(lambda: next(steps)),
    }
    while (asked := pipe.recv()) is not None:
        pipe.send(ways[asked]())


def main(address: str) -> None:
    """Fork for everyone who connects."""
    for name in EARLY:
        importlib.import_module(name)
    # Nobody waits for the forks.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with Listener(address) as door:
        while True:
            pipe = door.accept()
            if os.fork():
                pipe.close()
                continue
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            code = 1
            try:
                serve(pipe)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1])
