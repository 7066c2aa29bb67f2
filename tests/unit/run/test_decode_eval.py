"""What evaluation by decoding is made of: which rows, which prompts, how much memory, the best model, the card.

N rows of a batch, V vocabulary rows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_plan_activations import Live, model_of, sample, shape

from mirage_ds.config.flags import build_model
from mirage_ds.config.run import RunConfig
from mirage_ds.data.batch import collate
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.record_files import scan
from mirage_ds.data.sample import Sample
from mirage_ds.engine import setup
from mirage_ds.engine.card import model_card, write_card
from mirage_ds.engine.whole import bytes_to_decode
from mirage_ds.evaluate.decoder import decode_samples
from mirage_ds.evaluate.prompts import prompt_of, prompts_of
from mirage_ds.evaluate.scoring import spread
from mirage_ds.model.choose import Turn
from mirage_ds.model.generate import Prompts, generate, neighbours
from mirage_ds.model.load import load_model
from mirage_ds.model.slots import LatentTokens, Limits, latent_tokens
from mirage_ds.run import saving
from mirage_ds.run.folder import claim
from mirage_ds.run.saving import Best

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------- the rows


def test_rows_are_spread_evenly_and_each_comes_once() -> None:
    rows = [3, 5, 8, 9, 12, 20, 21]
    assert spread(rows, 7) == spread(rows, 100) == rows
    assert spread(rows, 1) == [3]
    assert spread(rows, 3) == [3, 8, 12]
    # Of a file whose levels stand one after another, as many of each.
    assert [row // 100 for row in spread(range(400), 8)] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("stage", ["sft", "stage1", "stage2"])
def test_a_training_row_cut_down_is_the_encoded_prompt(stage: Any, nano: Path, mixed: Path) -> None:
    encoder = load_encoder([str(nano)], ImageFinder.beside(mixed, None), stage, 3)
    records = [record for record in scan(mixed)[0] if stage != "stage1" or record.image_output]
    for row, record in enumerate(records):
        made, wanted = prompt_of(encoder.encode(record, row)), encoder.encode_prompt(record, row)
        for name in Sample._fields:
            one, other = getattr(made, name), getattr(wanted, name)
            assert torch.equal(one, other) if isinstance(other, torch.Tensor) else one == other, name
            assert not isinstance(other, torch.Tensor) or one.dtype == other.dtype


def test_runs_that_come_and_go_in_a_batch_change_no_row(nano: Path, mixed: Path) -> None:
    """Rows with random plans of starts, ends, words and stops: all together = each alone, token for token."""
    # In float64: rounding must not decide between two tokens.
    loaded = load_model(nano, stage="sft", dtype=torch.float64, device=CPU, checkpointing=False)
    encoder = load_encoder([str(nano)], ImageFinder.beside(mixed, None), "sft", 1)
    tokens = latent_tokens(encoder)
    samples = [encoder.encode_prompt(record, row) for row, record in enumerate(scan(mixed)[0][:6])]
    draw = random.Random(3)
    words = [*[tokens.start] * 3, *[tokens.end] * 2, tokens.pad, 17]
    plans = [{step: draw.choice(words) for step in range(20) if draw.random() < 0.5} for _ in samples]
    for plan in plans[::2]:
        plan[draw.randrange(8, 18)] = tokens.stops[0]

    def decoded(rows: list[int], limits: Limits) -> list[list[int]]:
        def choose(logits: torch.Tensor, turns: Sequence[Turn]) -> torch.Tensor:
            likeliest = logits.argmax(-1).tolist()
            return torch.tensor(
                [plans[rows[turn.row]].get(turn.step, one) for turn, one in zip(turns, likeliest, strict=True)]
            )

        prompts = prompts_of(loaded.model, loaded.tower, encoder, [samples[row] for row in rows])
        return [one.ids for one in generate(loaded.model, prompts, tokens, limits, choose)]

    for limits in (Limits(20, 3), Limits(20, 9, 2)):
        together = decoded(list(range(6)), limits)
        assert [decoded([row], limits)[0] for row in range(6)] == together
        # There are rows with several runs, rows that end early, and rows that go on to the limit.
        assert max(ids.count(tokens.start) for ids in together) > 1
        assert {len(ids) == 20 for ids in together} == {True, False}
        assert len({ids.index(tokens.start) for ids in together if tokens.start in ids}) > 1


def test_a_stop_is_looked_for_before_each_token(nano: Path, mixed: Path) -> None:
    from mirage_ds.errors import Stopped

    loaded = load_model(nano, stage="sft", dtype=torch.float32, device=CPU, checkpointing=False)
    encoder = load_encoder([str(nano)], ImageFinder.beside(mixed, None), "sft", 1)
    samples = [encoder.encode_prompt(scan(mixed)[0][1], 0)]
    looks = []

    def asked() -> bool:
        looks.append(1)
        return len(looks) == 3

    with pytest.raises(Stopped):
        decode_samples(loaded.model, loaded.tower, encoder, samples, Limits(9), asked=asked)
    assert len(looks) == 3


# -------------------------------------------------------------------------------------------------------- the memory


def test_memory_of_a_batch_by_hand(nano: Path) -> None:
    loaded = load_model(nano, stage="sft", dtype=torch.bfloat16, device=CPU, checkpointing=False)
    rows = len(loaded.model.head.weight)
    # Nothing is sharded: a block of 64 tokens, 4 layers, 2 key heads of 32, in bf16, keys and values; logits in bf16
    # and float32.
    limits = Limits(new_tokens=50)
    assert bytes_to_decode(loaded.model, 3, 0, limits) == 2 * 3 * 64 * 2 * 32 * 4 * 2 + 3 * rows * (2 + 4)
    part = loaded.model.language_model.norm.weight
    part.ds_id, part.ds_numel, part.ds_tensor = 1, 1000, torch.empty(400, device="meta")
    part.ds_tensor.ds_numel = 400
    # Sharded, and this rank's part elsewhere.
    assert bytes_to_decode(loaded.model, 0, 0, limits) == 1000 * 2 + 400 * 2


@pytest.mark.parametrize("name", ["nano", "mid", "nano-qwen2-vl", "nano-qwen3-vl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "budget", "new"), [(3, 8192, 8), (3, 60, 8), (6, 180, 200)])
def test_memory_of_a_batch_is_what_is_alive(name: str, dtype: torch.dtype, rows: int, budget: int, new: int) -> None:
    """The height of a whole batch, of prompts of 60 tokens, against all storages that are alive."""
    model = model_of(name, "sft", dtype, False).eval()
    values = shape(name)
    width = values["text_config"]["hidden_size"] * (
        1 + len(values["vision_config"].get("deepstack_visual_indexes", ()))
    )
    samples = [sample(row, 60, (), width, dtype, 0, False) for row in range(rows)]
    # Packed beforehand: what the rows themselves take is not what is counted.
    packed = {(first, end): collate(samples[first:end], 1, None) for first, end in neighbours([60] * rows, budget)}
    prompts = Prompts([60] * rows, range(rows), lambda first, end: packed[first, end])
    limits = Limits(new, prefill_tokens=budget)
    with Live() as live:
        # What is not needed after all has been allocated too.
        generate(
            model, prompts, LatentTokens(1, -1, 3, (7,)), limits,
            lambda logits, turns: torch.tensor([6 + turn.step for turn in turns]),
        )  # fmt: skip
    # What is left out are lengths, positions and the last hidden states.
    assert live.peak == pytest.approx(bytes_to_decode(model, rows, 60, limits), rel=0.005)


# ---------------------------------------------------------------------------------------------------------- the best


class Run:
    """A run whose model is a file with its step in it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path):
        for module in (saving, setup):
            monkeypatch.setattr(module, "from_rank_zero", lambda make, world: make())
        self.folder = folder
        self.fails: Exception | None = None

    def save(self, folder: Path, step: int, scores: Mapping[str, float]) -> None:
        (folder / "model.safetensors").write_text(str(step))
        if self.fails:
            raise self.fails

    def best(self, metric: str, start: int) -> Best:
        return Best(metric, self.folder, self.save, None, start)  # type: ignore[arg-type]

    @property
    def kept(self) -> int:
        assert sorted(path.name for path in self.folder.iterdir()) == ["best"]
        note = json.loads((self.folder / "best/best.json").read_text())
        assert (self.folder / "best/model.safetensors").read_text() == str(note["step"])
        return note["step"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    return Run(monkeypatch, tmp_path)


def test_the_best_stays_until_a_better_one_comes(run: Run) -> None:
    keeper = run.best("success", 0)
    kept = []
    for step, value in ((1, 0.2), (2, 0.5), (3, 0.5), (4, 0.1), (5, float("nan")), (6, 0.6)):
        said = keeper.consider(step, {"success": value, "loss": float(step)})
        kept.append((run.kept, said is not None))
    assert kept == [(1, True), (2, True), (2, False), (2, False), (2, False), (6, True)]
    # Of a loss less is better.
    keeper = run.best("loss", 0)
    for step, value in ((1, 3.0), (2, 2.0), (3, 2.5)):
        keeper.consider(step, {"loss": value})
    assert run.kept == 2


def test_a_run_that_goes_on_knows_its_best_and_a_new_one_has_none(run: Run) -> None:
    run.best("success", 0).consider(1, {"success": 0.5})
    again = run.best("success", 1)
    assert again.consider(2, {"success": 0.4}) is None
    assert again.consider(3, {"success": 0.6}) is not None
    assert run.best("loss", 3).value is None
    assert run.best("success", 0).value is None
    assert list(run.folder.iterdir()) == []


def test_what_somebody_put_beside_the_best_model_stays(run: Run) -> None:
    keeper = run.best("success", 0)
    for step, score in ((1, 0.5), (2, 0.6)):
        keeper.consider(step, {"success": score})
        (run.folder / "best/backup.safetensors").write_text("mine")
    assert keeper.consider(3, {"success": 0.7}) is not None
    assert run.kept == 3
    assert (run.folder / "best/backup.safetensors").read_text() == "mine"
    run.best("success", 0)
    assert [path.name for path in (run.folder / "best").iterdir()] == ["backup.safetensors"]


def test_what_cannot_be_written_leaves_the_earlier_best(run: Run) -> None:
    keeper = run.best("success", 0)
    keeper.consider(1, {"success": 0.5})
    run.fails = OSError(28, "No space left on device")
    said = keeper.consider(2, {"success": 0.6})
    assert said == "error: step 2 has the best success so far, and cannot be kept (a file: No space left on device)"
    assert run.kept == 1
    run.fails = None
    # The next one that is better than what is kept is kept.
    assert keeper.consider(3, {"success": 0.55}) is not None
    assert run.kept == 3


# ---------------------------------------------------------------------------------------------------------- the card

BASE = ("Qwen", "Qwen2.5-VL-7B-Instruct")
STATE: dict[str, Any] = dict(
    stage="stage2", latent_size=6, step=120, rows_per_step=8, rows=1000, data="ab" * 32, train_vision=False,
    optimizer=[1e-5, "cosine", 10, 0.9, 0.95, 1e-8, 0.01], ce_weight=1.0, reduction="sample", seed=42,
    dtype="bfloat16", zero_stage=3, world_size=16,
    sources=["/runs/stage1", f"/hub/models--{'--'.join(BASE)}/snapshots/cc59/"],
)  # fmt: skip


def test_the_card_says_what_was_trained_and_what_decodes_it() -> None:
    card = model_card(STATE, {"success": 0.51234, "loss": 0.25})
    assert "\nbase_model: Qwen/Qwen2.5-VL-7B-Instruct\n" in card
    for row in (
        "| base model | Qwen/Qwen2.5-VL-7B-Instruct |",
        "| started from | `/runs/stage1` |",
        "| stage | stage2 |",
        "| k, latents a block | 6 |",
        f"| records | 1000, SHA-256 `{'ab' * 32}` |",
        "| success | 0.5123 |",
        "| loss | 0.25 |",
        "| AdamW | learning rate 1e-05, schedule cosine, warm-up steps 10, β1 0.9, β2 0.95, ε 1e-08, weight decay 0.01 "
        "|",
    ):
        assert f"\n{row}\n" in card
    assert "vLLM, and transformers without `trust_remote_code`" in card
    # Each way, in lines that can be copied.
    for way in ("mirage-ds evaluate FOLDER", "mirage-ds serve FOLDER", "openai.OpenAI(", "lmms-eval --model mirage"):
        assert way in card
    for code in card.split("```python\n")[1:]:
        compile(code.split("```")[0], "card", "exec")
    # YAML that the hub reads.
    import yaml

    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "Qwen/Qwen2.5-VL-7B-Instruct"


def test_the_card_says_in_what_an_arm_differs_from_the_paper() -> None:
    assert "| arm |" not in model_card(STATE | dict(latents=[None, "average", "cosine", False, False]))
    card = model_card(STATE | dict(latents=["auxiliary", "grid", "l2", True, True]))
    said = "slots auxiliary, compression grid, latent loss l2, latents detached, targets train the tower"
    assert f"| arm | {said} |" in card


def test_the_card_of_a_text_model_and_of_a_local_base() -> None:
    card = model_card(STATE | dict(stage="sft", sources=["/models/base"]))
    assert "base_model" not in card
    assert "| base model | `/models/base` |" in card
    assert "k, latents" not in card
    assert "custom_generate" not in card
    assert "No scores are known" in card


def test_a_card_is_replaced_and_a_readme_of_somebody_s_own_is_not(tmp_path: Path) -> None:
    write_card(tmp_path, model_card(STATE))
    write_card(tmp_path, model_card(STATE | dict(seed=7)))
    assert "| seed | 7 |" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    write_card(tmp_path, model_card(STATE))
    assert (tmp_path / "README.md").read_text() == "mine"


# ---------------------------------------------------------------------------------------------------------- the flags


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (dict(eval_decode=5), "--eval_decode 5 needs records to evaluate: add --eval_data_path and --eval_every"),
        (dict(eval_pictures=2), "--eval_pictures 2 needs records to evaluate: add --eval_data_path and --eval_every"),
        (
            dict(eval_pictures=2, eval_data_path="e", eval_every=1, report_to="none"),
            "--eval_pictures 2 go to TensorBoard: add --report_to tensorboard",
        ),
        (
            dict(eval_pictures=2, eval_data_path="e", eval_every=1, stage="sft"),
            "--eval_pictures 2: --stage sft has no latents to draw; leave it out",
        ),
        (dict(save_best="loss"), "--save_best loss needs records to evaluate: add --eval_data_path and --eval_every"),
        (
            dict(save_best="success", eval_data_path="e", eval_every=1),
            "--save_best success: of losses there are loss, ce, token_ce, sim; a metric of the scorer needs "
            "--eval_decode",
        ),
    ],
)
def test_flags_that_need_others(given: dict[str, Any], sentence: str) -> None:
    from mirage_ds.errors import UserError

    flags = dict(model="m", save_model_path="s", stage="sft", data_path="d") | given
    with pytest.raises(UserError) as error:
        build_model(RunConfig, flags)
    assert str(error.value) == sentence


def test_a_run_that_starts_over_has_no_best(tmp_path: Path) -> None:
    for name in ("run/checkpoints/global_step1", "best"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("run/config.yaml", "best/best.json", "best/config.json"):
        (tmp_path / name).touch()
    claim(tmp_path, overwrite=False, resume=True)
    assert (tmp_path / "best").is_dir()
    claim(tmp_path, overwrite=True)
    assert not (tmp_path / "best").exists()
