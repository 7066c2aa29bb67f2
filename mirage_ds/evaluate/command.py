"""`mirage-ds evaluate` and `mirage-ds generate`; the first also as one process a GPU, under a launcher.

Imports stay inside the commands: `--help` is quick.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mirage_ds.config.flags import CONTEXT
from mirage_ds.engine.place import is_rank
from mirage_ds.errors import UserError
from mirage_ds.files import Output, check_output
from mirage_ds.run.process import run_rank
from mirage_ds.run.stop import StopRequest

if TYPE_CHECKING:
    import torch

    from mirage_ds.data.images import ImageFinder
    from mirage_ds.evaluate.decoder import Decoder, Decoding
    from mirage_ds.model.generate import Limits


def _path() -> click.Path:
    return click.Path(path_type=Path)


def _decoding_options(command: Any) -> Any:
    """Add the options that every decoding command has."""
    for option in (
        click.option("--processor", type=_path(), help="Folder that gives the image processor if FOLDER has none."),
        click.option("--decoding", default="greedy", show_default=True,
                     type=click.Choice(["greedy", "paper", "sampled"]),
                     help="sampled: with --temperature and --top_p; paper: sampled, temperature 0.7, top_p 0.9."),
        click.option("--temperature", type=click.FloatRange(min=0, min_open=True),
                     help="Of --decoding sampled; 1 if not set."),
        click.option("--top_p", type=click.FloatRange(min=0, min_open=True, max=1),
                     help="Of --decoding sampled; 1 if not set."),
        click.option("--max_new_tokens", default=1024, show_default=True, type=click.IntRange(min=1)),
        click.option("--longest_run", default=8, show_default=True, type=click.IntRange(min=0),
                     help="Latents after which a run's end is forced."),
        click.option("--run_length", default="trained", show_default=True,
                     help="Latents a run: as trained, as the model decides, or a number."),
        click.option("--no_latents", is_flag=True, help="Decode a model that was never trained on latents."),
        click.option("--min_pixels", type=int, help="Smallest input image; the processor's own if not set."),
        click.option("--max_pixels", type=int, help="Largest input image; the processor's own if not set."),
        click.option("--seed", default=42, show_default=True, type=click.IntRange(min=0),
                     help="Of the draws; a row's draws do not depend on the rows beside it."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command(context_settings=CONTEXT)
@click.argument("folder", type=_path())
@click.option("--data_path", required=True, type=_path(), help="Records; they need no output fields.")
@click.option("--task", help="Whose scorer is used; the records' own task if they name one.")
@click.option("--image_root", type=_path(), help="Second place where relative image paths are looked for.")
@click.option("--batch_size", default=32, show_default=True, type=click.IntRange(min=1))
@click.option("--prefill_tokens", default=8192, show_default=True, type=click.IntRange(min=1),
              help="Prompts of a batch run together up to so many tokens; a longer one runs alone.")  # fmt: skip
@click.option("--most", type=click.IntRange(min=1), help="Take only the first so many records.")
@click.option("--out", type=_path(), help="Write scores and answers to this JSON file.")
@click.option("--latents", help="Score under these conditions instead, separated by commas: own,swap,… "
              "(docs/controls.md; `mirage-ds controls` has more flags).")  # fmt: skip
@click.option("--local_rank", hidden=True, help="Passed by some launchers; the environment says it too.")
@_decoding_options
def evaluate(
    folder: Path,
    data_path: Path,
    task: str | None,
    image_root: Path | None,
    batch_size: int,
    most: int | None,
    out: Path | None,
    latents: str | None,
    local_rank: str | None,
    **options: Any,
) -> None:
    """Answer the records of a file with the model in FOLDER and score the answers, per level with 95 % intervals.

    On several GPUs: deepspeed --module mirage_ds.evaluate.decoder FOLDER … shares the records among the ranks.
    """
    del local_rank
    from functools import partial

    from rich.progress import track

    from mirage_ds.data.images import ImageFinder
    from mirage_ds.engine.setup import shared_fate
    from mirage_ds.evaluate import decoder as evaluation

    decoding = _decoding(options)
    if latents is not None:
        _compare_latents(latents, folder, data_path, task, image_root, batch_size, most, out, decoding, options)
        return
    world = None
    if is_rank(os.environ):
        from mirage_ds.engine.setup import join

        world = join(evaluation.PATIENCE_S)
    finder = ImageFinder.beside(data_path, image_root)
    with shared_fate(world):
        if out and (world is None or world.rank == 0):
            check_output(out, "--out")
        decoder = _decoder(folder, finder, options, world.device if world else None)
        limits = _limits(decoder, options)
    bar = partial(track, description="answering", transient=True, disable=world is not None and world.rank > 0)
    report = evaluation.evaluate_file(
        decoder, data_path, task, limits, decoding, options["seed"], batch_size, most, track=bar, world=world
    )
    with shared_fate(world):
        if world is None or world.rank == 0:
            evaluation.print_report(report)
            if out:
                evaluation.write_report(report, out)
    if world:
        import torch.distributed as dist

        world.waiting.part()
        dist.destroy_process_group()


def _compare_latents(
    names: str,
    folder: Path,
    data_path: Path,
    task: str | None,
    image_root: Path | None,
    batch_size: int,
    most: int | None,
    out: Path | None,
    decoding: Decoding,
    options: dict[str, Any],
) -> None:
    """Be `evaluate --latents`: the controls, with evaluate's options where both have them."""
    from mirage_ds.analysis.controls.command import run_controls
    from mirage_ds.analysis.controls.names import parse_names
    from mirage_ds.analysis.controls.study import Wanted
    from mirage_ds.data.images import ImageFinder

    if is_rank(os.environ):
        raise UserError("--latents compares in one process: start `mirage-ds evaluate` without a launcher")
    if decoding != "greedy":
        raise UserError("--latents decodes greedily, so that a difference comes from the latents: drop --decoding")
    if options["no_latents"]:
        raise UserError("--latents replaces latents, and --no_latents says that there are none: drop one of them")
    if out:
        check_output(out, "--out")
    wanted = Wanted(parse_names(names), task, most, options["seed"], batch_size)
    decoder = _decoder(folder, ImageFinder.beside(data_path, image_root), options)
    run_controls(decoder, data_path, options["processor"], _limits(decoder, options), wanted, out)


