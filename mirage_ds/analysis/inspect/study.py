"""What `mirage-ds inspect` does: chosen rows in detail, and all rows of a file together.

k latents a latent block.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirage_ds.analysis.bench import Bench
from mirage_ds.analysis.inspect.corpus import Corpus, gather, project, readings
from mirage_ds.analysis.inspect.live import drawings, looks
from mirage_ds.analysis.inspect.look import Look, spell
from mirage_ds.analysis.inspect.page import Section, Shown, page
from mirage_ds.analysis.inspect.probe import FEWEST_MAPS, Questions, labelled, questions
from mirage_ds.analysis.inspect.run import decoded, taught
from mirage_ds.analysis.inspect.spec import InspectSpec
from mirage_ds.analysis.inspect.words import sentence
from mirage_ds.config.columns import parse_columns
from mirage_ds.config.extras import need
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record import Record, RecordError
from mirage_ds.data.record_files import read_records
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import Track, load_decoder, need_latents
from mirage_ds.files import whole_folder, write_atomically
from mirage_ds.model.generate import Limits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTIONS = {
    "similarity": "Each square is one feature of the image. One scale an image: compare the latents with each other.",
    "words": "Words by the cosine of their output vectors to the latent, and as the head would emit them. numbers.json "
    "has them unshortened.",
    "norms": "Left: a state that is fed back far outside the inputs' norms is an input that the layers never saw "
    "before they were trained on it. Right: stage 1 pulls the diagonal to one; the other columns show how alike the "
    "targets are anyway.",
    "attention": "Probabilities of the softmax, computed anew from queries and keys. Rows of the left panel sum to "
    "100 %. Much attention does not prove that the latents matter, and little does not prove the contrary.",
    "pca": "Principal components of all kinds together; in brackets how many vectors of each. On the left a kind with "
    "long vectors decides what is seen, on the right only directions count. Of each row the first latent block.",
    "probe": "Ridge regression, five folds; no fold shares a map, nor a rotation or reflection of one, with another "
    "(of a label: an input picture). Bars are 95 % intervals (Wilson, each map or picture once). The dashed line is "
    "what the commonest answer gets. Cells: ice, hole, start or goal. Helper targets are what stage 1 pulls the "
    "latents to; the input image's features are averaged to as many vectors as there are latents.",
}


def check_rows(records: Sequence[Record], rows: Sequence[int], file: Path) -> None:
    """Refuse rows, counted from 0, that are not there or have no latent block."""
    for row in rows:
        if row >= len(records):
            raise UserError(f"--rows {row}: {file} has the rows 0 to {len(records) - 1}; choose among them")
        if not records[row].runs:
            raise UserError(
                f"--rows {row}: the record on line {records[row].line} of {file} has no latent block; choose a row "
                "with a helper image, or with its mark in the answer"
            )


def _keep(folder: Path, name: str, figure: Figure, caption: str) -> Shown:
    """Write a figure into the folder, and return it for the page."""
    from mirage_ds.analysis.inspect.style import png

    content = png(figure)
    (folder / f"{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}.png").write_bytes(content)
    return Shown(content, name, caption)


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
            made = drawings(look).items()
            shown = [_keep(folder, f"{look.title} {name}", figure, CAPTIONS[name]) for name, figure in made]
            sections.append(Section(look.title, shown, facts))
            numbers[look.title] = _numbers(look)
    return sections, numbers


def _asked(records: Sequence[Record], labels: Sequence[str], finder: ImageFinder) -> list[Questions]:
    """Choose what the probe is asked: of boards where there are enough, and of the labels."""
    boards = [one for one in questions(records) if len(set(one.groups)) >= FEWEST_MAPS]
    return boards + [labelled(records, label, finder) for label in dict.fromkeys(labels)]


def _together(
    folder: Path, corpus: Corpus, file: Path, asked: Sequence[Questions]
) -> tuple[list[Section], dict[str, Any], str]:
    """Study all rows of a file: components and probe; and say what came out."""
    from mirage_ds.analysis.inspect import draw, style

    found, heading = [readings(corpus, one) for one in asked], "What can be read from the latents"
    title = f"{file.name}, {len(corpus.records)} rows: latents among image features and text embeddings"
    with style.styled():
        figure = draw.pca(project(corpus.kinds, unit=False), project(corpus.kinds, unit=True), title)
        sections = [Section("Where the latents lie", [_keep(folder, "pca", figure, CAPTIONS["pca"])])]
        for one, read in zip(asked, found, strict=True):
            what = f"boards of {one.name}" if one.unit == "maps" else one.name
            figure = draw.reads(read, f"{file.name}, {what}: what a linear probe reads", one.unit)
            shown = _keep(folder, f"probe {one.name}", figure, CAPTIONS["probe"])
            sections.append(Section(f"{heading}: {what}", [shown], readings=read))
    if not found:
        text = f"No linear probe: it needs --label, or map_desc in the records, and {FEWEST_MAPS} different pictures."
        sections.append(Section(heading, text=text))
    numbers = {
        one.name: {block: {source: r._asdict() for source, r in sources.items()} for block, sources in read.items()}
        for one, read in zip(asked, found, strict=True)
    }
    return sections, numbers, sentence(asked, found)


def inspect_file(folder: Path, spec: InspectSpec, track: Track = iter) -> tuple[Path, str]:
    """Write pictures, numbers.json and index.html about a model's latents into a new folder.

    Returns:
        The page, and what came out in one sentence.

    Raises:
        UserError: what the user can fix in the model, the records or the flags.
    """
    try:
        return _inspect(folder, spec, track)
    except RecordError as error:
        raise UserError(f"{spec.data_path}: record on {error}") from None


def _inspect(folder: Path, spec: InspectSpec, track: Track) -> tuple[Path, str]:
    need("plot", "inspect")
    file, rows = spec.data_path, list(dict.fromkeys(spec.rows)) or [0]
    if spec.out.exists():
        raise UserError(f"--out {spec.out} exists; remove it, or choose another")
    records = read_records(file, columns=parse_columns(spec.columns))
    check_rows(records, rows, file)
    with_latents = [record for record in records if record.runs][: spec.most]
    finder = ImageFinder.beside(file, spec.image_root)
    asked = _asked(with_latents, spec.label, finder)
    decoder = load_decoder(folder, finder, spec.processor, True, spec.pixels, spec.helper_pixels)
    need_latents(decoder)
    k = spec.latent_size or decoder.trained.get("latent_size")
    if k is None:
        raise UserError(
            f"{decoder.folder}/config.json does not say how many latents it was trained with; give --latent_size"
        )
    limits = Limits(new_tokens=spec.max_new_tokens, fixed_run=k)
    bench = Bench(decoder.loaded.model, decoder.tower, decoder.latent_encoder("stage2", k), limits)
    facts = [("model", str(folder)), ("records", str(file)), ("latents a latent block (k)", str(k))]
    sections, numbers = [Section("", facts=facts)], dict[str, Any]()
    with whole_folder(spec.out) as work:
        for row in rows:
            made, measured = _row(work, bench, records[row], row, spec.decode)
            sections += made
            numbers |= measured
        corpus = gather(bench, with_latents, spec.batch_size, track)
        made, probe, said = _together(work, corpus, file, asked)
        write_atomically(work / "index.html", page("Latents", escape(said), [*sections, *made]))
        text = json.dumps({"words": said, "rows": numbers, "probe": probe}, indent=1, ensure_ascii=False)
        write_atomically(work / "numbers.json", text + "\n")
    return spec.out / "index.html", said
