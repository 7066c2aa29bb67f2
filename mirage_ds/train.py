"""Training: `deepspeed --module mirage_ds.train --model … --stage … --data_path … --save_model_path …`.

Read it from the top: main → run → train, then step.py. W ranks, G micro-steps of a step, B rows of a step.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from mirage_ds.config.flags import CONTEXT, build_model, model_options
from mirage_ds.config.mixture import Mixture
from mirage_ds.config.run import RunConfig, read_yaml
from mirage_ds.data.loader import WARN_DROPPED_SHARE
from mirage_ds.data.sources import unread_lines
from mirage_ds.data.weigh import describe
from mirage_ds.engine.checkpoint import save_checkpoint
from mirage_ds.engine.private import set_collective_timeout
from mirage_ds.engine.setup import World, agree, join
from mirage_ds.errors import Stopped, UserError
from mirage_ds.run import events
from mirage_ds.run.events import note_failure
from mirage_ds.run.folder import describe_start, stop_file
from mirage_ds.run.monitor import Monitor
from mirage_ds.run.process import run_rank
from mirage_ds.run.setup import SKIPPED_FILE, Prepared, prepare
from mirage_ds.run.sinks import Sink, open_sinks
from mirage_ds.run.startup import StartUp, phases_line
from mirage_ds.run.step import guilty, step
from mirage_ds.run.stop import StopRequest, never
from mirage_ds.run.validation import Evaluator
from mirage_ds.run.whereabouts import SAVING, UNTOLD, Whereabouts, guarded


@click.command(context_settings=CONTEXT, no_args_is_help=True)
@model_options(RunConfig)
@click.option("--config", "yaml_file", type=click.Path(path_type=Path), help="YAML file of the same settings.")
@click.option("--local_rank", hidden=True, help="Passed by some launchers; the environment says it too.")
def command(yaml_file: Path | None, local_rank: str | None, **flags: Any) -> None:
    """Train one stage of a Mirage model. Flags win over the YAML file, which wins over defaults."""
    del local_rank
    values = read_yaml(yaml_file) if yaml_file else None
    run(build_model(RunConfig, flags, values, source=str(yaml_file)))


def main() -> None:
    """Run the command as one rank of many."""
    run_rank(command)


def run(config: RunConfig) -> None:
    """Train as `config` says. All ranks call it.

    Raises:
        UserError: something the user can mend.
        Stopped: on request, once everything is saved.
    """
    # One rank looks for the file; all of them hear of it at the next edge.
    stop = StopRequest(stop_file(config.save_model_path) if os.environ.get("RANK", "0") == "0" else None)
    stop.listen()
    where = guarded()
    start = StartUp(where)
    start.begin("process group")
    world = join(config.start_timeout)
    start.moved = world.waiting.moved
    try:
        prepared = prepare(config, world, world.waiting.anyone(stop.asked), start.begin)
        train(config, prepared, world, stop.asked, where, start)
    except BaseException as error:
        if start.folder is not None and not isinstance(error, Stopped):
            note_failure(start.folder, error)
        if isinstance(error, Stopped):
            world.waiting.part()
        elif isinstance(error, UserError) and error.everywhere:
            world.waiting.leave()
        else:
            world.waiting.fail()
        raise
    finally:
        # Not before every rank has written its part: a launcher ends the others once one has left.
        if isinstance(sys.exc_info()[1], Stopped | None):
            dist.barrier()
            dist.destroy_process_group()


def train(
    config: RunConfig,
    prepared: Prepared,
    world: World,
    asked: Callable[[], bool] = never,
    where: Whereabouts = UNTOLD,
    begun: StartUp | None = None,
) -> None:
    """Take every optimizer step, write checkpoints on the way and the model at the end.

    Args:
        asked: whether somebody wants this process to stop.
        where: tells a guard how far this rank is.
        begun: has clocked the start.

    Raises:
        Stopped: on every rank, after a step that they have agreed on, with a checkpoint of it.
        UserError: too many steps in a row were not finite, or the model cannot be written.
    """
    own_folder = config.save_model_path / "run"
    where.folder(own_folder)
    start = int(prepared.resumed.get("step", 0))
    sinks: list[Sink] = []
    if world.rank == 0:
        describe_start(own_folder, facts(config, prepared, start))
        settings = json.loads(config.model_dump_json(exclude_none=True))
        sinks = open_sinks(config.report_to, own_folder, config.save_model_path.name, settings, start)
    peak = prepared.peak * world.size if prepared.peak else None
    with Monitor(own_folder, prepared.steps, sinks, config.log_file, world.rank == 0, start, peak) as monitor:
        for line in opening_lines(config, prepared):
            monitor.say(line)
        monitor.note(events.LOAD_ENDS, start)
        if agree(asked(), world):
            monitor.note(events.STOPPED, start)
            monitor.say("stopped on request before a step was taken")
            raise Stopped
        saver = Saver(config, prepared, monitor, where)
        evaluator = Evaluator(config, prepared, monitor, start, asked, where)
        if prepared.resumed.get("evaluation_owed") and not evaluator.measured(start):
            monitor.note(events.STOPPED, start)
            raise Stopped
        skipped = 0
        monitor.start_clock()
        for plan, batches in prepared.loader.steps(start, prepared.steps):
            taken = step(config, prepared, plan, batches, asked, where)
            done = plan.step + 1
            epoch = done * config.rows_per_step / len(prepared.measured.row_ids)
            monitor.step(done, epoch, len(plan.rows), taken.tokens, taken.metrics, taken.row_ids)
            if begun:
                begun.end()
                monitor.say(phases_line(begun.seconds))
                begun = None
                where.settle()
                world.waiting.part()
                set_collective_timeout(config.collective_timeout)
            skipped = 0 if taken.applied else skipped + 1
            if not taken.applied:
                monitor.not_finite(done, *guilty(prepared, taken))
            if skipped == config.max_skipped_steps:
                raise UserError(
                    f"{skipped} optimizer steps in a row, the last of them step {done}, had a loss or gradient that is "
                    f"not finite ({own_folder / 'not_finite.jsonl'} names the records); the last good checkpoint is "
                    f"{saver.last or 'none: --save_every was not given or not reached'}; lower --learning_rate or mend "
                    "the records, then --resume auto"
                )
            due = config.eval_every and (done % config.eval_every == 0 or done == prepared.steps)
            owed = bool(due) and (taken.stop or not evaluator.measured(done))
            stop = taken.stop or owed
            if stop or (config.save_every and done % config.save_every == 0):
                saver.save(done, owed)
            if stop:
                monitor.note(events.STOPPED, done)
                further = "the same command with --resume auto goes on" if saver.last else "nothing to go on from"
                monitor.say(f"stopped on request after step {done}; {further}")
                raise Stopped
            monitor.start_clock()
        saver.save_model(evaluator.of_step(prepared.steps))
        monitor.say(f"model saved to {config.save_model_path}")


class Saver:
    """Writes checkpoints and the model, and says what came of it; `last` is the newest good checkpoint."""

    def __init__(self, config: RunConfig, prepared: Prepared, monitor: Monitor, where: Whereabouts):
        self.model_folder = config.save_model_path
        self.folder = config.save_model_path / "run" / "checkpoints"
        self.keep = config.keep_checkpoints
        self.prepared = prepared
        self.monitor = monitor
        self.where = where
        self.last = prepared.checkpoint.place if prepared.checkpoint else None

    def save(self, done: int, owed: bool) -> None:
        """Write the checkpoint of `done` steps. One that cannot be written is said, and training goes on.

        Args:
            owed: the evaluation of this step is still to be made.
        """
        prepared = self.prepared
        state = {**prepared.state, "step": done, "evaluation_owed": owed}
        self.monitor.note(events.SAVE_BEGINS, done)
        self.where.at("saves a checkpoint", done, SAVING)
        outcome = save_checkpoint(prepared.engine, self.folder, state, self.keep, prepared.world)
        self.monitor.note(events.SAVE_ENDS, done)
        if isinstance(outcome, str):
            self.monitor.note(events.SAVE_FAILED, done, outcome)
            last = self.last or "none"
            self.monitor.say(f"error: no checkpoint of step {done}: {outcome}; the last good one is {last}")
            return
        self.last = outcome
        self.monitor.say(f"checkpoint {outcome}")

    def save_model(self, scores: Mapping[str, float]) -> None:
        """Write the trained model, with what it scores, if known; UserError on the rank that cannot."""
        self.monitor.note(events.MODEL_BEGINS, self.prepared.steps)
        self.where.at("saves the model", kind=SAVING)
        try:
            self.prepared.save(self.model_folder, self.prepared.steps, scores)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the model cannot be written ({error}); make room and use --resume auto: the last good checkpoint is "
                f"{self.last or 'none, since --save_every was not given'}",
                everywhere=False,
            ) from None
        self.monitor.note(events.MODEL_ENDS, self.prepared.steps)


def facts(config: RunConfig, prepared: Prepared, start: int) -> dict[str, Any]:
    """Return what the run came to before its first step, for who looks at its folder."""
    index, world = prepared.measured, prepared.world
    return {
        "steps": prepared.steps,
        "start": start,
        "world_size": world.size,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type,
        "peak_flops": prepared.peak,
        "rows": len(index.row_ids),
        "rows_per_step": config.rows_per_step,
        "dropped": index.dropped,
        "skipped_records": len(prepared.skipped),
    }


def opening_lines(config: RunConfig, prepared: Prepared) -> Iterator[str]:
    """Say what is about to be trained."""
    index, world = prepared.measured, prepared.world
    yield (
        f"{config.stage}: {len(index.row_ids)} rows of {index.tokens.min()}–{index.tokens.max()} tokens (mean "
        f"{index.tokens.mean():.0f}), {config.rows_per_step} rows a step, {prepared.steps} steps, {world.size} rank(s) "
        f"on {world.device.type}, attention {prepared.engine.module.attention}, k {config.latent_size}"
    )
    warning = "warning: " if index.dropped_share > WARN_DROPPED_SHARE else ""
    if prepared.checkpoint:
        yield from prepared.checkpoint.passed_over
        yield f"continuing from {prepared.checkpoint.form}"
    if isinstance(config.records, Mixture):
        yield f"a mixture: {describe(index, config.records)}"
    yield f"{warning}{index.dropped} row(s) dropped as longer than --max_length {config.max_length}"
    sources = [config.records, *([config.eval_data_path] if config.eval_data_path else [])]
    yield from (f"warning: {line}" for source in sources for line in unread_lines(source))
    if prepared.skipped:
        file, fault = prepared.skipped[0]
        yield (
            f"warning: {len(prepared.skipped)} faulty record(s) skipped, listed in "
            f"{config.save_model_path / 'run' / SKIPPED_FILE}; the first is {file}: {fault}"
        )


if __name__ == "__main__":
    main()
