"""The settings of --stage rl, part of RunConfig. Imports no torch.

Names are TRL's where it has the setting; docs/reinforcement.md puts the two side by side.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Objective = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"]
LatentPolicy = Literal["text", "through", "replay", "gaussian", "vlpo"]
LatentRatio = Literal["sum", "mean"]

# The paper's: answers right, and written as they should be.
PAPER_REWARD = ["accuracy*0.9", "format*0.1"]


class RlSettings(BaseModel):
    """How --stage rl samples, scores and learns. A rollout is P prompts with G answers each."""

    # the rollout
    prompts_per_rollout: PositiveInt | None = Field(None, description="rl: P, all prompts of a rollout. [default: 8]")
    num_generations: int = Field(8, ge=2, description="rl: G, answers sampled of each prompt.")
    max_completion_length: PositiveInt = Field(256, description="rl: tokens of an answer, latents included, at most.")
    temperature: PositiveFloat = Field(1.0, description="rl: of sampling, and of the loss's probabilities.")
    rollout_rows: PositiveInt | None = Field(None, description="rl: answers a rank decodes at a time. [default: all]")
    resample: NonNegativeInt = Field(0, description="rl: rounds of new prompts for those whose rewards are all alike.")
    # the latents
    latent_policy: LatentPolicy | None = Field(
        None,
        description="rl: how latents enter the policy: through (recomputed, with gradient), replay (fed as recorded), "
        "gaussian (sampled by two heads), vlpo (Monet's density); text opens no latent block. [default: text where "
        "the model was trained without latents, gaussian where it has heads, else through]",
    )
    latent_ratio: LatentRatio | None = Field(
        None, description="rl: a block's log-ratio: sum or mean over its latents' components. [default: mean]"
    )
    sigma: PositiveFloat = Field(10.0, description="rl: σ of vlpo's density.")
    # the objective
    updates: PositiveInt = Field(1, description="rl: optimizer steps of a pass, each on P / updates prompts.")
    num_iterations: PositiveInt = Field(1, description="rl: passes over a rollout.")
    objective: Objective = Field("grpo", description="rl: grpo, dr_grpo, dapo, gspo (sequence ratio) or cispo.")
    clip_low: PositiveFloat = Field(0.2, description="rl: the ratio is clipped below 1 − clip_low; cispo ignores it.")
    clip_high: PositiveFloat | None = Field(
        None,
        description="rl: the ratio is clipped above 1 + clip_high; cispo: the ratio's largest value. [default: "
        "clip_low; cispo: 5]",
    )
    beta: NonNegativeFloat = Field(0.0, description="rl: weight of the KL to the start's weights, on text tokens.")
    entropy: NonNegativeFloat = Field(0.0, description="rl: weight of an entropy bonus.")
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="rl: advantages are divided by the deviation of the group's rewards, or of all, or not."
    )
    mask_truncated: bool = Field(False, description="rl: answers that reach --max_completion_length teach nothing.")
    truncation_penalty: NonNegativeFloat = Field(0.0, description="rl: taken off the reward of a truncated answer.")
    # the rewards
    reward: list[str] = Field(
        PAPER_REWARD,
        description="rl: what is summed to the reward: accuracy (the task's scorer), format, judge, or a function "
        "package.module:function; *0.5 behind a name is its weight.",
    )
    reward_weights: list[float] | None = Field(None, description="rl: a weight for each --reward (or NAME*0.5 there).")
    reward_timeout: PositiveFloat = Field(30.0, description="rl: seconds of one call of a reward function, at most.")
    reward_workers: PositiveInt = Field(2, description="rl: processes that score.")
    max_reward_faults: float = Field(0.1, ge=0, le=1, description="rl: end when a larger share of scores failed.")
    judge_endpoint: str | None = Field(None, description="rl: OpenAI-compatible server of judge, as http://host/v1.")
    judge_model_name: str | None = Field(None, description="rl: what the judge's server calls its model.")
    judge_key_variable: str | None = Field(None, description="rl: variable with its key. [default: OPENAI_API_KEY]")
    judge_prompt: Path | None = Field(None, description="rl: holds {question}, {reference}, {answer}. [default: own]")
    judge_parallel: PositiveInt = Field(8, description="rl: requests to the judge at a time.")
    judge_timeout: PositiveFloat = Field(60.0, description="rl: seconds for one request.")
    judge_tries: PositiveInt = Field(6, description="rl: requests for one reply, at most.")
    judge_max_new_tokens: PositiveInt = Field(512, description="rl: tokens of a reply, at most.")
    judge_limit_key: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="rl: how the judge's server calls that limit."
    )
    judge_most: PositiveInt | None = Field(None, description="rl: replies of a run, at most. [default: any number]")
    judge_cache: Path | None = Field(None, description="rl: folder that keeps what was judged. [default: none]")
    # what ends the run
    max_drift: PositiveFloat = Field(
        0.1, description="rl: the mean difference of the decoder's log-probabilities from training's, at most."
    )
    min_latent_share: float = Field(0.0, ge=0, le=1, description="rl: the share of answers with latents, at least.")

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps between two rollouts; 1 in the other stages."""
        return self.updates * self.num_iterations


# By name: without a meaning in the other stages.
RL_ONLY = tuple(RlSettings.model_fields)
# Of these, what decides how a rollout is made, not what it is, or only ends a run.
OTHERWISE = {"rollout_rows", "reward_timeout", "reward_workers", "max_reward_faults", "max_drift", "min_latent_share"}
OTHERWISE |= {name for name in RL_ONLY if name.startswith("judge_")} - {"judge_model_name", "judge_prompt"}


def rl_noted(config: RlSettings) -> dict[str, Any]:
    """Return the settings of rl that must be the same for a run to go on exactly."""
    return config.model_dump(mode="json", include=set(RL_ONLY) - OTHERWISE - {"latent_policy", "prompts_per_rollout"})
