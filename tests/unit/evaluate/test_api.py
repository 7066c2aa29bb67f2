"""`from mirage_ds import load`: the same numbers as the commands', from Python."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import mirage_ds
from mirage_ds.api import Mirage, Rows
from mirage_ds.cli import cli
from mirage_ds.data.batch import Batch
from mirage_ds.data.sample import IGNORE
from mirage_ds.errors import UserError
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
    both = opened.generate_all(["Where <image>?", "Up?"], [["in0.png"], []], max_new_tokens=9, run_length=2)
    assert both[0].ids == found.ids


def test_latents_are_the_states_before_their_slots_and_can_be_given(opened: Mirage) -> None:
    start = opened._decoder.encoder.id_of("<|latent_start|>")

    def choose(logits: torch.Tensor, step: int) -> torch.Tensor:
        return torch.full_like(logits.argmax(-1), start) if step == 1 else logits.argmax(-1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mirage_ds.api.chooser_of", lambda *_: choose)
        answer = opened.generate("Up?", max_new_tokens=6, run_length=2)
        given = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
        other = opened.generate("Up?", max_new_tokens=6, run_length=2, latents=given)
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
    with pytest.raises(UserError, match=r"question 1: 2 <image> mark\(s\) for 1 image"):
        opened.generate("<image> or <image>?", [mixed.parent / "in0.png"])
    with pytest.raises(UserError, match=r"question on line 1, image_input: no image 'none\.png'"):
        opened.generate("?", ["none.png"])
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


def test_the_notebook_runs_and_prints_what_it_shows(capsys) -> None:
    book = json.loads((Path(__file__).parents[3] / "examples/python.ipynb").read_text())
    space: dict = {}
    for cell in book["cells"]:
        if cell["cell_type"] != "code":
            continue
        exec(compile("".join(cell["source"]), "python.ipynb", "exec"), space)
        shown = "".join(text for output in cell["outputs"] for text in output["text"])
        # Numbers and answers of a model that has just been trained may differ in another build of torch.
        said = capsys.readouterr().out
        assert [line.split()[:1] for line in said.splitlines()][:1] == [
            line.split()[:1] for line in shown.splitlines()
        ][:1]
        assert len(said.splitlines()) == len(shown.splitlines())
    assert space["last"] < space["first"] / 4


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
    with pytest.raises(UserError, match=r"evaluate: min_pixels is for `load` or the command"):
        opened.evaluate(mixed, ends_so, min_pixels=3)
    with pytest.raises(UserError, match=r"unknown key 'mos' in evaluate \(did you mean 'most'\?\)"):
        opened.evaluate(mixed, ends_so, mos=3)
