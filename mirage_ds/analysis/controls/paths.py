"""One input, the latents of one path or of another: which of them does the answer follow?

R latent blocks of a row, k latents a block, H hidden.

For maps with several shortest paths. A is the record's own path, B another shortest one, drawn by seed. The question
and its picture stay; the slots are fed the compressed features of a helper image with A in red, or with B. Both are
drawn here, so that they differ in the path alone.
"""

import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import pstdev
from typing import Any, NamedTuple

from mirage_ds.analysis.bench import Bench
from mirage_ds.analysis.controls.conditions import Given
from mirage_ds.analysis.controls.statistics import visible_mean
from mirage_ds.analysis.controls.teach import Row, check, decode, in_batches
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record import Record
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import Track, answer_of, batches_fit
from mirage_ds.evaluate.scoring import Prediction, bootstrap, wilson
from mirage_ds.tasks.boxed import last_boxed
from mirage_ds.tasks.maps import Board, count_shortest_paths, follow, parse_board, shortest_path
from mirage_ds.tasks.render import red_path, render
from mirage_ds.tasks.vsp_planning import NAME, read_moves, solves

VERDICTS = ("injected", "other", "neither")


class Fork(NamedTuple):
    """A record and the two paths: A its own, B another one of its length. Moves are names of maps.MOVES."""

    record: Record
    board: Board
    paths: tuple[tuple[str, ...], tuple[str, ...]]


def fork_of(record: Record, seed: int) -> Fork | None:
    """Choose the other path; None where the map has no other, or the record's own is no shortest path.

    Also None without an input image, which gives the scale, and with several latent blocks: one picture shows one path.

    Raises:
        UserError: the record's map is no board.
    """
    if "map_desc" not in record.extra or not record.image_input or record.runs != 1:
        return None
    board = parse_board(record.extra["map_desc"], f"record on line {record.line}")
    moves = read_moves(last_boxed(record.text_output) or "")
    if count_shortest_paths(board) < 2 or not solves(board, moves) or len(moves) > len(shortest_path(board)):
        return None
    rng, other = random.Random(f"{seed}/path/{record.line}"), moves
    while other == moves:
        other = shortest_path(board, rng)
    return Fork(record, board, (tuple(moves), tuple(other)))


def verdict(text: str, injected: Sequence[str], other: Sequence[str]) -> str:
    """Tell which path an answer's moves are: one of VERDICTS."""
    moves = tuple(read_moves(last_boxed(text) or ""))
    return {tuple(injected): "injected", tuple(other): "other"}.get(moves, "neither")


def _with_helpers(fork: Fork, finder: ImageFinder, folder: Path) -> list[Record]:
    """Make the record twice, its helper image showing one path each."""
    _, width = finder.size(fork.record, "image_input", fork.record.image_input[0])
    side = width // len(fork.board)
    found = []
    for name, moves in zip("AB", fork.paths, strict=True):
        file = folder / f"{fork.record.line}{name}.png"
        red_path(render(fork.board, cell_size=side), follow(fork.board, moves), side).save(file)
        found.append(replace(fork.record, image_output=(str(file),)))
    return found


def forks_of(records: Sequence[Record], task: str, seed: int) -> list[Fork]:
    """Choose the other path of each record that has one.

    Raises:
        UserError: another task than spatial planning, or no record with an alternative.
    """
    if task != NAME:
        raise UserError(f"--latents path is about the paths of {NAME}, and these records are of {task}; leave it out")
    forks = [fork for record in records if (fork := fork_of(record, seed)) is not None]
    if not forks:
        how = "build records with `mirage-ds data build vsp-spatial-planning --ties random`, or leave path out"
        raise UserError(f"--latents path: no record whose own answer is one of several shortest paths; {how}")
    return forks


def run_paths(
    bench: Bench, records: Sequence[Record], task: str, seed: int, batch_size: int, track: Track = iter
) -> dict[str, Any]:
    """Answer every record that has an alternative with the latents of either path.

    Args:
        bench: with the encoder of stage1.

    Returns:
        {"left_out", "opened", "answers"} and what `summary` returns; `opened` counts the answers, two a record, that
        have a latent block.

    Raises:
        UserError: see forks_of.
    """
    forks = forks_of(records, task, seed)
    with tempfile.TemporaryDirectory(prefix="mirage-paths-") as name:
        with batches_fit(batch_size):
            twins = [twin for fork in forks for twin in _with_helpers(fork, bench.encoder.finder, Path(name))]

        def answered(rows: Sequence[Row]) -> list[Prediction]:
            made = decode(bench, rows, [Given([row.targets for row in rows if row.targets is not None])])[0]
            return [answer_of(one, bench.encoder) for one in made]

        answers = in_batches(bench, twins, check(twins, bench), batch_size, track, answered)
    found = [_followed(*one) for one in zip(forks, answers[::2], answers[1::2], strict=True)]
    return {
        "left_out": len(records) - len(forks),
        "opened": sum(bool(answer.runs) for answer in answers),
        **summary([one["follows"] for one in found], seed),
        "answers": found,
    }


def _followed(fork: Fork, by_a: Prediction, by_b: Prediction) -> dict[str, Any]:
    """Say which path the answers are, with A's latents and with B's."""
    a, b = fork.paths
    return {
        "line": fork.record.line,
        "A": list(a),
        "B": list(b),
        "texts": {"A": by_a.text, "B": by_b.text},
        "runs": {"A": by_a.runs, "B": by_b.runs},
        "follows": {"A": verdict(by_a.text, a, b), "B": verdict(by_b.text, b, a)},
    }


def summary(follows: Sequence[Mapping[str, str]], seed: int) -> dict[str, Any]:
    """Count verdicts.

    Args:
        follows: for each record, "A" and "B" (whose latents were injected) → verdict.

    Returns:
        {"records": count, "A", "B": {verdict: {"count", "share", "low", "high"}} with Wilson's intervals, "difference":
        the share of answers that follow the injected path less that of the other one, over both injections, its
        bootstrap interval "low", "high", and "visible", as statistics.difference has it}. Answers that do not depend on
        the latents make the difference exactly 0.
    """
    count = len(follows)

    def share(name: str, kind: str) -> dict[str, float]:
        met = sum(one[name] == kind for one in follows)
        low, high = wilson(met, count)
        return {"count": met, "share": met / count, "low": low, "high": high}

    shares = {name: {kind: share(name, kind) for kind in VERDICTS} for name in "AB"}
    worth = {"injected": 0.5, "other": -0.5, "neither": 0.0}
    apart = [worth[one["A"]] + worth[one["B"]] for one in follows]
    low, high = bootstrap(apart, seed)
    seen = {"visible": visible_mean(pstdev(apart) / math.sqrt(count))}
    return {"records": count, **shares, "difference": sum(apart) / count, "low": low, "high": high, **seen}
