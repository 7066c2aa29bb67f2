"""What a run says of itself before its first step: run.json, the settings for the trackers, the log's first lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch

from mirage_ds.config.mixture import Mixture
from mirage_ds.data.loader import WARN_DROPPED_SHARE
from mirage_ds.data.sources import unread_lines
from mirage_ds.data.weigh import describe
from mirage_ds.run.folder import describe_start
from mirage_ds.run.journal import Logs
from mirage_ds.run.settings import Run
from mirage_ds.run.setup import SKIPPED_FILE, Data, Learner
from mirage_ds.run.sinks import open_sinks


def open_logs(run: Run, data: Data, learner: Learner) -> Logs | None:
    """Write run.json and open the logs on rank 0; nothing on the others.

    Raises:
        UserError: a tracker refuses the run; only this rank knows.
    """
    if run.world.rank > 0:
        return None
    config, start = run.config, learner.start
    describe_start(run.folder, facts(run, data, learner))
    settings = json.loads(config.model_dump_json(exclude_none=True))
    sinks = open_sinks(config.report_to, run.folder, config.save_model_path.name, settings, start)
    peak = learner.peak * run.world.size if learner.peak else None
    return Logs(run.folder, data.steps, sinks, config.log_file, start, peak)


def facts(run: Run, data: Data, learner: Learner) -> dict[str, Any]:
    """Return what the run came to before its first step, for who looks at its folder."""
    world = run.world
    return {
        "steps": data.steps,
        "start": learner.start,
        "world_size": world.size,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type,
        "peak_flops": learner.peak,
        "rows": len(data.index.row_ids),
        "rows_per_step": run.config.rows_per_step,
        "dropped": data.index.dropped,
        "skipped_records": len(data.skipped),
    }


def opening_lines(run: Run, data: Data, learner: Learner) -> Iterator[str]:
    """Say what is about to be trained."""
    config, index, world = run.config, data.index, run.world
    yield (
        f"{config.stage}: {len(index.row_ids)} rows of {index.tokens.min()}–{index.tokens.max()} tokens (mean "
        f"{index.tokens.mean():.0f}), {config.rows_per_step} rows a step, {data.steps} steps, {world.size} rank(s) "
        f"on {world.device.type}, attention {learner.engine.module.attention}, k {config.latent_size}"
    )
    if learner.checkpoint:
        yield from learner.checkpoint.passed_over
        yield f"continuing from {learner.checkpoint.form}"
    if isinstance(config.records, Mixture):
        yield f"a mixture: {describe(index, config.records)}"
    warning = "warning: " if index.dropped_share > WARN_DROPPED_SHARE else ""
    yield f"{warning}{index.dropped} row(s) dropped as longer than --max_length {config.max_length}"
    sources = [config.records, *([config.eval_data_path] if config.eval_data_path else [])]
    yield from (f"warning: {line}" for source in sources for line in unread_lines(source))
    if data.skipped:
        file, fault = data.skipped[0]
        yield (
            f"warning: {len(data.skipped)} faulty record(s) skipped, listed in {run.folder / SKIPPED_FILE}; the first "
            f"is {file}: {fault}"
        )