@click.command(context_settings=CONTEXT)
@click.argument("folder", type=_path())
@click.option("--image", "images", multiple=True, type=_path(), help="Input image; may be given several times.")
@click.option("--prompt", required=True, help="The question, with <image> where an image stands.")
@click.option(
    "--save_latents", type=Output(), help="Write tokens, latents and hidden states to this .safetensors file."
)
@_decoding_options
def generate(folder: Path, images: tuple[Path, ...], prompt: str, save_latents: Path | None, **options: Any) -> None:
    """Answer one question with the model in FOLDER; latent runs are marked."""
    from mirage_ds.data.images import ImageFinder
    from mirage_ds.data.record import IMAGE_MARK

    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("--prompt: not UTF-8 text; type it in a UTF-8 terminal") from None
    found = prompt.count(IMAGE_MARK)
    if found and found != len(images):
        raise UserError(
            f"--prompt: {found} {IMAGE_MARK} mark(s) for {len(images)} image(s); give --image once for each mark, or "
            "write none (images then stand first)"
        )
    decoding = _decoding(options)
    if save_latents is not None and save_latents.suffix != ".safetensors":
        raise UserError(f"--save_latents {save_latents}: give a name that ends in .safetensors")
    decoder = _decoder(folder, ImageFinder((Path.cwd(),)), options)
    from mirage_ds.api import Mirage, save_answer

    wanted = {name: options[name] for name in ("max_new_tokens", "longest_run", "run_length", "seed")}
    answer = Mirage(decoder).generate(prompt, images, decoding=decoding, **wanted)
    if save_latents is not None:
        save_answer(answer, save_latents)
    click.echo(answer.marked)


def _decoding(options: dict[str, Any]) -> Decoding:
    from mirage_ds.evaluate.decoder import Sampling

    name, given = options["decoding"], {key: options[key] for key in ("temperature", "top_p") if options[key]}
    if name == "sampled":
        return Sampling(given.get("temperature", 1.0), given.get("top_p", 1.0))
    if given:
        raise UserError(f"--{next(iter(given))} is of --decoding sampled, and it is {name}: give both, or neither")
    return name


def _decoder(folder: Path, finder: ImageFinder, options: dict[str, Any], device: torch.device | None = None) -> Decoder:
    import torch

    from mirage_ds.evaluate.decoder import load_decoder

    pixels = (options["min_pixels"], options["max_pixels"])
    decoder = load_decoder(folder, finder, options["processor"], not options["no_latents"], pixels, device)
    if decoder.loaded.config.dtype == torch.float16 and os.environ.get("RANK", "0") == "0":
        dtype = str(decoder.loaded.model.head.weight.dtype).removeprefix("torch.")
        click.echo(f"{folder}: stored in float16, in which these models overflow; decoded in {dtype}", err=True)
    return decoder


def _limits(decoder: Decoder, options: dict[str, Any]) -> Limits:
    from mirage_ds.evaluate.decoder import run_limits

    names = ("max_new_tokens", "longest_run", "run_length", "prefill_tokens")
    return run_limits(decoder, *(options[name] for name in names))


def main() -> None:
    """Be `python -m mirage_ds.evaluate.decoder`, one rank of those that a launcher starts, or a single process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Nothing is written before the end, so there is nothing to wait for.
    StopRequest().listen(at_once=True)
    run_rank(evaluate)
