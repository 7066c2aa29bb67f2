"""The hub and very many guards, all in one process."""

from __future__ import annotations

import asyncio
import gc
import resource
import time
from collections.abc import Iterator

import pytest

from mirage_ds.cluster.guard.hub import SPARE_FILES, Hub
from mirage_ds.cluster.guard.wire import Bounds, Client, Verdict
from mirage_ds.cluster.here import free_ports
from mirage_ds.errors import UserError

SIZE = 1200


@pytest.fixture
def few_files() -> Iterator[None]:
    """The soft limit that many systems set: fewer files than connections. The clients need as many of their own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 3 * SIZE:
        pytest.skip(f"needs {3 * SIZE} open files, the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    yield
    # Connections of a loop that has ended are closed when they are collected.
    gc.collect()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def _run(port: int, fail: int | None) -> tuple[Verdict, set[Verdict | None], float]:
    """Let SIZE clients report and end; the hub's verdict, the clients' verdicts, the processor seconds of a beat."""
    bounds = Bounds(gather=60, silence=60)
    hub = Hub(SIZE, bounds, "job", lambda line: None)
    await hub.listen(port)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft > SIZE
    # The clients live in other processes otherwise.
    resource.setrlimit(resource.RLIMIT_NOFILE, (3 * SIZE, hard))
    judging = asyncio.create_task(hub.watch())
    clients = [Client("127.0.0.1", port, "job", rank, bounds) for rank in range(SIZE)]
    talking = [asyncio.create_task(client.run(lambda message: None)) for client in clients]
    async with asyncio.timeout(30):
        while len(hub.members) < SIZE:
            await asyncio.sleep(0.05)
    progress = {"count": 1, "doing": "forward", "step": 1, "kind": "", "slow": False}
    begun = time.process_time()
    for client in clients:
        client.say({"state": "sleeping", "progress": progress, "folder": None})
    async with asyncio.timeout(30):
        while not all(member.progress for member in hub.members):
            await asyncio.sleep(0.01)
    seconds = time.process_time() - begun
    for rank, client in enumerate(clients):
        client.say({"ended": 3 if rank == fail else 0, "why": "ended with exit code 3"})
    verdict = await judging
    await asyncio.wait(talking, timeout=20)
    return verdict, {client.verdict for client in clients}, seconds


@pytest.mark.parametrize("fail", [None, 777])
def test_a_thousand_ranks_hear_one_verdict(fail: int | None, few_files: None) -> None:
    verdict, heard, seconds = asyncio.run(_run(free_ports(), fail))
    assert heard == {verdict}
    assert verdict.code == (0 if fail is None else 3)
    if fail is not None:
        assert verdict.lines[-1].startswith("rank 777 on ")
    print(f"a beat of {SIZE} guards, both sides: {seconds:.2f} processor seconds")


def test_fewer_files_than_ranks_is_said() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with pytest.raises(UserError, match=f"needs {hard + SPARE_FILES} open files and may have {hard}"):
        asyncio.run(Hub(hard, Bounds(), "job", lambda line: None).listen(0))


def test_no_limit_of_files_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    # RLIM_INFINITY is -1, which is below every number.
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    asyncio.run(Hub(2, Bounds(), "job", lambda line: None).listen(0))
