"""The log-ratio of a latent block as a sum or as a mean over its numbers, at a 7B's width: why --latent_ratio is mean.

    python -m benchmarks.latent_ratio

k latents a block, H hidden, P prompts, G answers of each.

A bandit at k × H = 4 × 3,584: states h are given, LatentHeads draw z, and an answer is rewarded where its block lies on
one side of a hyperplane. Each rollout of P · G blocks is used for several updates of PPO's clipped objective by AdamW.
Of each update it prints what the ratios are before it and which share of the blocks is silent (held, or below 0.01: no
gradient), and of each arm how far the chance of a reward has risen from 0.5 on fresh states. Before that it moves h
alone by so many σ, the first time as much as bf16 rounds it.
"""

from __future__ import annotations

import math

import click
import torch

from mirage_ds.model.latent_heads import LatentHeads, gaussian_logp
from mirage_ds.rl.objective import advantages

K, H, PROMPTS, ANSWERS, CLIP = 4, 3584, 16, 8, 0.2
BLOCK = {"sum": 1, "mean": K * H}


def states_of(blocks: int, generator: torch.Generator) -> torch.Tensor:
    """Return h of blocks, (blocks · k, H): of size 1, alike as those of one model are."""
    common = torch.randn(1, H, generator=generator)
    return (common + torch.randn(blocks * K, H, generator=generator)) / math.sqrt(2)


def told(log_ratio: torch.Tensor, advantage: torch.Tensor) -> str:
    """Say what ratios (B,) come to: their size, and how many blocks get no gradient to speak of."""
    ratio = log_ratio.exp()
    held = ((ratio > 1 + CLIP) & (advantage > 0)) | ((ratio < 1 - CLIP) & (advantage < 0))
    silent = held | (ratio < 0.01)
    return f"|log r| {float(log_ratio.abs().mean()):9.4f}, silent {float(silent.float().mean()):.2f}"


def moved(shift: float) -> None:
    """Print what log-ratios come to where every number of h moves by a normal number of `shift` σ."""
    generator = torch.Generator().manual_seed(1)
    states, heads = states_of(128, generator), LatentHeads(H)
    with torch.no_grad():
        mean, log_sigma = heads(states)
        fed = mean + log_sigma.exp() * torch.randn(mean.shape, generator=generator)
        other = states + shift * log_sigma.exp() * torch.randn(mean.shape, generator=generator)
        change = (gaussian_logp(fed, *heads(other)) - gaussian_logp(fed, mean, log_sigma)).view(-1, K).sum(1)
    for name, size in BLOCK.items():
        middle, spread = float(change.mean()) / size, float(change.std()) / size
        print(f"h moved by {shift:.3g} σ, {name:4}: log r {middle:10.4f} ± {spread:.4f}")


def learn(reduce: str, rate: float, rollouts: int, updates: int) -> float:
    """Train heads; return the chance of a reward on fresh states."""
    generator = torch.Generator().manual_seed(0)
    heads, way = LatentHeads(H), torch.nn.functional.normalize(torch.randn(H, generator=generator), dim=0)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=rate, weight_decay=0.0, betas=(0.9, 0.95))
    group = torch.arange(PROMPTS).repeat_interleave(ANSWERS)
    for number in range(rollouts):
        prompts = states_of(PROMPTS, generator).view(PROMPTS, K, H)
        states = prompts.repeat_interleave(ANSWERS, 0).flatten(0, 1)
        with torch.no_grad():
            mean, log_sigma = heads(states)
            fed = mean + log_sigma.exp() * torch.randn(mean.shape, generator=generator)
            old = gaussian_logp(fed, mean, log_sigma)
            rewards = (((fed - states) @ way).view(-1, K).sum(1) > 0).float()
        advantage = advantages(rewards, group, "group").values
        for update in range(updates):
            log_ratio = (gaussian_logp(fed, *heads(states)) - old).view(-1, K).sum(1) / BLOCK[reduce]
            if number in (0, rollouts - 1) and update:
                place = f"lr {rate:g}, {reduce:4}, rollout {number + 1}, update {update + 1}"
                print(f"  {place}: {told(log_ratio.detach(), advantage)}")
            ratio = log_ratio.clamp(-20, 20).exp()
            loss = -torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
            optimizer.step()
    with torch.no_grad():
        states = states_of(256, generator)
        mean, log_sigma = heads(states)
        away = ((mean - states) @ way).view(-1, K).sum(1) / (log_sigma.exp().view(-1, K)[:, 0] * math.sqrt(K))
        return float(torch.special.ndtr(away).mean())


@click.command(help=__doc__)
@click.option("--rollouts", default=8, show_default=True)
@click.option("--updates", default=4, show_default=True, help="Of each rollout.")
@click.option("--rates", default="1e-6,1e-5", show_default=True, help="Learning rates, separated by commas.")
def main(rollouts: int, updates: int, rates: str) -> None:
    """Print both arms at each rate."""
    for shift in (2**-9 / math.sqrt(3) / 0.05, 0.1, 0.3):
        moved(shift)
    for rate in map(float, rates.split(",")):
        for reduce in BLOCK:
            print(f"lr {rate:g}, {reduce}: chance of a reward {learn(reduce, rate, rollouts, updates):.3f}", flush=True)


if __name__ == "__main__":
    main()
