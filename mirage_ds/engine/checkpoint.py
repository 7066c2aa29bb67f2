"""Sharded checkpoints that are whole or not there: every rank writes its part, `latest` is written last.

    checkpoints/global_step<N>/     DeepSpeed's shards, mirage_state.json, mirage_manifest.json
    checkpoints/global_step<N>/universal/   the same for any number of ranks, once `checkpoint convert` made it
    checkpoints/latest              the newest one
    checkpoints/.global_step<N>.partial/    being written, or left by a writer that was killed

A checkpoint is written beside, read back, listed in its manifest, renamed. What cannot be written leaves the earlier
ones as they are. DeepSpeed reads its files as pickles, so no file is given to it before its hash is the manifest's.

W ranks.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from mirage_ds.engine.frozen import check_same
from mirage_ds.engine.manifest import (
    Entry,
    candidates,
    checkpoints,
    entry_of,
    faults,
    is_whole,
    step_of,
    write_manifest,
)
from mirage_ds.engine.private import collected_write_errors, own_groups_and_steps
from mirage_ds.engine.setup import World, at_rank_zero, everyone, from_rank_zero
from mirage_ds.errors import UserError
from mirage_ds.files import sync, write_atomically

STATE_FILE = "mirage_state.json"
# The folder in a checkpoint that holds its universal form, with a manifest of its own.
UNIVERSAL = "universal"
# The ZeRO stages whose checkpoints DeepSpeed converts to it.
CONVERTIBLE = (1, 2, 3)
# What must be the same for a run to go on exactly; name in the state → how a person says it.
MUST_AGREE = {
    "stage": "--stage",
    "latent_size": "--latent_size",
    "latents": "--slots, --compress_strategy, --latent_loss, --detach_latents, --train_targets",
    "data": "content of --data_path, --columns (SHA-256)",
    "rows": "number of usable rows (--max_length, --max_pixels)",
    "rows_per_step": "--global_batch_size",
    "seed": "--seed",
    "reduction": "--reduction",
    "ce_weight": "--ce_weight",
    "optimizer": "AdamW and its schedule (--learning_rate, --lr_scheduler, --warmup_steps, β, ε, --weight_decay)",
    "train_vision": "--train_vision",
    "lora": "--lora_rank, --lora_alpha, --lora_targets",
    "zero_stage": "ZeRO stage of --deepspeed",
}


class Found(NamedTuple):
    """A checkpoint to continue from.

    Attributes:
        place: its folder.
        passed_over: what was wrong with the newer ones.
        form: the folder to load: `place`, or its universal form where another number of ranks wrote it.
    """

    place: Path
    passed_over: list[str]
    form: Path

    @property
    def universal(self) -> bool:
        """Whether the universal form is loaded."""
        return self.form != self.place


def save_checkpoint(engine: Any, folder: Path, state: dict[str, Any], keep: int, world: World) -> Path | str:
    """Save the engine's whole state. All ranks call it.

    Args:
        folder: the run's checkpoint folder.
        state: what a resume checks before it loads (MUST_AGREE), and "step", the optimizer steps taken.
        keep: newest whole checkpoints that stay; older ones are deleted once `latest` names this one.

    Returns:
        The checkpoint's folder; or, the same on every rank, a sentence that says why there is none. The earlier
        checkpoints are then as they were.
    """
    place = folder / f"global_step{state['step']}"
    beside = folder / f".{place.name}.partial"
    trouble = at_rank_zero(lambda: _make_room(folder, beside), world)
    if trouble:
        return trouble
    with collected_write_errors(engine) as files:
        # The state stays out of DeepSpeed's files: a key of its own there ("optimizer") would be overwritten.
        # Frozen weights are the base's; the state says which (frozen.notes_of_engine).
        engine.save_checkpoint(str(folder), tag=beside.name, save_latest=False, exclude_frozen_parameters=True)
    trouble, entries = _gather(files.failed, files.written, beside, world)
    if trouble is None:
        trouble = at_rank_zero(lambda: _put_in_place(beside, place, state, entries, keep), world)
    if trouble:
        from_rank_zero(lambda: shutil.rmtree(beside, ignore_errors=True), world)
        return trouble
    return place


def _make_room(folder: Path, beside: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".global_step*.partial"):
        shutil.rmtree(left)
    beside.mkdir()


def _gather(failed: list[str], written: list[Path], beside: Path, world: World) -> tuple[str | None, list[Entry]]:
    """Read back what each rank has written; return the first trouble, if any, and all entries."""
    entries = []
    for file in [] if failed else dict.fromkeys(written):
        try:
            entries.append(entry_of(beside, file))
        except OSError as error:
            failed = [f"{file}: {error.strerror}"]
    troubles = everyone(failed, world)
    return (troubles[0] if troubles else None), everyone(entries, world)


def _put_in_place(beside: Path, place: Path, state: dict[str, Any], entries: list[Entry], keep: int) -> None:
    write_atomically(beside / STATE_FILE, json.dumps(state, indent=1) + "\n")
    write_manifest(beside, [*entries, entry_of(beside, beside / STATE_FILE)])
    sync(beside)
    if place.exists():
        # A run that went on from an older checkpoint writes this one again.
        old = place.with_name(f".{place.name}.partial-old")
        place.replace(old)
        beside.replace(place)
        shutil.rmtree(old)
    else:
        beside.replace(place)
    sync(place.parent)
    write_atomically(place.parent / "latest", place.name)
    # Later ones are there where a run went on from an older checkpoint; it will overwrite them. One whose files are
    # gone or cut short counts for nothing: deleting the ones before it could delete the only good one.
    whole = [one for one in checkpoints(place.parent) if step_of(one) <= state["step"] and is_whole(one)]
    for old in whole[:-keep]:
        shutil.rmtree(old)


def find_checkpoint(
    folder: Path, wanted: dict[str, Any], world: World, before: float = inf, asked: str = "--resume auto"
) -> Found | None:
    """Return the newest checkpoint that is whole, up to the one that `latest` names; None where the run has none yet.

    Every byte is read and compared with the manifest, each rank a share of the files. All ranks call it.

    Args:
        wanted: this run's values of MUST_AGREE, and "tower", the notes of its frozen tower.
        before: only those that have taken fewer steps.
        asked: what asks for it, as the sentences begin.

    Raises:
        UserError: on every rank: the checkpoint was made by another run (one sentence with both values), or by another
            number of ranks and has no universal form; or there are checkpoints and none is whole.
    """
    places = from_rank_zero(lambda: [one for one in candidates(folder) if step_of(one) < before], world)
    found = _newest(folder, places, lambda place: everyone(list(faults(place, world.rank, world.size)), world))
    if found is None:
        return None
    state = from_rank_zero(partial(_check_state, found.place, wanted, asked), world)
    return found._replace(form=_form(found.place, state, world, asked))


def newest_whole(folder: Path) -> Found | None:
    """Return the newest checkpoint that is whole, as find_checkpoint does, for one process and whoever wrote it."""
    return _newest(folder, candidates(folder), lambda place: list(faults(place)))


def _newest(folder: Path, places: list[Path], damage: Callable[[Path], list[str]]) -> Found | None:
    passed_over: list[str] = []
    for place in places:
        wrong = damage(place)
        if not wrong:
            return Found(place, passed_over, place)
        passed_over.append(f"{place} is damaged: {wrong[0]}")
    if passed_over:
        raise UserError(
            f"no checkpoint in {folder} is whole ({'; '.join(passed_over)}); restore one, or start over with another "
            "--save_model_path or --overwrite"
        )
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read what a checkpoint says of itself."""
    return dict(json.loads((checkpoint / STATE_FILE).read_text()))


