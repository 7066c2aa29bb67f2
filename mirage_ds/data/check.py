"""`mirage-ds data check`: every fault of a records file at once."""

from __future__ import annotations

from pathlib import Path

from mirage_ds.config import Stage
from mirage_ds.data.record import Fault, ImageFinder, Record, RecordError, scan
from mirage_ds.errors import UserError


def _faults(record: Record, finder: ImageFinder, stage: Stage) -> list[Fault]:
    faults = []
    if stage == "stage1":
        try:
            record.need_helper()
        except RecordError as error:
            faults.append(error.fault)
    for name, path in record.images(helpers=stage == "stage1"):
        try:
            finder.size(record, name, path)
            finder.load(record, name, path)
        except RecordError as error:
            faults.append(error.fault)
    return faults


def check_file(
    file: Path,
    stage: Stage,
    image_root: Path | None,
    model_folder: Path | None,
    latent_size: int,
    confine_paths: bool = False,
) -> tuple[int, list[Fault]]:
    """Check every record of a file: its form, its images, and with a model folder its encoding for a stage.

    Returns:
        The number of records, and the faults in the order of their lines.
    """
    from rich.progress import track

    records, faults = scan(file)
    finder = ImageFinder.beside(file, image_root, confine_paths)
    encoder = None
    if model_folder:
        from mirage_ds.data.load import load_encoder

        if not model_folder.is_dir():
            raise UserError(f"--model {model_folder}: no such folder")
        encoder = load_encoder([str(model_folder)], finder, stage, latent_size)
    for record in track(records, "checking", transient=True):
        found = _faults(record, finder, stage)
        if encoder and not found:
            try:
                encoder.measure(record)
            except RecordError as error:
                found.append(error.fault)
        faults += found
    return len(records) + len({fault.line for fault in faults} - {r.line for r in records}), sorted(
        faults, key=lambda fault: fault.line
    )


def print_faults(file: Path, count: int, faults: list[Fault], most: int) -> None:
    """Print the faults as a table, or one line when there is none."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not faults:
        console.print(f"{file}: {count} records, no fault", markup=False)
        return
    # Text, not str: rich would read brackets in a path as markup.
    title = Text(f"{file}: {len(faults)} fault(s) in {count} records")
    table = Table("line", "field", "what", "how to mend", title=title)
    for fault in faults[:most]:
        table.add_row(str(fault.line), fault.field, Text(fault.what), Text(fault.how))
    console.print(table)
    if faults[most:]:
        console.print(f"… and {len(faults) - most} more (--most)")
