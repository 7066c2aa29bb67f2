"""One step of every policy and objective as a slow loop over plain transformers, written from the formulas.

No tensor of it is packed: row by row, token by token, block by block. T tokens of a row, k latents a block, H hidden.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from test_forward import Plain, Task

from mirage_ds.data.sample import IGNORE, Sample


class Row(NamedTuple):
    """What a policy makes of a row.

    Attributes:
        logp, entropy: one scalar a sampled token; blocks: of each latent block one scalar a latent; states: (L, H) h.
    """

    logp: list[torch.Tensor]
    entropy: list[torch.Tensor]
    blocks: list[list[torch.Tensor]]
    states: torch.Tensor


class Drawn(NamedTuple):
    """What a rollout leaves of a row.

    Attributes:
        latents: (L, H) that were fed; old, reference: one number a sampled token; old_latents: one a latent.
    """

    latents: torch.Tensor
    old: list[float]
    reference: list[float]
    old_latents: list[float]
    advantage: float
    masked: bool = False


class Slow:
    """The policy over plain transformers; heads are parameters of its own."""

    def __init__(self, task: Task, policy: str, temperature: float, sigma: float, heads: dict[str, torch.Tensor]):
        self.plain, self.policy, self.temperature, self.sigma = Plain(task), policy, temperature, sigma
        self.heads = {name: value.clone().requires_grad_() for name, value in heads.items()}

    def row(self, sample: Sample, latents: torch.Tensor | None) -> Row:
        """Run a row; `latents` (L, H) are fed, or made by the row itself."""
        if self.policy == "through":
            hidden, _ = self.plain.recur(sample)
        else:
            x, at = self.plain.embed(sample), 0
            for p, k in sample.runs:
                x = torch.cat([x[:p], latents[at : at + k], x[p + k :]])
                at += k
            hidden = self.plain.states(x, sample)
        logp, entropy = [], []
        for place in range(1, len(sample.labels)):
            if sample.labels[place] != IGNORE:
                logits = self.plain.model.lm_head(hidden[place - 1]) / self.temperature
                logs = torch.log_softmax(logits, 0)
                logp.append(logs[sample.labels[place]])
                entropy.append(-(logs.exp() * logs).sum())
        before = [p + slot - 1 for p, k in sample.runs for slot in range(k)]
        blocks, at = [], 0
        for p, k in sample.runs:
            blocks.append([self.density(latents[at + slot], hidden[p + slot - 1]) for slot in range(k)])
            at += k
        return Row(logp, entropy, blocks, hidden[before].detach())

    @torch.no_grad()
    def draw(self, sample: Sample) -> torch.Tensor:
        """Decode a row's latents (L, H), each from the ones before it: h + μ + σ ε; near h where nothing is drawn."""
        x, made = self.plain.embed(sample), [self.plain.embed(sample)[:0]]
        for p, k in sample.runs:
            for at in range(p, p + k):
                h = self.plain.states(x[:at], sample)[-1]
                mean, sigma = self.gaussian(h) if self.heads else (h, 0.05)
                z = (mean + sigma * torch.randn_like(h)).to(x.dtype)
                x = torch.cat([x[:at], z[None], x[at + 1 :]])
                made.append(z[None])
        return torch.cat(made)

    def gaussian(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (H,) and spread (1,) of the latent behind h."""
        own, h = {name: value.double() for name, value in self.heads.items()}, h.double()
        start = 0.05 * (h**2).mean().sqrt()
        spread = start * torch.exp(own["log_sigma.weight"] @ h + own["log_sigma.bias"])
        return h + own["mean.weight"] @ h + own["mean.bias"], spread

    def density(self, z: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """Log-density of a latent that was fed, given the state before it."""
        z, h = z.double(), h.double()
        if self.policy == "vlpo":
            return -((z - h) ** 2).sum() / (2 * self.sigma**2)
        if self.policy == "gaussian":
            return torch.distributions.Normal(*self.gaussian(h)).log_prob(z).sum()
        return torch.zeros((), dtype=torch.float64)

    def gradients(self) -> dict[str, torch.Tensor]:
        """By MirageModel's names."""
        heads = {f"latent_heads.{name}": p.grad for name, p in self.heads.items() if p.grad is not None}
        return self.plain.gradients() | heads


def clipped(ratio: Any, advantage: float, low: float, high: float) -> Any:
    """PPO's pessimistic term."""
    held = ratio.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio * advantage, held * advantage)


def loss_of(
    rows: list[Row], drawn: list[Drawn], settings: Any, longest: int, reduce: str, scored: bool
) -> torch.Tensor:
    """The step's loss, written from the formulas of GRPO, Dr. GRPO, DAPO, GSPO and CISPO.

    Args:
        settings: objective, clip_low, clip_high, beta, entropy; longest: tokens an answer may have.
        reduce: sum or mean over the numbers of a block; scored: whether latents are actions.
    """
    kind, low, high = settings.objective, settings.clip_low, settings.clip_high
    answers, loss, entropies = len(rows), 0.0, []
    whole = sum(len(row.logp) + scored * len(row.blocks) for row, d in zip(rows, drawn, strict=True) if not d.masked)
    for row, rollout in zip(rows, drawn, strict=True):
        if rollout.masked:
            continue
        a, terms = rollout.advantage, []
        logs = [logp - old for logp, old in zip(row.logp, rollout.old, strict=True)]
        sequence = sum(logs) / len(logs)
        for logp, log_ratio, reference in zip(row.logp, logs, rollout.reference, strict=True):
            ratio = torch.exp(sequence if kind == "gspo" else log_ratio)
            held = ratio.detach().clamp(max=high)
            term = -held * a * logp if kind == "cispo" else clipped(ratio, a, low, high)
            if settings.beta:
                term = term + settings.beta * (torch.exp(reference - logp) - (reference - logp) - 1)
            terms.append(term)
        at = 0
        for block in row.blocks if scored else ():
            differences = [one - rollout.old_latents[at + slot] for slot, one in enumerate(block)]
            at += len(block)
            log_ratio = sum(differences) / (len(block) * rollout.latents.shape[1] if reduce == "mean" else 1)
            ratio = torch.exp(log_ratio)
            if kind == "cispo":
                terms.append(-ratio.detach().clamp(max=high) * a * log_ratio)
            else:
                terms.append(clipped(ratio, a, low, high))
        total = sum(terms)
        if kind in ("grpo", "gspo"):
            loss = loss + total / len(terms) / answers
        elif kind == "dr_grpo":
            loss = loss + total / (answers * longest)
        else:
            loss = loss + total / whole
        entropies += row.entropy
    return loss - settings.entropy * sum(entropies) / len(entropies)
