"""A linear probe: can a ridge regression read a label of the records, a path's moves or a board's cells from latents?

N rows, D numbers a row (k latents × H hidden, say), J questions a row, C classes, n rows to learn from, m to answer.

Every row is answered once, by a probe that has seen no row of its map, nor of a rotation or reflection of it; of a
label no row with its input images.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from mirage_ds.analysis.controls.statistics import MISSED, listed, visible_lift
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record import Record
from mirage_ds.errors import UserError, closest
from mirage_ds.evaluate.scoring import wilson
from mirage_ds.tasks.boxed import last_boxed
from mirage_ds.tasks.maps import GOAL, HOLE, ICE, MOVES, START, Board, map_json, parse_board, symmetries

FOLDS = 5
# Of the mean eigenvalue of the rows' Gram matrix.
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
# Maps, or pictures: with fewer, an interval of ± 0.14 around one half says nothing.
FEWEST_MAPS = 50
# A number with more values than these is asked for by quarters of its rows.
MOST_VALUES = 20
# A class has so many rows on average, at least.
ROWS_A_CLASS = 5
# What is read from the question itself.
POOLED = "input image, pooled"
# A move is asked for while so many rows still have one.
FEWEST_WITH_MOVE = 0.1
CELLS = (ICE, HOLE, START, GOAL)
STEPS = (*MOVES, "end")
USED = "whether the answer uses the latents, only `mirage-ds controls` tells"
UNTESTED = f"Nothing was tested: a probe needs --label with a key of the records, and {USED}."


class Questions(NamedTuple):
    """What is asked about boards of one size, or about one label.

    Attributes:
        name: "3 × 3" of boards, or the label's key.
        unit: what is counted once: "maps" or "pictures".
        rows: (n,) which of the rows have such a board, or the label.
        groups: the map of each, the same for its rotations and reflections; or its input images.
        labels: (n, J) classes.
        blocks: name → its columns of `labels`.
    """

    name: str
    unit: str
    rows: torch.Tensor
    groups: list[str]
    labels: torch.Tensor
    blocks: dict[str, list[int]]


class Reading(NamedTuple):
    """How well a question is answered.

    Attributes:
        accuracy: over all rows; low, high: its 95 % interval.
        chance: accuracy of the commonest answer.
        rows, maps: how many of each there are; of a label the maps are pictures.
    """

    accuracy: float
    low: float
    high: float
    chance: float
    rows: int
    maps: int


def questions(records: Sequence[Record]) -> list[Questions]:
    """Find what can be asked of boards: the cells of `map_desc`, and the moves of `path` where records have one.

    Raises:
        UserError: a record's map_desc is no board.
    """
    boards = [
        (row, parse_board(record.extra["map_desc"], f"record on line {record.line}"))
        for row, record in enumerate(records)
        if "map_desc" in record.extra
    ]
    return [
        _ask(side, [(row, board) for row, board in boards if len(board) == side], records)
        for side in sorted({len(board) for _, board in boards})
    ]


def boards(records: Sequence[Record]) -> list[Questions]:
    """As `questions`, where there are enough different maps."""
    return [one for one in questions(records) if len(set(one.groups)) >= FEWEST_MAPS]


def _ask(side: int, boards: Sequence[tuple[int, Board]], records: Sequence[Record]) -> Questions:
    paths: list[Any] = [records[row].extra.get("path") for row, _ in boards]
    columns: list[list[int]] = []
    blocks: dict[str, list[int]] = {}
    if all(isinstance(path, list) and all(move in MOVES for move in path) for path in paths):
        lengths = sorted((len(path) for path in paths), reverse=True)
        for move in range(lengths[int(FEWEST_WITH_MOVE * len(lengths))]):
            blocks[f"move {move + 1}"] = [len(columns)]
            columns.append([STEPS.index(path[move]) if move < len(path) else len(MOVES) for path in paths])
    blocks["cells"] = list(range(len(columns), len(columns) + side * side))
    cells = [[CELLS.index(cell) for line in board for cell in line] for _, board in boards]
    columns += [list(column) for column in zip(*cells, strict=True)]
    return Questions(
        f"{side} × {side}",
        "maps",
        torch.tensor([row for row, _ in boards]),
        [min(map_json(image) for image in symmetries(board)) for _, board in boards],
        torch.tensor(columns).T.contiguous(),
        blocks,
    )


def labelled(records: Sequence[Record], key: str, finder: ImageFinder) -> Questions:
    """Ask for a label of the records; those without it are left out.

    Numbers of more than MOST_VALUES values are asked for by quarters: which fourth of the rows, by size.

    Args:
        key: of the records; text_output is the answer, in its last box where it has one.

    Raises:
        UserError: the label is in no record, is always or hardly ever the same, or stands beside too few pictures.
        RecordError: an input image is missing.
    """
    values: dict[int, Any] = {}
    groups = []
    for row, record in enumerate(records):
        answer = last_boxed(record.text_output) or record.text_output
        value = answer if key == "text_output" else record.extra.get(key)
        if value not in (None, ""):
            values[row] = value
            # What it shows: its input images by content, or its question where it has none.
            pictures = [finder.key(record, "image_input", path) for path in record.image_input]
            groups.append(str(pictures) if pictures else record.text_input)
    if not values:
        keys = ["text_output", *sorted({one for record in records for one in record.extra})]
        raise UserError(f"--label {key}: no record has it{closest(key, keys)}; there are {', '.join(keys)}")
    block = key
    if all(type(value) in (int, float) for value in values.values()) and len(set(values.values())) > MOST_VALUES:
        block, found = f"{key} (which quarter)", torch.tensor(list(values.values()), dtype=torch.float64)
        labels = torch.bucketize(found, found.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)))
    else:
        texts = [json.dumps(value, sort_keys=True, default=str) for value in values.values()]
        labels = torch.tensor([sorted(set(texts)).index(text) for text in texts])
    classes, different = len(labels.unique()), len(set(groups))
    if classes < 2 or classes * ROWS_A_CLASS > len(labels) or different < FEWEST_MAPS:
        what = f"{classes} value(s) in {len(labels)} records with {different} different pictures"
        needs = f"at least two values, {ROWS_A_CLASS} records for each, and {FEWEST_MAPS} pictures"
        raise UserError(f"--label {key}: {what}; a probe needs {needs}")
    return Questions(key, "pictures", torch.tensor(list(values)), groups, labels[:, None], {block: [0]})


def folds(groups: Sequence[str], count: int = FOLDS, seed: int = 0) -> torch.Tensor:
    """Deal groups into folds of about the same number of groups → (N,) the fold of each row."""
    names = sorted(set(groups))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    fold = {name: int(place) % count for name, place in zip(names, order, strict=True)}
    return torch.tensor([fold[group] for group in groups])


def ridge(x: torch.Tensor, y: torch.Tensor, asked: torch.Tensor, strengths: Sequence[float]) -> torch.Tensor:
    """Ridge regression with intercept on standardized numbers.

    Args:
        x: (n, D); y: (n, K) values to learn; asked: (m, D).
        strengths: of the penalty, as multiples of the mean eigenvalue of x xᵀ.

    Returns:
        (S, m, K) predictions, one block a strength; float64.
    """
    x, asked, y = x.double(), asked.double(), y.double()
    mean, spread = x.mean(0), x.std(0, correction=0)
    # A number that never changes tells nothing; division by one leaves it at zero.
    spread = torch.where(spread > 0, spread, 1.0)
    x, asked = (x - mean) / spread, (asked - mean) / spread
    # The dual: n × n whatever D, and one factorization serves every strength.
    values, vectors = torch.linalg.eigh(x @ x.T)
    projected = vectors.T @ (y - y.mean(0))
    towards = asked @ x.T @ vectors
    penalties = [strength * values.mean().clamp(min=1e-12) for strength in strengths]
    return torch.stack([y.mean(0) + (towards / (values + penalty)) @ projected for penalty in penalties])


def _answers(x: torch.Tensor, labels: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Answer every question at every strength → (S, m, J) classes."""
    classes = int(labels.max()) + 1
    wanted = functional.one_hot(labels, classes).flatten(1)
    return ridge(x, wanted, asked, STRENGTHS).unflatten(-1, (-1, classes)).argmax(-1)


