"""Every record under every condition: from a model folder and a records file to the whole report.

N rows of a batch, R latent blocks of a row, k latents a block, H hidden.

Two rounds over the records. The first decodes them as usual and keeps the own latents of all; from these the vectors
of the other conditions are made, which the second round feeds.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mirage_ds.analysis.alike import measures, rows_of
from mirage_ds.analysis.bench import Bench
from mirage_ds.analysis.controls import bank, teach
from mirage_ds.analysis.controls.conditions import KNOWN, First, Given, Material, choose_partners, fixed_slots
from mirage_ds.analysis.controls.paths import run_paths
from mirage_ds.analysis.controls.report import summarize, tell, told
from mirage_ds.analysis.controls.spec import PATH, ControlsSpec, parse_names
from mirage_ds.analysis.controls.teach import Outcome, Row, check, decode, in_batches
from mirage_ds.analysis.inspect import probe
from mirage_ds.config.extras import need
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.progress import track
from mirage_ds.data.record import Record
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import Decoder, Track, answer_of, load_decoder, need_latents, run_limits
from mirage_ds.evaluate.report import Asked, prompt_hash, read_asked
from mirage_ds.files import check_output
from mirage_ds.model.folder import read_targets
from mirage_ds.model.rows import Generated
from mirage_ds.model.targets import load_targets
from mirage_ds.tasks import level_of

# Rows that the probe reads, as `mirage-ds inspect` does without --most: its time grows with their cube.
PROBED, SOURCE = 1000, "all latents"


def likelihood(name: str, vectors: Sequence[torch.Tensor], bench: Bench, rows: Sequence[Row]) -> list[float]:
    """Log-likelihood of the rows' answers with the slots filled in another way than `own`.

    Args:
        vectors: what is fed where it is known beforehand, (R, k, H) a row.
    """
    if name == "first":
        return teach.first(bench, rows)
    # Off: latent tokens are never emitted, and left out of the answer that is scored.
    return teach.off(bench, rows) if name == "off" else teach.given(bench, rows, vectors)


def run_conditions(
    bench: Bench, records: Sequence[Record], names: Sequence[str], spec: ControlsSpec, track: Track = iter
) -> tuple[dict[str, list[Outcome]], list[torch.Tensor]]:
    """Answer every record under `own` and the conditions named.

    Args:
        records: with answers and latent blocks; with helper images where "oracle" is among `names`.
        spec: its seed, batch_size and latent_bank; a record's draws do not depend on the records beside it.

    Returns:
        Name → an Outcome a record, in the order given; and each record's own latents (R, k, H), as teach.own's states.

    Raises:
        UserError: a record that cannot be used, or a condition that cannot be made of these records.
    """

    def outcomes(decoded: Sequence[Generated], log_likelihoods: Sequence[float]) -> list[Outcome]:
        answers = [answer_of(one, bench.encoder) for one in decoded]
        return [Outcome(*one) for one in zip(answers, log_likelihoods, strict=True)]

    def own(rows: Sequence[Row]) -> Iterator[Any]:
        fed, states, log_likelihoods = teach.own(bench, rows)
        answers = outcomes(decode(bench, rows, [None])[0], log_likelihoods)
        return zip(fed, states, [row.targets for row in rows], answers, strict=True)

    # All conditions but `own`, which comes first, are answered at once.
    order = check(records, bench, max(1, len(set(names) - {"own"})))
    latents, states, targets, found = zip(*in_batches(bench, records, order, spec.batch_size, track, own), strict=True)
    if spec.latent_bank:
        for place, (record, fed) in enumerate(zip(records, latents, strict=True)):
            bank.write(spec.latent_bank, prompt_hash(record, bench.encoder.finder), fed, place + 1, level_of(record))
    material = Material(
        own=list(latents),
        targets=[one for one in targets if one is not None],
        partners=choose_partners(records, spec.seed) if "swap" in names else [],
        pad=bench.model.language_model.embed_tokens.weight[bench.tokens.pad].detach().cpu(),
        seed=spec.seed,
    )
    vectors = {name: KNOWN[name](material) if name in KNOWN else [] for name in names if name != "own"}

    def others(rows: Sequence[Row]) -> Iterator[Any]:
        given = {name: [own[row.sample.row] for row in rows] if own else [] for name, own in vectors.items()}
        feeds = [First() if name == "first" else Given(own) if own else None for name, own in given.items()]
        answers = decode(bench, rows, feeds, [*given].index("off") if "off" in given else None)
        found = (likelihood(name, own, bench, rows) for name, own in given.items())
        return zip(*(outcomes(*both) for both in zip(answers, found, strict=True)), strict=True)

    rest = in_batches(bench, records, order, spec.batch_size, track, others) if vectors else []
    return {"own": list(found), **{name: [one[at] for one in rest] for at, name in enumerate(vectors)}}, list(states)


def looked_at(records: Sequence[Record], own: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Measure the first blocks of own latents (R, k, H).

    Returns:
        {"latents": alike.measures, "probe": "question (size of the board)" → probe.Reading}, of the first rows.
    """
    blocks = torch.stack([one[0] for one in own[:PROBED]])
    found: dict[str, Any] = {"latents": measures(blocks[: rows_of(blocks.shape[1])]), "probe": {}}
    # A task of one's own may call something else map_desc.
    with suppress(UserError):
        for one in probe.boards(records[:PROBED]):
            for question, read in probe.read({SOURCE: blocks.flatten(1)}, one).items():
                found["probe"][f"{question} ({one.name})"] = read[SOURCE]._asdict()
    return found


