"""Parity with the public Mirage code: `python tests/parity/check.py DIR`.

DIR holds what the public code computed (fp32, CPU, one row at a time):

    model/, tokenizer/                 the checkpoint and its tokenizer, in public format
    samples.jsonl, images/             the records; `id` names a sample
    index.json                         scalars of each case `<sample>.L<latent_size>`, in "stage1" and "stage2"
    stage1.safetensors, …              tensors `<case>.<tensor>`
    generate.safetensors               greedy decoding, some tokens forced: `plan` in index.json maps a step to an id

Each case runs through the code that training uses: Encoder → collate → FrozenTower → MirageModel → objective →
backward, with gradient checkpointing. One JSON line per case with the largest differences; exit code 0 only if all lie
within the tolerances.

T tokens, k latents, H hidden.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from mirage_ds.config.run import PAPER_GAMMA
from mirage_ds.data.batch import Batch, collate
from mirage_ds.data.encode import Encoder
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.record import Record
from mirage_ds.data.record_files import scan
from mirage_ds.evaluate.prompts import prompts_of
from mirage_ds.model.choose import Turn, greedy
from mirage_ds.model.generate import generate
from mirage_ds.model.load import Loaded, load_model, public_name
from mirage_ds.model.loss import StepCounts, objective
from mirage_ds.model.slots import Limits, latent_tokens

# Losses, hidden states and gradients: the tolerances that come with the folder (two attention back ends or thread
# counts differ by 2e-6 in hidden states). Inputs are exact; features and logits get what hidden states get.
TOLERANCE = {
    "ids": 0,
    "labels": 0,
    "fed": 0,
    "positions": 0,
    "pixels": 1e-6,
    "visual": 1e-5,
    "latents": 1e-5,
    "hidden": 1e-5,
    "cosines": 1e-5,
    "logits": 1e-5,
    "ce": 5e-6,
    "loss": 5e-6,
    "grad": 1e-4,
    "grad_norm": 1e-4,
}


class Case(NamedTuple):
    """One case: the tensors and scalars of the public code."""

    name: str
    tensors: dict[str, torch.Tensor]
    scalars: dict[str, Any]


def differ(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest absolute difference; infinite where the shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours.double() - theirs.double()).abs().max()) if ours.numel() else 0.0


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))


def load_cases(folder: Path, stage: str, index: dict[str, Any]) -> list[Case]:
    """Read every training case of a stage."""
    cases: list[Case] = []
    if not index.get(stage):
        return cases
    with safe_open(folder / f"{stage}.safetensors", "pt") as file:
        names = list(file.keys())
        for name, scalars in index[stage].items():
            own = {key[len(name) + 1 :]: file.get_tensor(key) for key in names if key.startswith(f"{name}.")}
            cases.append(Case(name, own, scalars))
    return cases


def check_inputs(batch: Batch, labels: torch.Tensor, case: Case) -> dict[str, float]:
    """Compare ids, labels, positions, pixels and visual features."""
    found = {
        "ids": differ(batch.input_ids, case.tensors["input_ids"]),
        "labels": differ(labels, case.tensors["labels"]),
    }
    if "position_ids" in case.tensors:
        found["positions"] = differ(batch.position_ids, case.tensors["position_ids"])
    if "pixel_values" in case.tensors:
        found["pixels"] = differ(batch.pixel_values, case.tensors["pixel_values"])
    if "pixel_values_sum" in case.scalars:
        pixels = batch.pixel_values.double()
        sums = torch.stack([pixels.sum(), pixels.square().sum()])
        theirs = torch.tensor([case.scalars["pixel_values_sum"], case.scalars["pixel_values_sqsum"]]).double()
        found["pixels"] = max(found.get("pixels", 0), float(((sums - theirs) / theirs).abs().max()))
    return found


def check_case(
    case: Case, stage: str, loaded: Loaded, encoder: Encoder, record: Record, index: Any
) -> dict[str, float]:
    """Run one case forward and backward; return the largest difference of each kind."""
    sample = encoder.encode(record, row=0)
    passes = len(sample.runs) * encoder.latent_size + 1 if stage == "stage2" else 1
    batch = collate([sample], passes, encoder.dummy(0))
    assert loaded.tower is not None
    found = check_inputs(batch, sample.labels, case)
    batch = loaded.tower.attach(batch)
    assert batch.image_features is not None
    assert batch.helper_features is not None
    tensors = case.tensors
    if "visual_in" in tensors:
        found["visual"] = differ(batch.image_features, tensors["visual_in"])
    if "visual_latent_image" in tensors:
        found["visual"] = max(found["visual"], differ(batch.helper_features, tensors["visual_latent_image"]))

    model = loaded.model
    model.zero_grad(set_to_none=True)
    sums, traced = model.trace(batch)
    gamma = PAPER_GAMMA if stage == "stage1" else 1.0
    counts = StepCounts(rows=1, labels=int(batch.label_count.sum()), latents=len(batch.latents))
    loss, ce, _ = objective(sums, counts, gamma, "sample")
    loss.backward()

    hidden = traced.hidden.detach()
    if "hidden_states" in tensors:
        found["hidden"] = differ(hidden, tensors["hidden_states"])
    if "latent_embeds" in tensors:
        # In stage 2 a latent's embedding is the final-norm hidden state of the position before it.
        fed = traced.inputs[batch.latents] if stage == "stage1" else hidden[batch.latents - 1]
        found["latents"] = differ(fed.detach(), tensors["latent_embeds"])
    if "cosines" in tensors:
        found["cosines"] = differ(1 - traced.one_minus_cosine.detach(), tensors["cosines"])
    if "logits.label_pos" in tensors:
        found["logits"] = check_logits(hidden, model.head.weight.detach(), sample.labels, tensors, index["vocab_cols"])
    found["ce"] = abs(ce.item() - case.scalars["ce"])
    found["loss"] = abs(loss.item() - case.scalars["loss"])
    found |= check_gradients(model, case, index["embed_grad_rows"])
    return found


def check_logits(
    hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, tensors: dict[str, torch.Tensor], columns: Any
) -> float:
    """Compare the logits where a label is predicted: log-sum-exp, the label's own, some columns.

    Over the largest logit: they are sums over H hidden states that have a tolerance of their own.
    """
    at = tensors["logits.label_pos"].long()
    logits = hidden[at] @ head.T
    ours = {
        "lse": logits.logsumexp(-1),
        "cols": logits[:, columns],
        "label": logits.gather(1, labels[at + 1][:, None])[:, 0],
    }
    scale = float(logits.abs().max())
    return max(differ(ours[key], tensors[f"logits.{key}"]) / scale for key in ours if f"logits.{key}" in tensors)


def check_gradients(model: torch.nn.Module, case: Case, rows: list[int]) -> dict[str, float]:
    """Compare the stored gradients (relative) and the norm of every parameter's gradient."""
    gradients = {public_name(name): p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    # Tied models have one matrix for both.
    gradients.setdefault("lm_head.weight", gradients["model.embed_tokens.weight"])
    parts = {"embed_rows": "model.embed_tokens.weight", "lm_head_rows": "lm_head.weight"}
    nothing = torch.empty(0)
    worst = 0.0
    for key, theirs in case.tensors.items():
        if key.startswith("grad."):
            name = key.removeprefix("grad.")
            ours = gradients[parts[name]][rows] if name in parts else gradients.get(name, nothing)
            worst = max(worst, relative(ours, theirs))
    # In double: a float32 norm over ten million elements is off by 2e-4 itself.
    norms = [
        relative(gradients.get(name, nothing).norm(), torch.tensor(norm, dtype=torch.float64))
        for name, norm in case.scalars.get("grad_norms", {}).items()
    ]
    return {"grad": worst, "grad_norm": max(norms, default=0.0)}


def check_generation(case: Case, loaded: Loaded, encoder: Encoder, record: Record) -> dict[str, float]:
    """Decode one case greedily with its forced tokens; return the largest difference of each kind."""
    plan = {int(step): token for step, token in case.scalars["plan"].items()}

    def forced(logits: torch.Tensor, turns: Sequence[Turn]) -> torch.Tensor:
        step = turns[0].step
        return torch.full((len(logits),), plan[step]) if step in plan else greedy(logits, turns)

    sample = encoder.encode_prompt(record, row=0)
    assert loaded.tower is not None
    prompts, prompt = prompts_of(loaded.model, loaded.tower, encoder, [sample]), sample.input_ids
    # The public code goes on to its limit whatever is emitted.
    tokens = latent_tokens(encoder)._replace(stops=())
    limits = Limits(new_tokens=case.scalars["max_new_tokens"])
    row = generate(loaded.model, prompts, tokens, limits, forced, trace=True)[0]
    tensors = case.tensors
    return {
        "ids": max(differ(prompt, tensors["prompt_ids"]), differ(torch.tensor(row.ids), tensors["new_ids"])),
        "fed": float(row.fed != case.scalars["fed"]),
        "hidden": differ(torch.stack(row.hidden), tensors["step_hidden"]),
        "latents": differ(torch.stack(row.inputs), tensors["step_inputs"]),
    }


def report(stage: str, case: Case, found: dict[str, float]) -> bool:
    """Print a case's line; return whether all differences lie within their tolerances."""
    beyond = [name for name, value in found.items() if not value <= TOLERANCE[name]]
    line = {"stage": stage, "case": case.name, "ok": not beyond, "beyond": beyond}
    print(json.dumps(line | {name: float(f"{value:.3g}") for name, value in found.items()}), flush=True)
    return not beyond


def main(folder: Path) -> int:
    """Check every training case of a folder; return the exit code."""
    index = json.loads((folder / "index.json").read_text())
    records, faults = scan(folder / "samples.jsonl")
    if faults:
        raise SystemExit(f"{folder}/samples.jsonl: {faults[0]}")
    by_id = {record.extra["id"]: record for record in records}
    finder = ImageFinder.beside(folder / "samples.jsonl", None)
    good = total = 0
    for stage in ("stage1", "stage2"):
        cases = load_cases(folder, stage, index)
        loaded = load_model(folder / "model", stage=stage, dtype=torch.float32, device=torch.device("cpu"))
        for case in cases:
            sample, size = case.name.rsplit(".L", 1)
            encoder = load_encoder([str(folder / "tokenizer")], finder, stage, int(size))
            good += report(stage, case, check_case(case, stage, loaded, encoder, by_id[sample], index))
            total += 1
    for case in load_cases(folder, "generate", index):
        encoder = load_encoder([str(folder / "tokenizer")], finder, "stage2", 1)
        found = check_generation(case, loaded, encoder, by_id[case.name.split(".")[0]])
        good += report("generate", case, found)
        total += 1
    print(json.dumps({"cases": total, "within_tolerance": good}))
    return 0 if total and good == total else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python tests/parity/check.py DIR")
    sys.exit(main(Path(sys.argv[1])))
