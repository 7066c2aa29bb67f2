"""What `mirage-ds inspect` does: chosen rows in detail, and all rows of a file together.

N rows, k latents a latent block, F features, W words, H hidden.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from mirage_ds.analysis import alike
from mirage_ds.analysis.bench import Bench
from mirage_ds.analysis.controls.paths import fork_of, run_paths
from mirage_ds.analysis.controls.report import notes
from mirage_ds.analysis.inspect import draw, measure, probe, style
from mirage_ds.analysis.inspect.command import InspectSpec
from mirage_ds.analysis.inspect.look import Look, decoded, drawings, looks, see, spell, taught
from mirage_ds.analysis.inspect.page import Section, Shown, data_url, page
from mirage_ds.config.columns import parse_columns
from mirage_ds.config.extras import need
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record import Record
from mirage_ds.data.record_files import read_records
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import Track, load_decoder, need_latents
from mirage_ds.files import whole_folder, write_atomically
from mirage_ds.model.slots import Limits
from mirage_ds.tasks.vsp_planning import NAME

# Vectors of a kind that go into the components: enough for a picture, and no kind outweighs the others by far.
MOST_VECTORS = 500
# Of the other path of a map, as the default of `mirage-ds controls`.
SEED = 42


# Name → vectors, float32 on the CPU.
Vectors = dict[str, torch.Tensor]


def _some(vectors: torch.Tensor) -> torch.Tensor:
    """Draw at most MOST_VECTORS of vectors (·, H), the same in each call."""
    drawn = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:MOST_VECTORS]
    return vectors[drawn.sort().values]


def gather(bench: Bench, records: Sequence[Record], batch_size: int, track: Track = iter) -> tuple[Vectors, Vectors]:
    """Run records with their answers given, and keep the latents of their first blocks.

    Args:
        bench: with an encoder of stage2.
        records: each with a latent block.

    Returns:
        What a probe reads → (N, k · H), or (N, H) of one latent: the latents; the helpers' targets, unless a row has
        none; the input images' features averaged to k as a helper's are, unless one has too few. And kind of vector →
        some of them (≤ MOST_VECTORS, H).

    Raises:
        RecordError: a record cannot be used, or an image is missing or does not decode.
    """
    encoder, k = bench.encoder, bench.encoder.latent_size
    latents, words = [], set[int]()
    # So many features a row are kept for the components; all of them might not fit.
    few = -(-MOST_VECTORS // len(records))
    features: dict[str, list[torch.Tensor]] = {"input image features": [], "helper image features": []}
    pooled: dict[str, list[torch.Tensor]] = {"helper targets": [], probe.POOLED: []}
    for part in track([records[at : at + batch_size] for at in range(0, len(records), batch_size)]):
        thoughts = taught(bench, [encoder.encode(record, row) for row, record in enumerate(part)])
        for record, thought in zip(part, thoughts, strict=True):
            inputs, own = see(bench, record, thought)
            latents.append(thought.latents[0].float().cpu())
            if inputs:
                features["input image features"].append(_some(thought.images.float().cpu())[:few])
            if len(thought.images) >= k:
                pooled[probe.POOLED].append(measure.targets(thought.images[None], k).cpu())
            if own:
                pooled["helper targets"].append(measure.targets(own[0].features, k, encoder.compress).cpu())
                features["helper image features"].append(_some(own[0].features.flatten(0, 1).float().cpu())[:few])
            words |= set(thought.ids.tolist())
    ids = torch.tensor(sorted(words - set(encoder.tokenizer.all_special_ids)), device=bench.device)
    stacked = torch.stack(latents)
    each = {f"latent {number + 1}": stacked[:, number] for number in range(k)}
    whole = {source: torch.stack(found).flatten(1) for source, found in pooled.items() if len(found) == len(records)}
    kinds = {
        "text embeddings": bench.model.language_model.embed_tokens.weight.detach()[ids].float().cpu(),
        **{name: torch.cat(vectors) for name, vectors in features.items() if vectors},
        **each,
    }
    sources = {"all latents": stacked.flatten(1), **each, **whole}
    return sources, {name: _some(vectors) for name, vectors in kinds.items()}


def _keep(folder: Path, name: str, figure: Figure, kind: str) -> Shown:
    """Write a figure into the folder, and return it for the page."""
    content = style.png(figure)
    (folder / f"{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}.png").write_bytes(content)
    return Shown(data_url(content), name, style.caption(kind))


def _numbers(look: Look) -> dict[str, Any]:
    """Return what a script may want of a latent block."""
    return {
        "norms": look.norms.tolist(),
        "median_norm_of_input_embeddings": float(look.word_norms.median()),
        "cosine_to_targets": None if look.to_targets is None else look.to_targets.tolist(),
        "attention_to_latents": look.attention.mean(1).tolist() if look.answer else None,
        "attention_evenly_spread": look.uniform if look.answer else None,
        "nearest": [[look.spellings[one] for one in ids] for ids in look.nearest.ids.tolist()],
        "lens": [[look.spellings[one] for one in ids] for ids in look.lens.ids.tolist()],
    }


def _row(folder: Path, bench: Bench, record: Record, row: int, decode: bool) -> tuple[list[Section], dict[str, Any]]:
    """Study one row: with its answer given, and with `decode` by the model's own decoding too."""
    encoder = bench.encoder
    question = [("question", record.text_input), ("answer", record.text_output)]
    studied = [("answer given", taught(bench, [encoder.encode(record, row)])[0], question)]
    if decode:
        prompt = encoder.encode_prompt(record, row)
        thought = decoded(bench, prompt)
        text = "".join(spell(encoder, token) for token in thought.ids[len(prompt.input_ids) :].tolist())
        said = ("decoded, without the token that ended it", text.replace("␣", " "))
        studied.append(("decoded", thought, [*question, said]))
    sections, numbers = [], {}
    for kind, thought, facts in studied:
        title = f"row {row} (line {record.line}), {kind}"
        if not thought.runs:
            sections.append(Section(title, facts=facts, text="The model opened no latent block."))
        for look in looks(bench, record, thought, title):
            shown = [_keep(folder, f"{look.title} {name}", made, name) for name, made in drawings(look).items()]
            sections.append(Section(look.title, shown, facts))
            numbers[look.title] = _numbers(look)
    return sections, numbers


