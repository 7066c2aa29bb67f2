"""What a run can be refused for in a second, before any rank starts. Imports no torch."""

import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import NamedTuple

from mirage_ds.config.columns import Columns
from mirage_ds.config.extras import need_for
from mirage_ds.config.run import HELPED, RunConfig, Stage
from mirage_ds.data.folders import find_files
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.messages import REGION
from mirage_ds.data.record import blamed, make_record
from mirage_ds.data.record_files import places, told
from mirage_ds.data.sources import no_record
from mirage_ds.engine.ds_config import read_json
from mirage_ds.errors import UserError
from mirage_ds.files import check_log
from mirage_ds.model.folder import read_targets, resolve_folder
from mirage_ds.rl.rewards import read_rewards
from mirage_ds.run import folder as run_folder

# The name of a Unix socket has 107 bytes at most (sun_path of unix(7)), and multiprocessing calls those through which a
# data worker hands on its tensors TMPDIR/pymp-xxxxxxxx/listener-xxxxxxxx.
MOST_TMPDIR_BYTES = 107 - len("/pymp-xxxxxxxx/listener-xxxxxxxx")


def check_beforehand(config: RunConfig, ranks: int) -> None:
    """Refuse settings that the ranks would refuse, as far as it shows in seconds. Nothing is read whole or downloaded.

    Raises:
        UserError: names the flag, or the file.
    """
    check_rows(config, ranks)
    check_outputs(config)
    check_sockets(config)
    need_for(config)
    if config.latent_targets:
        read_targets(config.latent_targets)
    if config.stage == "rl":
        read_rewards(config.reward, config.reward_weights)
    for source in (config.records, config.eval_data_path):
        if source is not None:
            find_files(source)
    if config.deepspeed:
        read_json(config.deepspeed)
    for flag, name in (("--load_model_path", config.load_model_path), ("--model", config.model)):
        is_id = flag == "--model" and re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) is not None
        if name is not None and (Path(name).is_dir() or not is_id):
            resolve_folder(str(name), flag, config.cache_dir)


def check_rows(config: RunConfig, ranks: int) -> None:
    """Refuse more ranks than an optimizer step has rows.

    Raises:
        UserError: says how many there are.
    """
    if config.rows_per_step < ranks and not config.allow_idle_ranks:
        rows = "rows an optimizer step (--global_batch_size)"
        if config.stage == "rl":
            rows = "prompts a rollout (--prompts_per_rollout)"
        raise UserError(
            f"{config.rows_per_step} {rows} are fewer than {ranks} ranks: use fewer ranks, or --allow_idle_ranks"
        )


def check_outputs(config: RunConfig) -> None:
    """Refuse, before any work, what cannot be written, and a run folder that holds what is not this run's.

    Raises:
        UserError: names the flag.
    """
    given = (config.model, config.load_model_path, config.latent_targets)
    sources = [Path(one) for one in given if one is not None]
    run_folder.check(config.save_model_path, config.overwrite, config.resume == "auto", sources)
    if config.log_file:
        check_log(config.log_file, "--log_file")


def check_sockets(config: RunConfig) -> None:
    """Refuse a folder of temporary files in which data workers cannot make their sockets: their batches never arrive.

    Raises:
        UserError: names the folder, and how long its name may be.
    """
    place, workers = gettempdir(), config.num_workers
    size = len(os.fsencode(place))
    if workers and size > MOST_TMPDIR_BYTES:
        what = f"--num_workers {workers}: workers hand on their rows through sockets in TMPDIR {place}"
        how = f"its name has {size} bytes and may have {MOST_TMPDIR_BYTES}; set TMPDIR to a shorter one, such as /tmp"
        raise UserError(f"{what}: {how}, or give --num_workers 0")


class FirstLook(NamedTuple):
    """What a host needs of a source of records, as far as the first record shows it.

    Attributes:
        files: all of the source, in the order in which their records count.
        images: of the first record, each as the places where it may lie; without pictures that the record holds itself.
    """

    files: tuple[Path, ...]
    images: tuple[tuple[Path, ...], ...]


def first_look(source: Path, columns: Columns, image_root: Path | None, stage: Stage | None) -> FirstLook:
    """Find a source's files and read its first record and this one's images, as training does.

    Args:
        stage: stage1 and scaffold need a helper; None where it is not known: helpers that are named are looked for.

    Raises:
        UserError: in training's words.
    """
    files = find_files(source)
    # Refuses columns that are not there.
    list(told(source, columns))
    with TemporaryDirectory() as pictures:
        first = next(places(source), None)
        if first is None:
            raise no_record(source)
        # Not resolved: a link may lead elsewhere on another host.
        folders = [one.absolute() for one in (files[first.file].parent, image_root, Path()) if one is not None]
        finder = ImageFinder(tuple(folders))
        with blamed(f"{files[first.file]}: "):
            record = make_record(first.row, first.line, True, Path(pictures), columns)
            if stage in HELPED and not record.extra.get(REGION):
                record.need_helper(stage)
            named = record.images(helpers=stage is None or stage in HELPED)
            for name, path in named:
                finder.size(record, name, path)
        inside = Path(pictures).resolve()
        outside = [path for _, path in named if not Path(path).is_relative_to(inside)]
    return FirstLook(files, tuple(tuple(finder.places(path)) for path in outside))
