"""What --stage rl adds to a plan: what a rank holds while it samples answers, the reference, and a rollout's seconds.

n answers that a rank decodes at a time, Ψ elements of the text model, W ranks, b bytes of an element of the compute
dtype. The same sum as engine/whole.py makes before a run's first rollout. Imports no torch.
"""

from typing import NamedTuple

from mirage_ds.plan.activations import Terms
from mirage_ds.plan.settings import Settings
from mirage_ds.plan.shape import Sizes
from mirage_ds.plan.spec import PlanSpec


class Rollout(NamedTuple):
    """One rank's part of a rollout.

    Attributes:
        answers: all of a rank; at_once: n; prompt: tokens before an answer.
    """

    answers: int
    at_once: int
    prompt: int


def rollout_of(spec: PlanSpec, ranks: int) -> Rollout:
    """Deal the prompts over the ranks."""
    answers = -(-spec.prompts_per_rollout // ranks) * spec.num_generations
    return Rollout(answers, min(answers, spec.rollout_rows or answers), int(spec.row_tokens * (1 - spec.labelled)))


def sampling(spec: PlanSpec, model: Sizes, settings: Settings, ranks: int) -> Terms:
    """Name what is on a GPU beside the model states while answers are sampled; nothing in other stages."""
    if spec.stage != "rl":
        return {}
    own, b = rollout_of(spec, ranks), settings.compute
    n, longest = own.at_once, own.prompt + spec.max_completion_length
    at_mlp = 3 * model.hidden + 3 * model.inner + 2 * model.kv_width + 2 * model.head_width
    at_attention = 2 * model.hidden + 6 * model.width + 4 * model.kv_width
    work = min(n * own.prompt, max(own.prompt, spec.micro_batch_tokens)) * max(at_mlp, at_attention) * b
    return {
        "weights, whole while answers are sampled": 0 if settings.resident(model) else model.text * b,
        f"keys and values of {n} answers": n * longest * 2 * model.layers * model.kv_width * b,
        "prompts' forward, or logits and what a choice takes": max(work, n * model.vocabulary * (b + 4)),
    }


def recorded(spec: PlanSpec, model: Sizes, settings: Settings) -> int:
    """Bytes of a host's memory for what a rollout's latents were fed, where it is fed again: each rank has them all."""
    if spec.stage != "rl" or spec.latent_policy in ("through", "text"):
        return 0
    latents = spec.prompts_per_rollout * spec.num_generations * spec.latent_runs * spec.latent_size
    return latents * model.hidden * settings.compute * spec.gpus_per_node


def reference(spec: PlanSpec, model: Sizes, settings: Settings, ranks: int) -> int:
    """Bytes of the start's weights that a KL needs: sharded under ZeRO-3, whole elsewhere."""
    if spec.stage != "rl" or not spec.beta:
        return 0
    return settings.compute * (-(-model.text // ranks) if settings.stage == 3 else model.text)


def seconds(spec: PlanSpec, model: Sizes, width: int, ranks: int, hbm: float, arithmetic: float) -> dict[str, float]:
    """Bound what a rollout adds to its one update: reading weights and cache for each token, and a KL's reference.

    Of several updates, all but the first also score their answers once more.

    Args:
        width: b; hbm: bytes/s; arithmetic: seconds of the update's forward and backward.
    """
    if spec.stage != "rl":
        return {}
    own = rollout_of(spec, ranks)
    cache = own.at_once * (own.prompt + spec.max_completion_length / 2) * 2 * model.layers * model.kv_width * width
    rounds = -(-own.answers // own.at_once)
    tokens = rounds * spec.max_completion_length * (model.text * width + cache) / hbm
    forward = arithmetic / (4 if spec.gradient_checkpointing else 3)
    return {"sampling tokens": tokens, **({"scoring by the reference": forward} if spec.beta else {})}
