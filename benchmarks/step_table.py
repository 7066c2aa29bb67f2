"""The lines of benchmarks.step as a Markdown table, for README.md and docs/performance.md.

python -m benchmarks.step_table benchmarks/results/step-2026-11-25.jsonl
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


def spread(found: dict[str, float], digits: int = 2) -> str:
    """Median, with least and most in brackets."""
    return f"{found['median']:.{digits}f} ({found['min']:.{digits}f}–{found['max']:.{digits}f})"


def compared(lines: list[dict[str, Any]]) -> list[str]:
    """A row for each line that has a plain side."""
    rows = [
        "| model | stage | rows a step | features of images | seconds a row: ours | plain | samples per CPU-second, "
        "ours over plain | peak memory, ours over plain | losses apart |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        padded = f", plain way {line['plain_rows']} padded" if line["plain_rows"] > 1 else ""
        rows.append(
            f"| {line['preset']} | {line['stage']} | {line['rows']}, {line['source']}{padded} | "
            f"{'kept' if line['features'] == 'all' else 'each step'} | "
            f"{line['product']['seconds_per_row']['median']:.2f} | {line['plain']['seconds_per_row']['median']:.2f} | "
            f"{spread(line['ratio'])} | {line['memory_ratio']:.2f} | {line['losses_apart']:.0e} |"
        )
    return rows


def alone(lines: list[dict[str, Any]]) -> list[str]:
    """A row for each line without a plain side."""
    rows = [
        "| model | part | stage | rows a step | CPU-seconds a row | tokens/s | peak memory, GB | share of the "
        "matrix-product rate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        own = line["decoder" if line["part"] == "decoder" else "product"]
        rows.append(
            f"| {line['preset']} | {line['part']} | {line['stage']} | {line['rows']}, {line['source']} | "
            f"{spread(own['cpu_seconds_per_row'])} | {own['tokens_per_s']['median']:.0f} | "
            f"{own['peak_memory_gb']:.2f} | {spread(own['share_of_matmul_rate'])} |"
        )
    return rows


@click.command()
@click.argument("file", type=click.Path(exists=True, path_type=Path))
def main(file: Path) -> None:
    """Print the tables of FILE."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for make, some in (
        (compared, [line for line in lines if "ratio" in line]),
        (alone, [line for line in lines if "ratio" not in line]),
    ):
        if some:
            print("\n".join(make(some)), end="\n\n")


if __name__ == "__main__":
    main()
