"""What a pass of the recurrent stage asks of the host, counted; how long that takes, benchmarks/host.py measures."""

from __future__ import annotations

from pathlib import Path

from benchmarks.host_steps import thin_operators

# Operators of one more pass of a token a row, forward and backward, a layer; b24ddd1 took 431.75. Each is one more to
# start in each of 28 to 80 layers and each such pass, on a card that waits for it: the bound only goes down.
THIN = 215.5


def test_a_thin_pass_asks_for_no_more_operators_than_it_did(nano: Path, mixed: Path) -> None:
    assert thin_operators(nano, mixed, rows=4) <= THIN
