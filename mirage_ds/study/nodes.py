"""From a study's file to its runs: what is trained and evaluated, each thing once, under a name made of its content.

A node is a training stage or an evaluation. Its key is a hash of all that its result is a function of: the settings,
the records, the model it starts from, the DeepSpeed JSON, and for a later stage the key of the one before. So equal
parts of two chains are one node, a changed setting is another one, and a finished one is never run again. Imports no
torch.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import ValidationError

from mirage_ds.analysis.controls.spec import parse_names
from mirage_ds.config.mixture import Mixture, Records
from mirage_ds.config.rl import OTHERWISE, RL_ONLY
from mirage_ds.config.run import RunConfig
from mirage_ds.data.folders import find_files, readable
from mirage_ds.engine.ds_config import read_json
from mirage_ds.errors import UserError, reason
from mirage_ds.files import own_modules_found
from mirage_ds.study.results import CONTROLS, SCORES
from mirage_ds.study.spec import Arm, EvaluationSpec, Settings, StudySpec, arm_names, first_fault

Kind = Literal["train", "evaluate", "controls"]

_TABLE = yaml.safe_load(Path(__file__).with_name("nodes.yaml").read_text(encoding="utf-8"))
MACHINE = OTHERWISE.union(_TABLE["machine"].split(), _TABLE["content"].split())
# Larger weight files are told apart by their ends: hashing 16 GB for each plan would take minutes.
WHOLE_BYTES, END_BYTES = 1 << 30, 1 << 20


@dataclass(frozen=True)
class Node:
    """One thing to run.

    Attributes:
        name: of the stage or evaluation; parent: the node whose model it needs;
            targets: the scaffold node whose learned targets it needs.
        config: of the training stage, or of the one whose model is evaluated; its save_model_path, load_model_path and
            latent_targets are the node's business (store.Store).
        evaluation: of the others.
        material: what the key is a hash of, for people who want to know why two nodes differ.
    """

    kind: Kind
    name: str
    parent: Self | None
    config: RunConfig
    evaluation: EvaluationSpec | None
    material: Mapping[str, Any]
    targets: Self | None = None

    @property
    def needs(self) -> list[Self]:
        """The nodes that are done before it."""
        return list(filter(None, (self.parent, self.targets)))

    @cached_property
    def key(self) -> str:
        """64 hex digits."""
        return _hash(json.dumps(self.material, sort_keys=True))

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{self.name}-{self.key[:12]}" if self.kind == "train" else f"{self.kind}-{self.name}-{self.key[:12]}"


@dataclass(frozen=True)
class CellPlan:
    """One arm under one seed.

    Attributes:
        settings: what the arm varies, with whatever its entry sets.
        stages: keys of its chain; results: as Cell.keys has them.
    """

    arm: str
    seed: int
    settings: Settings
    stages: tuple[str, ...]
    results: Mapping[str, str]

    @property
    def nodes(self) -> tuple[str, ...]:
        """All of its keys."""
        return (*self.stages, *self.results.values())


@dataclass(frozen=True)
class Study:
    """A study spelt out.

    Attributes:
        nodes: key → node, each behind the one whose model it needs; all arms of the first seed stand before the second
            seed's, so that what is there of an unfinished study can be compared.
        cells: in the order of the arms, then of the seeds.
    """

    spec: StudySpec
    nodes: Mapping[str, Node]
    cells: tuple[CellPlan, ...]

    def wanted(self, arms: Sequence[str] | None, only: Sequence[str]) -> list[str]:
        """Return the keys that are asked for, with all that they need; in the study's order.

        Raises:
            UserError: no such arm, or no such run.
        """
        of_arms: dict[str, set[str]] = {}
        for cell in self.cells:
            # By its whole name, or by that of its entry.
            for name in {cell.arm, cell.arm.partition("[")[0]}:
                of_arms.setdefault(name, set()).update(cell.nodes)
        if unknown := [name for name in arms or () if name not in of_arms]:
            raise UserError(f"--arms: no arm {unknown[0]!r}; there are {', '.join(sorted(of_arms))}")
        of_names = {name: {key} for key, node in self.nodes.items() for name in (key, node.folder)}
        if unknown := [name for name in only if name not in of_names]:
            raise UserError(f"--only {unknown[0]}: the study has no such run; `mirage-ds ablate plan` lists them")
        keys = set(self.nodes) if arms is None else set().union(*(of_arms[name] for name in arms))
        keys = set().union(*(of_names[name] for name in only)) if only else keys
        return [key for key in self.nodes if key in keys]


@lru_cache(maxsize=4096)
def _hash_of(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        ends = file.read(END_BYTES)
        file.seek(size - END_BYTES)
        return hashlib.sha256(str(size).encode() + ends + file.read()).hexdigest()


def _file_hash(path: Path) -> str:
    with readable(path, "make it readable"):
        state = path.stat()
        return _hash_of(path, state.st_size, state.st_mtime_ns)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def records_hash(source: Records) -> str:
    """Hash the records of a file, a folder, a glob pattern or a mixture; their images are left to the run's own index.

    Raises:
        UserError: there is nothing.
    """
    if isinstance(source, Mixture):
        weights = source.weights or [0.0] * len(source.parts)
        whole = sum(weights) or 1
        parts = [
            f"{records_hash(part.file)} {weight / whole:.9g}\n"
            for part, weight in zip(source.parts, weights, strict=True)
        ]
        return _hash("".join(parts))
    files = find_files(source)
    if files == (source,):
        return _file_hash(source)
    return _hash("".join(f"{file.name} {_file_hash(file)}\n" for file in files))


def model_hash(model: str) -> str:
    """Hash a model folder's files, but for its README; a hub id stands for itself.

    Raises:
        UserError: a folder without a model.
    """
    place = Path(model)
    if not place.is_dir():
        if place.is_absolute():
            raise UserError(f"model {model}: no such folder; `mirage-ds init` makes a small one")
        return model
    files = [path for path in sorted(place.iterdir()) if path.is_file() and path.suffix != ".md"]
    if not any(path.name == "config.json" for path in files):
        raise UserError(f"model {model}: no config.json in it; name a model folder or a hub id")
    return _hash("".join(f"{path.name} {_file_hash(path)}\n" for path in files))


def settings_of(spec: StudySpec, stage: str, arm: Arm, varied: Settings, seed: Settings) -> Settings:
    """Merge the settings of one stage of a chain: seed < common < stage < arm < seed's own < what the arm varies.

    A name with a stage before it counts for that stage alone, and more than one without.
    """
    merged: Settings = {"seed": seed["seed"]}
    own = {key: value for key, value in seed.items() if key != "seed"}
    for layer in (spec.common, spec.stages[stage], arm.settings, own, varied):
        for whose in ("", stage):
            parts = {name.rpartition("."): value for name, value in layer.items()}
            merged |= {name: value for (place, _, name), value in parts.items() if place == whose}
    return merged


def make_config(settings: Settings, where: str, here: Path) -> RunConfig:
    """Make the configuration of a stage; what has no meaning in it is set to its default, so that it makes no new run.

    Args:
        where: how the stage is called in messages; here: folder of the study's file.

    Raises:
        UserError: settings that a run would refuse.
    """
    values = dict(settings)
    for name, given in settings.items():
        if name in _TABLE["paths"].split() and given is not None:
            values[name] = [here / str(one) for one in given] if isinstance(given, list) else here / str(given)
    if values.get("model") is not None and (here / str(values["model"])).exists():
        values["model"] = str(here / str(values["model"]))
    stage, slots = str(values.get("stage")), values.get("slots")
    idle = _TABLE["idle"].get(stage, "").split() + (list(RL_ONLY) if stage != "rl" else [])
    own = stage == "stage1" and values.get("feed") == "own"
    idle += ["feed"] if stage != "stage1" else [] if own else ["detach_latents"]
    idle += [] if own or stage in ("stage2", "rl") else ["latent_passes"]
    idle += ["detach_latents"] if values.get("latent_passes") == 0 else []
    if stage == "sft" and slots != "pause":
        idle.append("latent_size")
    idle += ["bottleneck"] if stage not in ("stage1", "stage2") or slots == "auxiliary" else []
    if (stage, values.get("compress_strategy")) == ("stage1", "region"):
        idle += ["latent_size", "helper_min_pixels", "helper_max_pixels"]
    if slots == "latents":
        # What it is without being said.
        idle.append("slots")
    for name in idle:
        values.pop(name, None)
    try:
        return RunConfig(save_model_path=Path("model"), **values)
    except ValidationError as error:
        raise UserError(f"{where}: {first_fault(error, 'settings')}") from None


def _train_node(
    config: RunConfig, name: str, parent: Node | None, targets: Node | None, here: Path, on_cpu: bool = False
) -> Node:
    whole = json.loads(config.model_dump_json())
    material = {
        "kind": "train",
        "settings": {
            key: value
            for key, value in sorted(whole.items())
            # What came later than studies did: where it is not asked for, a run is the one that it was.
            if key not in MACHINE and (value or not key.startswith(("lora_", "columns")))
            if config.stage == "rl" or key not in RL_ONLY
            if (key, value) not in (("feed", "targets"), ("latent_passes", None), ("bottleneck", False))
        },
        "rows_per_step": config.rows_per_step,
        "data": records_hash(config.records),
        # From the study's folder, so that a study that is moved whole keeps its keys.
        "image_root": config.image_root and os.path.relpath(config.image_root, here),
        "evaluated": records_hash(config.eval_data_path) if config.eval_data_path else None,
        "model": model_hash(str(config.model)) if parent is None else None,
        "deepspeed": read_json(config.deepspeed) if config.deepspeed else None,
        "parent": parent and parent.key,
        **({"targets": targets.key} if targets else {}),
        **({"rewards": _own_rewards(config, name)} if config.stage == "rl" else {}),
        # On a CPU a recipe computes in float32. The study's file alone counts: whoever plans, looks at or reports runs
        # of GPUs may have none.
        **({"device": "cpu"} if on_cpu else {}),
    }
    return Node("train", name, parent, config, None, material, targets)


def _own_rewards(config: RunConfig, where: str) -> dict[str, Any]:
    """Hash the files of rewards and of a scorer of one's own; see _scorer."""
    names = [*(one.partition("*")[0] for one in config.reward), config.task]
    return {str(one): own for one in names if (own := _scorer(one, f"stage {where}"))}


