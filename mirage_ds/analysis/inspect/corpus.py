"""The latents of a file of records, beside image features and text embeddings.

N rows, k latents a latent block, F features, W words, H hidden, c components.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from mirage_ds.analysis.bench import Bench
from mirage_ds.analysis.inspect import measure, probe
from mirage_ds.analysis.inspect.look import see
from mirage_ds.analysis.inspect.run import taught
from mirage_ds.data.record import Record
from mirage_ds.evaluate.decoder import Track

# Vectors of a kind that go into the components: enough for a picture, and no kind outweighs the others by far.
MOST_VECTORS = 500


class Corpus(NamedTuple):
    """What a file's rows hold, all float32 on the CPU; of each row the first latent block.

    Attributes:
        records: N records.
        sources: what a probe reads → (N, k · H), or (N, H) of one latent: the latents; the helpers' targets, unless a
            row has none; the input images' features averaged to k as a helper's are, unless one has too few.
        kinds: kind of vector → some of them (≤ MOST_VECTORS, H).
    """

    records: list[Record]
    sources: dict[str, torch.Tensor]
    kinds: dict[str, torch.Tensor]


class Projection(NamedTuple):
    """Vectors on two principal components: kind → (·, 2) coordinates, and each component's share of the variance."""

    points: dict[str, torch.Tensor]
    share: torch.Tensor


def _some(vectors: torch.Tensor) -> torch.Tensor:
    """Draw at most MOST_VECTORS of vectors (·, H), the same in each call."""
    drawn = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:MOST_VECTORS]
    return vectors[drawn.sort().values]


def gather(bench: Bench, records: Sequence[Record], batch_size: int, track: Track = iter) -> Corpus:
    """Run records with their answers given, and keep the latents of their first blocks.

    Args:
        bench: with an encoder of stage2.
        records: each with a latent block.

    Raises:
        RecordError: a record cannot be used, or an image is missing or does not decode.
    """
    encoder, k = bench.encoder, bench.encoder.latent_size
    latents, images, helpers, words = [], [], [], set()
    # So many features a row are kept for the components; all of them might not fit.
    few = -(-MOST_VECTORS // len(records))
    features: dict[str, list[torch.Tensor]] = {"input image features": [], "helper image features": []}
    for part in track([records[at : at + batch_size] for at in range(0, len(records), batch_size)]):
        thoughts = taught(bench, [encoder.encode(record, row) for row, record in enumerate(part)])
        for record, thought in zip(part, thoughts, strict=True):
            inputs, own = see(bench, record, thought)
            latents.append(thought.latents[0].float().cpu())
            if inputs:
                features["input image features"].append(_some(thought.images.float().cpu())[:few])
            if len(thought.images) >= k:
                images.append(measure.targets(thought.images[None], k).cpu())
            if own:
                helpers.append(measure.targets(own[0].features, k, encoder.compress).cpu())
                features["helper image features"].append(_some(own[0].features.flatten(0, 1).float().cpu())[:few])
            words |= set(thought.ids.tolist())
    ids = torch.tensor(sorted(words - set(encoder.tokenizer.all_special_ids)), device=bench.device)
    stacked = torch.stack(latents)
    each = {f"latent {number + 1}": stacked[:, number] for number in range(k)}
    sources = {"all latents": stacked.flatten(1), **each}
    for source, pooled in (("helper targets", helpers), (probe.POOLED, images)):
        if len(pooled) == len(records):
            sources[source] = torch.stack(pooled).flatten(1)
    kinds = {
        "text embeddings": bench.model.language_model.embed_tokens.weight.detach()[ids].float().cpu(),
        **{name: torch.cat(vectors) for name, vectors in features.items() if vectors},
        **each,
    }
    return Corpus(list(records), sources, {name: _some(vectors) for name, vectors in kinds.items()})


def project(kinds: dict[str, torch.Tensor], unit: bool) -> Projection:
    """Lay all kinds of vectors on the two components of greatest variance of them together.

    Args:
        unit: bring each vector to length 1 first, so that directions alone matter.
    """
    if unit:
        kinds = {name: functional.normalize(vectors.float(), dim=-1) for name, vectors in kinds.items()}
    points, share = measure.components(torch.cat(list(kinds.values())))
    each = points.split([len(vectors) for vectors in kinds.values()])
    return Projection(dict(zip(kinds, each, strict=True)), share)


def readings(corpus: Corpus, asked: probe.Questions) -> dict[str, dict[str, probe.Reading]]:
    """Probe what the latents hold, and beside it what their targets and the input image hold in as many numbers.

    Returns:
        Question → what is read → Reading.
    """
    found: dict[str, dict[str, probe.Reading]] = {block: {} for block in asked.blocks}
    for source, x in corpus.sources.items():
        for block, reading in probe.read(x[asked.rows], asked).items():
            found[block][source] = reading
    return found
