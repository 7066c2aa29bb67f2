"""Linux namespaces from Python 3.11, whose `os` has neither `setns` nor `unshare`.

A pid namespace is entered by children alone: the calling thread says in which one its next children begin. So a
process started here is a direct child of the test: its pid, its signals and its exit code are the real ones.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

MOUNT, UTS, IPC, PID, NET = 0x00020000, 0x04000000, 0x08000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: int) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def enter(descriptor: int, kinds: int) -> None:
    """Enter the namespaces of these kinds: those of a process (its pidfd), or one that is open itself."""
    _call("setns", descriptor, kinds)


def leave(kinds: int) -> None:
    """Leave for new, empty namespaces of these kinds."""
    _call("unshare", kinds)


def die_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends, however that happens."""
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def children_in(pidfd: int | None) -> Iterator[None]:
    """Let children that this thread starts meanwhile begin in that process's pid namespace; None: in a new one."""
    own = os.pidfd_open(os.getpid())
    try:
        if pidfd is None:
            leave(PID)
        else:
            enter(pidfd, PID)
        try:
            yield
        finally:
            enter(own, PID)
    finally:
        os.close(own)


def new_network() -> int:
    """Return a descriptor of a new network namespace, which lasts while that is open or a process is in it."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        leave(NET)
        try:
            return os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        finally:
            enter(own, NET)
    finally:
        os.close(own)
