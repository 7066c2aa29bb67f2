"""The ranks of the bandwidth test on one host. Standard library and torch; its text is sent to hosts, see transport.py.

One process a host starts one rank a slot. Each rank first meets rank 0 over plain TCP on the master's port, so that a
firewall is told from a slow network before torch is imported; then all ranks measure together. Nothing stays behind:
every process has an alarm, and ends when the one that started it is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

Request = dict[str, Any]

SIGN = "\x1emirage-doctor "
MEET_S = 8.0
EXIT_UNMET = 3
# Runs of each measurement after the first; one that took SLOW_S is enough.
ITERATIONS = 3
SLOW_S = 0.3


def say(**values: Any) -> None:
    """Send one line to who asked, in one write: several ranks share the pipe."""
    os.write(1, f"{SIGN}{json.dumps(values)}\n".encode())


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def start(request: Request, source: str) -> int:
    """Start this host's ranks and wait for them; the first that fails ends the others. Return its exit code."""
    loader = "import json,sys;source=json.loads(sys.stdin.readline());exec(source)"
    ranks = []
    for local_rank, rank in enumerate(request["ranks"]):
        place = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": request["world_size"]}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        process = subprocess.Popen([sys.executable, "-c", loader], stdin=subprocess.PIPE, env=environment, text=True)
        assert process.stdin
        process.stdin.write(f"{json.dumps(source)}\n{json.dumps(request)}\n")
        process.stdin.flush()
        ranks.append(process)

    def leave_with_asker() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=leave_with_asker, daemon=True).start()
    codes: list[int | None] = [None]
    while None in codes and not any(codes):
        time.sleep(0.05)
        codes = [rank.poll() for rank in ranks]
    for rank in ranks:
        rank.kill()
        rank.wait()
    return next((code for code in codes if code), 0)


def receive(request: Request) -> list[int]:
    """As rank 0, wait on the master's port until every other rank has come; return those that did not in time."""
    missing = set(range(1, request["world_size"]))
    end = time.monotonic() + MEET_S
    guests = []
    with socket.create_server(("", request["master_port"]), backlog=len(missing) + 1) as server:
        while missing and time.monotonic() < end:
            server.settimeout(max(0.01, end - time.monotonic()))
            with contextlib.suppress(TimeoutError, ValueError, ConnectionError):
                guest = server.accept()[0]
                guest.settimeout(1.0)
                missing.discard(int(guest.recv(16)))
                guests.append(guest)
        for guest in guests:
            with contextlib.suppress(OSError):
                guest.sendall(b"-" if missing else b"+")
                # Whoever closes first keeps the port busy for a minute: that must not be the master.
                guest.recv(1)
            guest.close()
    return sorted(missing)


def come(request: Request, rank: int) -> str | None:
    """Reach rank 0 and wait until all are there; return why it cannot be reached, None when it was."""
    end, why = time.monotonic() + MEET_S, ""
    while True:
        left = max(0.5, end - time.monotonic())
        try:
            met = socket.create_connection((request["master_addr"], request["master_port"]), timeout=left)
        except OSError as error:
            # What the network has answered once says more than that the time is over.
            why = (not isinstance(error, TimeoutError) and error.strerror) or why or "timed out"
            if time.monotonic() > end - 0.5:
                return why
            time.sleep(0.1)
            continue
        with met:
            met.settimeout(2 * MEET_S)
            met.sendall(str(rank).encode())
            if met.recv(1) != b"+":
                # Rank 0 says who is missing.
                sys.exit(EXIT_UNMET)
            return None


def meet(request: Request, rank: int) -> None:
    """Meet rank 0 on the master's port over plain TCP, so that nobody goes on alone; say who cannot and leave."""
    if rank == 0:
        missing = receive(request)
        if missing:
            say(rank=rank, stage="meeting", missing=missing, within_s=MEET_S)
            sys.exit(EXIT_UNMET)
    elif fault := come(request, rank):
        say(rank=rank, stage="meeting", fault=fault)
        sys.exit(EXIT_UNMET)
    say(rank=rank, stage="met")


def measure(request: Request, rank: int, local_rank: int) -> dict[str, Any]:
    """Join all ranks and measure; seconds this rank took for each collective and, round by round, each pair."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    on_gpu = request["backend"] == "nccl"
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    address = f"tcp://{request['master_addr']}:{request['master_port']}"
    world, count = request["world_size"], request["elements"]
    dist.init_process_group(
        *(request["backend"], address), rank=rank, world_size=world, timeout=timedelta(seconds=request["limit_s"])
    )
    say(rank=rank, stage="joined")
    payload, together = torch.ones(count, device=device), torch.ones(1, device=device)

    def seconds(work: Any) -> float:
        """The fastest of some runs, fewer where they are slow; all ranks begin each together."""
        best = math.inf
        for number in range(1 + ITERATIONS):
            dist.all_reduce(together.fill_(1.0))
            # Also waits for the GPU.
            together.item()
            begin = time.perf_counter()
            work()
            payload[0].item()
            taken = time.perf_counter() - begin
            # The first run also makes connections.
            best = min(best, taken) if number else best
            dist.all_reduce(together.fill_(taken), dist.ReduceOp.MAX)
            if number and together.item() > SLOW_S:
                break
        return best

    part = torch.ones(count // world, device=device)
    gathered = [torch.empty_like(part) for _ in range(world)]
    found: dict[str, Any] = {
        "all_reduce_s": seconds(lambda: dist.all_reduce(payload)),
        "all_gather_s": seconds(lambda: dist.all_gather(gathered, part)),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "pairs": {},
    }
    say(rank=rank, stage="collectives")
    arriving = torch.empty_like(payload)

    def exchange(other: int) -> None:
        both = [dist.P2POp(dist.isend, payload, other), dist.P2POp(dist.irecv, arriving, other)]
        for work in dist.batch_isend_irecv(both):
            work.wait()
        arriving[0].item()

    for number, counterparts in enumerate(request["rounds"]):
        # Every rank goes through every round, so that pairs of different rounds never share a wire.
        other = counterparts.get(str(rank))
        taken = seconds(lambda other=other: None if other is None else exchange(other))
        if other is not None:
            found["pairs"][number] = taken
    dist.barrier()
    dist.destroy_process_group()
    return found


def main(source: str) -> None:
    """Be the host's starter or, where RANK says so, one rank. `source` is this file's own text."""
    request = json.loads(sys.stdin.readline())
    signal.alarm(math.ceil(request["limit_s"]) + 2)
    if not request.get("is_rank"):
        os.chdir(request["cwd"])
        sys.exit(start({**request, "is_rank": True, "starter": os.getpid()}, source))
    die_with_parent()
    if os.getppid() != request["starter"]:
        # It ended before the kernel was asked.
        sys.exit(EXIT_UNMET)
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    meet(request, rank)
    say(rank=rank, stage="measured", **measure(request, rank, local_rank))


if __name__ == "__main__":
    main(globals()["source"])
