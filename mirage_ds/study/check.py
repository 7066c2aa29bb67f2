"""What the evaluations of a study would refuse, said before anything is trained. Imports torch."""

from mirage_ds.analysis.controls.conditions import choose_partners
from mirage_ds.analysis.controls.paths import forks_of
from mirage_ds.analysis.controls.spec import PATH, parse_names
from mirage_ds.config.columns import parse_columns
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record import RecordError
from mirage_ds.data.record_files import read_records
from mirage_ds.errors import UserError
from mirage_ds.evaluate.scoring import task_of
from mirage_ds.study.nodes import Study
from mirage_ds.study.spec import EvaluationSpec


def check_evaluations(study: Study) -> None:
    """Read the records of each evaluation, their images' headers too, and look whether its task can score them.

    Raises:
        UserError: what `mirage-ds evaluate` or `controls` would refuse; names the evaluation.
    """
    asked = {(node.kind, node.name): node.evaluation for node in study.nodes.values() if node.evaluation}
    for (kind, name), evaluation in asked.items():
        conditions = parse_names(evaluation.controls or "own") if kind == "controls" else []
        try:
            _check(evaluation, conditions)
        except UserError as error:
            raise UserError(f"evaluation {name}: {error}") from None


def _check(evaluation: EvaluationSpec, conditions: list[str]) -> None:
    file = evaluation.data_path
    most = (evaluation.controls_most or evaluation.most) if conditions else evaluation.most
    # Questions alone can be answered; the controls compare with a record's own answer.
    records = read_records(file, answers=bool(conditions), columns=parse_columns(evaluation.columns))[:most]
    task = task_of(records, file, evaluation.task)
    finder = ImageFinder.beside(file, evaluation.image_root)
    oracle = "oracle" in conditions
    try:
        for record in records:
            if conditions and not record.runs:
                raise record.fault("text_output", "no latent block, so there is nothing to control",
                                   "write <output_image> where it stands, or give image_output")  # fmt: skip
            if oracle:
                record.need_helper()
            for name, path in record.images(helpers=oracle):
                finder.size(record, name, path)
    except RecordError as error:
        raise UserError(f"{file}, {error}") from None
    if "swap" in conditions:
        choose_partners(records, seed=0)
    if PATH in conditions:
        forks_of(records, task, seed=0)
