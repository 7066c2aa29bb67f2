"""What happens every --eval_every steps: records answered, scored and drawn, the loss on all, the best model kept.

N rows to decode, W ranks, k latents a block, H hidden. The rows are dealt to the ranks; in rounds, each rank answers a
batch of its own, and then all look whether somebody wants them to stop.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from mirage_ds.analysis.alike import measures, rows_of
from mirage_ds.analysis.bench import Bench
from mirage_ds.analysis.inspect.look import figures
from mirage_ds.data.batch import Batch
from mirage_ds.data.loader import Rows
from mirage_ds.data.record import Record, RecordError
from mirage_ds.engine.setup import World, everyone, from_rank_zero
from mirage_ds.engine.whole import check_room, whole_model
from mirage_ds.errors import Stopped, UserError
from mirage_ds.evaluate.decoder import decode_samples, slots_fed
from mirage_ds.evaluate.prompts import prompt_of
from mirage_ds.evaluate.scoring import NOTHING, Prediction, score, spread, task_of
from mirage_ds.model.choose import NotFinite
from mirage_ds.model.forward import MirageModel
from mirage_ds.model.loss import LossSums
from mirage_ds.model.slots import Limits
from mirage_ds.model.vision import FrozenTower
from mirage_ds.run.events import EVALUATION_BEGINS, EVALUATION_ENDS
from mirage_ds.run.records import Evaluation, longest_block
from mirage_ds.run.saving import Best
from mirage_ds.run.settings import Run
from mirage_ds.run.setup import Data, Learner
from mirage_ds.run.step import forward

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Made = TypeVar("Made")
# Rows that a rank answers at a time.
BATCH = 16


class Evaluator:
    """Evaluates a run on its evaluation records.

    Raises:
        UserError: on every rank, before anything is trained: no room to decode or draw, a record that its scorer
            cannot score, none with latents to draw.
    """

    def __init__(self, run: Run, data: Data, learner: Learner):
        self.run, self.learner, self.evaluation = run, learner, data.evaluation
        self.last: tuple[int, Mapping[str, float]] = (-1, {})
        self.task = ""
        self.names: list[str] = []
        self.chosen: list[int] = []
        self.drawn: list[int] = []
        self.best: Best | None = None
        config, engine, world = run.config, learner.engine, run.world
        # Every latent block has the length of training, as `mirage-ds evaluate` has it; as many tokens at a time as in
        # training.
        compress, k = config.compress_strategy, longest_block(config, data.index)
        slots, hides = slots_fed(config.slots, k, compress), config.bottleneck
        self.limits = Limits(config.eval_new_tokens, k, slots, config.micro_batch_tokens, bottleneck=hides)
        if self.evaluation is None:
            return
        self.rows, planner = self.evaluation.loader.rows, self.evaluation.loader.planner
        row_ids, longest = planner.row_ids.tolist(), int(planner.lengths.max())
        if config.eval_decode:
            self.chosen = spread(row_ids, config.eval_decode)
            # Not those that open_data looked at, where rows with broken images have been left out since.
            path = cast(Path, config.eval_data_path)
            self.task = from_rank_zero(lambda: task_of(self._records(), path, config.task), world)
            self.names = list(self._scored([NOTHING] * len(self.chosen)))
            check_room(engine, BATCH, longest, self.limits, world, f"--eval_decode {config.eval_decode}")
        if config.eval_pictures:
            self.drawn = rows_to_draw(self.rows, row_ids, config.eval_pictures)
            check_room(engine, 1, longest, Limits(new_tokens=0), world, f"--eval_pictures {config.eval_pictures}")
        if config.save_best:
            save = partial(learner.save, world)
            self.best = Best(config.save_best, config.save_model_path, save, world, learner.start)

    def measured(self, done: int) -> bool:
        """Evaluate and report after `done` steps; False when the ranks left it on request. All ranks call it."""
        if self.evaluation is None:
            return True
        journal = self.run.journal
        journal.tell(EVALUATION_BEGINS, done)
        try:
            metrics = self._metrics(done, self.evaluation)
        except Stopped:
            journal.tell(EVALUATION_ENDS, done)
            return False
        journal.evaluation(done, metrics)
        self.last = (done, metrics)
        line = self.best.consider(done, metrics) if self.best else None
        journal.tell(EVALUATION_ENDS, done, line or "")
        return True

    def of_step(self, done: int) -> Mapping[str, float]:
        """Return what was measured after `done` steps; nothing where the last evaluation was another."""
        step, metrics = self.last
        return metrics if step == done else {}

    def _metrics(self, done: int, evaluation: Evaluation) -> dict[str, float]:
        scores = self._scores(done) if self.chosen else {}
        if self.drawn:
            try:
                self.run.journal.pictures(done, draw_rows(self.run, self.learner, self.rows, self.drawn))
            except NotFinite as error:
                self.run.journal.say(f"error: pictures after step {done}: {error}; none is drawn")
        # After decoding: what this gathers stays for the next step where parameters are kept.
        return evaluate(self.run, self.learner, evaluation) | scores

    def _scores(self, done: int) -> dict[str, float]:
        """Decode and score; NaN where logits were not finite, or a scorer of one's own fails for an answer.

        Neither is a reason to lose the run: weights that break are judged in training (--max_skipped_steps).
        """
        given = self.run, self.learner, self.rows, self.chosen, self.limits
        try:
            scores = self._scored(decode_rows(*given))
            if self.learner.state.get("latent_policy") == "gaussian":
                first, *_ = drawn = self._scored(decode_rows(*given, drawn=True))
                scores[f"{first}_drawn"] = drawn[first]
            return scores
        except (NotFinite, UserError) as error:
            # What one rank alone has met ends the run: the others wait for it.
            if isinstance(error, UserError) and not error.everywhere:
                raise
            self.run.journal.say(f"error: evaluation after step {done}: {error}; nothing is scored")
            return dict.fromkeys(self.names, math.nan)

    def _scored(self, answers: list[Prediction]) -> dict[str, float]:
        """Score answers; every rank gets the same numbers: the scorer's metrics, `count`, `low` and `high`."""
        return from_rank_zero(lambda: dict(score(self._records(), answers, self.task)["all"]), self.run.world)

    def _records(self) -> list[Record]:
        return [self.rows.records.record(row) for row in self.chosen]


