"""What each arm gains over where it starts, base by base: mean, t interval over bases, exact tests.

    python examples/rl/gains.py report.csv [another.csv …]

Each file is one that `mirage-ds ablate report` wrote. Success on all maps of the evaluation `test`.
"""

from __future__ import annotations

import math
from pathlib import Path

import click
import pandas as pd

from mirage_ds.study.report.statistics import sign_flip

# Student's 97.5 % quantile for 1, 2, … degrees of freedom.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)
PAIRS = [(arm, "base") for arm in ("through", "replay", "gaussian", "vlpo", "random", "more")] + [("text", "words")]
PAIRS += [("through", other) for other in ("random", "more", "replay")] + [("gaussian", "replay")]


def line(name: str, gains: pd.Series) -> str:
    """Write a row of the table from the differences of n bases."""
    count, up = len(gains), int((gains > 0).sum())
    half = T[count - 2] * gains.std() / math.sqrt(count) if count > 1 else math.nan
    low, high = gains.mean() - half, gains.mean() + half
    # Of a fair coin's n tosses, as far from the middle as these or farther.
    far = [math.comb(count, k) for k in range(count + 1) if abs(2 * k - count) >= abs(2 * up - count)]
    each = " ".join(f"{one:+.3f}" for one in gains)
    tests = f"{sign_flip(list(gains)):.3f} | {up} of {count}, {sum(far) / 2**count:.3f}"
    return f"| {name} | {gains.mean():+.3f} ({low:+.3f} to {high:+.3f}) | {tests} | {each} |"


def show(file: Path) -> None:
    """Print the table of one report."""
    rows = pd.read_csv(file).query("evaluation == 'test' and level == 'all'")
    scores = rows.pivot(index="seed", columns="arm", values="score")
    print(f"\n{file}\n\n| | mean over bases (95 % t) | sign flips, p | bases up, sign test p | each base |")
    print("|---|---|---|---|---|")
    gains = {pair: (scores[pair[0]] - scores[pair[1]]).dropna() for pair in PAIRS if {*pair} <= {*scores.columns}}
    for (arm, base), own in gains.items():
        print(line(f"{arm} − {base}", own))
    if len(both := {("through", "base"), ("text", "words")} & {*gains}) > 1:
        first, second = sorted(both, reverse=True)
        print(line("gain of through − gain of text", (gains[first] - gains[second]).dropna()))


@click.command()
@click.argument("reports", nargs=-1, required=True, type=click.Path(path_type=Path))
def main(reports: tuple[Path, ...]) -> None:
    """Print a table for each report.csv."""
    for one in reports:
        show(one)


if __name__ == "__main__":
    main()
