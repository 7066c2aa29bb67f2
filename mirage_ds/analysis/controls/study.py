"""From a model folder and a records file to the whole report."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mirage_ds.analysis.bench import Bench
from mirage_ds.analysis.controls.paths import run_paths
from mirage_ds.analysis.controls.report import summarize
from mirage_ds.analysis.controls.run import run_conditions
from mirage_ds.analysis.controls.spec import PATH, ControlsSpec
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import Decoder, Track, need_latents, run_limits
from mirage_ds.evaluate.report import Asked


def study(
    decoder: Decoder, names: Sequence[str], spec: ControlsSpec, asked: Asked, track: Track = iter
) -> dict[str, Any]:
    """Run the conditions on a records file.

    Args:
        names: as spec.parse_names gives them; asked: the records, with their answers.

    Returns:
        {"task", "model", "data", "settings", "hashes", "conditions", "answers", "path"}; the last ones where asked for.

    Raises:
        UserError: an open length of blocks, a fault in a record, or a condition that cannot be made of these records.
    """
    need_latents(decoder)
    # With a fixed number of slots the longest block has no say.
    limits = run_limits(decoder, spec.max_new_tokens, 0, spec.run_length, spec.prefill_tokens)
    k = limits.fixed_run
    if not k:
        raise UserError(
            f"--run_length: conditions are compared at the same number of slots, at least 1, and {decoder.folder} does "
            "not say how many it was trained with; give the number"
        )
    records, task, digest = asked
    helpers = decoder.latent_encoder("stage1", k)
    grounded = Bench(decoder.loaded.model, decoder.tower, helpers, limits)
    bench = grounded if "oracle" in names else replace(grounded, encoder=replace(helpers, stage="stage2"))
    pixels: Any = helpers.images.size
    report: dict[str, Any] = {
        "task": task,
        "model": str(decoder.folder),
        "data": str(spec.data_path),
        "settings": {
            "latents": names,
            "slots": k,
            "decoding": "greedy",
            "max_new_tokens": limits.new_tokens,
            "seed": spec.seed,
            "batch_size": spec.batch_size,
            "min_pixels": pixels["shortest_edge"],
            "max_pixels": pixels["longest_edge"],
            "device": bench.device.type,
            "dtype": str(bench.model.head.weight.dtype).removeprefix("torch."),
        },
        "hashes": {"data": digest},
    }
    if PATH in names:
        # First, since it refuses soonest.
        report["path"] = run_paths(grounded, records, task, spec.seed, spec.batch_size, track)
    others = [name for name in names if name != PATH]
    if others:
        outcomes = run_conditions(bench, records, others, spec.seed, spec.batch_size, track)
        report["conditions"], report["answers"] = summarize(records, outcomes, task, spec.seed)
    return report
