"""The model card: the README.md of a folder that training or an export writes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mirage_ds.files import write_atomically

FILE = "README.md"
# By this line a card is known as one that this program may replace.
MARK = "<!-- written by mirage_ds -->"
# Between these lines are the scores.
SCORES, END_OF_SCORES = "<!-- scores -->", "<!-- end of scores -->"
# The order in which a checkpoint's state keeps them.
OPTIMIZER = ("learning rate", "schedule", "warm-up steps", "β1", "β2", "ε", "weight decay")
# How huggingface_hub names the folder of a downloaded model.
SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")


def hub_name(folder: str) -> str | None:
    """Return the hub's id of a downloaded model; None for another folder."""
    found = SNAPSHOT.search(folder)
    return f"{found[1]}/{found[2]}" if found else None


def model_card(state: Mapping[str, Any], scores: Mapping[str, float] | None = None) -> str:
    """Write the card of a trained model.

    Args:
        state: what a checkpoint of the run says of itself, with its `step`.
        scores: metric → value of an evaluation of these very weights, where there was one.
    """
    stage, k = state["stage"], state["latent_size"]
    text_only = stage == "sft" or state.get("latent_policy") == "text"
    base = next((name for source in reversed(state["sources"]) if (name := hub_name(source))), None)
    optimizer = ", ".join(f"{name} {value}" for name, value in zip(OPTIMIZER, state["optimizer"], strict=True))
    rows = {
        "base model": base or f"`{state['sources'][-1]}`",
        "started from": f"`{state['sources'][0]}`" if len(state["sources"]) > 1 else None,
        "stage": stage,
        "k, latents a block": None if text_only else k,
        "arm": _arm(state) or None,
        "optimizer steps": state["step"],
        "rows a step": state["rows_per_step"],
        "records": f"{state['rows']}, SHA-256 `{state['data']}`",
        "vision tower": "trained" if state["train_vision"] else "frozen",
        "trained": _adapters(state["lora"]) if state.get("lora") else None,
        "AdamW": optimizer,
        "loss": f"weight of the cross-entropy {state['ce_weight']}, reduction {state['reduction']}",
        "seed": state["seed"],
        "dtype": state["dtype"],
        "DeepSpeed": f"ZeRO-{state['zero_stage']}, {state['world_size']} ranks",
    }
    head = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text"]
    head += [f"base_model: {base}"] if base else []
    head += ["tags: [mirage, latent-visual-tokens]", "---", MARK, "", "# A model trained with mirage_ds", ""]
    table = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    decoding = _text_only() if text_only else _latents(k)
    return "\n".join([*head, "| | |", "|---|---|", *table, "", *_scores(scores), *decoding])


def _arm(state: Mapping[str, Any]) -> str:
    """Say in what a run's latents differ from the paper's; nothing where they do not."""
    slots, compress, loss, detached, targets = state.get("latents") or (None, "average", "cosine", False, False)
    differs = {
        f"slots {slots}": slots and slots != "latents",
        f"compression {compress}": compress != "average",
        f"latent loss {loss}": loss != "cosine",
        "latents detached": detached,
        "targets train the tower": targets,
    }
    return ", ".join(said for said, does in differs.items() if does)


def _adapters(lora: Mapping[str, Any]) -> str:
    """Say what was trained where it was not all weights."""
    return (
        f"LoRA of rank {lora['rank']}, alpha {lora['alpha']}, on {', '.join(lora['targets'])}, and the latent tokens' "
        "rows of embedding and head; merged here, alone in `adapter/`"
    )


def _scores(scores: Mapping[str, float] | None) -> list[str]:
    if not scores:
        table = ["No scores are known; `mirage-ds evaluate` measures them, and `mirage-ds card` writes them here.", ""]
    else:
        table = ["| measured on the evaluation records of the run | |", "|---|---|"]
        table += [*(f"| {name} | {value:.4g} |" for name, value in scores.items()), ""]
    return [SCORES, "", *table, END_OF_SCORES, ""]


def with_scores(card: str, lines: Sequence[str]) -> str:
    """Return a card with these lines in place of its scores; one of an older version gets them at its end."""
    before, begins, rest = card.partition(SCORES)
    _, ends, after = rest.partition(END_OF_SCORES)
    section = "\n".join([SCORES, "", *lines, END_OF_SCORES])
    return before + section + after if begins and ends else f"{card.rstrip()}\n\n{section}\n"


def _text_only() -> list[str]:
    return [
        "It was trained on text alone, without latents: plain transformers and vLLM decode it like its base model.",
        "",
    ]


def _latents(k: int) -> list[str]:
    return [
        "## What decodes it",
        "",
        f"This model was trained to think in {k} latent visual tokens between `<|latent_start|>` and `<|latent_end|>`: "
        "inside a block the input of the next position is the final hidden state of the last one, not the embedding "
        "of a token. These commands do that, and so does transformers with the file `custom_generate/generate.py` of "
        "this folder:",
        "",
        "```sh",
        'mirage-ds generate FOLDER --image map.png --prompt "<image>Where to?"',
        "mirage-ds evaluate FOLDER --data_path records.jsonl --out scores.json",
        "mirage-ds serve FOLDER  # extra `serve`; an OpenAI-compatible server, see below",
        "lmms-eval --model mirage --model_args pretrained=FOLDER --tasks mmstar  # with mirage-ds beside lmms-eval",
        "```",
        "",
        "```python",
        "model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)",
        "tokens = model.generate(**inputs, do_sample=False, max_new_tokens=1024)",
        "",
        'client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")  # of `mirage-ds serve`',
        'asked = [{"role": "user", "content": "Where to?"}]  # pictures as data: URLs in parts',
        "client.chat.completions.create(model=NAME_OF_FOLDER, messages=asked, max_tokens=1024)",
        "```",
        "",
        "vLLM, and transformers without `trust_remote_code`, open these weights and feed the embedding of whatever "
        "token comes out inside a block, which training never showed the model. What they answer is not what this "
        "model answers, and scores taken that way are not its scores.",
        "",
    ]


def write_card(folder: Path, card: str) -> None:
    """Write the card; a README.md that somebody else wrote stays."""
    file = folder / FILE
    if not file.exists() or MARK in file.read_text(encoding="utf-8", errors="replace"):
        write_atomically(file, card)
