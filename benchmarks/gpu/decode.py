"""How fast answers come: `python -m benchmarks.gpu.decode MODEL RECORDS`; one JSON line.

N rows decode together, greedily, each a block of four latents if it opens one; none of them ends before the limit.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("records", type=click.Path(exists=True, path_type=Path))
@click.option("--rows", default=32, show_default=True)
@click.option("--new", default=64, show_default=True, help="Tokens of an answer.")
def main(model: Path, records: Path, rows: int, new: int) -> None:
    """Decode and print seconds of the prompts with their pictures, milliseconds a step and tokens/s."""
    import torch

    from benchmarks.step import finish
    from mirage_ds.data.images import ImageFinder
    from mirage_ds.data.record_files import scan
    from mirage_ds.evaluate.decoder import load_decoder
    from mirage_ds.evaluate.prompts import prompts_of
    from mirage_ds.model.generate import Limits, generate
    from mirage_ds.model.slots import latent_tokens

    decoder = load_decoder(model, ImageFinder.beside(records, None))
    net, encoder = decoder.loaded.model, decoder.encoder
    device = net.head.weight.device.type
    samples = [encoder.encode_prompt(record, number) for number, record in enumerate(scan(records)[0][:rows])]
    prompts = prompts_of(net, decoder.tower, encoder, samples)
    endless = latent_tokens(encoder)._replace(stops=())

    def seconds(tokens: int) -> float:
        finish(device)
        begun = time.perf_counter()
        generate(net, prompts, endless, Limits(tokens, fixed_run=4))
        finish(device)
        return time.perf_counter() - begun

    # Libraries start up in the first.
    _, one, many = seconds(4), seconds(1), seconds(new)
    found = {
        "rows": len(samples),
        "prompts_s": round(one, 3),
        "ms_a_step": round((many - one) / (new - 1) * 1e3, 2),
        "tokens_per_s": round(len(samples) * (new - 1) / (many - one)),
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device == "cuda" else None,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
