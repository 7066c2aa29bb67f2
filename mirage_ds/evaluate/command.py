"""`mirage-ds evaluate` and `mirage-ds generate`; the first also as one process a GPU, under a launcher.

How they decode stands in decoder.py, what `evaluate` writes in report.py. Imports stay inside the commands: `--help`
is quick.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mirage_ds.config.flags import CONTEXT, build_model, model_options
from mirage_ds.engine.place import is_rank
from mirage_ds.errors import UserError, is_text
from mirage_ds.evaluate.spec import DecodingSpec, EvaluateSpec, GenerateSpec
from mirage_ds.files import check_output
from mirage_ds.run.process import run_rank
from mirage_ds.run.stop import StopRequest

if TYPE_CHECKING:
    import torch

    from mirage_ds.data.images import ImageFinder
    from mirage_ds.evaluate.decoder import Decoder


@click.command(context_settings=CONTEXT)
@click.argument("folder", type=click.Path(path_type=Path))
@model_options(EvaluateSpec)
# Passed by some launchers; the environment says it too.
@click.option("--local_rank", hidden=True, expose_value=False)
def evaluate(folder: Path, **flags: Any) -> None:
    """Answer the records of a file and score the answers.

    The model is that in FOLDER, or a hub id; scores are per level, with 95 % intervals.

    On several GPUs: deepspeed --module mirage_ds.evaluate FOLDER … shares the records among the ranks.
    """
    from mirage_ds.data.images import ImageFinder
    from mirage_ds.data.progress import track
    from mirage_ds.engine.setup import join, shared_fate
    from mirage_ds.evaluate import report as reports
    from mirage_ds.evaluate.samples import sentence
    from mirage_ds.evaluate.tables import print_table, score_table

    spec = build_model(EvaluateSpec, flags)
    if spec.latents is not None:
        _compare_latents(folder, spec)
        return
    world = join(reports.PATIENCE_S) if is_rank(os.environ) else None
    first = world is None or world.rank == 0
    finder = ImageFinder.beside(spec.data_path, spec.image_root)
    with shared_fate(world):
        if spec.out and first:
            check_output(spec.out, "--out")
    asked = reports.on_first(partial(reports.read_asked, spec), world)
    with shared_fate(world):
        decoder = _decoder(folder, finder, spec, world.device if world else None)
    bar = partial(track, title="answering", quiet=not first)
    report = reports.evaluate_file(decoder, spec, bar, world, asked)
    with shared_fate(world):
        if first:
            for part, how in ((report, ""), (report.get("drawn"), ", latents drawn")):
                if part:
                    print_table(*score_table(part, digits=2), title=f"{report['task']}, {report['model']}{how}")
            if "samples" in report:
                click.echo(sentence(report["samples"]))
            if spec.out:
                reports.write_report(report, spec.out)
    if world:
        import torch.distributed as dist

        world.waiting.part()
        dist.destroy_process_group()


def _compare_latents(folder: Path, spec: EvaluateSpec) -> None:
    """Be `evaluate --latents`: the controls, with evaluate's flags where both have them."""
    from mirage_ds.analysis.controls.spec import ControlsSpec

    if is_rank(os.environ):
        raise UserError("--latents compares in one process: start `mirage-ds evaluate` without a launcher")
    if spec.decoding != "greedy":
        raise UserError("--latents decodes greedily, so that a difference comes from the latents: drop --decoding")
    if spec.no_latents:
        raise UserError("--latents replaces latents, and --no_latents says that there are none: drop one of them")
    from mirage_ds.analysis.controls.run import run_controls

    shared = ControlsSpec.model_fields.keys() & EvaluateSpec.model_fields.keys()
    run_controls(folder, build_model(ControlsSpec, {name: getattr(spec, name) for name in shared}))


@click.command(context_settings=CONTEXT)
@click.argument("folder", type=click.Path(path_type=Path))
@model_options(GenerateSpec)
def generate(folder: Path, **flags: Any) -> None:
    """Answer one question.

    The model is that in FOLDER; latent blocks are marked.
    """
    from mirage_ds.data.images import ImageFinder

    spec = build_model(GenerateSpec, flags)
    if not is_text(spec.prompt):
        raise UserError("--prompt: not UTF-8 text; type it in a UTF-8 terminal")
    if spec.save_latents is not None:
        if spec.save_latents.suffix != ".safetensors":
            raise UserError(f"--save_latents {spec.save_latents}: give a name that ends in .safetensors")
        check_output(spec.save_latents, "--save_latents")
    decoder = _decoder(folder, ImageFinder((Path.cwd(),)), spec)
    from mirage_ds.api import Mirage, save_answer

    answer = Mirage(decoder).generate(
        spec.prompt,
        spec.image,
        decoding=spec.chosen,
        **spec.model_dump(include={"max_new_tokens", "longest_run", "run_length", "seed"}),
    )
    if spec.save_latents is not None:
        save_answer(answer, spec.save_latents)
    click.echo(answer.marked)


def _decoder(folder: Path, finder: ImageFinder, spec: DecodingSpec, device: torch.device | None = None) -> Decoder:
    import torch

    from mirage_ds.evaluate.decoder import load_decoder

    decoder = load_decoder(folder, finder, spec.processor, not spec.no_latents, spec.pixels, device=device)
    if decoder.loaded.config.dtype == torch.float16 and os.environ.get("RANK", "0") == "0":
        dtype = str(decoder.loaded.model.head.weight.dtype).removeprefix("torch.")
        click.echo(f"{folder}: stored in float16, in which these models overflow; decoded in {dtype}", err=True)
    return decoder


def main() -> None:
    """Be `python -m mirage_ds.evaluate`, one rank of those that a launcher starts, or a single process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Nothing is written before the end, so there is nothing to wait for.
    StopRequest().listen(at_once=True)
    run_rank(evaluate)
