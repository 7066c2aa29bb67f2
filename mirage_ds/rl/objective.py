"""Advantages, and the objectives of grpo, dr_grpo, dapo, gspo and cispo: pure functions on tensors.

n answers of a rollout, N samples of a micro-batch, M sampled tokens of it, B latent blocks of it.

Formulas and edge cases are those of TRL 1.16's GRPOTrainer, but for one thing: what TRL averages over a micro-batch is
here a sum over the whole optimizer step, divided by what the step counts, so that ranks and packing play no part.
"""

from typing import Literal, NamedTuple

import torch

from mirage_ds.data.batch import Batch
from mirage_ds.rl.latents import Blocks

Objective = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"]
Scale = Literal["group", "batch", "none"]

# Added to a spread that advantages are divided by.
EPSILON = 1e-4
# Nats of a ratio, at most.
MOST = 20.0


class Advantages(NamedTuple):
    """What a rollout's rewards come to.

    Attributes:
        values: (n,) float32; 0 for an answer without a reward (NaN).
        spread: (n,) float32 standard deviation (n − 1) of the rewards of each answer's group; 0 where it is not known.
    """

    values: torch.Tensor
    spread: torch.Tensor


def _spread(rewards: torch.Tensor, group: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of each group, (count,) float64; NaN are not counted."""
    there = ~rewards.isnan()
    known, of = rewards[there], group[there]
    sizes = torch.bincount(of, minlength=count)
    means = known.new_zeros(count).index_add(0, of, known) / sizes.clamp(min=1)
    squares = known.new_zeros(count).index_add(0, of, (known - means[of]).square())
    return means, (squares / (sizes - 1).clamp(min=1)).sqrt()


def advantages(rewards: torch.Tensor, group: torch.Tensor, scale: Scale) -> Advantages:
    """Compare each answer's reward with those of the other answers to its prompt.

    Args:
        rewards: (n,), NaN where an answer has none: it takes no part in its group.
        group: (n,) int64 number of each answer's prompt, from 0.
        scale: what the difference from the group's mean is divided by: the spread of the group, that of all rewards of
            the rollout, or nothing.
    """
    rewards, group = rewards.double(), group.long()
    means, spreads = _spread(rewards, group, int(group.max()) + 1)
    values = rewards - means[group]
    if scale == "group":
        values = values / (spreads[group] + EPSILON)
    elif scale == "batch":
        _, (whole,) = _spread(rewards, torch.zeros_like(group), 1)
        values = values / (whole + EPSILON)
    return Advantages(values.nan_to_num(0.0).float(), spreads[group].float())


class Totals(NamedTuple):
    """What one optimizer step counts over all ranks and micro-steps, known before its first backward.

    Attributes:
        answers: that the step takes, masked ones included.
        tokens: sampled tokens of the answers that are not masked; blocks: their latent blocks, where latents are scored
            (policies gaussian and vlpo), else 0.
        longest: tokens that an answer may have (--max_completion_length), for dr_grpo.
    """

    answers: int
    tokens: int
    blocks: int
    longest: int


class Settings(NamedTuple):
    """Which objective, and its numbers.

    Attributes:
        objective: dapo is also TRL's bnpo, whose mean is that of a whole step here.
        clip_low, clip_high: the ratio is held in [1 − low, 1 + high]; for cispo, as in TRL, at most `clip_high` itself.
        beta: factor of the KL divergence to the reference, tokens alone; entropy: of the mean entropy of tokens.
    """

    objective: Objective
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    entropy: float = 0.0


class Scored(NamedTuple):
    """What is known of a micro-batch's sampled tokens, in the order of batch.targets, and of its latent blocks.

    Attributes:
        logp, entropy: (M,) of the policy in training, with gradient (forward.Scores); old: (M,) of the one that
            sampled; reference: (M,), or None where beta is 0.
        blocks: log-ratios of the latent blocks (latents.block_ratios); None where latents are not scored. On all ranks
            alike: one without blocks gives empty tensors that are in the graph.
    """

    logp: torch.Tensor
    entropy: torch.Tensor
    old: torch.Tensor
    reference: torch.Tensor | None = None
    blocks: Blocks | None = None


# What a step is told of, as sums over all ranks and micro-steps; `reported` divides them.
SUMS = (
    "loss",
    "tokens",
    "entropy",
    "kl",
    "ratio",
    "drift",
    "clipped_low",
    "clipped_high",
    "blocks",
    "latent_ratio",
    "latent_drift",
    "latent_clipped_low",
    "latent_clipped_high",
)


class Terms(NamedTuple):
    """A micro-batch's share of the step.

    Attributes:
        loss: scalar float32; the sum over all micro-batches is the step's loss.
        sums: (len(SUMS),) float32, detached: by name in SUMS, for one all_reduce.
    """

    loss: torch.Tensor
    sums: torch.Tensor


def _policy_loss(
    log_ratio: torch.Tensor, score: torch.Tensor, advantage: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each action's loss, and where its ratio was held, below and above.

    Args:
        log_ratio, advantage: (M,), or (B,); score: of the same shape, what cispo's gradient is of.
    """
    # A latent block's may be hundreds of nats, of which exp makes infinity.
    ratio = log_ratio.clamp(-MOST, MOST).exp()
    if settings.objective == "cispo":
        held = ratio.detach().clamp(max=settings.clip_high)
        above = (ratio > settings.clip_high) & (advantage > 0)
        return -held * advantage * score, torch.zeros_like(above), above
    low, high = 1 - settings.clip_low, 1 + settings.clip_high
    loss = -torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
    return loss, (ratio < low) & (advantage < 0), (ratio > high) & (advantage > 0)


def _shares(batch: Batch, totals: Totals, settings: Settings, blocks: torch.Tensor) -> torch.Tensor:
    """What each action of a sample weighs in the step's loss: (N,) float32; masked samples and dummies 0.

    Args:
        blocks: (N,) latent blocks of each sample.
    """
    if settings.objective in ("dapo", "cispo"):
        return batch.weight / max(1, totals.tokens + totals.blocks)
    if settings.objective == "dr_grpo":
        return batch.weight / (max(1, totals.answers) * totals.longest)
    return batch.weight / ((batch.label_count + blocks).clamp(min=1) * max(1, totals.answers))


def token_terms(scored: Scored, advantage: torch.Tensor, batch: Batch, totals: Totals, settings: Settings) -> Terms:
    """Return a micro-batch's share of the step's loss.

    A latent block weighs as one token. Its ratio is its own, also in gspo, where all tokens of an answer share one.

    Args:
        advantage: (N,) of each sample, 0 for a dummy.
        batch: `weight` 0 leaves a sample out, a dummy or an answer that is masked; `target_sample`, `label_count`.
    """
    of, log_ratio = batch.target_sample, scored.logp - scored.old
    counts = batch.label_count.clamp(min=1)
    blocks = scored.blocks or Blocks(log_ratio[:0], of[:0])
    block_counts = torch.bincount(blocks.sample, minlength=len(batch.weight))
    share, each = _shares(batch, totals, settings, block_counts), log_ratio
    if settings.objective == "gspo":
        each = (log_ratio.new_zeros(len(counts)).index_add(0, of, log_ratio) / counts)[of]
    loss, low, high = _policy_loss(each, scored.logp, advantage[of], settings)
    kl = torch.zeros_like(loss)
    if scored.reference is not None:
        away = scored.reference - scored.logp
        kl = away.exp() - away - 1
        loss = loss + settings.beta * kl
    latent, latent_low, latent_high = _policy_loss(
        blocks.log_ratio, blocks.log_ratio, advantage[blocks.sample], settings
    )
    weighed = (loss * share[of]).sum() + (latent * share[blocks.sample]).sum()
    entropy = (scored.entropy * batch.weight[of]).sum()
    total = weighed - settings.entropy * entropy / max(1, totals.tokens)
    ones = (torch.ones_like(one) for one in (loss, blocks.log_ratio))
    actions = (next(ones), scored.entropy, kl, each.exp(), -log_ratio, low, high)
    latents = (next(ones), blocks.log_ratio.exp(), -blocks.log_ratio, latent_low, latent_high)
    sums = [
        torch.stack([one.detach().float() for one in values]) @ batch.weight[sample]
        for values, sample in ((actions, of), (latents, blocks.sample))
    ]
    return Terms(total, torch.cat([total.detach()[None], *sums]))


def reported(sums: torch.Tensor) -> dict[str, float]:
    """Turn a step's sums (SUMS), over all ranks and micro-steps, into its loss and means over tokens or blocks.

    `drift` is the mean of log π_old − log π: how far the policy has moved from the one that sampled, in nats a token.
    """
    found = dict(zip(SUMS, sums.tolist(), strict=True))
    tokens, blocks, loss = (found.pop(name) for name in ("tokens", "blocks", "loss"))
    means = {name: value / max(1.0, blocks if name.startswith("latent_") else tokens) for name, value in found.items()}
    if not blocks:
        means = {name: value for name, value in means.items() if not name.startswith("latent_")}
    return {"loss": loss} | means
