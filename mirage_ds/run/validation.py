"""What happens every --eval_every steps: records decoded, scored and drawn, the loss on all, the best model kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist

from mirage_ds.analysis.inspect.live import need_matplotlib
from mirage_ds.data.loader import Rows
from mirage_ds.engine.setup import from_rank_zero
from mirage_ds.engine.whole import check_room
from mirage_ds.evaluate.decoder import slots_fed
from mirage_ds.evaluate.scoring import NOTHING, Prediction, check_evaluation, score, spread
from mirage_ds.model.generate import Limits, NotFinite
from mirage_ds.run.decoding import BATCH, decode_rows, draw_rows, record_at, rows_to_draw
from mirage_ds.run.events import EVALUATION_BEGINS, EVALUATION_ENDS
from mirage_ds.run.records import Evaluation
from mirage_ds.run.saving import Best
from mirage_ds.run.settings import Run
from mirage_ds.run.setup import Data, Learner
from mirage_ds.run.step import forward


class Evaluator:
    """Evaluates a run on its evaluation records.

    Raises:
        UserError: on every rank, before anything is trained: no room to decode or draw, a record that its scorer
            cannot score, none with latents to draw, no matplotlib.
    """

    def __init__(self, run: Run, data: Data, learner: Learner):
        self.run, self.learner, self.evaluation = run, learner, data.evaluation
        self.last: tuple[int, Mapping[str, float]] = (-1, {})
        self.task = ""
        self.chosen: list[int] = []
        self.drawn: list[int] = []
        self.best: Best | None = None
        config, engine, world = run.config, learner.engine, run.world
        # Every latent block has the length of training, as `mirage-ds evaluate` has it; as many tokens at a time as in
        # training.
        k = config.latent_size
        self.limits = Limits(config.eval_new_tokens, k, slots_fed(config.slots, k), config.micro_batch_tokens)
        if self.evaluation is None:
            return
        rows, planner = self.evaluation.loader.rows, self.evaluation.loader.planner
        row_ids, longest = planner.row_ids.tolist(), int(planner.lengths.max())
        if config.eval_decode:
            self.chosen = spread(row_ids, config.eval_decode)
            # Not those that open_data looked at, where rows with broken images have been left out since.
            self.task = from_rank_zero(partial(self._check, rows), world)
            check_room(engine, BATCH, longest, self.limits, world, f"--eval_decode {config.eval_decode}")
        if config.eval_pictures:
            from_rank_zero(need_matplotlib, world)
            self.drawn = rows_to_draw(rows, row_ids, config.eval_pictures)
            check_room(engine, 1, longest, Limits(new_tokens=0), world, f"--eval_pictures {config.eval_pictures}")
        if config.save_best:
            save = partial(learner.save, world)
            self.best = Best(config.save_best, config.save_model_path, save, world, learner.start)

    def _check(self, rows: Rows) -> str:
        config = self.run.config
        assert config.eval_data_path is not None
        records = [record_at(rows, row) for row in self.chosen]
        return check_evaluation(records, config.eval_data_path, config.task, (), None)

    def measured(self, done: int) -> bool:
        """Evaluate and report after `done` steps; False when the ranks left it on request. All ranks call it."""
        if self.evaluation is None:
            return True
        journal = self.run.journal
        journal.tell(EVALUATION_BEGINS, done)
        metrics = self._metrics(done, self.evaluation)
        if metrics is not None:
            journal.evaluation(done, metrics)
            self.last = (done, metrics)
            line = self.best.consider(done, metrics) if self.best else None
            if line:
                journal.say(line)
        journal.tell(EVALUATION_ENDS, done)
        return metrics is not None

    def of_step(self, done: int) -> Mapping[str, float]:
        """Return what was measured after `done` steps; nothing where the last evaluation was another."""
        step, metrics = self.last
        return metrics if step == done else {}

    def _metrics(self, done: int, evaluation: Evaluation) -> dict[str, float] | None:
        rows = evaluation.loader.rows
        scores = self._scores(done, rows) if self.chosen else {}
        if scores is None:
            return None
        if self.drawn:
            try:
                self.run.journal.pictures(done, draw_rows(self.run, self.learner, rows, self.drawn))
            except NotFinite as error:
                self.run.journal.say(f"error: pictures after step {done}: {error}; none is drawn")
        # After decoding: what this gathers stays for the next step where parameters are kept.
        losses = evaluate(self.run, self.learner, evaluation)
        return None if losses is None else losses | scores

    def _scores(self, done: int, rows: Rows) -> dict[str, float] | None:
        """Decode and score; None when the ranks left it on request, NaN where logits were not finite."""
        try:
            answers = decode_rows(self.run, self.learner, rows, self.chosen, self.limits)
        except NotFinite as error:
            # Training has its own judgement of weights that break (--max_skipped_steps).
            self.run.journal.say(f"error: evaluation after step {done}: {error}; nothing is scored")
            return dict.fromkeys(self._scored(rows, [NOTHING] * len(self.chosen)), math.nan)
        return None if answers is None else self._scored(rows, answers)

    def _scored(self, rows: Rows, answers: list[Prediction]) -> dict[str, float]:
        """Score answers; every rank gets the same numbers: the scorer's metrics, `count`, `low` and `high`."""

        def on_rank_zero() -> dict[str, float]:
            return dict(score([record_at(rows, row) for row in self.chosen], answers, self.task)["all"])

        return from_rank_zero(on_rank_zero, self.run.world)


@torch.no_grad()
def evaluate(run: Run, learner: Learner, evaluation: Evaluation) -> dict[str, float] | None:
    """Measure the mean losses on the evaluation records; None when the ranks stop on request. All ranks call it."""
    engine, world = learner.engine, run.world
    totals = torch.zeros(4, device=world.device)
    engine.eval()
    for batch in evaluation.loader.batches(micro[world.rank] for micro in evaluation.bins):
        run.journal.at("evaluates")
        sums, loss, ce, sim = forward(run, learner, batch, evaluation.counts)
        totals += torch.stack([loss, ce, sim, sums.token_ce])
        if run.stops():
            engine.train()
            return None
    engine.train()
    dist.all_reduce(totals)
    loss, ce, sim, token_ce = totals.tolist()
    parts = {"sim": sim} if run.config.stage == "stage1" else {}
    return {"loss": loss, "ce": ce, **parts, "token_ce": token_ce / max(1, evaluation.counts.labels)}
