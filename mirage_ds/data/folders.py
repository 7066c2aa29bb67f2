"""Which files a --data_path names: a file, a folder as it lies or as `datasets` saved it, a glob pattern, several."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob, has_magic
from pathlib import Path

from mirage_ds.config.mixture import Mixture, Records
from mirage_ds.data.kinds import head_of
from mirage_ds.errors import UserError, reason

SUFFIXES = (".jsonl", ".parquet")
# What of a folder is read where it has none of these.
OTHERS = (".json", ".csv", ".tsv", ".arrow", ".feather")
# Files that are named where there are many.
NAMED = 5
_RECORDS_LIKE = re.compile(r"\.(jsonl?|ndjson|csv|tsv|xlsx|parquet|arrow|feather)(\.(gz|bz2|xz|zst|lz4|zip))?$", re.I)
_KEYS = re.compile(rb'"(text_input|messages|conversations?|query|instruction|prompt)"\s*:')
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}\b")
# What `datasets` and LLaMA-Factory have beside their files.
_NO_RECORDS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def paths_of(records: Records) -> list[Path]:
    """List the sources of records."""
    return [part.file for part in records.parts] if isinstance(records, Mixture) else [records]


def find_files(data_path: Records) -> tuple[Path, ...]:
    """List the files that a --data_path names, in the order in which their records count.

    Raises:
        UserError: there is none, or several sources have one in common.
    """
    if isinstance(data_path, Mixture):
        files = sorted((file for source in paths_of(data_path) for file in find_files(source)), key=str)
        seen: set[Path] = set()
        for file in files:
            if file.resolve() in seen:
                raise UserError(f"{file}: is in several sources of {data_path}; name it in one of them")
            seen.add(file.resolve())
        return tuple(files)
    with readable(data_path):
        if data_path.is_dir():
            found = _of_folder(data_path)
        elif data_path.is_file():
            found = [data_path]
        elif has_magic(str(data_path)):
            found = [Path(name) for name in glob(str(data_path)) if Path(name).is_file()]
            if not found:
                raise UserError(f"{data_path}: no file has such a name; name the records")
        else:
            raise UserError(f"{data_path}: no such file of records")
        return tuple(sorted(found, key=str))


def _of_folder(folder: Path) -> list[Path]:
    """List the files of records of a folder; UserError where there are none, or it cannot be known which are meant."""
    saved = _saved(folder)
    if saved:
        return saved
    found = [file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()]
    # As the Hub has the files of a data set.
    splits = sorted({split[1] for file in found if (split := _SHARD.match(file.name))}, key=lambda one: one != "train")
    if len(splits) > 1:
        one = f"'{folder / splits[0]}-*'"
        raise UserError(f"{folder}: has the splits {', '.join(splits)}; name one of them, such as {one}")
    if found:
        return found
    there = sorted(file for file in folder.iterdir() if _like_records(file))
    others = [file for file in there if file.suffix.lower() in OTHERS and file.is_file()]
    if len({file.suffix.lower() for file in others}) == 1:
        return others
    names = ", ".join(file.name for file in there[:NAMED])
    # As `datasets` has the splits of a data set.
    inner = sorted(file.parent for file in folder.glob("*/*") if file.suffix.lower() in SUFFIXES + OTHERS)
    such = "".join(f", such as {one}" for one in [*others, *inner][:1])
    but = f", but {names}" if names else ""
    wanted = "no *.jsonl or *.parquet file in this folder, nor JSON, CSV or Arrow files of one kind"
    raise UserError(f"{folder}: {wanted}{but}; name the records{such}")


def _saved(folder: Path) -> list[Path]:
    """List the files of what `datasets` saved to a folder; none where it is another folder."""
    splits, state = folder / "dataset_dict.json", folder / "state.json"
    try:
        if splits.is_file():
            names = json.loads(splits.read_bytes())["splits"]
            if len(names) > 1:
                how = f"name one of them, such as {folder / names[0]}"
                raise UserError(f"{folder}: has the splits {', '.join(names)}; {how}")
            return _saved(folder / names[0])
        if state.is_file() and (folder / "dataset_info.json").is_file():
            # Beside them lie files of its cache.
            return [folder / one["filename"] for one in json.loads(state.read_bytes()).get("_data_files", ())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: cannot be read as `datasets` saves it ({reason(error)}); save it anew") from None
    return []


def unread(folder: Path) -> list[Path]:
    """List what looks like records in a folder and is not read, in the order of the names."""
    if not folder.is_dir() or _saved(folder):
        return []
    read = set(_of_folder(folder))
    return sorted(file for file in folder.iterdir() if file not in read and _like_records(file))


def unread_lines(data_path: Records) -> Iterator[str]:
    """Say of each folder of a source what looks like records there and is not read."""
    for folder in paths_of(data_path):
        names = [file.name for file in unread(folder)]
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            yield f"{folder}: {', '.join(names[:NAMED])}{more} not read; of a folder *.jsonl and *.parquet are"


def _like_records(file: Path) -> bool:
    suffix = file.suffix.lower()
    if not _RECORDS_LIKE.search(file.name) or file.name in _NO_RECORDS or (suffix in SUFFIXES and file.is_file()):
        return False
    if suffix != ".json" or not file.is_file():
        return True
    # Of JSON files most are settings of something.
    try:
        head = head_of(file)
    except OSError:
        return True
    return head.startswith(b"[") or _KEYS.search(head) is not None


@contextmanager
def readable(file: object, how: str = "name a readable file of records") -> Iterator[None]:
    """Turn a file that the system does not give, or that is no text, into a sentence; `how` to fix it ends it."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise UserError(f"{file}: cannot be read ({why}); {how}") from None
