"""The file that describes a study: stages, arms, seeds, evaluations, what is compared. Imports no torch.

docs/studies.md shows whole files. A setting is a field of a run (`mirage-ds`' own flags, config.RunConfig) by its name;
`stage1.ce_weight` is that setting in the stage of that name alone.
"""

import itertools
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, Field, GetPydanticSchema, PositiveInt, ValidationError, model_validator

from mirage_ds.analysis.controls.spec import parse_names
from mirage_ds.config.columns import COLUMNS_HELP, ColumnsText
from mirage_ds.config.flags import read_yaml
from mirage_ds.config.names import hint
from mirage_ds.config.run import RunConfig
from mirage_ds.errors import UserError, closest, shown

Settings = dict[str, Any]

# Set by the study itself.
RESERVED = ("save_model_path", "latent_targets", "load_model_path", "resume", "overwrite", "log_file")


# A number, or settings with their `seed`, like {seed: 1, base.model: other}.
_Seed = Annotated[int | Settings, AfterValidator(lambda one: {"seed": one} if isinstance(one, int) else one)]
# For type checkers what comes out of it.
Seed = Annotated[Settings, GetPydanticSchema(lambda _, handler: handler.generate_schema(_Seed))]
# A path that starts at the folder of the study's file, which is the context of the validation.
Here = Annotated[Path, AfterValidator(lambda path, info: info.context / path)]


def _is_name(name: str) -> str:
    # Names become parts of folder names and of the report's tables.
    if not re.match(r"\w[\w.+-]*$", name):
        raise ValueError(f"{name!r}: a name may only have letters, digits and . _ + -")
    return name


Name = Annotated[str, AfterValidator(_is_name)]


def _is_there(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"no file {path}; name the records")
    return path


class _Strict(BaseModel):
    model_config = {"extra": "forbid", "frozen": True, "allow_inf_nan": False}


class Arm(_Strict):
    """One line of the report, or several where it varies something."""

    chain: list[str] = Field(
        min_length=1,
        description="Stages, by name, each from the one before's weights; stage1 behind scaffold learns its targets.",
    )
    about: str = Field("", description="What it is, in a line.")
    settings: Settings = Field({}, description="Settings of this arm.")
    grid: dict[str, list[Any]] = Field({}, description="Every combination of these values is an arm.")
    pairs: dict[str, list[Any]] = Field({}, description="All first values are an arm, all second ones, and so on.")
    listed: list[Settings] = Field([], alias="list", description="Each of these is an arm.")
    seeds: PositiveInt | None = Field(None, description="Take only the first so many seeds of the study.")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        for name, values in (*self.grid.items(), *self.pairs.items()):
            if not values:
                raise ValueError(f"{name}: an empty list makes no arm; give it values or leave it out")
        if sum(map(bool, (self.grid, self.pairs, self.listed))) > 1:
            raise ValueError("an arm varies by `grid`, `pairs` or `list`: give one of them")
        if len({len(values) for values in self.pairs.values()}) > 1:
            raise ValueError("the lists of `pairs` differ in length; make them equally long")
        return self

    def variants(self) -> list[Settings]:
        """Return what each arm of this entry varies; once nothing, where it varies nothing."""
        names = self.pairs or self.grid
        rows = zip(*names.values(), strict=True) if self.pairs else itertools.product(*names.values())
        return self.listed or [dict(zip(names, values, strict=True)) for values in rows]


class EvaluationSpec(_Strict):
    """Records that the last model of each chain answers."""

    data_path: Annotated[Here, AfterValidator(_is_there)] = Field(description="Records.")
    columns: ColumnsText = Field(None, description=COLUMNS_HELP)
    task: str | None = Field(None, description="Task that scores, or module:function; else the records' own.")
    most: PositiveInt | None = Field(None, description="Take only the first so many records.")
    max_new_tokens: PositiveInt = Field(256, description="Tokens that an answer may have.")
    batch_size: PositiveInt = Field(64, description="Rows answered at a time.")
    controls: str | None = Field(None, description="Conditions of the controls, where answers see latents: own,swap,…")
    controls_most: PositiveInt | None = Field(None, description="Records of the controls; all if not set.")
    arms: tuple[str, ...] | None = Field(None, description="Only these arms; all if not set.")
    image_root: Here | None = None

    @model_validator(mode="after")
    def _known(self) -> Self:
        try:
            parse_names(self.controls or "own", "controls")
        except UserError as error:
            raise ValueError(str(error)) from None
        return self


class ContrastSpec(_Strict):
    """Two arms compared on the same records and seeds: arm − base.

    Attributes:
        levels: of the records that count, all if empty; metric: compared, the task's first if None.
    """

    arm: str
    base: str
    evaluation: str
    levels: tuple[str, ...] = ()
    metric: str | None = None


class ReportSpec(_Strict):
    """What the report compares."""

    primary: ContrastSpec | None = Field(None, description="The one contrast that the study was made for.")
    contrasts: list[ContrastSpec] = Field([], description="The others; their p-values are corrected together (Holm).")
    margin: float = Field(0.02, gt=0, description="A difference within ± this counts as none.")


class LaunchSpec(_Strict):
    """How the runs start."""

    ranks: PositiveInt = Field(1, description="Ranks of a training run on this machine (GPUs, where there are any).")
    retries: int = Field(1, ge=0, description="How often a failed run is started again.")
    keep_checkpoints: bool = Field(False, description="Leave finished runs their sharded checkpoints.")
    environment: dict[str, str] = Field({}, description="Environment variables of the runs.")


