"""Encoded prompts for the decoder: rows packed with the features of their images, read as rows enter."""

from collections.abc import Callable, Sequence

from mirage_ds.data.batch import Batch, collate, deepest, to_device
from mirage_ds.data.encode import Encoder
from mirage_ds.data.sample import IGNORE, Sample
from mirage_ds.model.forward import MirageModel
from mirage_ds.model.generate import Prompts
from mirage_ds.model.targets import Targets
from mirage_ds.model.vision import FrozenTower


def pack(
    model: MirageModel,
    tower: FrozenTower,
    encoder: Encoder,
    samples: Sequence[Sample],
    recurrent: bool = False,
    targets: Targets | None = None,
) -> Batch:
    """Pack rows into a batch on the model's device, with the features of their images, or helpers' learned targets.

    Args:
        recurrent: in the passes that feed the model's own states at latents; else in one.
    """
    together = encoder.latent_passes
    passes = 1 + max(0, deepest(samples, together)) if recurrent else 1
    batch = collate(samples, passes, encoder.dummy(0), latent_passes=together)
    batch = batch if targets is None else targets.attach(batch)
    return to_device(tower.attach(batch), model.head.weight.device)


def reader(
    model: MirageModel, tower: FrozenTower, encoder: Encoder, count: int, prompt: Callable[[int], Sample]
) -> Callable[[int, int], Batch]:
    """Return what reads prompts (Prompts.read); the tower sees the images of as many as one call of it takes.

    Rows enter one or two at a time, and many small calls cost several times what a large one does.

    Args:
        prompt: encodes the i-th of `count` prompts (Encoder.encode_prompt), not before it is needed: the pixels of a
            whole file do not fit into memory.
    """
    seen: dict[int, Sample] = {}

    def see(first: int) -> None:
        some, size = list[Sample](), 0
        while first + len(some) < count and (not some or size + size // len(some) <= tower.call_patches):
            some.append(prompt(first + len(some)))
            size += len(some[-1].pixel_values) + len(some[-1].input_ids)
        batch = tower.attach(collate(some, 1, encoder.dummy(0)))
        assert batch.image_features is not None
        parts = batch.image_features.split([len(one.image_positions) for one in some])
        for place, (one, features) in enumerate(zip(some, parts, strict=True), first):
            seen[place] = one._replace(image_features=features, pixel_values=one.pixel_values[:0])

    def read(first: int, end: int) -> Batch:
        for place in range(first, end):
            if place not in seen:
                see(place)
        return pack(model, tower, encoder, [seen.pop(place) for place in range(first, end)])

    return read


def prompts_of(model: MirageModel, tower: FrozenTower, encoder: Encoder, samples: Sequence[Sample]) -> Prompts:
    """Make encoded prompts ready for the decoder; the tower runs as they enter."""
    lengths, rows = [len(sample.input_ids) for sample in samples], [sample.row for sample in samples]
    return Prompts(lengths, rows, reader(model, tower, encoder, len(samples), samples.__getitem__))


def without_helpers(sample: Sample) -> Sample:
    """Leave a row's helper images out."""
    return sample._replace(
        helper_pixel_values=sample.helper_pixel_values[:0],
        helper_grid_thw=sample.helper_grid_thw[:0],
        helper_groups=sample.helper_groups[:0],
        helper_features=None,
    )


def prompt_of(sample: Sample) -> Sample:
    """Cut a row before its first label: what Encoder.encode_prompt makes, with the features that were kept."""
    end = int((sample.labels != IGNORE).int().argmax())
    ids, labels, positions = sample.input_ids[:end], sample.labels[:end], sample.position_ids[:, :end]
    return without_helpers(sample)._replace(input_ids=ids, labels=labels, position_ids=positions, runs=())
