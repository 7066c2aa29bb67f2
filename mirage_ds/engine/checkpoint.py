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
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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
from mirage_ds.engine.setup import World, agree, at_rank_zero, everyone, from_rank_zero
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
    "latent_targets": "--latent_targets (SHA-256)",
    "feed": "--feed",
    "latent_passes": "--latent_passes",
    "bottleneck": "--bottleneck",
    "lora": "--lora_rank, --lora_alpha, --lora_targets",
    "zero_stage": "ZeRO stage of --deepspeed",
    "latent_policy": "--latent_policy",
    "task": "--task",
    "reference": "the reference of --beta, the weights of --model or --load_model_path (SHA-256),",
    "rl": "settings of rl (run/config.yaml has them)",
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


class Saved(NamedTuple):
    """A checkpoint that is in its place.

    Attributes:
        size: bytes of all ranks' files; own: of this rank's.
        seconds: from its begin until `latest` named it; held: of these, while no step was taken.
    """

    place: Path
    size: int
    own: int
    seconds: float
    held: float


class CheckpointWriter:
    """Writes a checkpoint of the engine's whole state. All ranks make it, and then finish it.

    Args:
        folder: the run's checkpoint folder.
        state: what a resume checks before it loads (MUST_AGREE), and "step", the optimizer steps taken.
        beside_steps: the files are written while steps are taken, from a copy in the host's memory.
    """

    def __init__(self, engine: Any, folder: Path, state: dict[str, Any], world: World, beside_steps: bool = False):
        self.state, self._world, self._begun = state, world, time.perf_counter()
        self._place = folder / f"global_step{state['step']}"
        self._beside = folder / f".{self._place.name}.partial"
        self._entries: Future[list[Entry]] | None = None
        self._trouble = at_rank_zero(lambda: _make_room(folder, self._beside), world)
        if not self._trouble:
            with collected_write_errors(engine, beside_steps) as self._files:
                # The state stays out of DeepSpeed's files: a key of its own there ("optimizer") would be overwritten.
                # Frozen weights are the base's; the state says which (frozen.notes_of_engine).
                engine.save_checkpoint(
                    str(folder), tag=self._beside.name, save_latest=False, exclude_frozen_parameters=True
                )
            thread = ThreadPoolExecutor(1)
            self._entries = thread.submit(self._write)
            thread.shutdown(wait=False)
        self._held = time.perf_counter() - self._begun

    def _write(self) -> list[Entry]:
        """Write what is not written yet, and read all of this rank's files back."""
        self._files.write()
        entries = []
        for file in [] if self._files.failed else dict.fromkeys(self._files.written):
            try:
                entries.append(entry_of(self._beside, file))
            except OSError as error:
                self._files.failed.append(f"{file}: {error.strerror}")
        return entries

    def written(self) -> bool:
        """Tell, on every rank alike, whether all of them have written their files."""
        return not agree(self._entries is not None and not self._entries.done(), self._world)

    def finish(self, keep: int) -> Saved | str:
        """Wait for all ranks' files, and put the checkpoint in its place.

        Args:
            keep: newest whole checkpoints that stay; older ones are deleted once `latest` names this one.

        Returns:
            What was saved; or, the same on every rank, a sentence that says why there is none. The earlier checkpoints
            are then as they were.
        """
        world, begun = self._world, time.perf_counter()
        if self._trouble or self._entries is None:
            return self._trouble or ""
        own = self._entries.result()
        troubles, entries = everyone(self._files.failed, world), everyone(own, world)
        put = partial(_put_in_place, self._beside, self._place, self.state, entries, keep)
        if trouble := troubles[0] if troubles else at_rank_zero(put, world):
            from_rank_zero(lambda: shutil.rmtree(self._beside, ignore_errors=True), world)
            return trouble
        size, mine = (sum(entry.size for entry in some) for some in (entries, own))
        now = time.perf_counter()
        return Saved(self._place, size, mine, now - self._begun, self._held + now - begun)


def _make_room(folder: Path, beside: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".global_step*.partial"):
        shutil.rmtree(left)
    beside.mkdir()


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
