"""Optimizer steps on sampled answers: packing, scoring before the first one, and each step's micro-steps.

A answers of a rollout, N samples and M sampled tokens of a micro-batch, L latents of it, H hidden; W ranks, G
micro-steps of a step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from mirage_ds.data.batch import Batch, collate, to_device
from mirage_ds.data.pack import pack
from mirage_ds.data.sample import Sample
from mirage_ds.engine.private import backward
from mirage_ds.engine.setup import everyone
from mirage_ds.errors import UserError
from mirage_ds.model.forward import Scores, Scoring
from mirage_ds.rl.latents import block_ratios
from mirage_ds.rl.objective import SUMS, Scored, Settings, Totals, reported, token_terms
from mirage_ds.rl.rollout import RECORDED, Sampled, row_of
from mirage_ds.run.heartbeat import COLLECTIVE
from mirage_ds.run.settings import Run
from mirage_ds.run.setup import Data, Learner
from mirage_ds.run.step import Taken, apply_gradients

# TRL's bound of cispo's weight, where none is given.
CISPO_CLIP = 5.0


@dataclass
class Micro:
    """One rank's part of a micro-step.

    Attributes:
        own: places of its answers in the rollout; passes: of the forward, on all ranks.
        old, reference: (M,) log-probabilities by the sampling policy and by the reference; latents: (L,) of its latents
            by the sampling policy. They are there once they have been computed.
    """

    own: list[int]
    passes: int
    old: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    reference: torch.Tensor | None = None


class Lesson(NamedTuple):
    """What is learnt from a rollout.

    Attributes:
        answers: all A; advantages: (A,) float32; weights: (A,) float32, 0 for those that teach nothing.
    """

    answers: Sequence[Sampled]
    advantages: torch.Tensor
    weights: torch.Tensor


class Pupil:
    """Takes optimizer steps on the answers of one rollout.

    Attributes:
        drift: how far log-probabilities of decoder and training are apart, once a step was taken.
    """

    def __init__(self, run: Run, data: Data, learner: Learner, lesson: Lesson):
        self.run, self.data, self.learner, self.lesson = run, data, learner, lesson
        config = run.config
        self.policy = learner.state["latent_policy"]
        density = self.policy if self.policy in ("gaussian", "vlpo") else None
        self.scoring = Scoring(config.temperature, density, config.sigma)
        high = config.clip_high or (CISPO_CLIP if config.objective == "cispo" else config.clip_low)
        self.settings = Settings(config.objective, config.clip_low, high, config.beta, config.entropy)
        self.rows = data.loader.rows
        self._prompts: dict[int, Sample] = {}
        self._away: list[torch.Tensor] = []
        self.drift: dict[str, float] = {}
        # Of whole prompts, in the order in which they were drawn.
        parts = np.array_split(np.arange(len(lesson.answers)), config.updates)
        self.parts = [(part.tolist(), self._packed(part.tolist())) for part in parts]

    def _packed(self, places: list[int]) -> list[Micro]:
        """Pack answers into this rank's micro-batches of a step."""
        planner, measured = self.data.loader.planner, self.rows.records
        answers = [self.lesson.answers[at] for at in places]
        rows = [answer.row for answer in answers]
        recurrent = self.policy == "through"
        passes = [self.run.config.passes(len(answer.blocks)) if recurrent else 1 for answer in answers]
        bins = pack(
            [int(measured["tokens"][answer.row]) + len(answer.ids) for answer in answers],
            planner.world_size,
            planner.micro_batch_tokens,
            planner.micro_batch_size,
            None if planner.patches is None else measured["patches"][rows],
            planner.micro_batch_patches,
            np.array(passes) if recurrent else None,
        )
        size = planner.world_size
        micros = [bins[at : at + size] for at in range(0, len(bins), size)]
        return [
            Micro(
                [places[one] for one in micro[self.run.world.rank]],
                max((passes[one] for rank in micro for one in rank), default=1),
            )
            for micro in micros
        ]

    def batch(self, micro: Micro) -> tuple[Batch, torch.Tensor]:
        """Make a micro-batch on this rank's device, and the decoder's log-probabilities (M,) of its labels."""
        answers = [self.lesson.answers[at] for at in micro.own]
        prompts = [self._prompt(answer.row) for answer in answers]
        samples = [row_of(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        dummy = self.rows.encoder.dummy((micro.passes - 1) // self.run.config.latent_size)
        made = collate(samples, micro.passes, dummy)
        teaches = torch.zeros_like(made.weight)
        teaches[: len(answers)] = self.lesson.weights[micro.own]
        made = made._replace(weight=teaches)
        if self.policy in RECORDED:
            width = self.learner.engine.module.language_model.config.hidden_size
            fed = [answer.latents for answer in answers if answer.latents is not None]
            made = made._replace(fed=torch.cat(fed) if fed else torch.empty(0, width))
        if self.learner.tower is not None:
            made = self.learner.tower.attach(made)
        # Packed, as its tokens stand; then in the order in which the passes reach the labels.
        noted = [torch.cat([torch.full((len(p.input_ids),), torch.nan), torch.tensor(a.logps)]) for p, a in
                 zip(prompts, answers, strict=True)]  # fmt: skip
        drawn = torch.cat([*noted, torch.full((len(made.input_ids) - sum(map(len, noted)),), torch.nan)])
        places = torch.cat([one.tokens[one.labelled] for one in made.passes]) + 1
        return to_device(made, self.run.world.device), drawn[places].to(self.run.world.device)

    def _prompt(self, row: int) -> Sample:
        if row not in self._prompts:
            self._prompts[row] = self.rows[row]
        return self._prompts[row]

    @torch.no_grad()
    def score(self) -> None:
        """Score answers before the first step: by the reference, and those of later parts by the policy that sampled.

        The first part's are scored by the forward of its own step: no weight has changed by then. All ranks call it.
        """
        engine = self.learner.engine
        # A copy of the start's weights, or these without their adapters.
        reference = engine if self.learner.reference is None else self.learner.reference
        reference.eval()
        for micro, batch, _ in self._batches(self.parts if self.run.config.beta else []):
            micro.reference = reference(batch, self.scoring._replace(density=None, adapters=False)).logp
        engine.eval()
        for micro, batch, drawn in self._batches(self.parts[1:]):
            self._keep(engine(batch, self.scoring), micro, drawn)
        engine.train()

    def _batches(self, parts: Sequence[tuple[list[int], list[Micro]]]) -> Iterator[tuple[Micro, Batch, torch.Tensor]]:
        for micro in (micro for _, micros in parts for micro in micros):
            self.run.journal.at("scores answers")
            yield micro, *self.batch(micro)

    def _keep(self, scores: Scores, micro: Micro, drawn: torch.Tensor) -> None:
        """Keep what the sampling policy gave its answers, and how far the decoder's `drawn` (M,) is from that."""
        micro.old, micro.latents = scores.logp.detach(), scores.latent_logp.detach()
        self._away.append((micro.old - drawn).abs()[drawn.isfinite()])

    def _compare(self, step: int) -> dict[str, float]:
        """Say how far apart decoder and training are, in nats a token: the mean and the largest.

        Raises:
            UserError: on every rank: too far.
        """
        config, away = self.run.config, torch.cat(self._away)
        sums, most = torch.stack([away.sum(), away.new_tensor(len(away))]), torch.cat([away, away.new_zeros(1)]).max()
        self.run.journal.at("compares log-probabilities", step, COLLECTIVE)
        dist.all_reduce(sums)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        drift = float(sums[0] / sums[1].clamp(min=1))
        if not drift <= config.max_drift:
            raise UserError(
                f"rollout {-(-step // config.steps_per_rollout)}: log-probabilities of decoder and training differ by "
                f"{drift:.3g} nats a token in the mean, above --max_drift {config.max_drift:g}: the answers are not "
                "those of the policy that is trained; raise it where a low precision explains that, or report it"
            )
        return {"decoder_drift": drift, "decoder_drift_max": float(most)}

    def totals(self, places: Sequence[int]) -> Totals:
        """Count what a step on these answers takes."""
        teach = [self.lesson.answers[at] for at in places if self.lesson.weights[at]]
        blocks = sum(len(answer.blocks) for answer in teach) if self.scoring.density else 0
        tokens = sum(answer.drawn for answer in teach)
        return Totals(len(places), tokens, blocks, self.run.config.max_completion_length)

    def update(self, part: int, step: int) -> Taken:
        """Take one optimizer step on a part of the rollout. All ranks call it.

        Args:
            step: optimizer steps taken before.

        Raises:
            UserError: on every rank, before weights change: decoder and training are apart.
        """
        (places, micros), engine, at = self.parts[part], self.learner.engine, self.run.journal.at
        begun, done = time.perf_counter(), step + 1
        totals = self.totals(places)
        sums = torch.zeros(len(SUMS), device=self.run.world.device)
        ran = []
        for number, micro in enumerate(micros):
            at(f"forward and backward of micro-step {number + 1}", done)
            engine.set_gradient_accumulation_boundary(number == len(micros) - 1)
            batch, drawn = self.batch(micro)
            made = self._micro_step(batch, micro, totals, drawn)
            sums += made
            ran.append((batch.rows, made[SUMS.index("loss")].expand(len(batch.rows)).clone()))
        self.drift = self.drift or self._compare(done)
        at("updates the weights", done)
        learning_rate = engine.get_lr()[0]
        applied, norm = apply_gradients(engine, self.run.config.max_grad_norm)
        at("sums up the losses", done, COLLECTIVE)
        dist.all_reduce(sums)
        answers = [self.lesson.answers[one] for one in places]
        tokens = [int(self.rows.records["tokens"][one.row]) + len(one.ids) for one in answers]
        metrics: dict[str, Any] = {
            **reported(sums),
            **self.drift,
            "grad_norm": norm,
            "lr": float(learning_rate),
            "labels": totals.tokens,
            "rows": len(places),
            "tokens": sum(tokens),
            "micro_steps": len(micros),
            "skipped": int(not applied),
            "model_flops": round(self.learner.flops.of_text(tokens, totals.tokens)),
            "update_seconds": round(time.perf_counter() - begun, 4),
        }
        if self.run.config.log_rows:
            metrics["row_ids"] = everyone([row for rows, _ in ran for row in rows.tolist() if row >= 0], self.run.world)
        return Taken(metrics, applied, False, ran, [one.row for one in answers])

    def _micro_step(self, batch: Batch, micro: Micro, totals: Totals, drawn: torch.Tensor) -> torch.Tensor:
        """Forward and backward over one micro-batch; return its SUMS."""
        engine, config = self.learner.engine, self.run.config
        scores: Scores = engine(batch, self.scoring)
        if micro.old is None:
            self._keep(scores, micro, drawn)
        assert micro.old is not None
        blocks = None
        if self.scoring.density is not None and micro.latents is not None:
            width = scores.states.shape[1]
            blocks = block_ratios(scores.latent_logp, micro.latents, batch, width, config.latent_ratio or "mean")
        scored = Scored(scores.logp, scores.entropy, micro.old, micro.reference, blocks)
        advantage = torch.zeros_like(batch.weight)
        advantage[: len(micro.own)] = self.lesson.advantages[micro.own].to(advantage.device)
        terms = token_terms(scored, advantage, batch, totals, self.settings)
        # As run/step.py: what is not finite reaches every rank with the gradients.
        finite = torch.where(terms.loss.detach().isfinite(), 1.0, torch.nan)
        backward(engine, terms.loss * finite * self.run.world.size, scores.earlier)
        engine.module.layers.round.check()
        return terms.sums
