"""`from mirage_ds import load`: the same numbers as the commands', from Python."""

from __future__ import annotations

import base64
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import mirage_ds
from mirage_ds.api import Mirage, Rows
from mirage_ds.cli import cli
from mirage_ds.data.asked import as_records, several
from mirage_ds.data.batch import Batch
from mirage_ds.data.frames import from_pixels
from mirage_ds.data.sample import IGNORE
from mirage_ds.errors import UserError
from mirage_ds.model.choose import Turn
from mirage_ds.model.load import load_model


@pytest.fixture(scope="module")
def opened(nano: Path) -> Mirage:
    return mirage_ds.load(nano, latent_size=2, device="cpu")


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_importing_the_package_wakes_neither_torch_nor_transformers() -> None:
    code = "import mirage_ds, sys; print(mirage_ds.__version__, {'torch', 'transformers'} & sys.modules.keys())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip().endswith("set()")
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        mirage_ds.lod  # noqa: B018


def test_a_question_is_answered_as_the_command_does(opened: Mirage, mixed: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(mixed.parent)
    arguments = ["--image", "in0.png", "--prompt", "Where <image>?", "--max_new_tokens", "9", "--run_length", "2"]
    cli.main(["generate", str(opened.folder), *arguments], standalone_mode=False)
    wanted = capsys.readouterr().out.strip()
    found = opened.generate("Where <image>?", ["in0.png"], max_new_tokens=9, run_length=2)
    assert found.marked == wanted
    assert found.hidden.shape == (9, 128)
    # A picture in memory is the picture on disk.
    with Image.open("in0.png") as image:
        again = opened.generate("Where <image>?", [image], max_new_tokens=9, run_length=2)
    assert again.ids == found.ids
    torch.testing.assert_close(again.hidden, found.hidden, rtol=0, atol=0)
    for pictures in ([["in0.png"], []], ["in0.png", ()], [Path("in0.png"), None]):
        both = opened.generate_all(["Where <image>?", "Up?"], pictures, max_new_tokens=9, run_length=2)
        assert both[0].ids == found.ids


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    "given",
    [
        str,
        lambda file: file,
        lambda file: file.read_bytes(),
        lambda file: base64.b64encode(file.read_bytes()).decode(),
        lambda file: {"bytes": file.read_bytes(), "path": None},
        lambda file: {"bytes": None, "path": str(file)},
        Image.open,
        pixels,
        lambda file: pixels(file) / 255,
        lambda file: torch.tensor(pixels(file)).permute(2, 0, 1),
        lambda file: torch.tensor(pixels(file)).permute(2, 0, 1).double() / 255,
    ],
)
def test_a_picture_is_the_same_in_whatever_form_it_comes(mixed: Path, given: Callable[[Path], Any]) -> None:
    picture = given(mixed.parent / "in1.png")
    finder, (record,) = as_records(["?"], [several(picture)])
    assert len(record.image_input) == 1
    found = finder.load(record, "image_input", record.image_input[0])
    assert np.array_equal(np.asarray(found), pixels(mixed.parent / "in1.png"))
    assert finder.size(record, "image_input", record.image_input[0]) == (84, 84)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.zeros((8, 8)) + 7.0, r"float64 values beyond 0 … 1; give uint8, or floats from 0 to 1"),
        (np.full((8, 8), np.nan), "beyond 0 … 1"),
        (np.full((8, 8, 3), 300), "int64 values beyond 0 … 255"),
        (torch.zeros(2, 3, 8, 8), r"an array of shape \(2, 3, 8, 8\); give \(height, width\)"),
        (np.zeros((8, 8, 5)), r"an array of shape \(8, 8, 5\)"),
        (np.zeros((0, 8)), r"an array of shape \(0, 8\)"),
        (Image.new("F", (8, 8)), "32 bits a channel"),
        (7, "7 is no picture; give a path, bytes, a PIL image or an array"),
        ("data:image/png,abc", "a data: URI without base64"),
    ],
)
def test_what_is_no_picture_is_one_sentence(opened: Mirage, value: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"image 2 of question 1: .*{said}"):
        opened.generate("?", [Image.new("RGB", (56, 56)), value])


def test_grey_and_masks_are_pictures() -> None:
    for value in (
        np.eye(4),
        np.eye(4, dtype=bool),
        np.eye(4)[..., None],
        torch.eye(4)[None],
        255 * np.eye(4, dtype=int),
    ):
        assert np.array_equal(np.asarray(from_pixels(value).convert("L")), 255 * np.eye(4))


