"""What a pass of the recurrent stage asks of the host, counted; how long that takes, benchmarks/host.py measures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.host_steps import operators, thin_operators
from mirage_ds.data.batch import collate, to_device
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.record_files import scan
from mirage_ds.model.load import load_model, load_tower, read_config
from mirage_ds.plan import host

# Operators of one more pass of a token a row, forward and backward, a layer; b24ddd1 took 431.75. Each is one more to
# start in each of 28 to 80 layers and each such pass, on a card that waits for it: the bound only goes down.
THIN = 215.5


def test_a_thin_pass_asks_for_no_more_operators_than_it_did(nano: Path, mixed: Path) -> None:
    assert thin_operators(nano, mixed, rows=4) <= THIN


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_planner_knows_what_a_layer_asks_for(nano: Path, mixed: Path, checkpointing: bool) -> None:
    meta, dtype = torch.device("meta"), torch.bfloat16
    tower = load_tower(nano, read_config(nano), dtype, torch.device("cpu"))

    def asked(k: int, layers: int, kept: bool = True) -> int:
        """Operators of stage2's forward and backward, as on a GPU, of the first `layers` of the model."""
        model = load_model(
            nano, stage="stage2", dtype=dtype, device=meta, attention="sdpa", tower=tower, checkpointing=checkpointing
        ).model
        model.how.attention = "torch_varlen"
        model.language_model.layers = model.language_model.layers[:layers]
        model.layers = type(model.layers)(model.language_model.layers)
        model.layers.resident = lambda: kept
        encoder = load_encoder([str(nano)], ImageFinder.beside(mixed, None), "stage2", k)
        samples = [encoder.encode(record, row) for row, record in enumerate(scan(mixed)[0][:4])]
        batch = to_device(tower.attach(collate(samples, k + 1, encoder.dummy(1))), meta)
        return operators(lambda: model(batch).ce.backward())  # noqa: PLW0108

    full = (asked(1, 2) - asked(1, 1)) / 2
    thin = [(asked(4, 2, kept) - asked(4, 1, kept) - 2 * full) / 3 for kept in (True, False)]
    assert full == pytest.approx(host.FULL[checkpointing], rel=0.05)
    assert thin == pytest.approx([host.THIN[0], host.THIN[checkpointing]], rel=0.05)
