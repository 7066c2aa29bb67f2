"""What happens every --eval_every steps: records decoded, scored and drawn, the loss on all, the best model kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from mirage_ds.analysis.inspect.live import need_matplotlib
from mirage_ds.config.run import RunConfig
from mirage_ds.data.loader import Rows
from mirage_ds.engine.setup import from_rank_zero
from mirage_ds.engine.whole import check_room
from mirage_ds.evaluate.decoder import slots_fed
from mirage_ds.evaluate.scoring import Answer, check_evaluation, spread
from mirage_ds.model.generate import Limits, NotFinite
from mirage_ds.run.best import Best
from mirage_ds.run.decoding import BATCH, decode_rows, record_at, scored
from mirage_ds.run.drawing import draw_rows, rows_to_draw
from mirage_ds.run.events import EVALUATION_BEGINS, EVALUATION_ENDS
from mirage_ds.run.monitor import Monitor
from mirage_ds.run.records import Evaluation
from mirage_ds.run.setup import Prepared
from mirage_ds.run.step import evaluate
from mirage_ds.run.stop import never
from mirage_ds.run.whereabouts import UNTOLD, Whereabouts


class Evaluator:
    """Evaluates a run on its evaluation records.

    Args:
        start: optimizer steps already taken.
        asked: whether somebody wants this process to stop.

    Raises:
        UserError: on every rank, before anything is trained: no room to decode or draw, a record that its scorer
            cannot score, none with latents to draw, no matplotlib.
    """

    def __init__(
        self,
        config: RunConfig,
        prepared: Prepared,
        monitor: Monitor,
        start: int,
        asked: Callable[[], bool] = never,
        where: Whereabouts = UNTOLD,
    ):
        self.config, self.prepared, self.monitor, self.asked, self.where = config, prepared, monitor, asked, where
        self.last: tuple[int, Mapping[str, float]] = (-1, {})
        self.task = ""
        self.chosen: list[int] = []
        self.drawn: list[int] = []
        self.best: Best | None = None
        # Every run has the length of training, as `mirage-ds evaluate` has it; as many tokens at a time as in training.
        k = config.latent_size
        self.limits = Limits(config.eval_new_tokens, k, slots_fed(config.slots, k), config.micro_batch_tokens)
        evaluation = prepared.evaluation
        if evaluation is None:
            return
        planner = evaluation.loader.planner
        row_ids, longest = planner.row_ids.tolist(), int(planner.lengths.max())
        if config.eval_decode:
            self.chosen = spread(row_ids, config.eval_decode)
            # Not those that prepare looked at, where rows with broken images have been left out since.
            self.task = from_rank_zero(lambda: self._check(evaluation), prepared.world)
            flag = f"--eval_decode {config.eval_decode}"
            check_room(prepared.engine, BATCH, longest, self.limits, prepared.world, flag)
        if config.eval_pictures:
            from_rank_zero(need_matplotlib, prepared.world)
            self.drawn = rows_to_draw(evaluation.loader.rows, row_ids, config.eval_pictures)
            flag = f"--eval_pictures {config.eval_pictures}"
            check_room(prepared.engine, 1, longest, Limits(new_tokens=0), prepared.world, flag)
        if config.save_best:
            self.best = Best(config.save_best, config.save_model_path, prepared.save, prepared.world, start)

    def _check(self, evaluation: Evaluation) -> str:
        config = self.config
        assert config.eval_data_path is not None
        records = [record_at(evaluation.loader.rows, row) for row in self.chosen]
        return check_evaluation(records, config.eval_data_path, config.task, (), None)

    def measured(self, done: int) -> bool:
        """Evaluate and report after `done` steps; False when the ranks left it on request. All ranks call it."""
        if self.prepared.evaluation is None:
            return True
        self.monitor.note(EVALUATION_BEGINS, done)
        metrics = self._metrics(done, self.prepared.evaluation)
        if metrics is not None:
            self.monitor.evaluation(done, metrics)
            self.last = (done, metrics)
            line = self.best.consider(done, metrics) if self.best else None
            if line:
                self.monitor.say(line)
        self.monitor.note(EVALUATION_ENDS, done)
        return metrics is not None

    def _metrics(self, done: int, evaluation: Evaluation) -> dict[str, float] | None:
        config, prepared = self.config, self.prepared
        scores: dict[str, float] = {}
        rows = evaluation.loader.rows
        if self.chosen:
            found = self._scores(done, rows)
            if found is None:
                return None
            scores = found
        if self.drawn:
            try:
                figures = draw_rows(prepared.engine, prepared.tower, rows, self.drawn, prepared.world)
                self.monitor.pictures(done, figures)
            except NotFinite as error:
                self.monitor.say(f"error: pictures after step {done}: {error}; none is drawn")
        # After decoding: what this gathers stays for the next step where parameters are kept.
        losses = evaluate(config, prepared, evaluation, self.asked, self.where)
        return None if losses is None else losses | scores

    def _scores(self, done: int, rows: Rows) -> dict[str, float] | None:
        """Decode and score; None when the ranks left it on request, NaN where logits were not finite."""
        config, prepared = self.config, self.prepared
        try:
            answers = decode_rows(
                prepared.engine,
                prepared.tower,
                rows,
                self.chosen,
                self.limits,
                latents=config.stage != "sft" or config.slots is not None,
                world=prepared.world,
                asked=self.asked,
                where=self.where,
            )
        except NotFinite as error:
            # Training has its own judgement of weights that break (--max_skipped_steps).
            self.monitor.say(f"error: evaluation after step {done}: {error}; nothing is scored")
            nothing = [Answer("", [], [])] * len(self.chosen)
            return dict.fromkeys(scored(rows, self.chosen, nothing, self.task, prepared.world), math.nan)
        return None if answers is None else scored(rows, self.chosen, answers, self.task, prepared.world)

    def of_step(self, done: int) -> Mapping[str, float]:
        """Return what was measured after `done` steps; nothing where the last evaluation was another."""
        step, metrics = self.last
        return metrics if step == done else {}