def cross_answers(x: torch.Tensor, labels: torch.Tensor, groups: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Answer each row from the rows of other folds.

    The strength is chosen a question by the next fold, which the probe that chooses has not seen either.

    Args:
        x: (N, D); labels: (N, J); groups: the map of each row.

    Returns:
        (N, J) answers of the probe, and the commonest answer among the rows that it learnt from.
    """
    fold = folds(groups)
    read, common = torch.empty_like(labels), torch.empty_like(labels)
    for number in range(FOLDS):
        held, chooses = fold == number, fold == (number + 1) % FOLDS
        learns = ~held & ~chooses
        right = (_answers(x[learns], labels[learns], x[chooses]) == labels[chooses]).double().mean(1)
        # Of equally good ones the strongest: argmax takes the first.
        best = len(STRENGTHS) - 1 - right.flip(0).argmax(0)
        answers = _answers(x[~held], labels[~held], x[held])
        read[held] = answers.gather(0, best.expand(1, int(held.sum()), -1))[0]
        common[held] = labels[~held].mode(0).values
    return read, common


def read(sources: Mapping[str, torch.Tensor], asked: Questions) -> dict[str, dict[str, Reading]]:
    """Probe what the latents hold, and beside it what their targets and the input image hold in as many numbers.

    The interval is Wilson's with each map counted once, however many rows and cells it has: these are not independent.

    Args:
        sources: what is read → (N, D), of all rows.

    Returns:
        Question → what is read → Reading.
    """
    maps = len(set(asked.groups))
    found: dict[str, dict[str, Reading]] = {block: {} for block in asked.blocks}
    for source, x in sources.items():
        answers, common = cross_answers(x[asked.rows], asked.labels, asked.groups)
        for block, columns in asked.blocks.items():
            right = float((answers == asked.labels)[:, columns].double().mean())
            chance = float((common == asked.labels)[:, columns].double().mean())
            found[block][source] = Reading(right, *wilson(right * maps, maps), chance, len(asked.labels), maps)
    return found


def sentence(asked: Sequence[Questions], found: Sequence[Mapping[str, Mapping[str, Reading]]]) -> str:
    """Say what can be read from all latents together, how surely, and what could not have been seen.

    Args:
        found: question → what is read → Reading, of each that was asked; none where nothing was.
    """
    above: list[str] = []
    level: list[str] = []
    lifts: list[float] = []
    for one, readings in zip(asked, found, strict=True):
        for question, sources in readings.items():
            read, name = sources["all latents"], question if one.unit == "pictures" else f"{question} ({one.name})"
            numbers = [100 * value for value in (read.accuracy, read.low, read.high, read.chance)]
            rates = "{:.1f} % (95 % interval {:.1f} to {:.1f}, the commonest answer {:.1f}".format(*numbers)
            if pooled := sources.get(POOLED):
                rates += f", the input image {100 * pooled.accuracy:.1f}"
            (above if read.low > read.chance else level).append(
                f"{name} in {rates}) of {read.rows:,} rows with {read.maps:,} {one.unit}"
            )
            lifts += [] if read.low > read.chance else [visible_lift(read.maps, read.chance) or 0.0]
    parts = [f"reads from the latents {listed(above)}"] if above else []
    if level:
        blind = f"less than {100 * max(lifts):.1f} points more {MISSED}" if any(lifts) else "nothing could be more"
        parts.append(f"finds {listed(level)}, not above the commonest answer, where {blind}")
    return f"A linear probe {'; it '.join(parts)}; {USED}." if parts else UNTESTED