def _scorer(task: str | None, where: str) -> dict[str, str]:
    """Hash the file of a scorer of one's own, so that what it judges is judged anew when it changes; {} of others.

    Raises:
        UserError: it is not found, or the package that it lies in fails.
    """
    if task is None or ":" not in task:
        return {}
    with own_modules_found():
        try:
            found = find_spec(task.partition(":")[0])
        except Exception as error:
            raise UserError(f"{where}: task {task} cannot be imported ({reason(error)}); fix it") from error
    if found is None or found.origin is None:
        raise UserError(f"{where}: task {task}: no such module here; put it beside the study's file")
    return {"scorer": _file_hash(Path(found.origin))}


def is_text(model: Node) -> bool:
    """Tell whether the answers of a training node's model have no slots: sft, and rl of text alone."""
    config = model.config
    if config.stage == "rl" and config.latent_policy is None and model.parent is not None:
        # A run goes by what its model was trained with.
        return is_text(model.parent)
    return config.latent_policy == "text" or (config.stage == "sft" and config.slots is None)


def _evaluations(spec: StudySpec, arm: str, last: Node, here: Path) -> Iterator[tuple[str, Node]]:
    """Yield the evaluations of an arm's last model, and its controls where answers see latents, under Cell.keys."""
    config = last.config
    for name, evaluation in spec.evaluations.items():
        # All variants of an entry may be named at once.
        if evaluation.arms is not None and not {arm, arm.partition("[")[0]} & set(evaluation.arms):
            continue
        left_out = {"arms", "batch_size", "controls", "controls_most"} | (set() if evaluation.columns else {"columns"})
        settings = json.loads(evaluation.model_dump_json(exclude=left_out))
        material = {
            **{**settings, "data_path": records_hash(evaluation.data_path), "parent": last.key, "kind": "evaluate"},
            "image_root": evaluation.image_root and os.path.relpath(evaluation.image_root, here),
            **_scorer(evaluation.task, f"evaluation {name}"),
        }
        yield f"{SCORES} {name}", Node("evaluate", name, last, config, evaluation, material)
        latents = (config.slots or "latents") == "latents" and config.compress_strategy != "region"
        if evaluation.controls and not is_text(last) and latents:
            material = {
                **{**material, "kind": "controls", "conditions": parse_names(evaluation.controls)},
                "helper_pixels": [config.helper_min_pixels, config.helper_max_pixels],
                "most": evaluation.controls_most or evaluation.most,
            }
            # What the oracle feeds.
            targets = _targets_of(last) if "oracle" in material["conditions"] else None
            material |= {"targets": targets.key} if targets else {}
            yield f"{CONTROLS} {name}", Node("controls", name, last, config, evaluation, material, targets)


