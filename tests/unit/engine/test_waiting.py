"""Ranks that wait for each other in the store of their process group: how long, and what ends them. Three processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from mirage_ds.cluster.here import free_ports
from mirage_ds.engine import waiting
from mirage_ds.engine.waiting import Waiting
from mirage_ds.errors import EXIT_LOST, UserError

SIZE = 3
# Of signs of life here; on a busy machine a process may not run for some tenths of a second.
BEAT_S, SILENCE_S = 0.05, 1.5
LIMIT_S = 30


def _rank(rank: int, port: int, bound: float, work: Callable[[Waiting], None]) -> None:
    waiting.BEAT_S, waiting.SILENCE_S, waiting.FAREWELL_S, waiting.TELL_EVERY_S = BEAT_S, SILENCE_S, 0.3, 0.0
    store = dist.TCPStore("127.0.0.1", port, SIZE, rank == 0, timedelta(seconds=LIMIT_S))
    ranks = Waiting(store, rank, SIZE, bound)
    ranks.watch()
    work(ranks)
    # Not before the others: rank 0 holds the store.
    time.sleep(0 if rank else 0.5)
    os._exit(0)


def codes(work: Callable[[Waiting], None], bound: float = LIMIT_S) -> list[int | None]:
    """Do `work` on three ranks; how each of them ended."""
    port = free_ports()
    # Forked: each has torch already.
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, port, bound, work)) for rank in range(SIZE)]
    for one in ranks:
        one.start()
    end = time.monotonic() + LIMIT_S
    for one in ranks:
        one.join(max(0.0, end - time.monotonic()))
    found = [one.exitcode for one in ranks]
    for one in ranks:
        one.kill()
    return found


def test_ranks_meet_again_and_again_and_part() -> None:
    def work(ranks: Waiting) -> None:
        for turn in range(20):
            if turn % SIZE == ranks.rank:
                time.sleep(0.02)
            ranks.meet()
        ranks.part()
        # Alone from here on: nobody waits, and nobody misses who has left.
        if ranks.rank == 1:
            ranks.meet()
            time.sleep(2 * SILENCE_S / SIZE)

    assert codes(work) == [0, 0, 0]


@pytest.mark.parametrize(("dying", "waits"), [(0, True), (1, True), (2, False)])
def test_a_rank_that_is_killed_ends_the_others(dying: int, waits: bool) -> None:
    def work(ranks: Waiting) -> None:
        ranks.meet()
        time.sleep(10 * BEAT_S)
        if ranks.rank == dying:
            os.kill(os.getpid(), signal.SIGKILL)
        if waits:
            ranks.meet()
        time.sleep(LIMIT_S)

    assert codes(work) == [-signal.SIGKILL if rank == dying else EXIT_LOST for rank in range(SIZE)]


def test_a_rank_that_fails_ends_the_others_at_once() -> None:
    def work(ranks: Waiting) -> None:
        ranks.meet()
        if ranks.rank == 2:
            ranks.fail()
            os._exit(1)
        begun = time.monotonic()
        try:
            ranks.meet()
        finally:
            assert time.monotonic() - begun < SILENCE_S

    assert codes(work) == [EXIT_LOST, EXIT_LOST, 1]


def test_a_rank_that_leaves_alone_is_missed_in_the_end() -> None:
    def work(ranks: Waiting) -> None:
        ranks.meet()
        if ranks.rank == 1:
            ranks.leave()
            os._exit(2)
        ranks.meet()

    assert codes(work) == [EXIT_LOST, 2, EXIT_LOST]


@pytest.mark.parametrize("comes_on", [True, False])
def test_the_bound_is_of_waiting_without_progress(comes_on: bool) -> None:
    def work(ranks: Waiting) -> None:
        ranks.meet()
        if ranks.rank == 1:
            for _ in range(20):
                time.sleep(0.1)
                if comes_on:
                    ranks.moved()
        if comes_on or ranks.rank == 1:
            ranks.meet()
        else:
            said = f"1 of 3 ranks made no progress for 1 s, and rank {ranks.rank} waits"
            with pytest.raises(UserError, match=said):
                ranks.meet()

    # Where two have given up, the store goes with them.
    assert codes(work, bound=1.0) == ([0, 0, 0] if comes_on else [0, EXIT_LOST, 0])


def test_a_request_to_stop_is_heard_by_all() -> None:
    def work(ranks: Waiting) -> None:
        asked = ranks.anyone(lambda: ranks.rank == 1)
        assert ranks.rank == 1 or not asked()
        ranks.meet()
        asked()
        ranks.meet()
        assert asked()

    assert codes(work) == [0, 0, 0]


def test_a_process_alone_waits_for_nobody() -> None:
    alone = Waiting(None, 0, 1, 1.0)
    alone.watch()
    alone.meet()
    alone.moved()
    assert alone.anyone(lambda: True)()
    alone.part()
    alone.fail()