class StudySpec(_Strict):
    """A whole study file."""

    name: Name = Field(description="Of the study.")
    question: str = Field("", description="What it asks; stands on top of the report.")
    out: Here = Field(description="Folder of all runs, relative to this file.")
    common: Settings = Field({}, description="Settings of every stage.")
    stages: dict[Name, Settings] = Field(description="Name → the settings of one stage.")
    arms: dict[Name, Arm] = Field(min_length=1)
    seeds: list[Seed] = Field([{"seed": 0}], min_length=1, description="Arms are paired by their number.")
    evaluations: dict[Name, EvaluationSpec] = {}
    report: ReportSpec = ReportSpec.model_validate({})
    launch: LaunchSpec = LaunchSpec.model_validate({})

    @model_validator(mode="after")
    def _agree(self) -> Self:
        for name, arm in self.arms.items():
            if arm.seeds is not None and arm.seeds > len(self.seeds):
                raise ValueError(f"arm {name}: {arm.seeds} seeds, the study has {len(self.seeds)}")
        self._check_settings()
        for name, arm in self.arms.items():
            kinds = [self.stages.get(stage, {}).get("stage") for stage in arm.chain]
            if any(one == "scaffold" and after != "stage1" for one, after in itertools.zip_longest(kinds, kinds[1:])):
                raise ValueError(
                    f"arm {name}: scaffold trains no model; put a stage1 behind it, which learns its targets"
                )
        for one in self.seeds:
            if not isinstance(one.get("seed"), int):
                raise ValueError(f"seeds: {one} needs `seed`, the number that pairs the arms")
        if len({one["seed"] for one in self.seeds}) < len(self.seeds):
            raise ValueError("seeds: a number is there twice")
        for where, kind, name, known in self._named():
            if name not in known:
                there = ", ".join(known) or "none"
                raise ValueError(f"{where}: no {kind} {name!r}{closest(name, known)}; there are {there}")
        return self

    def _check_settings(self) -> None:
        """Refuse settings that no run has, or that are the study's own."""
        places = [("common", self.common), *((f"stage {name}", own) for name, own in self.stages.items())]
        places += [(f"arm {name}", arm.settings | one) for name, arm in self.arms.items() for one in arm.variants()]
        for place, settings in [*places, *(("seeds", one) for one in self.seeds)]:
            for name in settings:
                stage, _, own = name.rpartition(".")
                if stage and stage not in self.stages:
                    raise ValueError(f"{place}: {name}: no stage {stage!r}{closest(stage, self.stages)} in `stages`")
                if own not in RunConfig.model_fields:
                    raise ValueError(f"{place}: no setting {own!r}{hint(own, RunConfig.model_fields)}")
                if own in RESERVED:
                    raise ValueError(f"{place}: {own} is set by the study itself; leave it out")

    def _named(self) -> Iterator[tuple[str, str, str, Collection[str]]]:
        """Yield what is named somewhere else than where it is described: (place, kind, name, those there are)."""
        arms = arm_names(self)
        for name, arm in self.arms.items():
            yield from ((f"arm {name}", "stage", stage, self.stages) for stage in arm.chain)
        for title, evaluation in self.evaluations.items():
            # All variants of an entry may be named at once.
            yield from ((f"evaluation {title}", "arm", name, {**self.arms, **arms}) for name in evaluation.arms or ())
        for one in filter(None, (self.report.primary, *self.report.contrasts)):
            yield from (("report", "arm", name, arms) for name in (one.arm, one.base))
            yield "report", "evaluation", one.evaluation, self.evaluations


def first_fault(error: ValidationError, whole: str = "") -> str:
    """Say where the first fault is and what it is.

    Args:
        whole: what a fault of no single key is said to be about.
    """
    first = error.errors()[0]
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        said = f"unknown key {shown(first['loc'][-1])}; put quotes around a text that has a comma"
    where = ".".join(map(str, first["loc"])) or whole
    return f"{where}: {said}" if where else said


def read_study(path: Path) -> StudySpec:
    """Read a study's file; its relative paths are from the file's folder.

    Raises:
        UserError: it cannot be read, or holds what a study has not.
    """
    values = read_yaml(path)
    unknown = [str(key) for key in values if key not in StudySpec.model_fields]
    if unknown:
        raise UserError(f"unknown key {shown(unknown[0])} in {path}{closest(unknown[0], StudySpec.model_fields)}")
    try:
        return StudySpec.model_validate(values, context=path.resolve().parent)
    except ValidationError as error:
        raise UserError(f"{path}: {first_fault(error)}") from None


def arm_names(spec: StudySpec) -> dict[str, tuple[Arm, Settings]]:
    """Spell out every arm: its name with what it varies in brackets → (entry, what it varies).

    Raises:
        ValueError: two arms come to have one name.
    """
    found: dict[str, tuple[Arm, Settings]] = {}
    for name, arm in spec.arms.items():
        for varied in arm.variants():
            whole = name + (f"[{','.join(f'{key}={value}' for key, value in varied.items())}]" if varied else "")
            if whole in found:
                raise ValueError(f"arm {whole} is there twice; give each value once")
            found[whole] = (arm, varied)
    return found