def test_a_model_is_saved_as_an_export_writes_it(opened: Mirage, nano: Path, mixed: Path, tmp_path: Path) -> None:
    rows = json.loads((nano / "config.json").read_text())["text_config"]["vocab_size"]
    cli.main(["export", str(nano), str(tmp_path / "export"), "--vocab_rows", str(rows)], standalone_mode=False)
    model = mirage_ds.load(nano, latent_size=2, device="cpu")
    whole = load_file(tmp_path / "export/model.safetensors")
    saved = load_file(model.save(tmp_path / "saved") / "model.safetensors")
    assert saved.keys() == whole.keys()
    assert all(torch.equal(saved[name], whole[name]) for name in whole)
    # Trained here, it is what plain transformers opens, and what `load` goes on with.
    batch = model.batch(model.rows(mixed)[0])
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    wanted = model.loss(batch).loss
    folder = model.save(tmp_path / "trained", stage="stage2")
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    plain, told = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(plain.lm_head.weight, model.model.head.weight)
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|latent_pad|>") is not None
    again = mirage_ds.load(folder, device="cpu")
    assert (again.trained["stage"], again.latent_size) == ("stage2", 2)
    torch.testing.assert_close(again.loss(batch).loss, wanted, rtol=0, atol=0)
    for place, said in ((folder, "exists already; give a new folder"), (folder / "config.json/x", "cannot be written")):
        with pytest.raises(UserError, match=said):
            model.save(place)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_latents_are_the_states_before_their_slots_and_can_be_given(opened: Mirage) -> None:
    start = opened._decoder.encoder.id_of("<|latent_start|>")

    def choose(logits: torch.Tensor, turns: Sequence[Turn]) -> torch.Tensor:
        return torch.full_like(logits.argmax(-1), start) if turns[0].step == 1 else logits.argmax(-1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mirage_ds.api.chooser_of", lambda *_: choose)
        answer = opened.generate("Up?", max_new_tokens=6, run_length=2)
        given = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
        other = opened.generate("Up?", max_new_tokens=6, run_length=2, latents=given)
        # Never trained by anybody: k is what `load` was told.
        assert opened.generate("Up?", max_new_tokens=6).runs == [(2, 2)]
    assert answer.runs == [(2, 2)]
    # The state that chose each pad is what was fed at it.
    torch.testing.assert_close(answer.latents[0], answer.hidden[2:4], rtol=0, atol=0)
    assert "[2 latents]" in answer.marked
    torch.testing.assert_close(other.latents[0], given, rtol=0, atol=0)
    assert not torch.equal(other.hidden[4:], answer.hidden[4:])


@pytest.mark.parametrize("stage", ["sft", "stage1", "stage2"])
def test_losses_are_those_of_the_training_forward(opened: Mirage, nano: Path, mixed: Path, stage: str) -> None:
    rows = opened.rows(mixed, stage)
    samples = [rows[0], rows[4], rows[5]] if stage == "stage1" else rows[:3]
    batch = opened.batch(samples)
    assert isinstance(batch, Batch)
    assert len(batch.passes) == (3 if stage == "stage2" else 1)
    opened.model.zero_grad()
    losses = opened.loss(batch)
    losses.loss.backward()
    plain = load_model(nano, stage=stage, dtype=torch.float32, device=torch.device("cpu"), checkpointing=False)
    sums = plain.model(batch)
    gamma = 0.1 if stage == "stage1" else 1.0
    wanted = (gamma * sums.ce + sums.sim) / 3
    wanted.backward()
    torch.testing.assert_close(losses.loss, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(opened.loss(batch, ce_weight=2.0).loss, (2 * sums.ce + sums.sim) / 3, rtol=0, atol=1e-6)
    for own, other in zip(opened.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=0, atol=1e-6)
    assert (losses.sim.item() > 0) == (stage == "stage1")


def test_rows_are_a_dataset_that_can_be_looked_into(opened: Mirage, mixed: Path, monkeypatch) -> None:
    monkeypatch.chdir(mixed.parent)
    rows = opened.rows(mixed)
    assert isinstance(rows, torch.utils.data.Dataset)
    assert isinstance(rows, Sequence)
    assert len(rows) == 12
    again = opened.rows(rows_of(mixed))
    assert torch.equal(rows[-1].input_ids, again[11].input_ids)
    assert [len(one.input_ids) for one in rows[2:4]] == [len(rows[2].input_ids), len(rows[3].input_ids)]
    assert rows.record(0).image_input == ("in0.png",)
    tokens = rows.tokens(0)
    sample = rows[0]
    assert [one.place for one in tokens] == list(range(len(sample.input_ids)))
    assert [one.learnt for one in tokens] == (sample.labels != IGNORE).tolist()
    assert [one.place for one in tokens if one.kind == "latent"] == [sample.runs[0][0], sample.runs[0][0] + 1]
    assert sum(one.kind == "image" for one in tokens) == len(sample.image_positions) > 0
    assert "".join(one.text for one in tokens).count("then right.") == 1
    loaded = next(iter(torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=opened.batch)))
    assert loaded.rows.tolist() == [0, 1]


def test_what_is_wrong_is_one_sentence(opened: Mirage, mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"question on line 1, text_input: 2 <image> mark\(s\) for 1 image"):
        opened.generate("<image> or <image>?", [mixed.parent / "in0.png"])
    with pytest.raises(UserError, match=r"question on line 1, image_input: no image 'none\.png'"):
        opened.generate("?", ["none.png"])
    with pytest.raises(UserError, match="questions: a string, 'Up'; give a list of them, or call generate"):
        opened.generate_all("Up")
    with pytest.raises(UserError, match="images: 1 lists for 2 questions"):
        opened.generate_all(["a", "b"], [[]])
    with pytest.raises(UserError, match="record on line 1, text_output: missing"):
        opened.rows([{"text_input": "?"}])
    with pytest.raises(UserError, match="record on line 3, image_output: stage1 needs a helper"):
        opened.rows(mixed, "stage1")[2]
    with pytest.raises(UserError, match=r"latents: \(2, 3\) is not \(k, 128\)"):
        opened.generate("a", latents=torch.zeros(2, 3))
    with pytest.raises(UserError, match="run_length 3: 2 latents a block are given"):
        opened.generate("a", latents=torch.zeros(2, 128), run_length=3)
    with pytest.raises(UserError, match="slots: auxiliary"):
        opened.rows(mixed, "stage1", slots="auxiliary")
    with pytest.raises(UserError, match="no such folder"):
        mirage_ds.load(tmp_path / "none")


def test_it_says_what_it_is(opened: Mirage) -> None:
    assert repr(opened).startswith(f"<Mirage {opened.folder}: never trained by mirage_ds, k 2, 1,")
    assert isinstance(opened.rows([{"text_input": "?", "text_output": "!"}], "sft"), Rows)


def test_an_answers_tensors_are_written(opened: Mirage, nano: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "answer.safetensors"
    arguments = ["generate", str(nano), "--prompt", "Up?", "--max_new_tokens", "5", "--save_latents"]
    cli.main([*arguments, str(out)], standalone_mode=False)
    answer = opened.generate("Up?", max_new_tokens=5)
    with safe_open(out, "pt") as file:
        assert file.get_tensor("ids").tolist() == answer.ids
        torch.testing.assert_close(file.get_tensor("hidden"), answer.hidden, rtol=0, atol=0)
        notes = file.metadata()
    assert notes["marked"] == capsys.readouterr().out.strip() == answer.marked
    assert json.loads(notes["runs"]) == []
    with pytest.raises(UserError, match=r"give a name that ends in \.safetensors"):
        cli.main([*arguments, str(tmp_path / "x.pt")], standalone_mode=False)
    with pytest.raises(UserError, match="cannot be written"):
        cli.main([*arguments, str(tmp_path / "answer.safetensors/x.safetensors")], standalone_mode=False)


def ends_so(answer: str, record: dict) -> bool:
    return record["text_output"].endswith(answer)


def test_evaluate_scores_by_a_function(opened: Mirage, mixed: Path) -> None:
    found = opened.evaluate(mixed, ends_so, max_new_tokens=2, most=3)
    answers = found["answers"]
    assert (found["task"], len(answers), found["settings"]["max_new_tokens"]) == (f"{__name__}:ends_so", 3, 2)
    assert [one["metrics"]["score"] for one in answers] == [
        row["text_output"].endswith(one["text"]) for row, one in zip(rows_of(mixed)[:3], answers, strict=True)
    ]
    with pytest.raises(UserError, match=r"is not of the form package\.module:name"):
        opened.evaluate(mixed, lambda answer, record: 1)
    with pytest.raises(UserError, match=r"evaluate: functools\.partial.* has no name of its own; write def score"):
        opened.evaluate(mixed, functools.partial(ends_so))
    with pytest.raises(UserError, match=r"evaluate: min_pixels is for `load` or the command"):
        opened.evaluate(mixed, ends_so, min_pixels=3)
    with pytest.raises(UserError, match=r"unknown key 'mos' in evaluate \(did you mean 'most'\?\)"):
        opened.evaluate(mixed, ends_so, mos=3)
