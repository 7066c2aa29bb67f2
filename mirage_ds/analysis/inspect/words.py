"""What a probe has read, in one sentence."""

from collections.abc import Mapping, Sequence

from mirage_ds.analysis.controls.statistics import visible_lift
from mirage_ds.analysis.controls.words import MISSED, listed
from mirage_ds.analysis.inspect.probe import POOLED, Questions, Reading

USED = "whether the answer uses the latents, only `mirage-ds controls` tells"
UNTESTED = f"Nothing was tested: a probe needs --label with a key of the records, and {USED}."


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