@torch.no_grad()
def evaluate(run: Run, learner: Learner, evaluation: Evaluation) -> dict[str, float]:
    """Measure the mean losses on the evaluation records, and how alike latents are. All ranks call it.

    Raises:
        Stopped: on every rank.
    """
    engine, world, chosen = learner.engine, run.world, rows_to_measure(run, evaluation)
    totals = torch.zeros(4, device=world.device)
    latents: list[tuple[int, torch.Tensor]] = []
    engine.eval()
    try:
        for batch in evaluation.loader.batches(evaluation.bins):
            run.journal.at("evaluates")
            sums, loss, ce, sim = forward(run, learner, batch, evaluation.counts)
            totals += torch.stack([loss, ce, sim, sums.token_ce])
            if chosen:
                latents += first_blocks(batch, sums, chosen, run.config.latent_size)
            if run.stops():
                raise Stopped
    finally:
        engine.train()
    dist.all_reduce(totals)
    loss, ce, sim, token_ce = totals.tolist()
    parts = {"sim": sim} if run.config.stage == "stage1" else {}
    alike: dict[str, float] = {}
    if chosen and (made := of_all_ranks(latents, [], world)):
        alike = from_rank_zero(lambda: measures(torch.stack(made)), world)
    return {"loss": loss, "ce": ce, **parts, "token_ce": token_ce / max(1, evaluation.counts.labels), **alike}


def rows_to_measure(run: Run, evaluation: Evaluation) -> set[int]:
    """Return the evaluation rows whose latents are measured: the first that have a block, where all have k latents."""
    if run.config.stage == "sft" or run.config.compress_strategy == "region":
        return set()
    rows = evaluation.loader.planner.row_ids
    with_latents = rows[evaluation.loader.rows.records["runs"][rows] > 0]
    return set(with_latents[: rows_of(run.config.latent_size)].tolist())


