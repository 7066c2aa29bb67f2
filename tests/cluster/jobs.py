"""Jobs on a cluster by each launcher: started as a user starts them, looked at, disturbed, and waited for."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from .hosts import Host, wait_until
from .slurm import Slurm

ROOT = Path(__file__).parents[2]
PYTHON = Path(sys.executable)
LAUNCHERS = ("pdsh", "mpi", "slurm", "pods")
# The guards' bounds in the tests; a job has to be over LIMIT_S after a fault.
GUARD = "--silence 8 --hang 8 --start 25 --gather 40 --grace 2"
LIMIT_S = 60
# Submits a job, waits until it is over, however often it is requeued, and ends with its exit code. `sbatch --wait`
# looks only every half minute.
SUBMIT = """
job=$(sbatch --parsable "$@") || exit
while squeue --noheader --job "$job" 2>/dev/null | grep -q .; do sleep 0.5; done
scontrol --oneliner show job "$job" | grep -oP 'ExitCode=\\K[0-9]+' | { read -r code; exit "$code"; }
"""
# Slurm and DeepSpeed's launcher start slowly when four jobs start at once on two cores.
START_S = 60


class Job:
    """One job of a launcher on some hosts.

    Attributes:
        out: where the job writes; log: everything that the launching commands printed.
        processes: the launching commands: one, or one a host where nobody launches for all.
    """

    def __init__(
        self,
        launcher: str,
        hosts: Sequence[Host],
        slots: int,
        out: Path,
        arguments: Sequence[object],
        module: str = "tests.cluster.stub",
        login: Host | None = None,
        guard: str = GUARD,
        options: Sequence[str] = (),
        **variables: str,
    ):
        out.mkdir(parents=True, exist_ok=True)
        self.launcher, self.hosts, self.out, self.log = launcher, hosts, out, out / "log"
        base = {
            "PATH": f"{PYTHON.parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            # Compiled extensions and caches of the machine's own, which the hosts share.
            **{key: os.environ[key] for key in ("XDG_CACHE_HOME",) if key in os.environ},
            "MIRAGE_PYTHON": str(PYTHON),
            "MIRAGE_MODULE": module,
            "MIRAGE_LOGS": str(out / "logs"),
            "MIRAGE_GUARD": guard,
            "MIRAGE_JOB": out.name,
            **variables,
        }
        words = [str(word) for word in arguments]
        launch = ROOT / "launch"
        if launcher in ("pdsh", "mpi"):
            hostfile = out / "hosts"
            hostfile.write_text("".join(f"{host.name} slots={slots}\n" for host in hosts))
            script = launch / ("deepspeed.sh" if launcher == "pdsh" else "mpi.sh")
            commands = [(hosts[0], [script, hostfile, *words], base)]
        elif launcher in ("slurm", "sbatch"):
            assert login is not None
            how = ["salloc", "-Q"]
            if launcher == "sbatch":
                how = ["bash", "-c", SUBMIT, "sbatch", f"--output={self.log}", "--gpus-per-node=0", "--cpus-per-task=1"]
            shape = ["-N", str(len(hosts)), f"--ntasks-per-node={slots}", "-w", ",".join(host.name for host in hosts)]
            shell = [] if launcher == "sbatch" else ["bash"]
            commands = [(login, [*how, *shape, *options, *shell, launch / "slurm.sbatch", *words], base)]
        elif launcher == "local":
            commands = [(hosts[0], [launch / "local.sh", *words], base | {"MIRAGE_RANKS": str(slots)})]
        else:
            place = {"NODES": str(len(hosts)), "SLOTS": str(slots), "MASTER_ADDR": hosts[0].name}
            place["MASTER_PORT"] = str(24000 + 2 * (sum(out.name.encode()) % 1000))
            commands = [
                (host, [launch / "pod.sh", *words], base | place | {"NODE_RANK": str(number)})
                for number, host in enumerate(hosts)
            ]
        self.started = time.monotonic()
        self.processes = [
            host.start(command, env=environment, cwd=ROOT, stdout=self.log) for host, command, environment in commands
        ]

    # Looking

    def step(self) -> int:
        """Return the last step that rank 0 of the stub has begun."""
        file = self.out / "step"
        text = file.read_text() if file.is_file() else ""
        return int(text) if text else 0

    def wait_for_step(self, step: int) -> None:
        """Wait until the stub is that far.

        Raises:
            AssertionError: the job has ended before, or does not start.
        """

        def there() -> bool:
            if self.step() >= step:
                return True
            assert any(one.poll() is None for one in self.processes), self.said()
            return False

        wait_until(there, f"{self.launcher}: step {step}", START_S)

    def said(self) -> str:
        """Return everything that the launching commands have printed."""
        return self.log.read_text(errors="replace") if self.log.is_file() else ""

    def last_lines(self, count: int = 3) -> str:
        """Return the last lines of the log, without what Slurm's own programs add after the job's end."""
        others = re.compile(r"\s*$|salloc|srun|slurm|attempt|Only batch")
        lines = [line for line in self.said().splitlines() if not others.match(line)]
        return "\n".join(lines[-count:])

    def given(self) -> list[dict[str, Any]]:
        """Return what each rank of the stub was given, in the order of ranks."""
        files = sorted(self.out.glob("rank*.json"), key=lambda file: int(file.stem[4:]))
        return [json.loads(file.read_text()) for file in files]

    def mine(self) -> list[psutil.Process]:
        """Return the processes on the job's hosts that belong to it: they all name its folder."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            if any(str(self.out) in word for word in process.info["cmdline"] or []):
                found.append(process)
        return found

    def launch_guard(self) -> psutil.Process:
        """Return the guard around the launcher."""
        return next(one for one in self.mine() if "mirage_ds.cluster.guard.launch" in one.cmdline())

    def launch_command(self) -> psutil.Process:
        """Return the launching command, which is all that its guard has started."""
        [command] = self.launch_guard().children()
        return command

    # Disturbing

    def signal_launcher(self, number: signal.Signals) -> None:
        """Signal as a user or a scheduler does: Ctrl-C reaches the whole process group, TERM the command alone."""
        for process in self.processes:
            if number == signal.SIGINT:
                os.killpg(process.pid, number)
            elif self.launcher == "slurm" and number == signal.SIGTERM:
                # salloc ends by itself and leaves its command alone; the script is what a scheduler signals.
                next(one for one in self.mine() if one.cmdline()[:1] == ["bash"]).send_signal(number)
            else:
                process.send_signal(number)

    # Ending

    def code(self) -> int | None:
        """Return the exit code of the (first) launching command, None until all of them have ended."""
        codes = [process.poll() for process in self.processes]
        return None if None in codes else codes[0]

    def end(self, limit_s: float = LIMIT_S) -> int:
        """Wait for the end and return the exit code; AssertionError when it does not come within the limit."""
        wait_until(lambda: self.code() is not None, f"end of the {self.launcher} job; it said {self.said()}", limit_s)
        return int(self.code() or 0)

    def left_behind(self, patience_s: float = 5) -> list[str]:
        """Return what still runs some seconds after the end."""
        deadline = time.monotonic() + patience_s
        while (rest := self.mine()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [" ".join(one.cmdline()) for one in rest if one.is_running()]


def flags(**settings: object) -> list[object]:
    """Return settings as the trainer's flags."""
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def start_all(slurm: Slurm, folder: Path, *arguments: object) -> list[Job]:
    """Start one job a launcher on the last two hosts; the first is Slurm's login host, and launches."""
    words = ("--steps", 4000, "--seconds", 0.05, *arguments)
    return [
        Job(launcher, slurm.nodes[:2], 1, folder / launcher, ("--out", folder / launcher, *words), login=slurm.login)
        for launcher in LAUNCHERS
    ]


def all_end(jobs: list[Job], fault: str, code: int | None, last: str, step: int = 0) -> None:
    """Wait for every job's end, then judge all of them.

    Args:
        code: of every job; None for any but 0.
        last: what the last lines of every log say.
        step: the fault's own, from when on seconds count; 0 for a fault that has just been made.
    """
    met: dict[str, float] = {}
    ended: dict[str, float] = {}
    begun = time.monotonic()
    while len(ended) < len(jobs) and time.monotonic() - begun < LIMIT_S + (START_S if step else 0):
        now = time.monotonic()
        for job in jobs:
            if job.step() >= step:
                met.setdefault(job.launcher, now)
            if job.code() is not None:
                ended.setdefault(job.launcher, now)
        time.sleep(0.05)
    wrong = []
    for job in jobs:
        name = job.launcher
        if name not in ended:
            wrong.append(f"{name}: it hangs; it said\n{job.said()[-3000:]}")
            continue
        left, returned, seconds = job.left_behind(), job.code(), ended[name] - met.get(name, begun)
        print(f"| {fault} | {name} | {seconds:.0f} | {returned} | {len(left) or 'nothing'} |")
        if returned != code and not (code is None and returned):
            wrong.append(f"{name}: exit code {returned}, not {code}; it said\n{job.said()[-3000:]}")
        if seconds > LIMIT_S:
            wrong.append(f"{name}: {seconds:.0f} s")
        if last not in job.last_lines():
            wrong.append(f"{name}: its last lines do not say '{last}':\n{job.last_lines(12)}")
        wrong += [f"{name} has left behind {one}" for one in left]
    assert not wrong, "\n\n".join(wrong)
