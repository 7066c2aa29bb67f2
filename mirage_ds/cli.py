"""`mirage-ds`: plan, doctor, data, init, checkpoint, export, … Imports stay inside commands: `--help` is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from mirage_ds.doctor.command import doctor
from mirage_ds.errors import EXIT_USER_ERROR, UserError
from mirage_ds.flags import CONTEXT, build_model, model_options
from mirage_ds.plan.command import plan
from mirage_ds.stop import EXIT_STOPPED, Stopped, StopRequest
from mirage_ds.tasks.spec import BuildSpec


def _path(**options: Any) -> click.Path:
    return click.Path(path_type=Path, **options)


@click.group(context_settings=CONTEXT)
def cli() -> None:
    """Train and study vision-language models that think in latent visual tokens."""


cli.add_command(doctor)
cli.add_command(plan)


@cli.group()
def data() -> None:
    """Build and check records."""


@data.command("build")
@click.argument("task")
@model_options(BuildSpec)
def data_build(task: str, **flags: Any) -> None:
    """Build records and images of a TASK: vsp-spatial-planning or vsp-spatial-reasoning."""
    from mirage_ds.tasks.build import build, print_report, progress_bar

    spec = build_model(BuildSpec, flags)
    with progress_bar(f"building {task}") as progress:
        report = build(task, spec, progress)
    print_report(report)


@data.command("check")
@click.argument("file", type=_path())
@click.option("--stage", default="stage1", show_default=True, type=click.Choice(["sft", "stage1", "stage2"]))
@click.option("--image_root", type=_path(), help="Second place where relative image paths are looked for.")
@click.option("--model", "model_folder", type=_path(), help="Model folder whose tokenizer and limits are applied.")
@click.option("--latent_size", default=4, show_default=True, help="k: a helper needs as many merged tokens.")
@click.option("--confine_paths", is_flag=True, help="Images outside FILE's folder and --image_root are faults.")
@click.option("--most", default=50, show_default=True, help="Faults listed at most.")
def data_check(
    file: Path,
    stage: Any,
    image_root: Path | None,
    model_folder: Path | None,
    latent_size: int,
    confine_paths: bool,
    most: int,
) -> None:
    """List every faulty record of FILE: line, field, what, how to mend. Exit code 2 if there is one."""
    from mirage_ds.data.check import check_file, print_faults

    count, faults = check_file(file, stage, image_root, model_folder, latent_size, confine_paths)
    print_faults(file, count, faults, most)
    if faults:
        sys.exit(EXIT_USER_ERROR)


@cli.command()
@click.option("--preset", required=True, help="nano, bench-87m, or qwen2.5-vl-3b|7b|32b|72b with --config_only.")
@click.option("--out", required=True, type=_path(), help="Folder to write.")
@click.option("--text", "texts", multiple=True, type=_path(), help="Records whose text trains the tokenizer.")
@click.option("--tokenizer", type=_path(), help="Folder whose tokenizer is taken instead.")
@click.option("--tokenizer_size", default=512, show_default=True, help="Entries of the trained tokenizer.")
@click.option("--seed", default=42, show_default=True)
@click.option("--config_only", is_flag=True, help="No weights: config, tokenizer and image processor.")
def init(
    preset: str,
    out: Path,
    texts: tuple[Path, ...],
    tokenizer: Path | None,
    tokenizer_size: int,
    seed: int,
    config_only: bool,
) -> None:
    """Write a random Qwen2.5-VL with a tokenizer trained on the task's text."""
    from mirage_ds.init import init_model

    count = init_model(
        preset,
        out,
        texts=list(texts),
        tokenizer_from=tokenizer,
        tokenizer_size=tokenizer_size,
        seed=seed,
        config_only=config_only,
    )
    print(f"{out}: {preset}, {count:,} parameters" if count else f"{out}: {preset}, configuration only")


@cli.command()
@click.argument("source", type=_path())
@click.argument("target", type=_path())
@click.option("--vocab_rows", type=int, help="151668 as the public Mirage code writes, 152064 as Qwen2.5-VL has.")
@click.option("--model", "base", type=_path(), help="Base folder, where it is no longer where training found it.")
def export(source: Path, target: Path, vocab_rows: int | None, base: Path | None) -> None:
    """Write a complete model folder TARGET that plain transformers opens.

    SOURCE is a sharded checkpoint (…/run/checkpoints/global_step<N>), a run folder (its newest checkpoint is taken
    where training has not finished), or a model folder that is to have another number of vocabulary rows.
    """
    from mirage_ds.export import export_folder

    print(export_folder(source, target, vocab_rows, base))


@cli.group()
def checkpoint() -> None:
    """List a run's checkpoints, and make them loadable by another number of ranks."""


@checkpoint.command("convert")
@click.argument("source", type=_path())
@click.option("--workers", default=1, show_default=True, type=click.IntRange(min=1),
              help="Processes at a time; each holds the whole shard of a rank in RAM.")  # fmt: skip
def checkpoint_convert(source: Path, workers: int) -> None:
    """Write the universal form of a checkpoint into it: --resume auto then goes on with any number of ranks.

    SOURCE is a sharded checkpoint (…/run/checkpoints/global_step<N>), or a --save_model_path folder, whose newest whole
    checkpoint is taken. Not while the run is training.
    """
    from functools import partial

    from mirage_ds.engine.universal import convert

    print(convert(source, workers, say=partial(print, file=sys.stderr, flush=True)))


