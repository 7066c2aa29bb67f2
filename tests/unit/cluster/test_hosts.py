"""Hostfiles: what DeepSpeed reads, read alike; what it refuses or reads by halves, refused with file and line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mirage_ds.cluster.hosts import Host, main, parse_hosts, read_hosts
from mirage_ds.errors import UserError

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
        ("a slots=0\n", ["line 1", "a has slots=0;"]),
        ("a slots=1\n# a\na slots=2\n", ["line 3", "a stands there twice"]),
        ("a slots=1\nbob@A. slots=2\n", ["line 2", "A. stands there twice"]),
        ("a slots=1025\n", ["line 1", "a has slots=1025;"]),
        ("a slots=" + 5000 * "9", ["line 1", "a has slots=999"]),
        ("a slots=1\nnode1:2222 slots=4\n", ["line 2", "'node1:2222'", "~/.ssh/config"]),
        ("alice@node1:2222 slots=4\n", ["line 1", "~/.ssh/config"]),
        ("[10.0.0.1]:22 slots=4\n", ["line 1", "~/.ssh/config"]),
        ("node[1-4] slots=4\n", ["line 1", "one host a line", "Slurm"]),
        ("192.168.1.1, slots=4\n", ["line 1", "'192.168.1.1,'", "one host a line"]),
        ("a,b slots=4\n", ["line 1", "one host a line"]),
        ("\ufeffnode1 slots=4\n", ["line 1", "byte order mark"]),
        ("no\x00de slots=1\n", ["line 1", r"'no\x00de'", "ASCII"]),
        ("n\u00f6de slots=1\n", ["line 1", "ASCII"]),
        ("fe80::1 slots=1\n", ["line 1", "IPv6", "/etc/hosts"]),
        ("bob@[2001:db8::7] slots=1\n", ["line 1", "IPv6"]),
        ("fe80::1%eth0 slots=1\n", ["line 1", "IPv6"]),
        ("-oProxyCommand=x slots=1\n", ["line 1", "`host` or `user@host`"]),
        ("@node1 slots=1\n", ["line 1", "`host` or `user@host`"]),
        ("a@b@c slots=1\n", ["line 1", "`host` or `user@host`"]),
        ("ssh://node1 slots=1\n", ["line 1", "`host` or `user@host`"]),
        ("a\u00a0slots=1\n", ["line 1", "names no host and slots"]),
        ("a slots=1\x0bb slots=2\n", ["line 1"]),
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


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_the_launch_scripts_get_an_address_that_the_other_hosts_reach(
    ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts").write_bytes(ends.join(["alice@node1 slots=4", "node2 slots=3", ""]).encode())
    monkeypatch.setattr(sys, "argv", ["hosts", str(tmp_path / "hosts")])
    main()
    assert capsys.readouterr().out == "node1 7\n"


@pytest.mark.parametrize("module", ["mirage_ds.cluster.hosts", "mirage_ds.hosts"])
def test_launch_scripts_read_a_hostfile_by_either_name(module: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("alice@node1 slots=4\nnode2 slots=4\n")
    said = subprocess.run(
        [sys.executable, "-m", module, tmp_path / "hosts"], capture_output=True, text=True, check=True
    )
    assert said.stdout == "node1 8\n"
