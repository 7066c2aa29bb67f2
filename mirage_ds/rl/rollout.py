"""Sampling answers with the weights in training, and answers as rows to learn from.

P prompts of a rollout, G answers of each, A = P · G; W ranks; n rows that decode at the moment, V vocabulary; T tokens
of a row, k latents a block, L latents of an answer, H hidden.

Who decodes an answer plays no part: its draws hang on the run's seed, the rollout, its prompt's place there and its
number. A prompt that stands twice in a rollout gets other answers at each place.
"""

from collections.abc import Callable, Mapping, Sequence
from math import isnan, nan
from typing import NamedTuple

import numpy as np
import torch

from mirage_ds.config.rl import LatentPolicy
from mirage_ds.data.loader import Rows
from mirage_ds.data.sample import Sample
from mirage_ds.engine.whole import whole_model
from mirage_ds.errors import Stopped
from mirage_ds.evaluate.decoder import seeds_of, tokens_and_feed
from mirage_ds.evaluate.prompts import prompts_of
from mirage_ds.model.choose import Chooser, NotFinite, Turn, sampler
from mirage_ds.model.forward import MirageModel
from mirage_ds.model.generate import decode
from mirage_ds.model.rows import Generated
from mirage_ds.model.slots import LatentTokens, Limits, noise
from mirage_ds.run.heartbeat import LOADING
from mirage_ds.run.settings import Run
from mirage_ds.run.setup import Learner
from mirage_ds.run.validation import of_all_ranks, tower_of

# Policies that feed the recorded latents again.
RECORDED = ("replay", "gaussian", "vlpo")


class Sampled(NamedTuple):
    """A sampled answer.

    Attributes:
        row: dataset row of its prompt.
        ids: emitted tokens, without what stands behind the mark of a latent block that was cut off.
        logps: of each token the logarithm of its probability when it was drawn; NaN where it was forced.
        blocks: the latent blocks as (place of the first latent among `ids`, k).
        latents: (L, H) what was fed at them, on the CPU; None where it is not needed, or there is none.
        truncated: it has --max_completion_length tokens and no end.
    """

    row: int
    ids: list[int]
    logps: list[float]
    blocks: tuple[tuple[int, int], ...]
    latents: torch.Tensor | None
    truncated: bool

    @property
    def drawn(self) -> int:
        """How many of its tokens were drawn."""
        return sum(not isnan(one) for one in self.logps)


class Recorder:
    """A Chooser that notes the log-probability of each token that another one chooses, at its temperature.

    Args:
        asked: whether somebody wants this process to stop; looked at before each token.
    """

    def __init__(self, choose: Chooser, temperature: float, asked: Callable[[], bool]):
        self.choose, self.temperature, self.asked = choose, temperature, asked
        self._noted: list[tuple[Sequence[Turn], torch.Tensor]] = []

    def __call__(self, logits: torch.Tensor, turns: Sequence[Turn]) -> torch.Tensor:
        """Choose as the other one does; logits (n, V)."""
        if self.asked():
            raise Stopped
        scaled = logits.float() / self.temperature
        chosen = self.choose(logits, turns)
        right = scaled.gather(1, chosen[:, None])[:, 0]
        # Numbers stay on the device: the host would wait.
        self._noted.append((turns, right - scaled.logsumexp(-1)))
        return chosen

    def noted(self) -> dict[int, list[float]]:
        """Return number of the answer → the log-probability of each of its tokens, forced ones too."""
        found: dict[int, list[float]] = {}
        for turns, logps in self._noted:
            for turn, logp in zip(turns, logps.tolist(), strict=True):
                found.setdefault(turn.row, []).append(logp)
        return found


def limits_of(run: Run, policy: LatentPolicy) -> Limits:
    """Return the limits of a rollout's answers; every latent block has the length of training."""
    config, k = run.config, run.config.latent_size
    fixed = None if policy == "text" else k
    return Limits(config.max_completion_length, k, fixed, config.micro_batch_tokens, config.rollout_rows)


