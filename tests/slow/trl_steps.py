"""Two optimizer steps of TRL's GRPOTrainer on answers that are given; run by a Python that has TRL.

    python trl_steps.py asked.json

Writes OUT/CASE/step0.safetensors and step1: gradients by transformers' names, loss, advantages, log-probabilities.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from peer_steps import import_torchvision

import_torchvision()

from datasets import Dataset  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

ASKED = json.loads(Path(sys.argv[1]).read_text())
FOUND: dict[str, torch.Tensor] = {}


def rollout(prompts, trainer):
    del trainer
    count = len(prompts)
    assert count == len(ASKED["completions"])
    return dict(
        prompt_ids=[ASKED["prompts"][int(one)] for one in prompts], completion_ids=ASKED["completions"], logprobs=None
    )


def reward(prompts, completions, **columns):
    del prompts, completions, columns
    return ASKED["rewards"]


class Watched(GRPOTrainer):
    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        FOUND.update(loss=loss.detach(), advantages=inputs["advantages"], old=inputs["old_per_token_logps"])
        return loss


class Write(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        made = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        made = {name: one.detach().clone() for name, one in (made | {f"told.{n}": v for n, v in FOUND.items()}).items()}
        save_file(made, Path(args.output_dir) / f"step{state.global_step}.safetensors")


def train(name: str) -> None:
    kept = dict(dtype=torch.float32, attn_implementation="eager")
    model = AutoModelForImageTextToText.from_pretrained(ASKED["folder"], **kept)
    config = GRPOConfig(
        output_dir=f"{ASKED['out']}/{name}", per_device_train_batch_size=len(ASKED["completions"]),
        num_generations=ASKED["answers"], num_iterations=2, gradient_accumulation_steps=1, steps_per_generation=1,
        max_steps=2, optim="sgd", learning_rate=ASKED["rate"], lr_scheduler_type="constant", weight_decay=0.0,
        max_grad_norm=0.0, report_to=[], save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
        shuffle_dataset=False, disable_tqdm=True, **ASKED["settings"][name],
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": str(number)} for number in range(len(ASKED["prompts"]))])
    trainer = Watched(
        model, reward, args=config, train_dataset=data, rollout_func=rollout, callbacks=[Write()],
        processing_class=AutoTokenizer.from_pretrained(ASKED["folder"]),
    )  # fmt: skip
    trainer.train()


for case in ASKED["settings"]:
    train(case)
