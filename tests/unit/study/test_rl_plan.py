"""examples/rl/rl.yaml is the study that docs/study_rl.md plans: the numbers of the page are those of the runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mirage_ds.config.run import RunConfig
from mirage_ds.rl.rewards import read_rewards
from mirage_ds.study.nodes import Study
from mirage_ds.study.store import open_study

REPO = Path(__file__).parents[3]
HERE, PAGE = REPO / "examples/rl", " ".join((REPO / "docs/study_rl.md").read_text().split())
# Policies that begin at `base`.
POLICIES = ("through", "replay", "gaussian", "vlpo")
# As the page's table has them; the last step of `random` is rl by a coin.
CHAINS = {
    "base": ("sft", "stage1", "stage2"),
    **dict.fromkeys(POLICIES, ("sft", "stage1", "stage2", "rl")),
    "random": ("sft", "stage1", "stage2", "coin"),
    "more": ("sft", "stage1", "stage2", "more"),
    "words": ("sft", "text1", "text2"),
    "text": ("sft", "text1", "text2", "rl"),
}


def said(pattern: str) -> tuple[float, ...]:
    """Return the numbers of the one sentence of the page that is like this."""
    (found,) = re.findall(pattern.replace(" ", r"\s+").replace("#", r"(\d[\d,]*\.?\d*(?:e-?\d+)?)"), PAGE)
    return tuple(float(one.replace(",", "")) for one in ([found] if isinstance(found, str) else found))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The study as its own reader has it."""
    place = tmp_path_factory.mktemp("rl_study")
    for file in ("rl.yaml", "rewards.py"):
        shutil.copy(HERE / file, place)
    for name in ("train", "prompts", "test"):
        (place / name).mkdir()
        (place / name / "data.jsonl").write_text("{}\n")
    return open_study(place / "rl.yaml")[0]


@pytest.fixture(scope="module")
def runs(study: Study) -> dict[str, dict[str, RunConfig]]:
    """Arm → stage of its chain → settings, of the first seed; the others have the same but for seed and model."""
    made: dict[int, dict[str, dict[str, RunConfig]]] = {}
    for cell in study.cells:
        nodes = [study.nodes[key] for key in cell.stages]
        made.setdefault(cell.seed, {})[cell.arm] = {node.name: node.config for node in nodes}
    first, *others = [made[seed] for seed in sorted(made)]

    def plain(config: RunConfig) -> dict[str, Any]:
        return config.model_dump(exclude={"seed", "model", "load_model_path", "save_model_path"})

    for other in others:
        assert {arm: {name: plain(one) for name, one in chain.items()} for arm, chain in other.items()} == {
            arm: {name: plain(one) for name, one in chain.items()} for arm, chain in first.items()
        }
    return first


def test_the_arms_are_the_pages(study: Study, runs: dict[str, dict[str, RunConfig]]) -> None:
    assert {arm: tuple(chain) for arm, chain in runs.items()} == CHAINS
    table = re.search(r"\| arm \| chain \|.*?\n\n", (REPO / "docs/study_rl.md").read_text(), re.DOTALL)
    assert table
    named = [row.split("|")[1].strip() for row in table[0].splitlines()[2:] if row]
    assert {one for row in named for one in row.split(", ")} == set(CHAINS)
    for arm, policy in {**{one: one for one in POLICIES}, "random": "through", "text": "text"}.items():
        assert [*runs[arm].values()][-1].latent_policy == policy
    # Six models, each its own; of one base all arms share what they begin with.
    bases = {cell.seed: study.nodes[cell.stages[0]].config.model for cell in study.cells}
    assert len(bases) == len(set(bases.values())) == 6
    assert "The unit of inference is the base: six models" in PAGE
    assert len({cell.stages[2] for cell in study.cells if cell.arm in ("base", *POLICIES, "random", "more")}) == 6


def test_the_bases_are_trained_as_the_page_says(runs: dict[str, dict[str, RunConfig]]) -> None:
    sft, stage1, stage2, rows, _ = said("sft, stage1, stage2: #, # and # steps of # rows, # maps of levels 3 and 4")
    for name, steps in (("sft", sft), ("stage1", stage1), ("stage2", stage2)):
        one = runs["base"][name]
        assert (one.stage, one.max_steps, one.rows_per_step, one.data_path.parent.name) == (name, steps, rows, "train")
    again = said("sft, then # and # steps of sft in the place of stage1 and stage2")
    assert again == (stage1, stage2)
    for name, steps, like in zip(("text1", "text2"), again, ("stage1", "stage2"), strict=True):
        one, other = runs["words"][name], runs["base"][like]
        assert (one.stage, one.max_steps) == ("sft", steps)
        assert one.model_dump(exclude={"stage"}) == other.model_dump(exclude={"stage"})


