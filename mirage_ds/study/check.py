"""What the evaluations of a study would refuse, said before anything is trained. Imports torch."""

from mirage_ds.analysis.controls.conditions import choose_partners
from mirage_ds.analysis.controls.paths import forks_of
from mirage_ds.analysis.controls.spec import PATH
from mirage_ds.config.extras import need, need_for
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record import blamed
from mirage_ds.errors import UserError
from mirage_ds.evaluate.report import read_asked
from mirage_ds.evaluate.spec import RecordsSpec
from mirage_ds.study.nodes import Study
from mirage_ds.study.spec import EvaluationSpec


def check_study(study: Study) -> None:
    """Refuse a study that needs what is not installed, or of which some evaluation would be refused.

    The records of each evaluation are read, their images' headers too, and its task has to be able to score them.

    Raises:
        UserError: what `mirage-ds evaluate` or `controls` would refuse; names the evaluation.
    """
    for node in study.nodes.values():
        need_for(node.config)
        if PATH in node.material.get("conditions", ()):
            need("vsp", f"evaluation {node.name}: controls: {PATH}")
    need("plot", "`ablate report`, which draws,")
    for node in {(node.kind, node.name): node for node in study.nodes.values()}.values():
        if node.evaluation is not None:
            try:
                _check(node.evaluation, node.material.get("conditions", []), node.material["most"])
            except UserError as error:
                raise UserError(f"evaluation {node.name}: {error}") from None


def _check(evaluation: EvaluationSpec, conditions: list[str], most: int | None) -> None:
    file = evaluation.data_path
    known = evaluation.model_dump(include={"data_path", "columns", "task"})
    asked = RecordsSpec.model_validate(known | {"most": most})
    # Questions alone can be answered; the controls compare with a record's own answer.
    records, task, _ = read_asked(asked, answers=bool(conditions))
    finder = ImageFinder.beside(file, evaluation.image_root)
    oracle = "oracle" in conditions
    with blamed(f"{file}, "):
        for record in records:
            if conditions and not record.runs:
                raise record.fault("text_output", "no latent block, so there is nothing to control",
                                   "write <output_image> where it stands, or give image_output")  # fmt: skip
            if oracle:
                record.need_helper()
            for name, path in record.images(helpers=oracle):
                finder.size(record, name, path)
    if "swap" in conditions:
        choose_partners(records, seed=0)
    if PATH in conditions:
        forks_of(records, task, seed=0)
