"""PID 1 of a host: mounts what a host has of its own, says "ready", then reaps orphans until it is killed.

    python init.py ETC      # ETC: a folder laid over /etc

It begins in namespaces made for it by `hosts.py`. Standard library only, no import from here: it starts in 30 ms.
"""

import os
import signal
import subprocess
import sys

# /proc shows the host's processes alone, /sys its interfaces. /etc has no upper layer, so nobody can write there.
# Private: shared memory, and sockets and pid files in /run. All else is shared, as over NFS.
SETUP = """
mount --make-rprivate /
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/lock /run/sshd /run/munge
mount -t overlay -o lowerdir={etc}:/etc overlay /etc
"""


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the kernel then spares PID 1, as with every other signal
    for line in SETUP.format(etc=sys.argv[1]).strip().splitlines():
        subprocess.run(line.split(), check=True)
    print("ready", flush=True)
    while True:
        signal.sigwait([signal.SIGCHLD])
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:  # none left
            pass


if __name__ == "__main__":
    main()
