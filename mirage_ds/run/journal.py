"""What a run says of itself. The journal takes each event once and tells all whom it concerns:

every rank   the guard's heartbeat; the ranks that wait for this one while the run starts
rank 0       events.jsonl; then also the console, --log_file, log.jsonl and the trackers (sinks.py)
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from mirage_ds.config.run import LATENT_MEASURES, LOSSES
from mirage_ds.data.progress import clock
from mirage_ds.engine.waiting import Waiting
from mirage_ds.errors import Stopped, UserError, reason
from mirage_ds.files import write_atomically
from mirage_ds.run import events, odd_steps
from mirage_ds.run.heartbeat import LOADING, SAVING, Heartbeat
from mirage_ds.run.sinks import End, Sink

# What a rank does from an event on. Both take as long as the model is large.
DOING = {events.SAVE_BEGINS: "saves a checkpoint", events.MODEL_BEGINS: "saves the model"}
# Of a step's losses, those on the console.
SAID = ("reward", "loss", "ce", "sim")
# What the trackers draw of a step, in groups: TensorBoard sorts these by name and opens the first two, eval and loss.
# log.jsonl has more.
CURVES = {
    "loss": ("loss", "ce", "sim"),
    "optimizer": ("lr", "grad_norm", "skipped"),
    "speed": (
        *("seconds", "data_seconds", "tokens_per_second", "mfu", "memory_gb"),
        *("decode_seconds", "scoring_seconds", "logp_seconds", "update_seconds"),
    ),
    "records": ("epoch", "tokens"),
    "answers": ("flat_groups", "redrawn", "failed_rewards", "answer_tokens", "truncated", "latent_share"),
    "policy": (
        *("entropy", "kl", "ratio", "drift", "clipped_low", "clipped_high", "decoder_drift"),
        *("latent_ratio", "latent_drift", "latent_clipped_low", "latent_clipped_high"),
    ),
}
# In rl also all that begins so: by function and level.
REWARD = "reward"
# Of an evaluation, what is no curve.
NOT_PLOTTED = ("count", "low", "high")


def _line(record: Mapping[str, Any]) -> str:
    """Write a line of JSON. It knows no NaN and no infinity: null stands for them."""
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    return json.dumps(plain) + "\n"


def _curves(metrics: Mapping[str, float]) -> dict[str, float]:
    """Name an evaluation's curves: the objective and the scorer's first metric in front, the rest in a later group."""
    drawn = {name: value for name, value in metrics.items() if name not in NOT_PLOTTED}
    scores = [name for name in drawn if name not in (*LOSSES, *LATENT_MEASURES)]
    groups = dict.fromkeys(LATENT_MEASURES, "latents") | dict.fromkeys(("loss", "sim", *scores[:1]), "eval")
    return {f"{groups.get(name, 'scores')}/{name}": value for name, value in drawn.items()}


class Journal:
    """Reports a run.

    Attributes:
        at: marks what this rank does now (heartbeat.py): it concerns the guard alone.
        waiting: is told of each phase that this rank has come on; None before there is a process group.
    """

    def __init__(self, heartbeat: Heartbeat | None = None):
        self.heartbeat = heartbeat or Heartbeat()
        self.at = self.heartbeat.at
        self.waiting: Waiting | None = None
        self._events: Path | None = None
        self._logs: Logs | None = None
        # By the wall clock: the process is older than this interpreter.
        age = time.time() - psutil.Process().create_time()
        self._phase, self._phase_began = "imports", time.perf_counter() - age
        self._phases: dict[str, float] = {}
        self._step_began = 0.0

    def phase(self, name: str) -> None:
        """Begin a phase of the start, or go on with it; a phase ends where the next one begins."""
        self._end_phase()
        self._phase = name
        self.tell(f"{events.PHASE}{name}")
        self.heartbeat.at(name, kind=LOADING)
        if self.waiting:
            self.waiting.moved()

    def _end_phase(self) -> None:
        now = time.perf_counter()
        self._phases[self._phase] = self._phases.get(self._phase, 0.0) + now - self._phase_began
        self._phase_began = now

    def started(self) -> None:
        """Report that the first step is done, and what the time until then went into."""
        self._end_phase()
        parts = ", ".join(f"{name} {took:.1f}" for name, took in self._phases.items())
        self.say(f"first step {sum(self._phases.values()):.1f} s after this process began: {parts}")
        self.heartbeat.settle()

    def claimed(self, own_folder: Path, writes: bool) -> None:
        """Take the run's own folder; `writes`: this rank notes the events there."""
        self.heartbeat.folder(own_folder)
        if writes:
            self._events = own_folder

    @contextmanager
    def logging(self, logs: Logs | None) -> Iterator[None]:
        """Write to these logs (None on ranks that have none) until the run ends, and close them with how it ended."""
        self._logs = logs
        end: End = "failed"
        try:
            yield
            end = "finished"
        except Stopped:
            end = "stopped"
            raise
        finally:
            self._logs = None
            if logs:
                logs.close(end)

    def tell(
        self, event: str, step: int | None = None, said: str = "", why: str | None = None, **numbers: float
    ) -> None:
        """Report that something began or ended (events.py).

        Args:
            said: a line for the log.
            why: a reason, for events.jsonl; numbers: what else it holds.
        """
        if event in DOING:
            self.heartbeat.at(DOING[event], step, SAVING)
        if self._events:
            events.note(self._events, event, step, why, **numbers)
        if said:
            self.say(said)

    def failed(self, error: BaseException) -> None:
        """Report what ends the run before its time."""
        text = " ".join(str(error).split())
        # A disk that is full, perhaps the very reason: what is to be seen is the error itself.
        with suppress(OSError):
            self.tell(events.FAILED, why=text if isinstance(error, UserError) else f"{type(error).__name__}: {text}")

    def say(self, line: str) -> None:
        """Write one line to the console and --log_file."""
        if self._logs:
            self._logs.say(line)

    def start_clock(self) -> None:
        """Begin to time the next step."""
        self._step_began = time.perf_counter()

    def step(self, step: int, epoch: float, metrics: Mapping[str, Any]) -> float | None:
        """Report one optimizer step.

        Args:
            step: optimizer steps taken, from 1.
            metrics: see step.Taken.

        Returns:
            Where the logs are, for a loss that is a spike: the median of those before.
        """
        if not self._logs:
            return None
        logs, seconds = self._logs, time.perf_counter() - self._step_began
        rows, tokens = metrics["rows"], metrics["tokens"]
        record: dict[str, Any] = {
            "step": step,
            "epoch": round(epoch, 4),
            **metrics,
            "time": round(time.time(), 3),
            "seconds": round(seconds, 4),
            "samples_per_second": rows / seconds,
            "tokens_per_second": tokens / seconds,
            "memory_gb": memory_gb(),
        }
        if logs.peak is not None:
            record["mfu"] = metrics["model_flops"] / (seconds * logs.peak)
        logs.write(record)
        logs.taken(record, seconds)
        drawn = [(group, name) for group in CURVES for name in CURVES[group] if name in record]
        drawn += [(REWARD, name) for name in record if name.startswith(REWARD)]
        logs.plot(step, {f"{group}/{name}": record[name] for group, name in drawn})
        return logs.usual(metrics["loss"])

    def odd(self, step: int, why: str, metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        """Report a step that is worth a look.

        Args:
            metrics: see step.Taken.
            rows: those that are to blame, or all of the step (Index.places_of).
        """
        if self._events:
            numbers = {"loss": metrics["loss"], "grad_norm": metrics["grad_norm"]}
            with (self._events / odd_steps.FILE).open("a", encoding="utf-8") as file:
                file.write(_line({"step": step, "why": why, **numbers, "rows": rows}))
        lines = ", ".join(str(row["line"]) for row in rows[:8]) + (" …" if rows[8:] else "")
        self.say(f"step {step}: {why}; records on line(s) {lines}")

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report what was measured on the evaluation records after `step` optimizer steps."""
        if self._logs:
            measured = {f"eval_{name}": value for name, value in metrics.items()}
            self._logs.write({"step": step, "time": round(time.time(), 3), **measured})
            parts = " ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            self._logs.say(f"evaluation after step {step}: {parts}")
            self._logs.plot(step, _curves(metrics))

    def pictures(self, step: int, figures: Mapping[str, Any], group: str = "pictures of latents") -> None:
        """Give figures (sinks.Sink.figure) to TensorBoard."""
        if self._logs:
            for name, figure in figures.items():
                self._logs.draw(step, f"{group}/{name}", figure)


class Logs:
    """Where rank 0 writes while steps are taken: console with a bar, --log_file, log.jsonl, trackers.

    Args:
        folder: the run's own folder.
        steps: optimizer steps of the whole run.
        sinks: the trackers.
        log_file: where the console's lines are repeated, or None.
        start: optimizer steps already taken; what an interrupted run logged beyond them is dropped.
        peak: FLOP/s of all ranks together, by which MFU is taken; None where it is not known.
        every: steps between two lines; the first step, the last and those that are skipped have one in any case.
        owed: the evaluation of step `start` is made now, again if need be.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        sinks: Sequence[Sink],
        log_file: Path | None = None,
        start: int = 0,
        peak: float | None = None,
        every: int = 1,
        owed: bool = False,
    ):
        self.steps, self.sinks, self.peak, self.every = steps, sinks, peak, every
        folder.mkdir(parents=True, exist_ok=True)
        log, losses = folder / "log.jsonl", []
        if log.is_file():
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            # The last line may be half of one, where the run broke off in the middle of it.
            known = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
            # Evaluations have no loss of this name; of their step they come last.
            last = (start, not owed)
            kept = [(line, one) for line, one in known if (one["step"], "loss" not in one) <= last]
            write_atomically(log, "".join(line for line, _ in kept))
            losses = [one["loss"] for _, one in kept[-2 * odd_steps.WINDOW :] if one.get("loss") is not None]
        self.lines = log.open("a", buffering=1, encoding="utf-8")
        self.text = None
        if log_file:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            self.text = log_file.open("a", buffering=1, encoding="utf-8", errors="replace")
        self.recent: deque[float] = deque(maxlen=50)
        # Of the newest steps that had a finite one.
        self.losses: deque[float] = deque(losses, maxlen=odd_steps.WINDOW)
        # Of the steps since the last line.
        self.unsaid: list[Mapping[str, Any]] = []
        # A terminal gets a bar under the lines; a file gets the lines alone.
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("steps", total=steps, completed=start)
        self.bar.start()

    def say(self, line: str) -> None:
        """Print one line."""
        self.console.print(line, markup=False)
        if self.text:
            self.text.write(line + "\n")

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a line to log.jsonl."""
        self.lines.write(_line(record))

    def plot(self, step: int, values: Mapping[str, float]) -> None:
        """Give numbers to the trackers, named group/name."""
        self._give(f"the numbers of step {step}", lambda sink: sink.scalars(step, values))

    def draw(self, step: int, name: str, figure: Any) -> None:
        """Give a figure to the trackers."""
        self._give(f"{name} of step {step}", lambda sink: sink.figure(step, name, figure))

    def taken(self, record: Mapping[str, Any], seconds: float) -> None:
        """Take note of a step that took so long, and print a line if one is due."""
        step, first = record["step"], not self.recent
        self.bar.update(self.task, completed=step, description=f"loss {record['loss']:.4f}")
        self.recent.append(seconds)
        self.unsaid.append({**record, "seconds": seconds})
        if first or step % self.every == 0 or step == self.steps or record["skipped"]:
            self.say(self._line())
            self.unsaid.clear()

    def usual(self, loss: float) -> float | None:
        """Take note of a step's loss; return the median of those before, if this one is a spike (spike_over)."""
        median_before = odd_steps.spike_over(loss, self.losses)
        if math.isfinite(loss):
            self.losses.append(loss)
        return median_before

    def _line(self) -> str:
        """Say how the steps since the last line were: losses, seconds and rates are means over them."""
        steps = self.unsaid
        last, seconds = steps[-1], sum(one["seconds"] for one in steps)
        losses = "".join(f" {name} {sum(one[name] for one in steps) / len(steps):.4f}" for name in SAID if name in last)
        rates = [sum(one[name] for one in steps) / seconds for name in ("rows", "tokens", "model_flops")]
        mfu = f" mfu {rates[2] / self.peak:.1%}" if self.peak else ""
        return (
            f"step {last['step']}/{self.steps} epoch {last['epoch']:.2f}{losses} grad {last['grad_norm']:.3f} "
            f"lr {last['lr']:.2e} G {last['micro_steps']:.0f} {seconds / len(steps):.2f} s {rates[0]:.1f} rows/s "
            f"{rates[1]:.0f} tok/s{mfu} mem {last['memory_gb']:.2f} GB "
            f"eta {clock(median(self.recent) * (self.steps - last['step']))}{' SKIPPED' if last['skipped'] else ''}"
        )

    def close(self, end: End) -> None:
        """Say to the trackers how the run ended, and write what waits."""
        self.bar.stop()
        self.lines.close()
        self._give("how the run ended", lambda sink: sink.close(end))
        if self.text:
            self.text.close()

    def _give(self, what: str, give: Callable[[Sink], None]) -> None:
        """Hand something to the trackers. One that is away ends no run: log.jsonl has all of it."""
        for sink in self.sinks:
            try:
                give(sink)
            except sink.errors as error:
                self.say(f"warning: {type(sink).__name__} has not taken {what} ({reason(error)}); log.jsonl has all")


def memory_gb() -> float:
    """Peak memory of this process in GB: the GPU's where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    # Linux counts ru_maxrss in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
