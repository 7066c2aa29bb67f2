"""What the hub concludes from what it has heard, by the clock alone."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from mirage_ds.cluster.guard.judge import Member, hanging, judge, late, main_stack, waits_for
from mirage_ds.cluster.guard.wire import EXIT_HANG, Bounds, Verdict
from mirage_ds.engine.place import Place, find_place
from mirage_ds.errors import EXIT_LOST, EXIT_STOPPED, UserError
from mirage_ds.run.heartbeat import COLLECTIVE, LOADING, SAVING, SETTLED, Heartbeat

BOUNDS = Bounds(gather=50, silence=10, start=100, hang=20, grace=1)


def mark(
    count: int, doing: str = "waits for data", step: int | None = 3, kind: str = "", slow: bool = False
) -> dict[str, Any]:
    return {"count": count, "doing": doing, "step": step, "kind": kind, "slow": slow}


def rank(number: int, heard: float = 0.0, **more: Any) -> Member:
    return Member(number, f"node{number}", heard, **more)


def verdict(members: list[Member], now: float, size: int = 2) -> Verdict | None:
    return judge(members, size, BOUNDS, 0.0, now)


def test_all_is_well_within_the_bounds() -> None:
    assert verdict([rank(0, 95), rank(1, 95)], 100) is None


def test_ranks_that_never_came_are_named() -> None:
    assert verdict([rank(0, 49)], 49) is None
    found = verdict([rank(0, 51), rank(2, 51)], 51, size=4)
    assert found == Verdict(EXIT_LOST, ("rank(s) 1, 3 of 4 did not start within 50 s; heard from node0, node2",))


def test_silence_counts_from_the_last_word() -> None:
    assert verdict([rank(0, 100), rank(1, 91)], 101) is None
    found = verdict([rank(0, 100), rank(1, 90.5)], 101)
    assert found is not None
    assert found.code == EXIT_LOST
    assert found.lines[-1].startswith("rank 1 on node1: no sign of life for 10 s")


def test_the_failure_that_began_it_is_named_last_though_another_was_heard_first() -> None:
    first = rank(0, 10, code=1, ended=10.0, why="ended with exit code 1: RuntimeError: Connection closed by peer")
    second = rank(1, 10, code=137, ended=10.4, why="was killed by SIGKILL")
    assert verdict([first, second], 10.5) is None, "the hub waits for the others' last words"
    found = verdict([first, second], 11.1)
    assert found is not None
    assert (found.code, found.lines[-1]) == (137, "rank 1 on node1 was killed by SIGKILL")
    assert found.lines[0].startswith("then rank 0")


def test_a_rank_that_ended_since_another_is_gone_did_not_begin_it() -> None:
    first = rank(0, 10, code=EXIT_LOST, ended=10.0, why=f"ended with exit code {EXIT_LOST}")
    found = verdict([first, rank(1, 10, code=1, ended=10.4, why="ended with exit code 1: KeyError")], 11.1)
    assert found is not None
    assert (found.code, found.lines[-1]) == (1, "rank 1 on node1 ended with exit code 1: KeyError")


def test_stopped_on_request_is_no_failure() -> None:
    members = [rank(n, 10, code=EXIT_STOPPED, ended=10.0, why="ended with exit code 75") for n in (0, 1)]
    assert verdict(members, 12) == Verdict(EXIT_STOPPED, ("stopped on request",))


def test_a_stopped_process_is_judged_after_a_while() -> None:
    member = rank(1, 10)
    member.hear({"state": "stopped", "progress": {}, "folder": None}, 10)
    member.hear({"state": "stopped", "progress": {}, "folder": None}, 12)
    assert verdict([rank(0, 12), member], 12) is None
    member.hear({"state": "stopped", "progress": {}, "folder": None}, 13.5)
    assert verdict([rank(0, 13.5), member], 13.5) == Verdict(
        EXIT_HANG, ("rank 1 on node1 is stopped (SIGSTOP); the others wait for it",)
    )
    member.hear({"state": "sleeping", "progress": {}, "folder": None}, 14)
    assert verdict([rank(0, 14), member], 20) is None


@pytest.mark.parametrize(("code", "wanted"), [(1, 1), (0, EXIT_LOST)])
def test_a_launcher_that_ends_before_its_ranks_ends_them(code: int, wanted: int) -> None:
    launcher = Member(None, "login", 10, code=code, ended=10.0, why=f"ended with exit code {code}")
    assert verdict([rank(0, 11), rank(1, 11), launcher], 10.5) is None
    found = verdict([rank(0, 11), rank(1, 11), launcher], 11.5)
    assert found is not None
    assert found.code == wanted


@pytest.mark.parametrize(("slow", "bound"), [(False, 20), (True, 100)])
def test_a_hang_is_no_progress_of_any_rank_for_as_long_as_its_work_may_take(slow: bool, bound: float) -> None:
    members = [rank(0, progress=mark(4, slow=slow), progressed=10.0), rank(1, progress=mark(4), progressed=30.0)]
    assert not hanging(members, 2, BOUNDS, 30 + bound - 0.1)
    assert hanging(members, 2, BOUNDS, 30 + bound + 0.1)
    assert not hanging(members, 3, BOUNDS, 1000), "a rank that has not come yet is another matter"


STACKS = """Thread 0x00007f (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 324 in wait

Current thread 0x00007e (most recent call first):
  File "/site-packages/torch/distributed/distributed_c10d.py", line 2806 in all_reduce
  File "/site-packages/mirage_ds/run/step.py", line 120 in step
"""


def test_what_a_rank_waits_for_is_read_from_its_main_thread() -> None:
    assert [frame.split(", ")[1] for frame in main_stack(STACKS)] == ["line 2806 in all_reduce", "line 120 in step"]
    assert waits_for(STACKS) == "another rank (a collective)"
    assert waits_for(STACKS.replace("distributed/distributed_c10d", "utils/data/dataloader")).startswith("its data")
    assert waits_for(STACKS.replace("distributed/distributed_c10d", "serialization")) == "the disk"
    assert waits_for("") == "something unknown: it wrote no stacks"
    # Somebody had asked before: the newest answer counts, of a process with one thread too.
    one = 'Current thread 0x01 (most recent call first):\n  File "{}", line 1 in f\n  File "main.py", line 2 in run\n'
    assert main_stack(one.format("old.py") + one.format("new.py")) == [
        '"new.py", line 1 in f',
        '"main.py", line 2 in run',
    ]


def test_the_rank_with_the_fewest_marks_was_late() -> None:
    members = [rank(0, progress=mark(9, "forward")), rank(1, progress=mark(8)), rank(2, progress=mark(9, "forward"))]
    assert late(members) == "rank 1 on node1 was late: waits for data, step 3"


def test_a_rank_in_a_collective_is_not_late_for_one_that_has_left_it_behind() -> None:
    members = [rank(0, progress=mark(8, "sums up the losses", 3, COLLECTIVE)), rank(1, progress=mark(9, step=4))]
    assert late(members) == (
        "rank 1 on node1 went past a collective in which rank 0 on node0 still waits (sums up the losses, step 3); "
        "it is at: waits for data, step 4"
    )


def test_at_equal_marks_the_one_that_waits_for_nobody_was_late() -> None:
    busy = STACKS.replace("torch/distributed/distributed_c10d", "somewhere/busy")
    members = [rank(0, progress=mark(8), stacks=STACKS), rank(1, progress=mark(8), stacks=busy)]
    assert late(members).startswith(
        'rank 1 on node1 was late: waits for data, step 3, waits for "/site-packages/somewhere'
    )
    members[1].stacks = STACKS
    assert late(members).startswith("all ranks are at the same place: waits for data, step 3")


def test_a_place_is_read_from_any_launcher() -> None:
    meeting = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
    assert find_place(meeting | slurm) == Place(3, 4, 1, "node1", 29500)
    mpi = {f"OMPI_COMM_WORLD_{name}": value for name, value in (("RANK", "2"), ("SIZE", "4"), ("LOCAL_RANK", "0"))}
    # mpirun inside a batch script: Slurm speaks of the script.
    assert find_place(meeting | slurm | mpi).rank == 2
    assert find_place(meeting | slurm | mpi | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}).size == 1
    with pytest.raises(UserError, match="no launcher has set RANK") as caught:
        find_place(meeting)
    # The rank that meets it says it.
    assert not caught.value.everywhere
    with pytest.raises(UserError, match="SLURM_PROCID is set, and MASTER_PORT not"):
        find_place(slurm | {"MASTER_ADDR": "node1"})


def test_marks_are_slow_until_the_first_step_is_done_and_in_loads_and_saves() -> None:
    reading, writing = os.pipe()
    where = Heartbeat(writing)
    where.at("forward", 1)
    where.settle()
    # From here on a rank that has had more marks in its start is not ahead of the others.
    where.at("forward", 2)
    where.at("saves", 2, SAVING)
    where.at("loads", kind=LOADING)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = [json.loads(line) for line in pipe]
    assert [one["slow"] for one in told] == [True, False, True, True]
    assert [one["count"] for one in told] == [1, SETTLED + 1, SETTLED + 2, SETTLED + 3]


def test_a_guard_that_is_gone_or_takes_nothing_never_stops_a_rank() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    where = Heartbeat(writing)
    for _ in range(10_000):  # more than a pipe holds
        where.at("forward", 1)
    os.close(reading)
    where.at("forward", 2)
    where.at("forward", 3)
    os.close(writing)
