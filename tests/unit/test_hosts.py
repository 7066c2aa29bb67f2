"""Hostfiles: what DeepSpeed reads, read alike; what it refuses or reads by halves, refused with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirage_ds.errors import UserError
from mirage_ds.hosts import Host, parse_hosts, read_hosts

GOOD = "# two racks\n\n  node-b slots=8\nnode-a\tslots=4 max_slots=4\n#node-c slots=8\nuser@10.0.0.3 slots=1 # spare\n"


def test_hosts_keep_the_files_order_which_gives_ranks() -> None:
    assert parse_hosts(GOOD, "hosts") == (Host("node-b", 8), Host("node-a", 4), Host("user@10.0.0.3", 1))


def test_deepspeed_reads_the_same() -> None:
    from deepspeed.launcher.runner import _parse_hostfile

    assert list(_parse_hostfile(GOOD.splitlines()).items()) == [tuple(host) for host in parse_hosts(GOOD, "hosts")]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a slots=1\nb\n", ["line 2", "'b'", "host slots=N"]),
        ("a slots=2x\n", ["line 1", "'a slots=2x'"]),
        ("a slots = 2\n", ["line 1"]),
        ("a slots=0\n", ["line 1", "a has 0 slots"]),
        ("a slots=1\n# a\na slots=2\n", ["line 3", "a stands there twice"]),
        ("# nothing\n\n", ["no host in it"]),
        ("", ["no host in it"]),
    ],
)
def test_a_faulty_file_is_refused_with_its_line(text: str, parts: list[str], tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        read_hosts(file)
    assert all(part in str(refused.value) for part in [str(file), *parts]), refused.value


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("gone", "binary", "."):
        with pytest.raises(UserError, match=r"--hostfile .*cannot be read"):
            read_hosts(tmp_path / name)
