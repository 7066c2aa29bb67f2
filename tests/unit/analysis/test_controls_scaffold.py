"""Learned targets as the oracle of the controls, against an encoder written by hand on plain transformers.

R runs of a row, k latents a run, H hidden.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_controls import (  # noqa: F401  # fixtures
    REASONING,
    K,
    Oracle,
    bench,
    call,
    file,
    folder,
    oracle,
    records,
    sized,
)
from test_scaffold import by_hand, load, saved

from mirage_ds.analysis.bench import Bench
from mirage_ds.analysis.controls.run import run_conditions
from mirage_ds.analysis.controls.teach import rows_of
from mirage_ds.data.record import Record
from mirage_ds.model.targets import load_targets


@pytest.fixture(scope="module")
def learned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    return saved(folder, tmp_path_factory.mktemp("targets") / "learned", load(folder))


def test_the_oracle_feeds_the_encoders_latents(
    folder: Path,  # noqa: F811
    bench: Bench,  # noqa: F811
    records: list[Record],  # noqa: F811
    oracle: Oracle,  # noqa: F811
    learned: Path,
) -> None:
    targets = load_targets(learned, load(folder).config, K, bench.tower)
    weights = {name: one.double() for name, one in load(folder).model.target_encoder.state_dict().items()}
    own = replace(bench, targets=targets)
    wanted = []
    for sample in oracle.samples:
        features = oracle.features(sample.helper_pixel_values, sample.helper_grid_thw)
        helpers = zip(features, sample.helper_grid_thw.tolist(), strict=True)
        wanted.append(torch.stack([by_hand(weights, *one) for one in helpers]))
    made = rows_of(own, records, range(len(records)))
    for row, latents in zip(made, wanted, strict=True):
        torch.testing.assert_close(row.targets, latents, rtol=0, atol=1e-5)
    found, _ = run_conditions(own, records, ["own", "oracle"], sized(2))
    pooled, _ = run_conditions(bench, records, ["own", "oracle"], sized(2))
    for row, (outcome, latents) in enumerate(zip(found["oracle"], wanted, strict=True)):
        slow, _ = oracle.teach(row, lambda run, slot, _, fed=latents: fed[run, slot])
        assert outcome.log_likelihood == pytest.approx(slow, abs=1e-5)
    assert [one.log_likelihood for one in found["oracle"]] != [one.log_likelihood for one in pooled["oracle"]]
    assert [one.log_likelihood for one in found["own"]] == [one.log_likelihood for one in pooled["own"]]


def test_controls_take_learned_targets_and_refuse_those_that_do_not_fit(
    folder: Path,  # noqa: F811
    file: Path,  # noqa: F811
    learned: Path,
    tmp_path: Path,
    call: Callable,  # noqa: F811
) -> None:
    words = ("controls", folder, "--data_path", file, "--task", REASONING, "--max_new_tokens", 8)
    out = tmp_path / "out.json"
    code, _, error = call(*words, "--latents", "oracle", "--latent_targets", learned, "--out", out)
    assert code == 0, error
    assert len(json.loads(out.read_text())["settings"]["latent_targets"]) == 64
    for more, said in [
        (("--latents", "zero", "--latent_targets", learned), "--latent_targets: none of --latents is fed them"),
        (("--latent_targets", tmp_path), f"--latent_targets {tmp_path}: no latent_targets.json there"),
        (("--latent_targets", learned, "--run_length", 2), f"makes {K} latents a helper, and a block has 2 here"),
    ]:
        code, _, error = call(*words, *more)
        assert code == 2
        assert said in error
        assert error.count("\n") == 1
