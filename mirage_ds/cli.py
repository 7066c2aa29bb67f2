"""`mirage-ds`: status, plan, doctor, data, init, export, … Imports stay inside commands: `--help` is quick."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, get_args

import click

from mirage_ds import __version__
from mirage_ds.analysis.controls.command import compare, controls
from mirage_ds.analysis.inspect.command import inspect
from mirage_ds.cluster.doctor.command import doctor
from mirage_ds.cluster.replay.command import replay
from mirage_ds.cluster.status.command import status
from mirage_ds.cluster.train import train
from mirage_ds.config.columns import COLUMNS_HELP, parse_columns
from mirage_ds.config.flags import CONTEXT, Group, RunCommand, run_config, run_options
from mirage_ds.config.run import Compress, Stage
from mirage_ds.curate.command import import_, mix, rationalize, vary
from mirage_ds.errors import EXIT_STOPPED, EXIT_USER_ERROR, Stopped, UserError, closest
from mirage_ds.evaluate.command import evaluate, generate
from mirage_ds.files import Output, pages, shipped, shipped_files, users_error, write_atomically, write_shipped
from mirage_ds.model.presets import LARGE, PRESETS
from mirage_ds.plan.command import plan
from mirage_ds.run.process import hush, print_anything
from mirage_ds.run.stop import StopRequest
from mirage_ds.serve.command import serve
from mirage_ds.study.command import ablate
from mirage_ds.tasks.command import TaskGroup

_PATH = click.Path(path_type=Path)
_columns = click.option("--columns", help=COLUMNS_HELP)
_image_root = click.option("--image_root", type=_PATH, help="Second place where relative image paths are looked for.")


@click.group(cls=Group, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="mirage-ds")
def cli() -> None:
    """Train and study vision-language models that think in latent visual tokens."""


cli.sections = {
    "Data": "data",
    "Training": "train status replay config init checkpoint export",
    "Results": "evaluate generate serve controls inspect compare card ablate",
    "Cluster": "plan doctor launch",
    "More": "docs examples",
}
for command in (train, status, replay, ablate, doctor, plan, evaluate, generate, serve, inspect, controls, compare):
    cli.add_command(command)


@cli.group()
def data() -> None:
    """Import, build, check, show, vary and mix records."""


data.add_command(TaskGroup("build", "Build a task's records and pictures. A TASK of your own is package.module:Name."))
data.add_command(TaskGroup("convert", "Convert a data set as its authors hand it out. SOURCE is its file or folder."))
data.add_command(vary)
data.add_command(mix)
data.add_command(import_)
data.add_command(rationalize)


@data.command("check")
@click.argument("file", type=_PATH)
@click.option("--stage", default="stage1", show_default=True, type=click.Choice(get_args(Stage)),
              help="The stage that the records are checked for.")  # fmt: skip
@_image_root
@click.option("--model", "model_folder", type=_PATH, help="Model folder whose tokenizer and limits are applied.")
@click.option("--latent_size", default=4, show_default=True, help="k: a helper needs at least k merged tokens.")
@click.option("--compress_strategy", default="average", show_default=True, type=click.Choice(get_args(Compress)),
              help="As of a run: region checks the records' regions in place of helpers.")  # fmt: skip
@click.option("--confine_paths", is_flag=True, help="Images outside FILE's folder and --image_root are faults.")
@_columns
@click.option("--most", default=50, show_default=True, help="Kinds of faults to list; others are counted.")
def data_check(file: Path, most: int, columns: str | None, **options: Any) -> None:
    """List faulty records of FILE and how to fix them. Exit code 2 if there is one."""
    from collections import Counter

    from mirage_ds.curate.check import check_file, print_faults, scored
    from mirage_ds.data.folders import unread_lines
    from mirage_ds.data.record_files import told

    names = parse_columns(columns)
    for line in told(file, names):
        print(line)
    answers: Counter[str] = Counter()

    def see(record: Any) -> None:
        answers.update([scored(record), "region" if record.extra.get("region") else "none"])

    count, faults = check_file(file, columns=names, see=see, **options)
    print_faults(file, count, faults, most)
    for line in unread_lines(file):
        print(line)
    if answers["region"]:
        print(f"{answers['region']} of {count} records have a region (stage1 --compress_strategy region)")
    if faults:
        sys.exit(EXIT_USER_ERROR)
    if answers["nothing"] and not answers["task"]:
        which = f"{answers['nothing']} answer(s) have" if answers["box"] else "the answers have"
        how = "evaluate needs --task module:score (`mirage-ds docs tasks`)"
        print(f"no task is named, and {which} no \\boxed{{…}}: {how}")


@data.command("index", cls=RunCommand)
@run_options
def data_index(yaml_file: Path | None, **flags: Any) -> None:
    """Index a run's records before the run.

    The run would otherwise do it before its first step; it then opens what it finds in --cache_dir. Give it the run's
    own flags (not --ranks); those that do not matter here are ignored. It needs no GPU. A stopped index is continued.
    """
    from mirage_ds.run.records import index_beforehand

    for line in index_beforehand(run_config(yaml_file, flags, save_model_path=Path())):
        print(line)


@data.command("show")
@click.argument("file", type=_PATH)
@click.option("--rows", help="Lines to show, like 1,5-8; the first 20 records if not set.")
@click.option("--out", type=Output(), help="Write one page, .html or .png; without it text is printed.")
@_image_root
@_columns
def data_show(file: Path, rows: str | None, out: Path | None, image_root: Path | None, columns: str | None) -> None:
    """Show records of FILE as text or as a page.

    With question, images, answer with its latents marked, other keys, faults.
    """
    from mirage_ds.curate.show import as_text, read_shown, write_page

    records = read_shown(file, rows, image_root, parse_columns(columns))
    if out is None:
        click.echo(as_text(records))
    else:
        write_page(file, records, out)
        print(f"{out}: {len(records)} records")


@cli.group()
def config() -> None:
    """Turn another trainer's configuration into ours."""