def test_reinforcement_is_as_the_page_says(runs: dict[str, dict[str, RunConfig]]) -> None:
    prompts, answers, updates = said("# prompts with # answers each in each of # updates, one update a rollout")
    accuracy, form = said(r"reward # accuracy \+ # format")
    temperature, low, high = said(r"temperature #, Adam \(#, #\)")
    norm, rate, warmup = said("clip norm #, learning rate # after # steps of warm-up, no KL, all else by default")
    for arm in (*POLICIES, "random", "text"):
        one = [*runs[arm].values()][-1]
        assert (one.stage, one.data_path.parent.name) == ("rl", "prompts")
        assert (one.prompts_per_rollout, one.num_generations, one.max_steps) == (prompts, answers, updates)
        assert (one.updates, one.num_iterations, one.beta) == (1, 1, 0)
        assert (one.temperature, one.adam_beta1, one.adam_beta2) == (temperature, low, high)
        assert (one.max_grad_norm, one.learning_rate, one.warmup_steps) == (norm, rate, warmup)
        wanted = {"rewards:coin": 1} if arm == "random" else {"accuracy": accuracy, "format": form}
        assert read_rewards(one.reward, one.reward_weights) == wanted
        # Each prompt once.
        assert prompts * updates == said("Prompts are # maps of levels 4 to 6, each asked once")[0]
    steps, rows, passes, rate = said(
        r"so # steps of # rows \(# passes, learning rate #, linear: half of the recipe's\)"
    )
    more = runs["more"]["more"]
    assert (more.stage, more.data_path, more.lr_scheduler) == ("stage2", one.data_path, "linear")
    assert (more.max_steps, more.rows_per_step, more.learning_rate, more.epochs) == (steps, rows, rate, passes)
    assert passes * prompts * updates == steps * rows
    assert rate == runs["base"]["stage2"].learning_rate / 2


def test_the_data_the_gate_and_the_test_are_the_pages(study: Study) -> None:
    script, gate = (HERE / "make_data.sh").read_text(), (HERE / "gate.py").read_text()
    default = {name: int(count) for name, count in re.findall(r"(\w+)=\$\{\d:-(\d+)\}", script)}
    (maps,) = said("eight answers at temperature 1 to each of # maps")
    test, each = said("greedy, on # fresh maps, # of each of levels 4, 5 and 6")
    assert default == {
        "bases": 6, "train": said("of # rows, # maps of levels 3 and 4")[1], "gate": maps, "test": test,
        "prompts": said("Prompts are # maps of levels 4 to 6")[0],
    }  # fmt: skip
    assert test == 3 * each
    assert "build train --levels 3,4 " in script
    assert "--levels 4,5,6 --proportions 1,1,1 " in script
    assert '"--samples", 8, ' in gate
    assert "pass@8 at least ten points above pass@1" in PAGE
    assert "MARGIN = 0.1\n" in gate
    evaluated = [node.evaluation for node in study.nodes.values() if node.kind == "evaluate"]
    assert evaluated
    assert {one.data_path.parent.name for one in evaluated} == {"test"}


def test_the_contrasts_are_the_hypotheses(study: Study) -> None:
    report = study.spec.report
    assert (report.primary.arm, report.primary.base) == ("through", "base")
    assert "arm `through` minus arm `base`, mean over bases" in PAGE
    pairs = {(one.arm, one.base) for one in report.contrasts if not one.levels}
    wanted = {(arm, "base") for arm in (*POLICIES[1:], "random", "more")}
    assert pairs == wanted | {("text", "words"), ("through", "random"), ("through", "more"), ("through", "replay"),
                              ("gaussian", "replay")}  # fmt: skip
    hypotheses = (
        "each other policy gains over `base`, `text` over `words`; `random` does not gain; `through` gains more than "
        "`random`; `through` and `more` differ; `through` and `replay` differ; `gaussian` and `replay` differ."
    )
    assert hypotheses in PAGE
    levels = [one for one in report.contrasts if one.levels]
    assert [(one.arm, one.base, one.levels) for one in levels] == [
        ("through", "base", ("4", "5")), ("through", "base", ("6",))
    ]  # fmt: skip
    assert "`through` − `base` is given for levels 4 and 5 and for level 6 too" in PAGE
    (kept,) = said("On the first # test maps, before")
    controls = study.spec.evaluations["test"]
    assert (controls.controls_most, controls.controls) == (kept, "own,swap,zero,off")
    assert "own, another map's, zero, and no block" in PAGE
