"""The decoder of an earlier checkout, for benchmarks.decode: run with that checkout as the working directory.

Told a model folder, records, lengths of answers and a batch size, it prints a line once it stands; then, for each line
that it reads, the CPU-seconds of answering all rows in fixed batches, each as long as its longest answer.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer as often as it is asked."""
    import torch

    from mirage_ds.data.images import ImageFinder
    from mirage_ds.data.record_files import scan
    from mirage_ds.evaluate import load_decoder  # type: ignore[attr-defined]  # the earlier checkout's
    from mirage_ds.model import generate as there

    model, records, lengths, batch, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    decoder: Any = load_decoder(Path(model), ImageFinder.beside(Path(records), None))
    encoder, tower = decoder.encoder, decoder.loaded.tower
    samples = [encoder.encode_prompt(record, row) for row, record in enumerate(scan(Path(records))[0][: len(lengths)])]
    tokens: Any = there.latent_tokens(encoder)._replace(start=-1)  # type: ignore[attr-defined]
    stops = list(tokens.stops)

    def answer() -> int:
        from mirage_ds.data.batch import collate

        made = 0
        for at in range(0, len(samples), batch):
            own = torch.tensor(lengths[at : at + batch])

            def choose(logits: torch.Tensor, step: int, own: torch.Tensor = own) -> torch.Tensor:
                logits[:, stops] = -torch.inf
                return torch.where(own == step + 1, stops[0], logits.argmax(-1))

            packed = tower.attach(collate(samples[at : at + batch], 1, encoder.dummy(0)))
            limits: Any = there.Limits(int(own.max()))
            found: list[Any] = there.generate(decoder.loaded.model, packed, tokens, limits, choose)
            made += sum(len(one.ids) for one in found)
        return made

    print("ready", flush=True)
    for _ in sys.stdin:
        begun = time.process_time()
        made = answer()
        assert made == sum(lengths), (made, sum(lengths))
        print(json.dumps(time.process_time() - begun), flush=True)


if __name__ == "__main__":
    main()
