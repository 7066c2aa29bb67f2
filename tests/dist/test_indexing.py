"""The index of a start on two ranks: made together, outside of collectives, stopped and gone on with."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest
from support.group import Group
from support.indices import open_index

from mirage_ds.config.run import RunConfig
from mirage_ds.run.records import index_beforehand, make_encoder, model_folders

Values = dict[str, Any]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mirage_ds.data.sources.PIECE_BYTES", 100)


@pytest.fixture
def values(nano: Path, mixed: Path, tmp_path: Path) -> Values:
    paths = {"model": nano, "data_path": mixed, "save_model_path": tmp_path / "run", "cache_dir": tmp_path / "cache"}
    return {name: str(path) for name, path in paths.items()} | {"stage": "sft"}


def alone(values: Values, cache: Path) -> dict[str, bytes]:
    """The files of the index that one process makes."""
    config = RunConfig.model_validate({**values, "cache_dir": cache})
    encoder = make_encoder(config, model_folders(config))
    return files_of(open_index(config.records, encoder, config.kept_fields, cache).place)


def files_of(place: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in place.iterdir()}


def start(
    world: Any,
    values: Values,
    late_s: float = 0.0,
    bound_s: float = 3600.0,
    stop_after: int | None = None,
    host: bool = False,
    strange: bool = False,
) -> tuple[Path | str, list[int]]:
    """Open the index; its folder, or why it was not made, and which parts this rank has made.

    Args:
        late_s: rank 0 hashes the records, and rank 1 makes each part, so much longer.
        bound_s: of collectives.
        stop_after: parts after which rank 1 is asked to stop.
        host: each rank is a host of its own, with a working directory of its own, and files of other times.
        strange: rank 1 has other records.
    """
    from mirage_ds.data import sources
    from mirage_ds.data.index_part import Parts
    from mirage_ds.engine.private import set_collective_timeout
    from mirage_ds.errors import Stopped, UserError
    from mirage_ds.run.records import index_records
    from mirage_ds.run.settings import Run

    made: list[int] = []
    encode, content_hash = Parts.encode, sources.content_hash

    def noted(parts: Parts, number: int) -> Any:
        time.sleep(late_s / 10 if world.rank else 0)
        made.append(number)
        return encode(parts, number)

    def slow(*given: Any) -> str:
        time.sleep(0 if world.rank else late_s)
        return "0" * 64 if strange and world.rank else content_hash(*given)

    def of(file: Path) -> sources.Stamp:
        found = file.stat()
        return sources.Stamp(found.st_size, found.st_mtime_ns + 10**9 * world.rank)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_BYTES", 100)
        patch.setattr(sources, "content_hash", slow)
        patch.setattr(Parts, "encode", noted)
        patch.setattr("mirage_ds.data.make_index.processes", lambda *_: 0)
        if host:
            (Path(values["save_model_path"]).parent / str(world.rank)).mkdir(exist_ok=True)
            patch.chdir(Path(values["save_model_path"]).parent / str(world.rank))
            patch.setattr(socket, "gethostname", lambda: f"host{world.rank}")
            patch.setattr(sources.Stamp, "of", of)
        config = RunConfig.model_validate(values)
        encoder = make_encoder(config, model_folders(config))
        set_collective_timeout(bound_s)
        asked = world.waiting.anyone(lambda: world.rank == 1 and stop_after is not None and len(made) >= stop_after)
        found: Path | str
        try:
            found = index_records(Run(config, world, asked=asked), encoder, config.records).rows.place.resolve()
        except Stopped:
            found = "stopped"
        except UserError as error:
            found = str(error)
        set_collective_timeout(3600)
        # Nobody has asked the next start.
        world.waiting.meet()
        world.waiting._store.delete_key("mirage/stop")
        world.waiting._stopping = False
        world.waiting.meet()
        return found, made


def test_ranks_wait_longer_than_a_collective_and_share_the_work(
    own_group: Group, values: Values, tmp_path: Path
) -> None:
    (place, first), (other, second) = own_group.run(start, values, late_s=1.5, bound_s=0.7)
    assert place == other
    assert (first, second) == (list(range(0, 12, 2)), list(range(1, 12, 2)))
    assert files_of(place) == alone(values, tmp_path / "alone")
    assert [(one, made) for one, made in own_group.run(start, values)] == 2 * [(place, [])]


def test_an_index_made_beforehand_is_found(own_group: Group, values: Values) -> None:
    config = RunConfig.model_validate(values)
    (line,) = index_beforehand(config)
    assert line.startswith(f"{config.data_path}: 12 records, 12 rows to train on, index ")
    for place, made in own_group.run(start, values):
        assert (line.endswith(f" {place}"), made) == (True, [])


def test_a_request_to_stop_reaches_every_rank_and_the_next_start_goes_on(
    own_group: Group, values: Values, tmp_path: Path
) -> None:
    own_group.run(start, {**values, "cache_dir": str(tmp_path / "other")})
    (said, first), (also, second) = own_group.run(start, values, late_s=1.0, stop_after=2)
    assert (said, also, len(second)) == ("stopped", "stopped", 2)
    (place, more), (_, rest) = own_group.run(start, values)
    assert sorted([*first, *second, *more, *rest]) == list(range(12))
    assert files_of(place) == alone(values, tmp_path / "alone")


def test_hosts_that_share_no_cache_make_their_own(own_group: Group, values: Values, tmp_path: Path) -> None:
    both = own_group.run(start, {**values, "cache_dir": "cache"}, host=True)
    wanted = alone(values, tmp_path / "alone")
    for rank, (place, made) in enumerate(both):
        assert isinstance(place, Path), place
        assert (place.parents[1], made) == (tmp_path / str(rank) / "cache", list(range(12)))
        assert files_of(place) == wanted


def test_a_host_with_other_records_is_named(own_group: Group, values: Values) -> None:
    for said, _ in own_group.run(start, {**values, "cache_dir": "cache"}, host=True, strange=True):
        wanted = f"{values['data_path']}: rank 1 finds other records or images there than rank 0; copy"
        assert str(said).startswith(wanted)