def study(
    decoder: Decoder, names: Sequence[str], spec: ControlsSpec, asked: Asked, track: Track = iter
) -> dict[str, Any]:
    """Run the conditions on a records file.

    Args:
        names: as spec.parse_names gives them; asked: the records, with their answers.

    Returns:
        {"task", "model", "data", "settings", "hashes", "conditions", "answers", "path"}, the last ones where asked for,
        and with conditions what `looked_at` returns.

    Raises:
        UserError: an open length of blocks, a fault in a record, or a condition that cannot be made of these records.
    """
    need_latents(decoder, regions=not {"oracle", PATH} & set(names))
    # With a fixed number of slots the longest block has no say.
    room = dict(prefill_tokens=spec.prefill_tokens, rows=spec.batch_size, cache_gb=spec.cache_gb)
    limits = run_limits(decoder, spec.max_new_tokens, 0, spec.run_length, **room)
    k = fixed_slots(decoder, limits)
    records, task, digest = asked
    helpers = decoder.latent_encoder("stage1", k)
    targets = None
    if spec.latent_targets:
        targets = load_targets(spec.latent_targets, decoder.loaded.config, k, decoder.tower)
    grounded = Bench(decoder.loaded.model, decoder.tower, helpers, limits, targets)
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
            **({"latent_targets": targets.digest} if targets else {}),
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
        outcomes, own = run_conditions(bench, records, others, spec, track)
        report["conditions"], report["answers"] = summarize(records, outcomes, task, spec.seed)
        report |= looked_at(records, own)
    return report


def run_controls(folder: Path, spec: ControlsSpec) -> None:
    """Run the study, print its tables, and write the files asked for."""
    names = parse_names(spec.latents)
    if spec.latent_targets and not {"oracle", PATH} & set(names):
        raise UserError("--latent_targets: none of --latents is fed them; add oracle to --latents, or leave it out")
    if spec.latent_targets:
        read_targets(spec.latent_targets)
    if PATH in names:
        need("vsp", "--latents path")
    for flag, file in (("--out", spec.out), ("--markdown", spec.markdown), ("--latent_bank", spec.latent_bank)):
        if file:
            check_output(file, flag, folder=file is spec.latent_bank)
    asked = read_asked(spec, answers=True)
    finder = ImageFinder.beside(spec.data_path, spec.image_root)
    decoder = load_decoder(folder, finder, spec.processor, True, spec.pixels, spec.helper_pixels)
    found = study(decoder, names, spec, asked, partial(track, title="answering"))
    tell(found, told(found), spec.out, spec.markdown)