def first_blocks(batch: Batch, sums: LossSums, chosen: Container[int], k: int) -> list[tuple[int, torch.Tensor]]:
    """Return those rows of an evaluated micro-batch that are among `chosen`, each with its first block (k, H)."""
    assert sums.latents is not None
    each = zip(batch.rows.tolist(), sums.latents.split(batch.latent_count.tolist()), strict=True)
    return [(row, own[:k].float().cpu()) for row, own in each if row in chosen and len(own)]


def tower_of(learner: Learner, model: MirageModel) -> FrozenTower:
    """Return the vision tower: the frozen one, or, where it is trained, the model's own."""
    return learner.tower or FrozenTower(cast(nn.Module, model.visual))


def decode_rows(
    run: Run, learner: Learner, rows: Rows, chosen: Sequence[int], limits: Limits, drawn: bool = False
) -> list[Prediction]:
    """Answer rows with the engine's weights, greedily. All ranks call it.

    The weights are gathered once, whatever is decoded, and released at the end.

    Args:
        rows: encodes the rows, kept features in place of pixels where they are kept.
        chosen: dataset rows.
        drawn: as decoder.Decoder.drawn.

    Returns:
        The answers in the order of `chosen`, on every rank.

    Raises:
        NotFinite: on every rank, once all have done their rounds.
        Stopped: on every rank.
    """
    world = run.world
    # Whether the model may open latent blocks.
    latents = run.config.stage != "sft" or run.config.slots is not None
    latents = latents and learner.state.get("latent_policy") != "text"
    own = list(range(world.rank, len(chosen), world.size))
    rounds = math.ceil(len(chosen) / (world.size * BATCH))
    made: list[tuple[int, Prediction]] = []
    broken: list[int] = []
    with whole_model(learner.engine) as model:
        tower = tower_of(learner, model)
        for number in range(rounds):
            part = own[number * BATCH : (number + 1) * BATCH]
            run.journal.at(f"decodes batch {number + 1} of {rounds}")
            try:
                if part:
                    samples = [prompt_of(rows[chosen[i]]) for i in part]
                    how: Any = {"asked": run.asked, "slots": rows.encoder.slots, "drawn": drawn}
                    answers = decode_samples(model, tower, rows.encoder, samples, limits, latents, **how)
                    made += zip(part, answers, strict=True)
            except Stopped:
                pass
            except NotFinite as error:
                broken.append(error.row)
            if run.stops():
                raise Stopped
    return of_all_ranks(made, broken, world)


def of_all_ranks(made: list[tuple[int, Made]], broken: list[int], world: World) -> list[Made]:
    """Return what the ranks have made, in the order of its places. All ranks call it.

    Args:
        broken: rows whose logits were not finite on this rank.

    Raises:
        NotFinite: on every rank, where one of them has such a row.
    """
    if rows := everyone(broken, world):
        raise NotFinite(min(rows))
    return [one for _, one in sorted(everyone(made, world), key=itemgetter(0))]


def rows_to_draw(rows: Rows, of: Sequence[int], count: int) -> list[int]:
    """Return the first `count` rows of `of` whose answer has a latent block.

    Raises:
        UserError: none has.
    """
    found = list(islice((row for row in of if rows.records.record(row).runs), count))
    if not found:
        raise UserError(
            f"--eval_pictures {count}: no evaluation record has a latent block to draw; give records with a helper "
            "image or its mark, or leave the flag out"
        )
    return found


def draw_rows(run: Run, learner: Learner, rows: Rows, chosen: Sequence[int]) -> dict[str, Figure]:
    """Draw the latents of rows with the engine's weights, which are gathered once and released. All ranks call it.

    Returns:
        On rank 0 the name and figure of each picture; nothing on the others, which wait.

    Raises:
        UserError: on every rank: an image does not open any more.
    """
    made: dict[str, Figure] = {}
    with whole_model(learner.engine) as model:

        def draw() -> None:
            bench = Bench(model, tower_of(learner, model), rows.encoder)
            try:
                made.update(figures(bench, [rows.records.record(row) for row in chosen]))
            except RecordError as error:
                raise UserError(f"record on {error.fault}") from None

        from_rank_zero(draw, run.world)
    return made
