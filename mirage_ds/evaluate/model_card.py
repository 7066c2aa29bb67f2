"""`mirage-ds card`: write the scores of `mirage-ds evaluate` into the model card of the folder that they are of."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mirage_ds.engine.card import FILE, MARK, with_scores
from mirage_ds.engine.manifest import entry_of
from mirage_ds.errors import UserError
from mirage_ds.evaluate.tables import markdown_table, read_report, score_table
from mirage_ds.files import check_output, write_atomically
from mirage_ds.model.folder import weight_files
from mirage_ds.tasks import NO_METRICS

TASK_TYPE = "image-text-to-text"


def lines_of(report: dict[str, Any]) -> list[str]:
    """Write a report as Markdown: one line of what was measured, and a table with a row a level."""
    settings = report["settings"]
    drawn = "" if settings["decoding"] == "greedy" else f", seed {settings['seed']}"
    several = f", means of {samples} samples" if (samples := settings.get("samples", 1)) > 1 else ""
    return [
        f"**{report['task']}**, {Path(report['data']).name} (SHA-256 `{report['hashes']['data']}`), decoding "
        f"{settings['decoding']}{drawn}{several}, at most {settings['max_new_tokens']} new tokens, {settings['dtype']}",
        "",
        markdown_table(*score_table(report, digits=3)),
        "",
    ]


def results_of(report: dict[str, Any]) -> list[EvalResult]:
    """Write a report as the hub's model index has it: the means over all rows."""
    return [
        EvalResult(
            task_type=TASK_TYPE,
            dataset_type=report["task"],
            dataset_name=f"{report['task']}, {Path(report['data']).name}",
            dataset_revision=report["hashes"]["data"],
            metric_type=name,
            metric_value=round(value, 4),
        )
        for name, value in report["all"].items()
        if name not in NO_METRICS
    ]


def add_scores(folder: Path, files: Sequence[Path], track: Callable[[Sequence[Path]], Iterable[Path]] = iter) -> str:
    """Write the scores of these files into the model card of `folder`, in place of those that it has; return a line.

    Args:
        track: is given the weight files that are hashed, for a progress bar.

    Raises:
        UserError: no card that this program wrote, a file without scores, or scores of other weights.
    """
    place = folder / FILE
    if not place.is_file() or MARK not in place.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{place}: is no model card of mirage_ds; name the folder of a trained or exported model")
    # Before the weights are hashed.
    check_output(place, "the model card")
    reports = [read_report(file) for file in files]
    own = {(entry := entry_of(folder, file)).name: entry.sha256 for file in track(weight_files(folder))}
    for file, report in zip(files, reports, strict=True):
        if report["hashes"].get("model") != own:
            raise UserError(
                f"{file}: are scores of other weights ({report.get('model')}) than those in {folder}; evaluate these"
            )
    lines = [line for report in reports for line in lines_of(report)]
    card = ModelCard(with_scores(place.read_text(encoding="utf-8"), lines))
    head = {**card.data.to_dict(), "model_name": folder.resolve().name}
    head.pop("model-index", None)
    results = [result for report in reports for result in results_of(report)]
    card.data = ModelCardData(**head, eval_results=results)
    write_atomically(place, str(card))
    return f"{place}: scores of {len(files)} file(s)"