def _check_state(place: Path, wanted: dict[str, Any], asked: str) -> dict[str, Any]:
    state = read_state(place)
    for name, said in MUST_AGREE.items():
        if state.get(name) != wanted.get(name):
            raise UserError(
                f"{asked}: {place} was written with {said} {state.get(name)}, this run has {wanted.get(name)}; "
                "go on with the same, or train into another --save_model_path"
            )
    check_same(place, state.get("tower", {}), wanted["tower"])
    return state


def _form(place: Path, state: dict[str, Any], world: World, asked: str) -> Path:
    """Return the folder that this number of ranks can load; every byte of it is read, as of the checkpoint itself."""
    written, stage = state["world_size"], state["zero_stage"]
    if written == world.size:
        return place
    sizes = f"{place} was written by {written} rank(s), this run has {world.size}"
    if stage not in CONVERTIBLE:
        raise UserError(f"{asked}: {sizes}; under ZeRO stage {stage} that cannot change: use {written}")
    folder = place / UNIVERSAL
    wrong = everyone(list(faults(folder, world.rank, world.size)), world)
    if not wrong:
        return folder
    there = from_rank_zero(folder.exists, world)
    damage = f", and its universal form is damaged ({wrong[0]})" if there else ""
    raise UserError(
        f"{asked}: {sizes}{damage}; `mirage-ds checkpoint convert {place}` makes it loadable by any number of "
        f"ranks, or use {written}"
    )


def check_whole(checkpoint: Path) -> None:
    """Compare every file of a checkpoint with its manifest; UserError names the first that differs."""
    wrong = next(faults(checkpoint), None)
    if wrong:
        raise UserError(f"{checkpoint} is damaged: {wrong}; take an older one")


def load_checkpoint(engine: Any, found: Found) -> dict[str, Any]:
    """Load weights, optimizer and schedule; return the state that was saved with them. All ranks call it."""
    with own_groups_and_steps(engine) if found.universal else nullcontext():
        # Frozen weights are not in it.
        whole = all(parameter.requires_grad for parameter in engine.module.parameters())
        place, _ = engine.load_checkpoint(str(found.form.parent), tag=found.form.name, load_module_strict=whole)
    if place is None:
        raise UserError(f"{found.place}: DeepSpeed could not load it; name an older one in {found.place.parent}/latest")
    return read_state(found.place)
