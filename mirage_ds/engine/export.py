"""`mirage-ds export`: a sharded checkpoint, or a model folder with other vocabulary rows, as a complete folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder, load_tokenizer
from mirage_ds.engine.checkpoint import STATE_FILE
from mirage_ds.engine.save import Parts, change_rows, export_checkpoint, refuse_existing, trained_of
from mirage_ds.engine.spelling import read_base
from mirage_ds.errors import UserError
from mirage_ds.model.folder import resolve_folder
from mirage_ds.model.load import check_folder


def _find(source: Path) -> Path:
    """Return the model folder or the checkpoint that `source` names."""
    latest = source / "run" / "checkpoints" / "latest"
    if (source / STATE_FILE).is_file() or (source / "config.json").is_file():
        return source
    if latest.is_file():
        return latest.parent / latest.read_text().strip()
    raise UserError(f"{source}: neither a model folder, nor a run folder with a checkpoint, nor a checkpoint")


def export_folder(source: Path, target: Path, vocab_rows: int | None, base: Path | None) -> str:
    """Export; return one line that says what was written.

    Raises:
        UserError: nothing to export, `target` exists, or the base model is gone.
    """
    refuse_existing(target)
    found = _find(source)
    if not (found / STATE_FILE).is_file():
        if vocab_rows is None:
            raise UserError(f"{source}: is a complete model folder already; --vocab_rows changes its vocabulary rows")
        folder = resolve_folder(str(found), "SOURCE", None)
        check_folder(folder)
        change_rows(folder, target, vocab_rows, tokens=len(load_tokenizer([str(folder)], None)))
        return f"{target}: {vocab_rows} vocabulary rows"
    state = json.loads((found / STATE_FILE).read_text())
    if vocab_rows is not None:
        raise UserError("--vocab_rows goes with a model folder: export the checkpoint first, then the folder")
    sources = [str(base)] if base else state["sources"]
    place = resolve_folder(sources[0], "--model", None)
    check_folder(place, [Path(folder) for folder in sources[1:]])
    encoder = load_encoder(sources, ImageFinder(()), "sft", 1, tuple(state["pixels"]))
    parts = Parts(read_base(place, encoder.tokenizer), encoder.tokenizer, encoder.images, place, trained_of(state))
    export_checkpoint(found, target, getattr(torch, state["dtype"]), parts)
    return f"{target}: step {state['step']} of {state['stage']}, {state['dtype']}"