@config.command("import")
@click.argument("file", type=_PATH)
@click.option("--out", type=Output(), help="Settings file to write; without it, it is printed.")
@click.option("--stage", default="sft", show_default=True, type=click.Choice(["sft", "stage1", "stage2"]),
              help="What the run trains: theirs is sft; stage1 and stage2 train latents.")  # fmt: skip
@click.option("--ranks", type=click.IntRange(min=1), help="GPUs in all, where FILE does not say how many.")
def config_import(file: Path, out: Path | None, **options: Any) -> None:
    """Turn FILE, a configuration of LLaMA-Factory or ms-swift, into a settings file.

    FILE is LLaMA-Factory's YAML or JSON, or ms-swift's YAML, JSON or shell script with `swift sft`. Tables say what is
    carried over, what has no counterpart, and what is still missing. Run it in the trainer's working directory.
    """
    from mirage_ds.config.importing import import_config, print_imported

    if out is not None and out.exists():
        raise UserError(f"--out {out}: is there already; name another file")
    made = import_config(file, **options)
    print_imported(made, on_stderr=out is None)
    if out is None:
        click.echo(made.as_yaml(), nl=False)
    else:
        write_atomically(out, made.as_yaml())
        print(f"{out}: {len(made.settings)} settings; train with --config {out}")


@cli.command()
@click.option(
    "--preset",
    required=True,
    help=f"{', '.join(name for name in PRESETS if name not in LARGE)}; in bfloat16, for a GPU: {', '.join(LARGE)}.",
)
@click.option("--out", required=True, type=Output(folder=True), help="Folder to write.")
@click.option("--text", "texts", multiple=True, type=_PATH, help="Records whose text trains the tokenizer.")
@_columns
@click.option("--tokenizer", "tokenizer_from", type=_PATH, help="Folder whose tokenizer is taken instead.")
@click.option("--tokenizer_size", default=512, show_default=True, help="Entries of the trained tokenizer.")
@click.option("--seed", default=42, show_default=True)
@click.option("--config_only", is_flag=True, help="No weights: config, tokenizer and image processor.")
def init(preset: str, out: Path, **options: Any) -> None:
    """Write a random model, to try things out.

    It is a Qwen2-VL, Qwen2.5-VL or Qwen3-VL. Its tokenizer is trained on the records of --text; without them it knows
    single bytes and the chat template's words alone. A large preset (qwen2.5-vl-…) needs room for all its weights, on
    the GPU where there is one.
    """
    from mirage_ds.model.init import init_model

    count = init_model(preset, out, **options)
    print(f"{out}: {preset}, {count:,} parameters" if count else f"{out}: {preset}, configuration only")


