"""What the speed benchmarks compare with: the same losses, padded or row by row; the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import host, peers
from benchmarks.decode import Ours, Theirs
from benchmarks.naive import Naive
from benchmarks.step import described
from benchmarks.workload import encode, make_workload
from mirage_ds.data.batch import collate
from mirage_ds.data.sample import IGNORE
from mirage_ds.model.load import load_model
from mirage_ds.model.loss import StepCounts, objective

GAMMA, ROWS, K = 0.1, 3, 3


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_workload(tmp_path_factory.mktemp("work"), "nano", ROWS, "mixed")


@pytest.mark.parametrize("stage", ["sft", "stage1", "stage2"])
def test_plain_way_trains_on_the_same_loss(work: Any, stage: Any) -> None:
    encoder, samples = encode(work, stage, K)
    assert len({len(sample.input_ids) for sample in samples}) == ROWS
    passes = K + 1 if stage == "stage2" else 1
    loaded = load_model(work.model, stage=stage, dtype=torch.float32, device=torch.device("cpu"))
    assert loaded.tower is not None
    batch = loaded.tower.attach(collate(samples, passes, encoder.dummy((passes - 1) // K)))
    counts = StepCounts(ROWS, sum(int((sample.labels != IGNORE).sum()) for sample in samples), ROWS * K)
    ours = float(objective(loaded.model(batch), counts, GAMMA, "sample")[0].detach())

    after = []
    for size in (1, 2) if stage != "stage2" else (1,):
        plain = Naive(work.model, stage, GAMMA, torch.float32, {"lr": 1e-3}, 1.0, size)
        assert plain.step(samples) == pytest.approx(ours, rel=1e-5), size
        after.append(plain.step(samples))
        # It trained, and by the same gradient whatever it takes at a time.
        assert after[-1] < 0.99 * ours
        assert after[-1] == pytest.approx(after[0], rel=1e-3)


def test_what_was_run_is_described() -> None:
    said = described(host.Case(28, 1, "sft", 0, "zero1"))
    assert (said["layers"], said["recipe"]) == (28, "zero1")
    assert "no GPU" in said["machine"]


def test_transformers_own_generate_decodes_the_same_tokens(work: Any) -> None:
    ours = Ours(work, ROWS)
    theirs = Theirs(work, ours.samples).answers(6, 2, ours.tokens.stops)
    found = ours.answers(ours.samples, [6, 3, 6], batch=2)
    # The last token of ours is the stop that ends a row at its length.
    assert [ids[:-1] for ids in found] == [theirs[0][:5], theirs[1][:2], theirs[2][:5]]
    assert len({tuple(ids) for ids in theirs}) > 1


def test_peers_asks_for_a_case_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(peers, "measured", lambda case, *_: asked.append(case) or {"rows": case.rows})
    peers.main(["--rows", "4"], standalone_mode=False)
    assert [(case.rows, case.stage, case.kernels) for case in asked] == [(4, "sft", None)]