def _targets_of(model: Node) -> Node | None:
    """Return the scaffold node whose targets a model, or the one that it was trained from, has learnt."""
    return model.targets or (_targets_of(model.parent) if model.parent else None)


def _chain(spec: StudySpec, name: str, arm: Arm, varied: Settings, seed: Settings, here: Path) -> list[Node]:
    """Make the training stages of an arm under a seed."""
    chain: list[Node] = []
    # The last that trains a model, and learned targets that wait for a stage1.
    model: Node | None = None
    targets: Node | None = None
    on_cpu = spec.launch.environment.get("DS_ACCELERATOR") == "cpu"
    for stage in arm.chain:
        where, parent = f"arm {name}, stage {stage}", model
        settings = settings_of(spec, stage, arm, varied, seed)
        if settings.get("stage") in ("stage2", "rl") and parent is not None and parent.config.stage != "sft":
            # Targets are those of the stage before, unless this one says otherwise.
            settings = {field: getattr(parent.config, field) for field in _TABLE["targets"].split()} | settings
        if targets is not None and settings.get("stage") == "stage1":
            settings["latent_targets"] = "targets"
        config = make_config(settings, where, here)
        node = _train_node(config, stage, parent, targets, here, on_cpu)
        # scaffold trains no model: what follows starts from what it started from.
        model, targets = (parent, node) if config.stage == "scaffold" else (node, None)
        chain.append(node)
    return chain


def spell_out(spec: StudySpec, here: Path) -> Study:
    """Make all runs of a study.

    Args:
        here: folder of the study's file: relative paths start there.

    Raises:
        UserError: settings that a run would refuse, records or models that are not there.
    """
    nodes: dict[str, Node] = {}
    cells: dict[tuple[str, tuple[str, ...]], CellPlan] = {}
    arms = arm_names(spec)
    for number, seed in enumerate(spec.seeds):
        for name, (arm, varied) in arms.items():
            if arm.seeds is None or number < arm.seeds:
                chain = _chain(spec, name, arm, varied, seed, here)
                results = dict(_evaluations(spec, name, chain[-1], here))
                for node in (*chain, *results.values()):
                    nodes.setdefault(node.key, node)
                keys = {title: node.key for title, node in results.items()}
                settings = {**arm.settings, **varied}
                cell = CellPlan(name, int(seed["seed"]), settings, tuple(node.key for node in chain), keys)
                # An arm whose stages fix their own seeds is one run, and must not count as several.
                cells.setdefault((name, cell.nodes), cell)
    order = list(arms)
    return Study(spec, nodes, tuple(sorted(cells.values(), key=lambda cell: order.index(cell.arm))))