def seed_of(*parts: int) -> int:
    """Mix numbers into a seed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def sample(run: Run, learner: Learner, rows: Rows, chosen: Sequence[int], seed: int) -> list[Sampled]:
    """Sample G answers to each prompt with the engine's weights. All ranks call it with the same prompts.

    The weights are gathered once and released at the end.

    Args:
        chosen: dataset rows.

    Returns:
        The answers, those to a prompt behind each other, in the order of `chosen`; the same on every rank.

    Raises:
        NotFinite, Stopped: on every rank.
    """
    world, several = run.world, run.config.num_generations
    made: list[tuple[int, list[Sampled]]] = []
    broken: list[int] = []
    own = range(world.rank, len(chosen), world.size)
    # With the guard's long bound: it is one mark, however many answers there are.
    run.journal.at("samples answers", kind=LOADING)
    with whole_model(learner.engine) as model:
        try:
            answers = _decode(run, learner, model, rows, {at: chosen[at] for at in own}, seed) if own else []
            made = [(at, answers[n * several : (n + 1) * several]) for n, at in enumerate(own)]
        except Stopped:
            pass
        except NotFinite as error:
            broken.append(error.row)
        if run.stops():
            raise Stopped
    return [answer for group in of_all_ranks(made, broken, world) for answer in group]


def _decode(
    run: Run, learner: Learner, model: MirageModel, rows: Rows, own: Mapping[int, int], seed: int
) -> list[Sampled]:
    """Decode this rank's prompts: place in the rollout → dataset row."""
    config, policy = run.config, learner.state["latent_policy"]
    several, encoder = config.num_generations, rows.encoder
    tokens, _ = tokens_and_feed(model, encoder, policy != "text", None)
    seeds, chosen = [one for at in own for one in seeds_of(seed, at, several)], [*own.values()]
    choose = Recorder(sampler(config.temperature, 1.0, seeds), config.temperature, run.asked)
    draws = noise(seeds) if policy == "gaussian" else None
    prompts = prompts_of(model, tower_of(learner, model), encoder, [rows[row] for row in chosen])
    prompts, limits, record = prompts._replace(answers=several), limits_of(run, policy), policy in RECORDED
    found = dict(decode(model, prompts, tokens, limits, choose, record=record, noise=draws))
    logps = choose.noted()
    return [sampled(chosen[at // several], found[at], logps[at], tokens, record) for at in range(len(found))]


def sampled(row: int, made: Generated, logps: Sequence[float], tokens: LatentTokens, recorded: bool) -> Sampled:
    """Turn what the decoder made into an answer to learn from.

    Args:
        logps: of every token, forced or not.
        recorded: whether what was fed at its latents is there, and needed.
    """
    ids, fed_here = made.ids, made.fed + "E"
    # The latents and the mark of their end were not chosen.
    forced = [
        here == "H" or (at > 0 and (fed_here[at - 1] == "H" or ids[at - 1] == tokens.start))
        for at, here in enumerate(fed_here[: len(ids)])
    ]
    end = len(ids)
    if forced[-1] and ids[-1] == tokens.pad:
        # Cut off inside a block: behind its mark nothing was chosen.
        end -= ids[::-1].index(tokens.start)
    noted = [nan if force else logp for logp, force in zip(logps, forced, strict=True)]
    blocks = tuple(block for block in made.blocks() if block[0] < end)
    fed = made.latents[: sum(k for _, k in blocks)]
    latents = torch.stack(fed).cpu() if recorded and fed else None
    return Sampled(row, ids[:end], noted[:end], blocks, latents, ids[-1] not in tokens.stops)


def row_of(prompt: Sample, answer: Sampled) -> Sample:
    """Put a prompt and an answer to it together: a row whose labels are the tokens that were drawn."""
    return prompt.answered(answer.ids, answer.blocks, ~torch.tensor(answer.logps).isnan())
