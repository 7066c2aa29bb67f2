"""The reinforcement stage's way to optimizer steps: rollout after rollout, each sampled, scored and learnt from.

P prompts of a rollout, G answers of each, A = P · G.

A rollout is a function of the weights, the seed and its number, so a run that is stopped or killed makes the rollout
anew that it was at: checkpoints are written between rollouts alone (config.run checks --save_every), and nothing of a
rollout has to be kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, nullcontext

import numpy as np
import torch

from mirage_ds.config.run import RunConfig
from mirage_ds.engine.private import set_collective_timeout
from mirage_ds.engine.setup import from_rank_zero
from mirage_ds.engine.whole import check_room
from mirage_ds.errors import Stopped, UserError
from mirage_ds.evaluate.decoder import answer_of
from mirage_ds.model.rows import Generated
from mirage_ds.rl.objective import advantages
from mirage_ds.rl.report import Completions, Group, Rollout, measures
from mirage_ds.rl.rewards import Answer, Scored
from mirage_ds.rl.rollout import Sampled, limits_of, sample, seed_of
from mirage_ds.rl.step import Lesson, Pupil
from mirage_ds.run import events
from mirage_ds.run.heartbeat import LOADING
from mirage_ds.run.settings import Run
from mirage_ds.run.setup import Data, Learner
from mirage_ds.run.step import Taken
from mirage_ds.tasks import seen_by_scorer

ROOM = "lower --rollout_rows or --max_completion_length, or use GPUs with more memory (`mirage-ds plan --stage rl`)"


def reinforce(run: Run, data: Data, learner: Learner) -> Iterator[Taken]:
    """Yield each optimizer step of the run as it is taken. All ranks call it.

    It ends early, between two rollouts, where somebody asked the run to stop while one was sampled.

    Raises:
        UserError: no memory for the rollout, too many rewards failed, log-probabilities of decoder and training apart,
            or hardly an answer has latents any more.
    """
    config, every = run.config, run.config.steps_per_rollout
    limits = limits_of(run, learner.state["latent_policy"])
    longest = int(data.index.tokens.max()) - config.max_completion_length
    own = -(-config.rows_per_step // run.world.size) * config.num_generations
    rows = min(own, config.rollout_rows or own)
    check_room(learner.engine, rows, longest, limits, run.world, f"a rollout of {rows} answers at a time", ROOM)
    completions = Completions(run, data, learner.start // every)
    with closing(data.rewards) if data.rewards is not None else nullcontext():
        for number in range(learner.start // every, -(-data.steps // every)):
            # Until its first step is done a run has the long bound anyway.
            later = number > learner.start // every
            try:
                if later:
                    # Ranks wait for the longest answers, and for rank 0 that scores alone.
                    set_collective_timeout(config.start_timeout)
                rollout = roll(run, data, learner, number)
            except Stopped:
                return
            finally:
                if later:
                    set_collective_timeout(config.collective_timeout)
            lesson = lesson_of(run, rollout)
            completions.write(number * every, rollout, lesson)
            found = measures(data, rollout)
            check(run, learner, found, number)
            pupil = Pupil(run, data, learner, lesson)
            begun = time.perf_counter()
            pupil.score()
            found["logp_seconds"] = round(time.perf_counter() - begun, 4)
            for at in range(number * every, min((number + 1) * every, data.steps)):
                taken = pupil.update(at % config.updates, at)
                last = (at + 1) % every == 0
                yield taken._replace(metrics=taken.metrics | found, stop=last and run.stops())


def roll(run: Run, data: Data, learner: Learner, number: int) -> Rollout:
    """Sample and score the answers of a rollout; groups without spread are drawn anew, up to --resample times.

    Raises:
        Stopped: on every rank.
    """
    config, planner = run.config, data.loader.planner
    chosen = planner.row_ids[planner.rows_of(number)].tolist()
    groups: list[Group] = []
    used, redrawn = set(chosen), 0
    seconds = dict.fromkeys(("decode_seconds", "scoring_seconds"), 0.0)
    for attempt in range(config.resample + 1):
        begun = time.perf_counter()
        run.journal.tell(events.ROLLOUT_BEGINS, number * config.steps_per_rollout)
        answers = sample(run, learner, data.loader.rows, chosen, seed_of(config.seed, number, attempt))
        sampled = time.perf_counter()
        run.journal.tell(events.SCORING_BEGINS, number * config.steps_per_rollout)
        fresh = grouped(config, chosen, answers, judge(run, data, answers))
        seconds["decode_seconds"] += sampled - begun
        seconds["scoring_seconds"] += time.perf_counter() - sampled
        better = iter([group for group in fresh if not group.flat])
        groups = [next(better, group) if group.flat else group for group in groups] or fresh
        redrawn += len(chosen) if attempt else 0
        # In the place of those that teach nothing, other prompts; what is left at the end stays.
        wanted = sum(group.flat for group in groups)
        rest = np.setdiff1d(planner.row_ids, list(used))
        chance = np.random.default_rng((config.seed, number, attempt))
        chosen = chance.choice(rest, min(wanted, len(rest)), replace=False).tolist()
        used.update(chosen)
        if not chosen:
            break
    run.journal.tell(events.ROLLOUT_ENDS, number * config.steps_per_rollout)
    return Rollout(groups, redrawn, seconds)


def judge(run: Run, data: Data, answers: list[Sampled]) -> Scored:
    """Let rank 0 score answers; every rank gets the same rewards.

    Raises:
        UserError: on every rank: too many of them failed.
        Stopped: on every rank, also where all answers have been scored: a rollout that nothing was learnt from is made
            again.
    """
    records, encoder = data.index.rows, data.loader.rows.encoder

    def score() -> Scored:
        assert data.rewards is not None
        given = []
        for at, answer in enumerate(answers):
            said, place = answer_of(Generated(answer.ids), encoder), at // run.config.num_generations
            record = seen_by_scorer(records.record(answer.row))
            given.append(Answer(answer.row, record, said.text, tuple(said.runs), answer.truncated, place))
        try:
            scored = data.rewards.score(given)
        except (Stopped, UserError):
            # Who stops a job may signal all of its processes, those that score too.
            if run.asked():
                return Scored([], {}, [])
            raise
        if scored.faults:
            row, name, sentence = scored.faults[0]
            first = f"{data.rewards.place(row)}, {name}: {sentence}"
            run.journal.say(f"warning: failed rewards: {len(scored.faults)}; the first: {first}")
        return scored

    # With the guard's long bound: a judge may be slow.
    run.journal.at("scores answers by reward", kind=LOADING)
    scored = from_rank_zero(score, run.world)
    if run.stops():
        raise Stopped
    return scored


def grouped(config: RunConfig, chosen: list[int], answers: list[Sampled], scored: Scored) -> list[Group]:
    """Put the answers to each prompt, and what they got, together; a truncated one got less."""
    several = config.num_generations
    parts = [slice(at * several, (at + 1) * several) for at in range(len(chosen))]
    rewards = [
        total - config.truncation_penalty * answer.truncated
        for total, answer in zip(scored.total, answers, strict=True)
    ]
    return [
        Group(row, answers[part], rewards[part], {name: one[part] for name, one in scored.by_function.items()})
        for row, part in zip(chosen, parts, strict=True)
    ]


def lesson_of(run: Run, rollout: Rollout) -> Lesson:
    """Work out what each answer teaches: its advantage, or nothing where it has no reward or is masked."""
    config, answers = run.config, rollout.answers
    truncated = torch.tensor([answer.truncated for answer in answers])
    rewards = torch.tensor(rollout.rewards, dtype=torch.float64)
    group = torch.arange(len(rollout.groups)).repeat_interleave(config.num_generations)
    weights = ~rewards.isnan() & ~(truncated & config.mask_truncated)
    return Lesson(answers, advantages(rewards, group, config.scale_rewards).values, weights.float())


def check(run: Run, learner: Learner, found: Mapping[str, float], number: int) -> None:
    """Refuse to learn from a rollout that shows something broken.

    Raises:
        UserError: on every rank: answers have no latents any more, or no rewards.
    """
    config, share = run.config, found["latent_share"]
    if learner.state["latent_policy"] != "text" and share < config.min_latent_share:
        raise UserError(
            f"rollout {number + 1}: {share:.1%} of the answers have latents, below --min_latent_share "
            f"{config.min_latent_share:g}: the model falls back to text; start from the last checkpoint with a reward "
            "that asks for latents, a lower --learning_rate or a --beta"
        )
    if math.isnan(found["reward"]):
        raise UserError(f"rollout {number + 1}: no answer has a reward; see what --reward returns")
