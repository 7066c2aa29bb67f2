"""A rank without torch: steps, each with an exchange between all ranks that has no timeout, and one fault.

    python -m tests.cluster.stub --out DIR --steps 50 --fault raise --at 5 --on 1

Rank 0 listens on MASTER_PORT. At the end of each step every rank tells it whether it was asked to stop and waits for
the answer; a rank that is late or gone leaves the others waiting for ever, as a collective does. What a rank was given
stands in DIR/rank<N>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

from mirage_ds.errors import EXIT_STOPPED
from mirage_ds.run.heartbeat import COLLECTIVE, LOADING, guarded

FAULTS = ("none", "user", "raise", "exit", "kill", "stop", "sleep", "skip")


def meet(rank: int, size: int) -> list[socket.socket]:
    """Connect all ranks with rank 0; there, return one connection a rank."""
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if rank == 0:
        with socket.create_server(("", address[1])) as server:
            return [server.accept()[0] for _ in range(size - 1)]
    while True:
        try:
            return [socket.create_connection(address)]
        except OSError:
            time.sleep(0.1)


def exchange(rank: int, others: list[socket.socket], flag: bool) -> bool:
    """Return, on every rank, whether the flag is up on any of them."""
    if rank:
        others[0].sendall(b"1" if flag else b"0")
        return answer(others[0]) == b"1"
    raised = [answer(other) == b"1" for other in others]
    whole = flag or any(raised)
    for other in others:
        other.sendall(b"1" if whole else b"0")
    return whole


def answer(other: socket.socket) -> bytes:
    """Read one byte."""
    said = other.recv(1)
    if not said:
        raise ConnectionError("connection closed by peer")
    return said


def do(fault: str) -> None:
    """Do what goes wrong."""
    if fault == "raise":
        raise RuntimeError("the disk of this rank is on fire")
    if fault == "exit":
        sys.exit(7)
    if fault == "user":
        print("error: a mistake\n", end="", file=sys.stderr, flush=True)
        os._exit(2)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "sleep":
        time.sleep(1000)


def main() -> None:
    """Run the steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=0.05)
    parser.add_argument("--fault", choices=FAULTS, default="none")
    parser.add_argument("--at", type=int, default=5)
    parser.add_argument("--on", type=int, default=1)
    parser.add_argument("--word", help="arrives as it was written")
    parser.add_argument("--resume", help="what slurm.sbatch adds")
    options = parser.parse_args()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    where = guarded()
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGTERM, ask)
    options.out.mkdir(parents=True, exist_ok=True)
    where.folder(options.out)
    given = {"host": socket.gethostname(), "word": options.word, "environment": dict(os.environ)}
    (options.out / f"rank{rank}.json").write_text(json.dumps(given))
    where.at("meets the others", kind=LOADING)
    others = meet(rank, size)
    for step in range(1, options.steps + 1):
        where.at("waits for data", step)
        faulty = step == options.at and rank == options.on
        if faulty:
            do(options.fault)
        time.sleep(options.seconds)
        if rank == 0:
            # In one write, also where Python does not buffer: the other rank's line may come between two.
            print(f"step {step}\n", end="", flush=True)
            (options.out / "step").write_text(str(step))
        if faulty and options.fault == "skip":
            where.at("exchanges losses", step, COLLECTIVE)
            where.at("waits for data", step + 1)
            time.sleep(1000)
        where.at("exchanges losses", step, COLLECTIVE)
        if exchange(rank, others, asked):
            print(f"rank {rank} saved step {step}", flush=True)
            sys.exit(EXIT_STOPPED)
        where.settle()


if __name__ == "__main__":
    main()
