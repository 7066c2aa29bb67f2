"""The rows and the model that the speed benchmarks run on, made in a folder of their own.

`vsp`: VSP planning maps of levels 3 to 6 as in the benchmark (64 px a cell), the public prompt, a rationale by rule:
rows of the length of the public data's. `mixed`: the same rows with texts of very different lengths in front.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

Source = Literal["vsp", "mixed"]
# So many entries make rows of VSP planning about as long as the public vocabulary does.
TOKENIZER_SIZE = 576
# A mixed row's text begins with so many repetitions of a sentence, drawn log-uniformly.
LONGEST_FILLER = 64
FILLER = "The agent looks at the map once more. "


class Workload(NamedTuple):
    """A model folder and records beside it."""

    model: Path
    records: Path


def make_workload(
    out: Path, preset: str, rows: int, source: Source, seed: int = 0, model: Path | None = None,
    records: Path | None = None,
) -> Workload:  # fmt: skip
    """Write `rows` records with their images and a random model of `preset` whose tokenizer knows their text.

    Args:
        model, records: what is there already.
    """
    from mirage_ds.model.init import init_model
    from mirage_ds.tasks.board_task import BuildSpec
    from mirage_ds.tasks.build import build

    if records is None:
        build("vsp-spatial-planning", BuildSpec(out=out / "data", count=rows, answer="cot", seed=seed))
        records = out / "data/data.jsonl"
        if source == "mixed":
            _lengthen(records, seed)
    if model is None:
        model = out / "model"
        init_model(preset, model, texts=[records], tokenizer_size=TOKENIZER_SIZE)
    return Workload(model, records)


def _lengthen(records: Path, seed: int) -> None:
    import numpy as np

    random = np.random.default_rng(seed)
    lines: list[dict[str, Any]] = [json.loads(line) for line in records.read_text().splitlines()]
    for line in lines:
        line["text_input"] = FILLER * int(LONGEST_FILLER ** random.random()) + line["text_input"]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))


def encode(work: Workload, stage: Any, k: int, most: int | None = None) -> tuple[Any, list[Any]]:
    """Return the encoder and every record, or the first of them, as a Sample with pixels."""
    from mirage_ds.data.images import ImageFinder
    from mirage_ds.data.load import load_encoder
    from mirage_ds.data.record_files import scan

    encoder = load_encoder([str(work.model)], ImageFinder.beside(work.records, None), stage, k)
    return encoder, [encoder.encode(record, row) for row, record in enumerate(scan(work.records)[0][:most])]
