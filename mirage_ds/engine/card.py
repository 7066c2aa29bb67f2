"""The model card: the README.md of a folder that training or an export writes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template

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
    """Write the card of a trained model (card.md.jinja).

    Args:
        state: what a checkpoint of the run says of itself, with its `step`.
        scores: metric → value of an evaluation of these very weights, where there was one.
    """
    text = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    template = Template(
        text, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    more: dict[str, Any] = dict(
        mark=MARK, begin=SCORES, end=END_OF_SCORES, names=OPTIMIZER, scores=scores, arm=_arm(state)
    )
    more["base"] = next((name for source in reversed(state["sources"]) if (name := hub_name(source))), None)
    more["text_only"] = state["stage"] == "sft" or state.get("latent_policy") == "text"
    return template.render({"lora": None, **state, **more})


def _arm(state: Mapping[str, Any]) -> str:
    """Say in what a run's latents differ from the paper's; nothing where they do not."""
    slots, compress, loss, detached, targets = state.get("latents") or (None, "average", "cosine", False, False)
    differs = {
        f"slots {slots}": slots and slots != "latents",
        f"compression {compress}": compress != "average",
        f"latent loss {loss}": loss != "cosine",
        "latents detached": detached,
        "targets train the tower": targets,
        "learned targets": state.get("latent_targets"),
        "own states fed": state.get("feed"),
        f"latents made together in {state.get('latent_passes')} passes": state.get("latent_passes") is not None,
        "pictures hidden behind latents": state.get("bottleneck"),
    }
    return ", ".join(said for said, does in differs.items() if does)


def with_scores(card: str, lines: Sequence[str]) -> str:
    """Return a card with these lines in place of its scores; one of an older version gets them at its end."""
    before, begins, rest = card.partition(SCORES)
    _, ends, after = rest.partition(END_OF_SCORES)
    section = "\n".join([SCORES, "", *lines, END_OF_SCORES])
    return before + section + after if begins and ends else f"{card.rstrip()}\n\n{section}\n"


def write_card(folder: Path, card: str) -> None:
    """Write the card; a README.md that somebody else wrote stays."""
    file = folder / FILE
    if not file.exists() or MARK in file.read_text(encoding="utf-8", errors="replace"):
        write_atomically(file, card)
