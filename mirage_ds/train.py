"""Training: `deepspeed --module mirage_ds.train --model … --stage … --data_path … --save_model_path …`.

Read it from the top: main → run → open_run → train, then run/step.py.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

if __name__ == "__main__":
    from mirage_ds.run.process import hush
    from mirage_ds.run.stop import leave_on_signals

    # Before torch, whose import takes seconds.
    leave_on_signals()
    hush()

import torch.distributed as dist

from mirage_ds.config.flags import CONTEXT, RunCommand, run_config, run_options
from mirage_ds.config.run import RunConfig
from mirage_ds.engine.private import set_collective_timeout
from mirage_ds.engine.setup import World, join
from mirage_ds.errors import Stopped, UserError
from mirage_ds.rl.loop import reinforce
from mirage_ds.run import events, odd_steps
from mirage_ds.run.folder import stop_file
from mirage_ds.run.heartbeat import guarded
from mirage_ds.run.journal import Journal
from mirage_ds.run.process import run_rank
from mirage_ds.run.profile import profiling
from mirage_ds.run.saving import Saver
from mirage_ds.run.settings import Run, check_settings
from mirage_ds.run.setup import (
    Data,
    Learner,
    claim_folder,
    open_data,
    open_engine,
    open_logs,
    open_model,
    opening_lines,
)
from mirage_ds.run.step import Taken, guilty, step
from mirage_ds.run.stop import StopRequest
from mirage_ds.run.validation import Evaluator


def main() -> None:
    """Run the command as one rank of many."""
    run_rank(command)


@click.command(cls=RunCommand, context_settings=CONTEXT)
@run_options
# Passed by some launchers; the environment says it too.
@click.option("--local_rank", hidden=True, expose_value=False)
def command(yaml_file: Path | None, **flags: Any) -> None:
    """Train one stage of a Mirage model. Flags win over the YAML file, which wins over defaults."""
    run(run_config(yaml_file, flags))


def run(config: RunConfig) -> None:
    """Train as `config` says. All ranks call it.

    Raises:
        UserError: something the user can fix.
        Stopped: on request, once everything is saved.
    """
    # One rank looks for the file; all of them hear of it at the next edge.
    request = StopRequest(stop_file(config.save_model_path) if os.environ.get("RANK", "0") == "0" else None)
    request.listen()
    journal = Journal(guarded())
    journal.phase("process group")
    world = join(config.start_timeout)
    journal.waiting = world.waiting
    with leaving(world, journal):
        this = Run(config, world, journal, world.waiting.anyone(request.asked))
        train(this, *open_run(this))


@contextmanager
def leaving(world: World, journal: Journal) -> Iterator[None]:
    """Let the other ranks know how this one ends, and end after them where all is well."""
    try:
        yield
    except Stopped:
        world.waiting.part()
        end_together()
        raise
    except BaseException as error:
        journal.failed(error)
        if isinstance(error, UserError) and error.everywhere:
            world.waiting.leave()
        else:
            world.waiting.fail()
        raise
    end_together()


def end_together() -> None:
    """Leave the process group, not before every rank has written its part: a launcher then ends the others."""
    dist.barrier()
    dist.destroy_process_group()


def open_run(run: Run) -> tuple[Data, Learner]:
    """Check everything, then open the records, the model and the engine, from a checkpoint where the run goes on.

    Raises:
        UserError: the same on every rank; nothing has been trained or overwritten.
        Stopped: the same.
    """
    checked = check_settings(run)
    data = open_data(run, checked)
    if run.stops():
        raise Stopped
    # All that can refuse the run has come by now: a refused run must not stand in the way of the corrected one.
    state, checkpoint = claim_folder(run, checked, data)
    loaded = open_model(run, checked, data)
    if run.stops():
        run.journal.tell(events.STOPPED)
        raise Stopped
    return data, open_engine(run, checked, data, loaded, state, checkpoint)


def train(run: Run, data: Data, learner: Learner) -> None:
    """Take every optimizer step, write checkpoints on the way and the model at the end.

    Raises:
        Stopped: on every rank, after a step that they have agreed on, with a checkpoint of it.
        UserError: too many steps in a row were not finite, or the model cannot be written.
    """
    config, journal, start = run.config, run.journal, learner.start
    with journal.logging(open_logs(run, data, learner)), profiling(run, start) as profiled:
        for line in opening_lines(run, data, learner):
            journal.say(line)
        journal.tell(events.LOAD_ENDS, start)
        if run.stops():
            stop_run(run, start, "stopped on request before a step was taken")
        saver = Saver(run, learner)
        evaluator = Evaluator(run, data, learner)
        if learner.resumed.get("evaluation_owed") and not evaluator.measured(start):
            stop_run(run, start)
        skipped, done = 0, start
        journal.start_clock()
        for done, taken in enumerate(optimizer_steps(run, data, learner), start + 1):
            epoch = done / config.steps_per_rollout * config.rows_per_step / len(data.index.row_ids)
            usual = journal.step(done, epoch, taken.metrics)
            if usual is not None:
                why = f"the loss {taken.metrics['loss']:.4f} is a spike over the median before it, {usual:.4f}"
                journal.odd(done, why, taken.metrics, data.index.rows.places_of(taken.rows))
            profiled()
            saver.step_done()
            if done == start + 1:
                first_step_done(run)
            skipped = 0 if taken.applied else skipped + 1
            if skipped:
                not_applied(run, data, taken, skipped, done, saver)
            due = config.eval_every and (done % config.eval_every == 0 or done == data.steps)
            owed = bool(due) and (taken.stop or not evaluator.measured(done))
            stops = taken.stop or owed
            if stops or (config.save_every and done % config.save_every == 0):
                saver.save(done, owed, at_once=stops or done == data.steps)
            if stops:
                stop_saved(run, done, saver)
            journal.start_clock()
        if done < data.steps:
            # The source of steps was left on request between two of them.
            if done > start:
                saver.save(done, owed=False, at_once=True)
            stop_saved(run, done, saver)
        saver.save_model(data.steps, evaluator.of_step(data.steps))


def optimizer_steps(run: Run, data: Data, learner: Learner) -> Iterator[Taken]:
    """Yield each optimizer step of the run as it is taken; rl has a way of its own to them."""
    if run.config.stage == "rl":
        yield from reinforce(run, data, learner)
        return
    for plan, batches in data.loader.steps(learner.start, data.steps):
        yield step(run, data, learner, plan, batches)


def first_step_done(run: Run) -> None:
    """Leave the rules of a start behind: ranks no longer wait in the store, and collectives have their own bound."""
    run.journal.started()
    run.world.waiting.part()
    set_collective_timeout(run.config.collective_timeout)


def not_applied(run: Run, data: Data, taken: Taken, skipped: int, done: int, saver: Saver) -> None:
    """Report a step whose loss or gradient was not finite; UserError where it is one too many in a row."""
    rows, whole = guilty(run, taken)
    why = f"the {'gradient' if whole else 'loss'} was not finite, the step is skipped"
    run.journal.odd(done, why, taken.metrics, data.index.rows.places_of(rows))
    if skipped == run.config.max_skipped_steps:
        saver.finish()
        raise UserError(
            f"{skipped} optimizer steps in a row, the last of them step {done}, had a loss or gradient that is not "
            f"finite ({run.folder / odd_steps.FILE} names the records); the last good checkpoint is "
            f"{saver.last or 'none: --save_every was not given or not reached'}; lower --learning_rate or fix the "
            "records, then --resume auto"
        )


def stop_saved(run: Run, done: int, saver: Saver) -> NoReturn:
    """Stop after `done` steps, saying whether the run can go on; raises Stopped."""
    further = "the same command with --resume auto goes on" if saver.last else "nothing to go on from"
    stop_run(run, done, f"stopped on request after step {done}; {further}")


def stop_run(run: Run, step: int, said: str = "") -> NoReturn:
    """Report that the run stops after `step` steps, and stop.

    Raises:
        Stopped: always.
    """
    run.journal.tell(events.STOPPED, step, said)
    raise Stopped(told=bool(said))


if __name__ == "__main__":
    main()