@checkpoint.command("list")
@click.argument("run", type=_path())
@click.option("--hashes", is_flag=True, help="Read every byte; without it sizes alone are compared.")
def checkpoint_list(run: Path, hashes: bool) -> None:
    """List the checkpoints of RUN, a --save_model_path folder: ranks, size, whole or damaged, universal or not."""
    from mirage_ds.engine.universal import listed, print_list

    print_list(listed(run, hashes))


def _decoding_options(command: Any) -> Any:
    """Add the options that every decoding command has."""
    for option in (
        click.option("--processor", type=_path(), help="Folder that gives the image processor if FOLDER has none."),
        click.option("--decoding", default="greedy", show_default=True, type=click.Choice(["greedy", "paper"]),
                     help="paper: sampled, temperature 0.7, top_p 0.9."),
        click.option("--max_new_tokens", default=1024, show_default=True),
        click.option("--longest_run", default=8, show_default=True, help="Latents after which a run's end is forced."),
        click.option("--run_length", default="trained", show_default=True,
                     help="Latents a run: as trained, as the model decides, or a number."),
        click.option("--no_latents", is_flag=True, help="Decode a model that was never trained on latents."),
        click.option("--min_pixels", type=int, help="Smallest input image; the processor's own if not set."),
        click.option("--max_pixels", type=int, help="Largest input image; the processor's own if not set."),
        click.option("--seed", default=42, show_default=True),
    ):  # fmt: skip
        command = option(command)
    return command


@cli.command()
@click.argument("folder", type=_path())
@click.option("--data_path", required=True, type=_path(), help="Records; they need no output fields.")
@click.option("--task", help="Whose scorer is used; the records' own task if they name one.")
@click.option("--image_root", type=_path(), help="Second place where relative image paths are looked for.")
@click.option("--batch_size", default=32, show_default=True, type=click.IntRange(min=1))
@click.option("--most", type=click.IntRange(min=1), help="Take only the first so many records.")
@click.option("--out", type=_path(), help="Write scores and answers to this JSON file.")
@_decoding_options
def evaluate(
    folder: Path,
    data_path: Path,
    task: str | None,
    image_root: Path | None,
    batch_size: int,
    most: int | None,
    out: Path | None,
    **options: Any,
) -> None:
    """Answer the records of a file with the model in FOLDER and score the answers, per level with 95 % intervals."""
    from functools import partial

    from rich.progress import track

    from mirage_ds import evaluate as evaluation
    from mirage_ds.data.record import ImageFinder

    decoder = _decoder(folder, ImageFinder.beside(data_path, image_root), options)
    report = evaluation.evaluate_file(
        decoder,
        data_path,
        task,
        _limits(decoder, options),
        options["decoding"],
        options["seed"],
        batch_size,
        most,
        track=partial(track, description="answering", transient=True),
    )
    evaluation.print_report(report)
    if out:
        evaluation.write_report(report, out)


@cli.command()
@click.argument("folder", type=_path())
@click.option("--image", "images", multiple=True, type=_path(), help="Input image; may be given several times.")
@click.option("--prompt", required=True, help="The question, with <image> where an image stands.")
@_decoding_options
def generate(folder: Path, images: tuple[Path, ...], prompt: str, **options: Any) -> None:
    """Answer one question with the model in FOLDER; latent runs are marked."""
    from mirage_ds import evaluate as evaluation
    from mirage_ds.data.record import IMAGE_MARK, ImageFinder, Record

    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("--prompt: not UTF-8 text; type it in a UTF-8 terminal") from None
    marks = prompt.count(IMAGE_MARK)
    if marks and marks != len(images):
        raise UserError(
            f"--prompt: {marks} {IMAGE_MARK} mark(s) for {len(images)} image(s); give --image once for each mark, or "
            "write none (images then stand first)"
        )
    decoder = _decoder(folder, ImageFinder((Path.cwd(),)), options)
    record = Record(1, prompt, "", tuple(str(image) for image in images), ())
    answers = evaluation.answer_records(
        decoder, [record], _limits(decoder, options), options["decoding"], options["seed"]
    )
    print(answers[0].marked(decoder.encoder))


def _decoder(folder: Path, finder: Any, options: dict[str, Any]) -> Any:
    from mirage_ds.evaluate import load_decoder

    pixels = (options["min_pixels"], options["max_pixels"])
    return load_decoder(folder, finder, options["processor"], not options["no_latents"], pixels)


def _limits(decoder: Any, options: dict[str, Any]) -> Any:
    from mirage_ds.evaluate import run_limits

    return run_limits(decoder, options["max_new_tokens"], options["longest_run"], options["run_length"])


def main() -> None:
    """Run the command line; a user's mistake is one sentence and exit code 2."""
    # Quick commands must not wake the GPU, nor the tokenizers' threads complain after a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    stop = StopRequest()
    stop.listen(at_once=True)
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        message = error.format_message()
    except UserError as error:
        message = str(error)
    except (click.Abort, Stopped):
        print("stopped", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)
