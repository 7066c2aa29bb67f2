"""Two optimizer steps of text alone against TRL's own GRPOTrainer, on the same answers and from the same weights.

TRL has an environment of its own, built the first time (benchmarks/venvs.py) where a package index is in reach.
Elsewhere these tests are skipped, and tests/unit/rl/test_policies.py alone says what the formulas are.

G answers of each of P prompts, M sampled tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.peers import python_of

from mirage_ds.data.batch import Batch, collate
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.sample import IGNORE
from mirage_ds.model.forward import Scoring
from mirage_ds.model.load import load_model, public_name
from mirage_ds.rl.objective import SUMS, Scored, Settings, Totals, advantages, token_terms

PROMPTS, ANSWERS, LONGEST, TEMPERATURE = 2, 4, 12, 0.8
REWARDS = [1.0, 0.0, 0.3, 0.0, 0.9, 1.0, 0.0, 0.2]
# By TRL's names, beside ours.
CASES: dict[str, tuple[dict[str, Any], Settings, str]] = {
    "grpo": (dict(loss_type="grpo", epsilon=0.05, beta=0.3), Settings("grpo", 0.05, 0.05, 0.3), "group"),
    "dr_grpo": (
        dict(loss_type="dr_grpo", epsilon=0.02, epsilon_high=0.03, entropy_coef=0.1),
        Settings("dr_grpo", 0.02, 0.03, entropy=0.1),
        "none",
    ),
    "dapo": (dict(loss_type="dapo", epsilon=0.05, epsilon_high=0.08), Settings("dapo", 0.05, 0.08), "batch"),
    "gspo": (
        dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=0.1, beta=0.1),
        Settings("gspo", 0.1, 0.1, 0.1),
        "group",
    ),
    "cispo": (dict(loss_type="cispo", epsilon_high=1.02), Settings("cispo", 0.2, 1.02), "group"),
}


def answers_of(folder: Path) -> dict[str, Any]:
    """Prompts and answers of the model's own tokens, of all lengths; the third does not end, and is masked."""
    torch.manual_seed(7)
    encoder = load_encoder([str(folder)], ImageFinder(()), "sft", 1)
    end = encoder.id_of("<|im_end|>")
    draw = lambda count: torch.randint(20, 200, (count,)).tolist()  # noqa: E731
    completions = [[*draw(length - 1), end] for length in (5, 12, 12, 3, 7, 9, 2, 11)]
    completions[2][-1] = 30
    return dict(prompts=[draw(6) for _ in range(PROMPTS)], completions=completions)


def batch_of(folder: Path, asked: dict[str, Any]) -> Batch:
    encoder = load_encoder([str(folder)], ImageFinder(()), "sft", 1)
    samples = []
    for number, completion in enumerate(asked["completions"]):
        prompt = asked["prompts"][number // ANSWERS]
        ids = torch.tensor([*prompt, *completion])
        labels = ids.clone()
        labels[: len(prompt)] = IGNORE
        places = torch.arange(len(ids)).expand(3, -1)
        samples.append(encoder.dummy(0)._replace(row=number, input_ids=ids, labels=labels, position_ids=places))
    batch = collate(samples, 1, encoder.dummy(0))
    batch.weight[2] = 0
    return batch


def ours(folder: Path, asked: dict[str, Any], settings: Settings, scale: Any) -> list[dict[str, Any]]:
    loaded = load_model(folder, stage="sft", dtype=torch.float32, device=torch.device("cpu"), checkpointing=False)
    model, batch = loaded.model, loaded.tower.attach(batch_of(folder, asked))
    group = torch.arange(PROMPTS).repeat_interleave(ANSWERS)
    advantage = advantages(torch.tensor(REWARDS), group, scale).values
    totals = Totals(len(REWARDS), int(batch.label_count[batch.weight > 0].sum()), 0, LONGEST)
    with torch.no_grad():
        old = model(batch, Scoring(TEMPERATURE)).logp
    made = []
    for _ in range(2):
        scores = model(batch, Scoring(TEMPERATURE))
        scored = Scored(scores.logp, scores.entropy, old, old if settings.beta else None)
        terms = token_terms(scored, advantage, batch, totals, settings)
        model.zero_grad()
        terms.loss.backward()
        gradients = {public_name(name): p.grad.clone() for name, p in model.named_parameters()}
        made.append(dict(loss=terms.loss.item(), advantages=advantage, gradients=gradients, sums=terms.sums.tolist()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(asked["rate"] * parameter.grad)
    return made


@pytest.fixture(scope="module")
def asked(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What TRL was asked; its answers are in the folder `out`. One process takes all cases: most of it is its start."""
    out = tmp_path_factory.mktemp("trl")
    made = answers_of(nano) | dict(folder=str(nano), out=str(out), answers=ANSWERS, rewards=REWARDS, rate=0.001)
    # Ours is the plain k3 estimator of the GRPO paper, as in verl.
    same = dict(
        temperature=TEMPERATURE,
        max_completion_length=LONGEST,
        mask_truncated_completions=True,
        use_bias_correction_kl=False,
    )
    made["settings"] = {name: theirs | same | {"scale_rewards": scale} for name, (theirs, _, scale) in CASES.items()}
    (out / "asked.json").write_text(json.dumps(made))
    quiet = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [str(python_of("trl")), str(Path(__file__).with_name("trl_steps.py")), str(out / "asked.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=quiet, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_two_steps_equal_trls(name: str, nano: Path, asked: dict[str, Any]) -> None:
    _, settings, scale = CASES[name]
    held = 0.0
    for number, found in enumerate(ours(nano, asked, settings, scale)):
        wanted = load_file(Path(asked["out"]) / name / f"step{number}.safetensors")
        told = {key.removeprefix("told."): wanted.pop(key) for key in list(wanted) if key.startswith("told.")}
        # TRL shuffles the answers of a rollout.
        theirs, own = (one.sort().values for one in (told["advantages"], found["advantages"]))
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-6)
        apart = {
            key: float((found["gradients"][public_name(key)] - one).norm() / one.norm())
            for key, one in wanted.items()
            if ".visual." not in key
        }
        worst = max(apart, key=lambda key: apart[key])
        print(name, number, f"loss {abs(found['loss'] - float(told['loss'])):.1e}, {worst} {apart[worst]:.1e}")
        assert abs(found["loss"] - float(told["loss"])) <= 1e-5
        assert apart[worst] <= 1e-5, f"step {number}, {worst}: {apart[worst]:.2e}"
        held += sum(value for key, value in zip(SUMS, found["sums"], strict=True) if key.startswith("clipped"))
    # Some, or nothing was seen of clipping.
    assert held > 0