@cli.command()
@click.argument("source", type=_PATH)
@click.argument("target", type=Output(folder=True))
@click.option("--vocab_rows", type=int, help="Rows, such as the public Mirage code's 151668, Qwen2.5-VL-7B's 152064.")
@click.option("--model", "base", type=_PATH, help="Base folder, if it has moved since training.")
def export(source: Path, target: Path, vocab_rows: int | None, base: Path | None) -> None:
    """Write a model folder that plain transformers opens.

    TARGET has weights, tokenizer and image processor. SOURCE is a sharded checkpoint
    (…/run/checkpoints/global_step<N>) or the folder of a run that has not finished, whose newest checkpoint is taken.
    With --vocab_rows SOURCE is a model folder, and TARGET a copy with so many rows of embedding and head.
    """
    from mirage_ds.engine.save import export_folder

    print(export_folder(source, target, vocab_rows, base))


@cli.command()
@click.argument("folder", type=_PATH)
@click.argument("scores", type=_PATH, nargs=-1, required=True)
def card(folder: Path, scores: tuple[Path, ...]) -> None:
    """Write scores into a model card.

    SCORES are files of `mirage-ds evaluate --out`, the card is that of FOLDER. The weights are hashed: scores of
    another model are refused. Scores that the card already has are replaced.
    """
    from mirage_ds.data.progress import track
    from mirage_ds.evaluate.model_card import add_scores

    print(add_scores(folder, scores, partial(track, title="hashing weights")))


_write = click.option("--write", "target", type=Output(folder=True), metavar="DIR", help="Write them into DIR.")


@cli.command()
@_write
def launch(target: Path | None) -> None:
    """Write the start scripts for ssh, MPI, Slurm, Kubernetes.

    Those for one machine are there too. Without --write, list them.
    """
    if target is None:
        click.echo(pages()["launch/README"].read_text(encoding="utf-8"))
    else:
        print("\n".join(map(str, write_shipped({"launch": target}))))


@cli.command()
@_write
def examples(target: Path | None) -> None:
    """Write the examples, and what they use.

    These are examples/, and launch/, ds_configs/ and data/ beside it. Without --write, list them.
    """
    if target is None:
        print("\n".join(str(file.relative_to(shipped())) for file in shipped_files("examples")))
    else:
        written = write_shipped({name: target / name for name in ("examples", "launch", "ds_configs", "data")})
        print(f"{len(written)} files in {target}; start commands from there")


@cli.command()
@click.argument("page", required=False)
def docs(page: str | None) -> None:
    """Show a page of the documentation of this version.

    Without PAGE, list them.
    """
    if page is None:
        for name, file in pages().items():
            print(f"{name:32}{file.read_text(encoding='utf-8').partition(chr(10))[0].strip('# ')}")
        print(f"mirage-ds docs PAGE shows one. They lie in {shipped()}.")
        return
    name = page.removesuffix(".md").removeprefix("docs/")
    if name not in pages():
        raise UserError(f"no page '{page}'{closest(name, pages())}; `mirage-ds docs` lists them")
    click.echo_via_pager(pages()[name].read_text(encoding="utf-8"))


@cli.group()
def checkpoint() -> None:
    """List checkpoints, make them loadable by any number of ranks."""


@checkpoint.command("convert")
@click.argument("source", type=_PATH)
@click.option("--workers", default=1, show_default=True, type=click.IntRange(min=1),
              help="Processes at a time; each holds the whole shard of a rank in RAM.")  # fmt: skip
def checkpoint_convert(source: Path, workers: int) -> None:
    """Make a checkpoint loadable by any number of ranks.

    The universal form goes into its folder; --resume auto loads it.

    SOURCE is a sharded checkpoint (…/run/checkpoints/global_step<N>), or a --save_model_path folder, whose newest whole
    checkpoint is taken. Not while the run is training.
    """
    from mirage_ds.engine.universal import convert

    print(convert(source, workers, say=partial(print, file=sys.stderr, flush=True)))


@checkpoint.command("list")
@click.argument("run", type=_PATH)
@click.option("--hashes", is_flag=True, help="Read every byte; without it sizes alone are compared.")
def checkpoint_list(run: Path, hashes: bool) -> None:
    """List the checkpoints of RUN, a --save_model_path folder.

    With ranks, size, whole or damaged, universal or not.
    """
    from mirage_ds.engine.universal import print_list

    print_list(run, hashes)


def main() -> None:
    """Run the command line; a user's error is one sentence and exit code 2."""
    print_anything()
    hush()
    # Quick commands must not wake the GPU, nor the tokenizers' threads complain after a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    stop = StopRequest()
    stop.listen(at_once=True)
    try:
        cli.main(standalone_mode=False)
    except (click.Abort, Stopped):
        print("stopped", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    # A full disk, or a cache that cannot be written, may be met anywhere.
    except (click.ClickException, UserError, OSError) as error:
        message = users_error(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
