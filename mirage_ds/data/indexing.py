"""Making the index of a records source (data/index.py): many processes make its parts (data/parts.py), one joins them.

R rows, I images of a field, T tokens of a row.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import PIL
import tokenizers
import torch
import transformers
from rich.progress import track

from mirage_ds.config.mixture import Records
from mirage_ds.config.run import cache_folder
from mirage_ds.data import encode, images, inside, joining, messages, parts, record, record_files, sample, sources
from mirage_ds.data import index as on_disk
from mirage_ds.data.encode import Encoder
from mirage_ds.data.index import FORMAT, HEADER, EncodedRows
from mirage_ds.data.joining import Writer, open_made, put, remove_abandoned
from mirage_ds.data.parts import Parts, Plan
from mirage_ds.data.ship import ignore_in_worker
from mirage_ds.errors import UserError
from mirage_ds.files import sync

MOST_PROCESSES = 16


def plan_index(
    data_path: Records, encoder: Encoder, keep: Sequence[str], cache: Path, tick: Callable[[], None] = lambda: None
) -> Plan:
    """Find the records and the key of their index.

    Raises:
        UserError: a file is missing or cannot be read, or the cache not written.
    """
    files = sources.find_files(data_path)
    # Before they are read.
    stamps = sources.stamps(files)
    hashes = []
    for file in files:
        hashes.append(sources.content_hash(file, cache))
        tick()
    key = key_of(files, hashes, encoder, keep)
    return Plan(cache / "index" / key, files, stamps, sources.data_hash(hashes), [])


def processes(work: int, sharers: int = 1) -> int:
    """Choose how many processes encode; none where the work is a single piece.

    Args:
        sharers: ranks that share this host's processors.
    """
    return 0 if work < 2 else max(1, min(work, MOST_PROCESSES, len(os.sched_getaffinity(0)) // sharers))


class Maker:
    """Makes an index, alone or as one of several ranks, each of which makes its share of the parts.

    Args:
        data_path: as the user has given it.
        keep, quiet, check_images: see open_index.
        tick: is called again and again.
    """

    def __init__(
        self,
        data_path: Records,
        encoder: Encoder,
        keep: Sequence[str],
        cache: Path,
        quiet: bool = True,
        check_images: bool = False,
        tick: Callable[[], None] = lambda: None,
    ):
        self.data_path, self.encoder, self.keep, self.cache = data_path, encoder, keep, cache
        self.quiet, self.check_images, self.tick = quiet, check_images, tick

    def plan(self) -> Plan:
        """See plan_index."""
        return plan_index(self.data_path, self.encoder, self.keep, self.cache, self.tick)

    def open(self, plan: Plan) -> EncodedRows | None:
        """Open what is there; where that is damaged or, as far as is looked, of other images, it is removed."""
        there = plan.place.exists()
        rows = open_made(plan.place, plan.files, self.cache)
        other = rows is not None and rows.pictures_changed(self.encoder.finder, self.check_images)
        if other:
            shutil.rmtree(plan.parts, ignore_errors=True)
        if other or (there and rows is None):
            with inside.writable(self.cache):
                # Without its header it is no index.
                (plan.place / HEADER).unlink(missing_ok=True)
            shutil.rmtree(plan.place, ignore_errors=True)
            return None
        return rows

    def begin(self, plan: Plan) -> tuple[Plan, str]:
        """Cut the files into pieces, for which they are read.

        Returns:
            With the pieces, the name of a new file in the folder of parts, by which others tell that they share it.
        """
        token = f".{uuid.uuid4().hex}"
        with inside.writable(self.cache):
            plan.parts.mkdir(parents=True, exist_ok=True)
            (plan.parts / token).touch()
        return plan._replace(pieces=list(sources.pieces(plan.files))), token

    def _parts(self, plan: Plan) -> Parts:
        return Parts(plan, self.encoder, self.keep, self.cache)

    def make_parts(
        self,
        plan: Plan,
        share: int = 0,
        shares: int = 1,
        sharers: int = 1,
        asked: Callable[[], bool] = lambda: False,
    ) -> None:
        """Make the parts of one of several shares, as far as they are not there and nobody asks to stop.

        Raises:
            UserError: a file cannot be read, or the cache not written.
        """
        own = range(share, len(plan.pieces), shares)
        loader: Any = torch.utils.data.DataLoader(
            self._parts(plan),
            batch_size=None,
            sampler=own,
            collate_fn=_as_it_is,  # type: ignore[arg-type]  # there are no batches
            num_workers=processes(len(own), sharers),
            worker_init_fn=ignore_in_worker,
        )
        for error in track(loader, "indexing records", total=len(own), disable=self.quiet, transient=True):
            if error:
                raise error
            self.tick()
            if asked():
                return

    def join(self, plan: Plan) -> EncodedRows:
        """Write the index from its parts, put it at its place, and return it opened.

        Raises:
            UserError: the records hold nothing or have changed meanwhile, or there is no room.
        """
        with inside.writable(self.cache):
            made = open_made(plan.place, plan.files, self.cache)
            if made is None:
                made = self._join(plan)
            shutil.rmtree(plan.parts, ignore_errors=True)
            return made

    def _join(self, plan: Plan) -> EncodedRows:
        place = plan.place
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(place.parent)
        partial = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
        partial.mkdir()
        try:
            with ExitStack() as stack:
                writer = Writer(partial, self.keep, stack)
                made = self._parts(plan)
                for number in track(range(len(made)), "joining the index", disable=self.quiet, transient=True):
                    writer.add(made.read(number, self.check_images))
                    self.tick()
            if not writer.count:
                raise sources.no_record(self.data_path)
            sources.check_unchanged(plan.files, plan.stamps)
            writer.finish(self.encoder.finder, plan.source, inside.folder_of_pictures(self.cache))
            for file in partial.iterdir():
                sync(file)
            sync(partial)
            own = open_made(partial, plan.files, self.cache)
            if own is None:
                raise UserError(
                    f"{self.cache}: cannot be read back as it was written; look at the disk, or use --cache_dir"
                )
            return put(own, place, self.cache)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _as_it_is(error: UserError | None) -> UserError | None:
    return error


# ------------------------------------------------------------------------------------------------------------- opening


def _settings(processor: Any) -> dict[str, Any]:
    size = {edge: int(processor.size[edge]) for edge in ("shortest_edge", "longest_edge")}
    return {
        "size": size,
        **{name: getattr(processor, name) for name in ("patch_size", "temporal_patch_size", "merge_size")},
    }


def _tokenizer_text(tokenizer: Any) -> str:
    # What was asked of it last is no part of it.
    made = copy.deepcopy(tokenizer.backend_tokenizer)
    made.no_padding()
    made.no_truncation()
    return str(made.to_str()) + str(tokenizer.chat_template)


def key_of(files: Sequence[Path], hashes: Sequence[str], encoder: Encoder, keep: Sequence[str]) -> str:
    """Hash of all that an index is a function of, but for the images."""
    finder = encoder.finder
    modules = (encode, sample, messages, record, record_files, images, inside, sources, on_disk, parts, joining)
    code = b"".join(Path(file).read_bytes() for file in (*(str(module.__file__) for module in modules), __file__))
    values = dict(
        format=FORMAT,
        # So that nobody who mends the encoding trains on rows from before.
        code=hashlib.sha256(code).hexdigest(),
        libraries=[transformers.__version__, tokenizers.__version__, PIL.__version__],
        records=[(str(file.parent.resolve()), content) for file, content in zip(files, hashes, strict=True)],
        tokenizer=hashlib.sha256(_tokenizer_text(encoder.tokenizer).encode()).hexdigest(),
        images=_settings(encoder.images),
        helpers=_settings(encoder.helpers),
        stage=encoder.stage,
        latent_size=encoder.latent_size,
        slots=encoder.slots,
        # It refuses what cannot be pooled; which feature goes where is no part of the index.
        compress=encoder.compress,
        keep=sorted(keep),
        # The first looks beside the records, the last in the working directory, which rarely decides anything.
        folders=[str(folder) for folder in finder.folders[1:-1]],
        confined=finder.within is not None,
    )
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def open_index(
    data_path: Records,
    encoder: Encoder,
    keep: Sequence[str] = (),
    cache_dir: Path | None = None,
    quiet: bool = True,
    check_images: bool = False,
) -> EncodedRows:
    """Open the index of a records source; it is made first where there is none, and anew where it does not hold.

    Args:
        encoder: its finder looks for images beside each file, wherever it was made for.
        keep: fields ("image_input", "image_output") whose features are kept: their images get keys here and are decoded
            by whoever makes the features.
        cache_dir: holds the index; ~/.cache/mirage_ds if None.
        quiet: show no progress.
        check_images: look at every image file; see EncodedRows.pictures_changed.

    Raises:
        UserError: a file is missing, cannot be read or changes meanwhile, there is no record, or no room.
    """
    maker = Maker(data_path, encoder, keep, cache_folder(cache_dir), quiet, check_images)
    plan = maker.plan()
    rows = maker.open(plan)
    if rows is None:
        plan, _ = maker.begin(plan)
        maker.make_parts(plan)
        rows = maker.join(plan)
    return rows
