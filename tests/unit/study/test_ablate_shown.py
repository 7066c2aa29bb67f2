"""What a report shows of the records behind its scores."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
from PIL import Image

from mirage_ds.study.collect import with_records
from mirage_ds.study.results import Cell, Results, Scores
from mirage_ds.study.spec import EvaluationSpec


def test_the_records_behind_the_scores_are_read_as_they_lie(tmp_path: Path) -> None:
    """A table with columns of its own, whose task nobody names."""
    Image.new("RGB", (640, 480), "red").save(tmp_path / "red.png")
    rows = pd.DataFrame({"q": ["Which?", "And?", "Then?"], "a": [f"\\boxed{{{one}}}" for one in "ABA"]})
    rows.assign(pic="red.png").to_csv(tmp_path / "rows.csv", index=False)
    values = {"data_path": "rows.csv", "columns": "question=q,answer=a,image=pic"}
    spec = EvaluationSpec.model_validate(values, context=tmp_path)
    # The lines of a table are counted with its head.
    said = {"3": {"answer": "A", "latents": 4, "score": 0.0}}
    cell = Cell("mirage", 0, scores={"test": Scores(["2", "3", "4"], ["?"] * 3, {"correct": [1, 0, 1]}, said)})
    shown = with_records(Results("small", "", {"mirage": ""}, [cell]), {"test": spec})
    assert shown.unseen == []
    assert shown.chance == {"test": {"2": 1, "3": 0, "4": 1}}
    (example,) = shown.examples
    assert (example["question"], example["right"], example["answer"]) == ("And?", "\\boxed{B}", "A")
    assert Image.open(io.BytesIO(example["picture"])).size == (320, 240)
