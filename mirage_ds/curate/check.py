"""`mirage-ds data check`: every fault of the records at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mirage_ds.config.columns import RECOGNISED, Columns
from mirage_ds.config.run import HELPED, Compress, Stage
from mirage_ds.data.folders import find_files
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.inside import folder_of_pictures
from mirage_ds.data.record import NO_LATENTS, Fault, Record, RecordError, name_file
from mirage_ds.data.record_files import read_piece
from mirage_ds.data.region import cells_of
from mirage_ds.data.sources import no_record, pieces
from mirage_ds.errors import UserError
from mirage_ds.tasks import named_task
from mirage_ds.tasks.boxed import last_boxed


def scored(record: Record) -> str:
    """Return how evaluate would score an answer: by a task that the record names, by its box, or not at all."""
    try:
        if named_task(record, None):
            return "task"
    except RecordError:
        # evaluate says what is wrong with the name.
        return "task"
    return "box" if (last_boxed(record.text_output) or "").strip() else "nothing"


@contextmanager
def _noted(faults: list[Fault]) -> Iterator[None]:
    """Note a fault and go on behind the block."""
    try:
        yield
    except RecordError as error:
        faults.append(error.fault)


def _faults(
    record: Record, finder: ImageFinder, stage: Stage, regions: bool, measure: Callable[[Record], object] | None
) -> list[Fault]:
    faults: list[Fault] = []
    helped = stage in HELPED and not regions
    if helped:
        with _noted(faults):
            record.need_helper(stage)
    for name, path in record.images(helpers=helped):
        with _noted(faults):
            finder.size(record, name, path)
            finder.load(record, name, path)
    if regions and not faults:
        with _noted(faults):
            sizes = [finder.size(record, "image_input", path) for path in record.image_input]
            cells_of(record, sizes, [(1, 1)] * len(sizes))
    if measure and not faults:
        with _noted(faults):
            measure(record)
    return faults


def check_file(
    data_path: Path,
    stage: Stage,
    image_root: Path | None,
    model_folder: Path | None,
    latent_size: int,
    confine_paths: bool = False,
    columns: Columns = RECOGNISED,
    see: Callable[[Record], object] = lambda record: None,
    compress_strategy: Compress = "average",
) -> tuple[int, list[Fault]]:
    """Check every record: its form, its images, and with a model folder its encoding for a stage.

    Args:
        data_path: a file, a folder of files, or a glob pattern.
        see: is shown each record that has the format.
        compress_strategy: as of a run; region looks for regions in place of helpers.

    Returns:
        The number of records, and the faults in the order of the records.
    """
    from mirage_ds.data.progress import track

    files = find_files(data_path)
    pictures = folder_of_pictures()
    finder = ImageFinder.beside(data_path, image_root, confine_paths)
    encoder = None
    if model_folder:
        from mirage_ds.data.load import load_encoder

        if not model_folder.is_dir():
            raise UserError(f"--model {model_folder}: no such folder")
        encoder = load_encoder([str(model_folder)], finder, stage, latent_size, compress=compress_strategy)
    count, latents, regions = 0, False, stage == "stage1" and compress_strategy == "region"
    faults: list[Fault] = []
    for piece in track(list(pieces(files)), "checking"):
        own = finder.of(files[piece.file], pictures)
        measure = replace(encoder, finder=own).measure if encoder else None
        for record in read_piece(piece, files[piece.file], pictures, columns):
            count += 1
            if isinstance(record, Fault):
                found = [record]
            else:
                see(record)
                latents |= record.runs > 0
                found = _faults(record, own, stage, regions, measure)
            faults += [name_file(fault, files, piece.file) for fault in found]
    if not count:
        raise no_record(data_path)
    if stage == "stage2" and not latents and not faults:
        faults.append(name_file(Fault(1, "image_output", *NO_LATENTS), files, 0))
    return count, faults


def print_faults(file: Path, count: int, faults: list[Fault], most: int) -> None:
    """Print the faults as a table, those that are alike once, or one line when there is none."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not faults:
        console.print(f"{file}: {count} records, no fault", markup=False)
        return
    # Text, not str: rich would read brackets in a path as markup.
    title = Text(f"{file}: {len(faults)} fault(s) in {count} records")
    table = Table("line", "field", "what", "how to fix", title=title)
    groups: dict[tuple[str, ...], list[Fault]] = {}
    for fault in faults:
        groups.setdefault((fault.field, fault.what, fault.how), []).append(fault)
    for alike in list(groups.values())[:most]:
        fault, more = alike[0], f" and {len(alike) - 3} more" if len(alike) > 3 else ""
        lines = ", ".join(f"{one.file} {one.line}".strip() for one in alike[:3]) + more
        table.add_row(Text(lines), fault.field, Text(fault.what), Text(fault.how))
    console.print(table)
    if len(groups) > most:
        console.print(f"… and {sum(map(len, list(groups.values())[most:]))} more (--most)")
