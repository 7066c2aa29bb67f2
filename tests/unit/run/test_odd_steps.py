"""Which losses are spikes, and what is kept of a step that is worth a look."""

from __future__ import annotations

import json
from math import inf, nan
from pathlib import Path

import pytest

from mirage_ds.run.journal import Journal, Logs
from mirage_ds.run.odd_steps import FILE, spike_over

FLAT = [1.0] * 20
# Median 1, median absolute deviation 0.1.
NOISY = [0.9, 1.1] * 10 + [1.0]


@pytest.mark.parametrize(
    ("loss", "before", "usual"),
    [
        # No deviation at all: half above it is the bound.
        (1.5, FLAT, None),
        (1.51, FLAT, 1.0),
        # Eight deviations are more than half.
        (1.79, NOISY, None),
        (1.81, NOISY, 1.0),
        # One spike before it moves neither.
        (1.81, [*NOISY, 100.0, 0.9], 1.0),
        (0.01, FLAT, None),
        # Losses that are not finite are reported by themselves.
        (inf, FLAT, None),
        (nan, FLAT, None),
        # Nine say nothing yet.
        (100.0, FLAT[:9], None),
        (100.0, FLAT[:10], 1.0),
    ],
)
def test_spikes(loss: float, before: list[float], usual: float | None) -> None:
    assert spike_over(loss, before) == usual


@pytest.mark.parametrize("owed", [True, False])
def test_a_resumed_run_knows_the_losses_before(owed: bool, tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 2.0 if step % 2 else None} for step in range(1, 31)]
    lines += [{"step": 24, "eval_loss": 9.0}, {"step": 30, "eval_loss": 8.0}, {"step": 31, "loss": 90.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    logs = Logs(tmp_path, 40, [], start=30, owed=owed)
    # What it had logged beyond its checkpoint is taken again.
    assert list(logs.losses) == [2.0] * 15
    assert logs.usual(nan) is None
    assert (logs.usual(9.0), logs.usual(2.0)) == (2.0, None)
    assert list(logs.losses)[-3:] == [2.0, 9.0, 2.0]
    logs.close("finished")
    # An evaluation that will be made again has no line before: it was made after this checkpoint, and the run killed.
    kept = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert kept == lines[: 31 if owed else 32]


@pytest.mark.parametrize("writes", [True, False])
def test_an_odd_step_is_a_line_of_the_file_and_of_the_console(
    writes: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal()
    journal.claimed(tmp_path, writes)
    rows = [{"row": row, "file": "a.jsonl", "line": row + 1} for row in range(9)]
    with journal.logging(Logs(tmp_path, 4, []) if writes else None):
        journal.odd(3, "the loss was not finite", {"loss": nan, "grad_norm": 2.0, "lr": 1e-3}, rows)
    assert (tmp_path / FILE).exists() == writes
    if writes:
        (line,) = (tmp_path / FILE).read_text().splitlines()
        assert json.loads(line) == {
            "step": 3, "why": "the loss was not finite", "loss": None, "grad_norm": 2.0, "rows": rows,
        }  # fmt: skip
        said = "step 3: the loss was not finite; records on line(s) 1, 2, 3, 4, 5, 6, 7, 8 …\n"
        assert capsys.readouterr().out == said
