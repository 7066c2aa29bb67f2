"""Speed of decoding, alone or against transformers' own `generate`; docs/performance.md has the results.

    python -m benchmarks.decode --against transformers
    git worktree add ../before b24ddd1 && python -m benchmarks.decode --against transformers --before ../before
    python -m benchmarks.decode --preset nano --rows 8 --batch 4 --new 8 --longest 30

Prints a JSON line a part: tokens per CPU-second of this process, prompts, vision tower and all; sides take turns, and
ratios are the medians of those turns. Random weights, greedy, no latents, no end before the length that is asked for.

`equal`: all answers have --new tokens; transformers gets the same prompts, padded on the left, --batch at a time.
`mixed`: answers of --shortest to --longest tokens, drawn log-uniformly; beside them batches that wait for the longest
answer of each: this decoder's, or with --before those of a checkout that had fixed batches. `samples`: --samples
answers to one prompt until their first token, over one answer.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.workload import Workload, make_workload
from mirage_ds.model.presets import PRESETS


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU-seconds of this process that something takes, and what it gives."""
    begun = time.process_time()
    found = work()
    return time.process_time() - begun, found


class Ours:
    """The product's decoder over the first rows of a workload."""

    def __init__(self, work: Workload, rows: int):
        from mirage_ds.data.images import ImageFinder
        from mirage_ds.data.record_files import scan
        from mirage_ds.evaluate.decoder import load_decoder
        from mirage_ds.model.slots import latent_tokens

        self.decoder = load_decoder(work.model, ImageFinder.beside(work.records, None))
        encoder = self.decoder.encoder
        self.samples = [encoder.encode_prompt(record, row) for row, record in enumerate(scan(work.records)[0][:rows])]
        self.tokens = latent_tokens(encoder)._replace(start=-1)

    def answers(self, samples: Sequence[Any], lengths: Sequence[int], batch: int, each: int = 1) -> list[list[int]]:
        """Answer prompts, the i-th with `lengths[i]` tokens; `each` answers a prompt."""
        import torch

        from mirage_ds.evaluate.prompts import prompts_of
        from mirage_ds.model.choose import greedy
        from mirage_ds.model.generate import Limits, generate

        stop, other = self.tokens.stops

        def choose(logits: torch.Tensor, turns: Any) -> torch.Tensor:
            logits[:, [stop, other]] = -torch.inf
            ends = torch.tensor([turn.step + 1 == lengths[turn.row // each] for turn in turns])
            return torch.where(ends, stop, greedy(logits, turns))

        net, tower = self.decoder.loaded.model, self.decoder.tower
        prompts = prompts_of(net, tower, self.decoder.encoder, samples)._replace(answers=each)
        limits = Limits(max(lengths), rows=batch)
        return [one.ids for one in generate(net, prompts, self.tokens, limits, choose)]


class Theirs:
    """transformers' own model and `generate`."""

    def __init__(self, work: Workload, samples: Sequence[Any]):
        import torch
        from transformers import AutoModelForImageTextToText, GenerationConfig, logging

        logging.set_verbosity_error()
        self.model = AutoModelForImageTextToText.from_pretrained(work.model, dtype=torch.float32).eval()
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        self.samples = samples

    def answers(self, new: int, batch: int, stops: Sequence[int]) -> list[list[int]]:
        """Answer all prompts, `new` tokens each, so many at a time."""
        import torch

        found: list[list[int]] = []
        for at in range(0, len(self.samples), batch):
            rows = self.samples[at : at + batch]
            longest = max(len(row.input_ids) for row in rows)
            ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
            for number, row in enumerate(rows):
                ids[number, longest - len(row.input_ids) :] = row.input_ids
                mask[number, longest - len(row.input_ids) :] = 1
            made = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
                pixel_values=torch.cat([row.pixel_values for row in rows]),
                image_grid_thw=torch.cat([row.image_grid_thw for row in rows]),
                max_new_tokens=new,
                suppress_tokens=list(stops),
            )
            found += made[:, longest:].tolist()
        return found


def equal(ours: Ours, theirs: Theirs | None, new: int, batch: int, turns: int) -> dict[str, Any]:
    """Answers of equal length, beside transformers'."""
    tokens = new * len(ours.samples)
    own: list[float] = []
    other: list[float] = []
    alike = 0.0
    for _ in range(turns):
        seconds, made = cpu_seconds(lambda: ours.answers(ours.samples, [new] * len(ours.samples), batch))
        own.append(seconds)
        if theirs is not None:
            seconds, plain = cpu_seconds(lambda: theirs.answers(new, batch, ours.tokens.stops))
            other.append(seconds)
            # All but the last, which here is the stop token.
            alike = statistics.fmean(a[:-1] == b[:-1] for a, b in zip(made, plain, strict=True))
    found: dict[str, Any] = {"new": new, "batch": batch, "tokens_per_cpu_s": round(tokens / statistics.median(own), 1)}
    if other:
        found["transformers"] = round(tokens / statistics.median(other), 1)
        found["ratio"] = round(statistics.median(b / a for a, b in zip(own, other, strict=True)), 3)
        found["answers_alike"] = alike
    return found


class Before:
    """The decoder of an earlier checkout, in a process of its own."""

    def __init__(self, checkout: Path, work: Workload, lengths: Sequence[int], batch: int, threads: int):
        told = json.dumps([str(work.model), str(work.records), list(lengths), batch, threads])
        script = Path(__file__).with_name("decode_before.py").resolve()
        environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
        words = [sys.executable, str(script), told]
        self.process = subprocess.Popen(
            words, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise click.ClickException("the decoder of --before has ended; its message stands above")
        return line

    def seconds(self) -> float:
        """Answer all rows; CPU-seconds of that process."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return float(json.loads(self._line()))


def mixed(ours: Ours, before: Before | None, lengths: Sequence[int], batch: int, turns: int) -> dict[str, Any]:
    """Answers of unlike length, beside batches that wait for their longest."""

    def waiting() -> Iterator[list[int]]:
        for at in range(0, len(lengths), batch):
            some = ours.samples[at : at + batch]
            yield from ours.answers(some, [max(lengths[at : at + batch])] * len(some), batch)

    def fixed() -> float:
        return before.seconds() if before else cpu_seconds(lambda: list(waiting()))[0]

    def own() -> float:
        return cpu_seconds(lambda: ours.answers(ours.samples, lengths, batch))[0]

    pairs = [(own(), fixed()) for _ in range(turns)]
    # Both read the same prompts.
    reading = cpu_seconds(lambda: ours.answers(ours.samples, [1] * len(lengths), batch))[0]
    rates = [round(sum(lengths) / statistics.median(side), 1) for side in zip(*pairs, strict=True)]
    some = [lengths[at : at + batch] for at in range(0, len(lengths), batch)]
    needed = sum(lengths) / sum(max(one) * len(one) for one in some)
    return {
        "rows": len(lengths),
        "new": [min(lengths), round(statistics.fmean(lengths), 1), max(lengths)],
        "tokens_per_cpu_s": rates[0],
        "before" if before else "fixed_batches": rates[1],
        "ratio": round(statistics.median(fixed / own for own, fixed in pairs), 3),
        "ratio_without_prompts": round(statistics.median((b - reading) / (a - reading) for a, b in pairs), 3),
        # If only rows that still write cost anything, each what it costs the fixed batches.
        "most": round(statistics.median(b / (reading + (b - reading) * needed) for _, b in pairs), 3),
    }


def several(ours: Ours, samples: int, turns: int) -> dict[str, Any]:
    """First tokens of several answers to one prompt, over that of one."""
    first = ours.samples[:1]

    def seconds(each: int) -> float:
        return cpu_seconds(lambda: ours.answers(first, [1], samples, each))[0]

    pairs = [(seconds(samples), seconds(1)) for _ in range(5 * turns)]
    ratio = statistics.median(many for many, _ in pairs) / statistics.median(one for _, one in pairs)
    return {"answers": samples, "ratio": round(ratio, 3)}


@click.command()
@click.option("--preset", type=click.Choice([*PRESETS]), default="bench-87m", show_default=True)
@click.option("--against", type=click.Choice(["transformers"]))
@click.option("--before", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A checkout of b24ddd1.")
@click.option("--part", multiple=True, type=click.Choice(["equal", "samples", "mixed"]), help="This alone.")
@click.option("--rows", default=64, show_default=True)
@click.option("--batch", default=16, show_default=True, help="Rows that decode at a time.")
@click.option("--new", default=128, show_default=True, help="Tokens of answers of equal length.")
@click.option("--shortest", default=10, show_default=True)
@click.option("--longest", default=300, show_default=True)
@click.option("--samples", default=8, show_default=True)
@click.option("--turns", default=3, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(preset: str, against: str | None, before: Path | None, part: tuple[str, ...], rows: int, batch: int, new: int, shortest: int, longest: int, samples: int, turns: int, threads: int, seed: int) -> None:  # fmt: skip  # noqa: E501
    """Time decoding and print a JSON line a part."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch

    torch.set_num_threads(threads)
    draw = random.Random(seed)
    lengths = [round(shortest * (longest / shortest) ** draw.random()) for _ in range(rows)]
    with tempfile.TemporaryDirectory(prefix="mirage-decode-") as place:
        work = make_workload(Path(place), preset, rows, "vsp", seed)
        ours = Ours(work, rows)
        # The model takes its time to become warm.
        ours.answers(ours.samples[:2], [2, 2], batch)
        few = Ours(work, batch)
        theirs = Theirs(work, few.samples) if against else None
        earlier = Before(before, work, lengths, batch, threads) if before else None
        sizes = [len(one.input_ids) for one in ours.samples]
        case = {"preset": preset, "prompts": [min(sizes), max(sizes)], "threads": threads, "turns": turns}
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "equal": lambda: equal(few, theirs, new, batch, turns),
            "samples": lambda: several(ours, samples, turns),
            "mixed": lambda: mixed(ours, earlier, lengths, batch, turns),
        }
        for name, measure in parts.items():
            if part and name not in part:
                continue
            print(json.dumps({"part": name, **case, **measure()}), flush=True)


if __name__ == "__main__":
    main()