def questions_for(records: Sequence[Record], labels: Sequence[str], finder: ImageFinder) -> list[probe.Questions]:
    """Choose what the probe is asked: of boards where there are enough, and of the labels."""
    return probe.boards(records) + [probe.labelled(records, label, finder) for label in dict.fromkeys(labels)]


def _alike(found: Mapping[str, float], followed: Mapping[str, Any] | None) -> list[Section]:
    """Write how alike latents are, and what answers follow, where that was asked."""
    facts = [(alike.LABELS[name], f"{value:.3f}") for name, value in found.items()]
    sections = [Section("How alike the latents are", facts=facts, text=alike.sentence(found))]
    if followed:
        sections.append(Section("Which path answers follow", text=notes({"path": followed})[0]))
    return sections


def _together(
    folder: Path, sources: Vectors, kinds: Vectors, file: str, asked: Sequence[probe.Questions]
) -> tuple[list[Section], dict[str, Any], str]:
    """Study all rows of a file: components and probe; and say what came out."""
    found, heading = [probe.read(sources, one) for one in asked], "What can be read from the latents"
    numbers: dict[str, Any] = {}
    with style.styled():
        title = f"{file}, {len(sources['all latents'])} rows: latents among image features and text embeddings"
        raw, unit = (measure.project(kinds, unit) for unit in (False, True))
        figure = draw.pca(raw, unit, title)
        sections = [Section("Where the latents lie", [_keep(folder, "pca", figure, "pca")])]
        for one, read in zip(asked, found, strict=True):
            what = f"boards of {one.name}" if one.unit == "maps" else one.name
            figure = draw.reads(read, f"{file}, {what}: what a linear probe reads", one.unit)
            shown = _keep(folder, f"probe {one.name}", figure, "probe")
            sections.append(Section(f"{heading}: {what}", [shown], readings=read))
            numbers[one.name] = {
                block: {source: r._asdict() for source, r in sources.items()} for block, sources in read.items()
            }
    if not found:
        needs = f"--label, or map_desc in the records, and {probe.FEWEST_MAPS} different pictures"
        sections.append(Section(heading, text=f"No linear probe: it needs {needs}."))
    return sections, numbers, probe.sentence(asked, found)


def inspect_file(folder: Path, spec: InspectSpec, track: Track = iter) -> tuple[Path, str]:
    """Write pictures, numbers.json and index.html about a model's latents into a new folder.

    Returns:
        The page, and what came out in one sentence.

    Raises:
        UserError: what the user can fix in the model, the records or the flags. RecordError: in a record.
    """
    file, rows = spec.data_path, list(dict.fromkeys(spec.rows)) or [0]
    if spec.out.exists():
        raise UserError(f"--out {spec.out} exists; remove it, or choose another")
    records = read_records(file, columns=parse_columns(spec.columns))
    for row in rows:
        if row >= len(records):
            raise UserError(f"--rows {row}: {file} has the rows 0 to {len(records) - 1}; choose among them")
        if not records[row].runs:
            what = f"the record on line {records[row].line} of {file} has no latent block"
            raise UserError(f"--rows {row}: {what}; choose a row with a helper image, or with its mark in the answer")
    with_latents = [record for record in records if record.runs][: spec.most]
    finder = ImageFinder.beside(file, spec.image_root)
    asked = questions_for(with_latents, spec.label, finder)
    forked = spec.decode and any(fork_of(record, SEED) for record in with_latents)
    if forked:
        need("vsp", "--decode of maps with two shortest paths")
    decoder = load_decoder(folder, finder, spec.processor, True, spec.pixels, spec.helper_pixels)
    need_latents(decoder, regions=False)
    k = spec.latent_size or decoder.trained.get("latent_size")
    if k is None:
        file = decoder.folder / "config.json"
        raise UserError(f"{file} does not say how many latents it was trained with; give --latent_size")
    limits = Limits(new_tokens=spec.max_new_tokens, fixed_run=k, bottleneck=decoder.bottleneck)
    bench = Bench(decoder.loaded.model, decoder.tower, decoder.latent_encoder("stage2", k), limits)
    grounded = replace(bench, encoder=decoder.latent_encoder("stage1", k))
    followed = run_paths(grounded, with_latents, NAME, SEED, spec.batch_size, track) if forked else None
    facts = [("model", str(folder)), ("records", str(file)), ("latents a latent block (k)", str(k))]
    sections, numbers = [Section("", facts=facts)], dict[str, Any]()
    with whole_folder(spec.out) as work:
        for row in rows:
            made, measured = _row(work, bench, records[row], row, spec.decode)
            sections += made
            numbers |= measured
        sources, kinds = gather(bench, with_latents, spec.batch_size, track)
        made, read, said = _together(work, sources, kinds, file.name, asked)
        found = alike.measures(sources["all latents"].unflatten(1, (k, -1))[: alike.rows_of(k)])
        said = f"{alike.sentence(found)} {said}".strip()
        write_atomically(
            work / "index.html", page("Latents", escape(said), [*sections, *_alike(found, followed), *made])
        )
        whole = {"words": said, "rows": numbers, "probe": read, "latents": found, "path": followed}
        write_atomically(work / "numbers.json", json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    return spec.out / "index.html", said
