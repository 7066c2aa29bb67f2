"""What a run says of itself: one dense line a step, JSON lines, sinks (TensorBoard, …), a progress bar. Rank 0 only."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mirage_ds.errors import Stopped
from mirage_ds.files import write_atomically
from mirage_ds.run.events import note
from mirage_ds.run.sinks import End, Sink, SinkError

# What stands in a line of log.jsonl and is no curve.
NOT_PLOTTED = ("step", "rows", "tokens", "time")


def memory_gb() -> float:
    """Peak memory of this process in GB: the GPU's where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    # Linux counts ru_maxrss in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def hours(seconds: float) -> str:
    """Write a duration as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def _plain(value: Any) -> Any:
    """Return a value that JSON has: it knows no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Monitor:
    """Reports a run; on the other ranks every call does nothing.

    Args:
        folder: the run's own folder (log.jsonl).
        steps: optimizer steps of the whole run.
        sinks: get the same numbers, and are closed at the end.
        log_file: where the log lines are repeated, or None.
        active: whether this is rank 0.
        start: optimizer steps already taken; what an interrupted run logged beyond them is dropped.
        peak: FLOP/s of all ranks together, by which MFU is taken; None where it is not known.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        sinks: Sequence[Sink],
        log_file: Path | None,
        active: bool,
        start: int = 0,
        peak: float | None = None,
    ):
        self.active = active
        self.sinks = sinks
        self.peak = peak
        self.folder = folder
        if not active:
            return
        self.steps = steps
        # A terminal gets a bar under the lines; a log file gets the lines alone.
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("steps", total=steps, completed=start)
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "log.jsonl"
        if log.is_file():
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            # The last line may be half of one, where the run broke off in the middle of it.
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
            write_atomically(log, "".join(kept))
        self.lines = log.open("a", buffering=1, encoding="utf-8")
        self.text = None
        if log_file:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            self.text = log_file.open("a", buffering=1, encoding="utf-8", errors="replace")
        self.recent: deque[float] = deque(maxlen=50)
        self.last = time.perf_counter()

    def __enter__(self) -> Self:
        if self.active:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.active:
            return
        self.bar.stop()
        self.lines.close()
        end: End = "finished" if error is None else "stopped" if isinstance(error, Stopped) else "failed"
        for sink in self.sinks:
            self._give(sink.close, end)
        if self.text:
            self.text.close()

    def say(self, message: str) -> None:
        """Print one line."""
        if self.active:
            self.console.print(message, markup=False)
            if self.text:
                self.text.write(message + "\n")

    def note(self, event: str, step: int | None = None, why: str | None = None) -> None:
        """Write down that something began or ended, and why."""
        if self.active:
            note(self.folder, event, step, why)

    def start_clock(self) -> None:
        """Begin timing the next step."""
        if self.active:
            self.last = time.perf_counter()

    def step(
        self,
        step: int,
        epoch: float,
        rows: int,
        tokens: int,
        metrics: dict[str, float],
        row_ids: list[int] | None = None,
    ) -> None:
        """Report one optimizer step.

        Args:
            step: optimizer steps taken, from 1.
            rows, tokens: of the whole step, over all ranks.
            metrics: loss and its parts, grad_norm, lr, labels, micro_steps, skipped, model_flops, data_seconds.
            row_ids: the rows that the ranks ran, where they are to be logged.
        """
        if not self.active:
            return
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        self.recent.append(seconds)
        left = median(self.recent) * (self.steps - step)
        record: dict[str, Any] = {
            "step": step,
            "epoch": round(epoch, 4),
            **metrics,
            "rows": rows,
            "tokens": tokens,
            "time": round(time.time(), 3),
            "seconds": round(seconds, 4),
            "samples_per_second": rows / seconds,
            "tokens_per_second": tokens / seconds,
            "memory_gb": memory_gb(),
        }
        if self.peak is not None:
            record["mfu"] = metrics["model_flops"] / (seconds * self.peak)
        logged = record if row_ids is None else {**record, "row_ids": row_ids}
        self.lines.write(json.dumps({name: _plain(value) for name, value in logged.items()}) + "\n")
        sim = f" sim {metrics['sim']:.4f}" if "sim" in metrics else ""
        mfu = f" mfu {record['mfu']:.1%}" if "mfu" in record else ""
        self.say(
            f"step {step}/{self.steps} epoch {epoch:.2f} loss {metrics['loss']:.4f} ce {metrics['ce']:.4f}{sim} "
            f"grad {metrics['grad_norm']:.3f} lr {metrics['lr']:.2e} G {metrics['micro_steps']:.0f} "
            f"{seconds:.2f} s {rows / seconds:.1f} rows/s {tokens / seconds:.0f} tok/s{mfu} "
            f"mem {record['memory_gb']:.2f} GB eta {hours(left)}{' SKIPPED' if metrics['skipped'] else ''}"
        )
        self._plot(step, "train", {name: record[name] for name in record if name not in NOT_PLOTTED})
        self.bar.update(self.task, completed=step)

    def not_finite(self, step: int, records: list[dict[str, int]], whole: bool) -> None:
        """Report a step that was skipped.

        Args:
            records: row and line of the samples whose loss was not finite.
            whole: no loss was: these are all samples of the step, whose gradient was not.
        """
        if not self.active:
            return
        with (self.folder / "not_finite.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "gradient_only": whole, "records": records}) + "\n")
        lines = ", ".join(str(record["line"]) for record in records[:8]) + (" …" if records[8:] else "")
        what = "the gradient" if whole else "the loss"
        self.say(f"step {step}: {what} was not finite, the step is skipped; records on line(s) {lines}")

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Report the losses on the evaluation records after `step` optimizer steps."""
        if not self.active:
            return
        measured = {f"eval_{name}": _plain(value) for name, value in metrics.items()}
        self.lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **measured}) + "\n")
        parts = " ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.say(f"evaluation after step {step}: {parts}")
        self._plot(step, "eval", metrics)

    def pictures(self, step: int, figures: Mapping[str, Any]) -> None:
        """Give figures of matplotlib to TensorBoard."""
        if self.active:
            for name, figure in figures.items():
                for sink in self.sinks:
                    self._give(sink.figure, step, f"latents/{name}", figure)

    def _plot(self, step: int, group: str, values: dict[str, Any]) -> None:
        for sink in self.sinks:
            self._give(sink.scalars, step, {f"{group}/{name}": value for name, value in values.items()})

    def _give(self, take: Callable[..., None], *what: Any) -> None:
        """Hand something to a sink. A tracker that is away ends no run: log.jsonl has all of it."""
        try:
            take(*what)
        except SinkError as error:
            self.say(f"warning: {error}; log.jsonl has them")
