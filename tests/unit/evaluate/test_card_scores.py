"""Scores of an evaluation in the model card: of these very weights, readable by people and by the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from test_decode_eval import STATE

from mirage_ds.data.images import ImageFinder
from mirage_ds.engine.card import model_card, write_card
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import load_decoder
from mirage_ds.evaluate.model_card import add_scores
from mirage_ds.evaluate.report import evaluate_file, write_report
from mirage_ds.evaluate.spec import EvaluateSpec

SAMPLE = Path(__file__).parents[3] / "data/sample_planning.jsonl"


@pytest.fixture(scope="module")
def scored(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder with a card, and what `evaluate` wrote of it."""
    folder = tmp_path_factory.mktemp("scored")
    model = folder / "model"
    shutil.copytree(nano, model)
    write_card(model, model_card(STATE))
    decoder = load_decoder(model, ImageFinder.beside(SAMPLE, None), latents=False)
    report = evaluate_file(decoder, EvaluateSpec(data_path=SAMPLE, max_new_tokens=2, most=6))
    write_report(report, folder / "scores.json")
    return model, folder / "scores.json"


@pytest.fixture
def model(scored: tuple[Path, Path], tmp_path: Path) -> Path:
    shutil.copytree(scored[0], tmp_path / "model")
    return tmp_path / "model"


def changed(file: Path, scores: Path, **values: Any) -> Path:
    report = json.loads(scores.read_text())
    file.write_text(json.dumps(report | values))
    return file


def test_people_and_the_hub_read_the_scores(scored: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    before = (model / "README.md").read_text()
    report = json.loads(scored[1].read_text())
    whole = report["all"] | dict(success=0.8125, low=0.7, high=0.9, count=6, latents=4.0)
    scores = changed(tmp_path / "scores.json", scored[1], all=whole)
    assert add_scores(model, [scores]) == f"{model / 'README.md'}: scores of 1 file(s)"
    text = (model / "README.md").read_text()
    assert "No scores are known" in before
    assert "No scores are known" not in text
    assert f"**vsp-spatial-planning**, sample_planning.jsonl (SHA-256 `{report['hashes']['data']}`)" in text
    assert "decoding greedy, at most 2 new tokens, float32" in text
    assert "| all | 6 | 0.812 | 0.700–0.900 |" in text
    for level in report["levels"]:
        assert f"\n| {level} | {report['levels'][level]['count']} |" in text
    # All else stays as it was.
    rows = [line for line in before.splitlines() if line.startswith("| ")]
    assert all(row in text for row in rows)
    assert text.endswith(before[before.index("## What decodes it") :])
    head = yaml.safe_load(text.split("---")[1])
    assert (head["base_model"], head["library_name"]) == ("Qwen/Qwen2.5-VL-7B-Instruct", "transformers")
    found = {one.metric_type: one for one in ModelCard(text).data.eval_results}
    assert found["success"].metric_value == 0.8125
    assert found["success"].dataset_revision == report["hashes"]["data"]
    assert not found.keys() & {"low", "high", "count", "latents", "runs"}


def test_a_second_time_replaces_the_first_and_several_files_stand_together(
    scored: tuple[Path, Path], model: Path, tmp_path: Path
) -> None:
    other = changed(tmp_path / "other.json", scored[1], task="vsp-path-reading", data="elsewhere/other.jsonl")
    add_scores(model, [scored[1], other])
    both = (model / "README.md").read_text()
    assert both.index("**vsp-spatial-planning**") < both.index("**vsp-path-reading**, other.jsonl")
    assert {one.dataset_type for one in ModelCard(both).data.eval_results} == {
        *("vsp-spatial-planning", "vsp-path-reading")
    }
    add_scores(model, [scored[1]])
    once = (model / "README.md").read_text()
    assert "vsp-path-reading" not in once
    add_scores(model, [scored[1]])
    assert (model / "README.md").read_text() == once


def test_a_card_of_an_older_version_gets_them_at_its_end(scored: tuple[Path, Path], model: Path) -> None:
    card = model / "README.md"
    card.write_text(card.read_text().replace("<!-- scores -->", "").replace("<!-- end of scores -->", ""))
    add_scores(model, [scored[1]])
    assert card.read_text().rstrip().endswith("<!-- end of scores -->")


def test_what_does_not_belong_to_it_is_refused(scored: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    card = model / "README.md"
    before = card.read_text()

    def refused(*files: Path) -> str:
        with pytest.raises(UserError) as error:
            add_scores(model, files)
        assert card.read_text() == before
        return str(error.value)

    hashes = json.loads(scored[1].read_text())["hashes"]
    strange = changed(tmp_path / "strange.json", scored[1], hashes=hashes | {"model": {"model.safetensors": "0" * 64}})
    assert refused(scored[1], strange).startswith(f"{strange}: are scores of other weights (")
    nothing = tmp_path / "nothing.json"
    for text in ("", "[]", "{}", '{"conditions": {}}', json.dumps({"hashes": None})):
        nothing.write_text(text)
        assert refused(nothing).startswith(f"{nothing}: is no file of scores; `mirage-ds evaluate FOLDER")
    assert refused(tmp_path / "gone.json") == f"{tmp_path / 'gone.json'}: cannot be read (No such file or directory)"
    card.write_text("mine")
    before = "mine"
    assert refused(scored[1]) == (
        f"{card}: is no model card of mirage_ds; name the folder of a trained or exported model"
    )
