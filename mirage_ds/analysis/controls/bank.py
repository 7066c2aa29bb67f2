"""Own latents in a folder, a file a question: what `mirage-ds serve` feeds other questions.

R latent blocks of a question, k latents a block, H hidden.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from mirage_ds.analysis.controls.conditions import KNOWN, Material, choose_partners
from mirage_ds.data.record import Record
from mirage_ds.errors import UserError, reason
from mirage_ds.files import write_new


def write(folder: Path, question: str, own: torch.Tensor, line: int = 0, level: str = "?") -> None:
    """Write a question's own latents (R, k, H).

    Args:
        question: its evaluate.report.prompt_hash; line: its record's; level: it is swapped with others of it alone.

    Raises:
        OSError: the file cannot be written.
    """
    notes = {"line": str(line), "level": level}
    write_new(folder / f"{question}.safetensors", save({"latents": own.contiguous()}, notes))


class Bank:
    """What each question of a bank is fed under a condition.

    Args:
        name: random, matched or swap; shape: (k, H) of a block; seed: see Material.

    Raises:
        UserError: there are no latents, they do not fit the model, or the condition cannot be made of them.
    """

    def __init__(self, folder: Path, name: str, shape: tuple[int, int], seed: int):
        found = [(*_read(file, shape), file.stem) for file in sorted(folder.glob("*.safetensors"))]
        if not found:
            raise UserError(f"--latent_bank {folder}: holds no latents; write some with --latents own or with controls")
        # As in their file of records, where they come from one; else by name.
        found.sort(key=lambda one: one[0].line)
        records, own, questions = ([*column] for column in zip(*found, strict=True))
        partners = choose_partners(records, seed) if name == "swap" else []
        self.vectors = KNOWN[name](Material(own, [], partners, torch.empty(0), seed))
        self.places = {question: place for place, question in enumerate(questions)}

    def of(self, question: str) -> torch.Tensor:
        """Return the vectors (R, k, H) for a question; one that is not there gets another one's, always the same."""
        return self.vectors[self.places.get(question, int(question, 16) % len(self.vectors))]


def _read(file: Path, shape: tuple[int, int]) -> tuple[Record, torch.Tensor]:
    """Return what stands for a question's record, and its own latents (R, k, H)."""
    try:
        with safe_open(file, "pt") as held:
            own, notes = held.get_tensor("latents"), held.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({reason(error)}); write it again") from None
    if own.shape[1:] != shape:
        what = f"latents of {tuple(own.shape)} do not fit blocks of {shape}"
        raise UserError(f"{file}: {what}; give those of this model and this --run_length")
    return Record(int(notes.get("line", 0)), "", "", (), (), {"level": notes.get("level", "?")}), own
