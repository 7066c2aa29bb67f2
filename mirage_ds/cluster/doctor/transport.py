"""How a self-contained Python file gets to the hosts, runs there and answers, on all of them at the same time.

The interpreter on the host reads the file's text and one line of JSON from standard input, and prints lines of JSON. It
is started as DeepSpeed starts a rank: over ssh with the same interpreter, working directory and exported variables, or
by srun with the whole environment.
"""

import getpass
import json
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mirage_ds.cluster.doctor.probe import SIGN
from mirage_ds.cluster.environment import as_exported

# host → the command that runs LOADER on it.
Reach = Callable[[str], list[str]]

# The text comes as a line of JSON: ASCII, whatever the host's locale.
LOADER = "import json,sys;source=json.loads(sys.stdin.readline());exec(source)"
SSH_OPTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "ServerAliveInterval=5", "-a", "-x")
# DeepSpeed 0.19.8 exports what begins with these (runner.py, EXPORT_ENVS), on GPUs NCCL too.
EXPORTED = ("PYTHON", "MLFLOW", "MV2", "UCX")
GRACE_S = 1.0


def faults() -> Any:
    """Read faults.yaml: what goes wrong between hosts, and how to fix it."""
    return yaml.safe_load(Path(__file__).with_name("faults.yaml").read_text(encoding="utf-8"))


class Answer(NamedTuple):
    """What came back from one host.

    Attributes:
        lines: every line of JSON, in order.
        fault: what went wrong, behind the host's name; empty when the program ended well.
        mend: how to fix it.
        skew_s: by how much the host's clock is ahead of this one's at least; negative when it is behind.
        ended_s: when it ended, by time.monotonic().
    """

    host: str
    lines: list[dict[str, Any]]
    fault: str = ""
    mend: str = ""
    skew_s: float = 0.0
    ended_s: float = 0.0


def local(host: str) -> list[str]:
    """Reach this machine, whatever it is called."""
    return [sys.executable, "-c", LOADER]


def slurm(host: str) -> list[str]:
    """Reach a node of the Slurm job that this runs in, beside whatever runs there."""
    step = ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={host}", "--export=ALL", "--unbuffered"]
    return [*step, sys.executable, "-c", LOADER]


def ssh(exports: str) -> Reach:
    """Reach hosts over ssh; `exports` is shell code that sets what DeepSpeed would export, before pdsh has read it."""

    def command(host: str) -> list[str]:
        # pdsh puts names in: the host's, the user's (and ranks for %n).
        names = {"%%": "%", "%h": host, "%u": getpass.getuser()}
        read = re.sub("%[%hu]", lambda match: names[match[0]], exports)
        return ["ssh", *SSH_OPTIONS, host, f"{read}exec {shlex.quote(sys.executable)} -c {shlex.quote(LOADER)}"]

    return command


def exports(environment: Mapping[str, str], cwd: str, gpus: bool, remote_env: Mapping[str, str]) -> str:
    """Return shell code that sets what DeepSpeed's pdsh launcher exports.

    Args:
        remote_env: what `.deepspeed_env` holds: name → text behind `NAME=`.
    """
    begins = (*EXPORTED, "NCCL") if gpus else EXPORTED
    texts = {name: shlex.quote(value) for name, value in environment.items() if name.startswith(begins)}
    texts["PYTHONPATH"] = shlex.quote(":".join(filter(None, (cwd, environment.get("PYTHONPATH")))))
    texts |= {name: as_exported(value) for name, value in remote_env.items()}
    return "".join(f"export {name}={text}; " for name, text in texts.items())


def _fault(host: str, said: str, code: int, answered: bool) -> tuple[str, str]:
    """Return (what is wrong, how to fix it), from what ssh or srun wrote and returned; empty where nothing is."""
    last = (said.strip().splitlines() or ["it said nothing"])[-1]
    if answered:
        return (f"ended with exit code {code}: {last}", "read that line; it is the host's own") if code else ("", "")
    fault = next(one for one in faults()["asking"] if re.search(one["says"], f"{said}\nexit code {code}"))
    return fault["what"].format(code=code, last=last), fault["mend"].format(host=host, python=sys.executable)


def _end(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        # srun cancels its step on SIGTERM; killed at once it would leave it.
        process.terminate()
    for process in processes:
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()


def _skew(said: float, asked_at: float, heard_at: float) -> float:
    """Return by how much a clock is off at least, that showed `said` between two times of this one."""
    return said - min(max(said, asked_at), heard_at)


def _ask(
    host: str, command: list[str], source: str, request: dict[str, Any], running: list[subprocess.Popen[str]]
) -> Answer:
    lines: list[dict[str, Any]] = []
    skew_s, limit_s, asked_at, begin = 0.0, request["limit_s"], time.time(), time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace"
        )
        running.append(process)
        timer = threading.Timer(limit_s, _end, [process])
        timer.start()
        assert process.stdin
        assert process.stdout
        # Where ssh has left already, its exit code and words say why.
        with suppress(BrokenPipeError):
            process.stdin.write(f"{json.dumps(source)}\n{json.dumps(request, default=str)}\n")
            process.stdin.flush()
        for line in process.stdout:
            if line.startswith(SIGN):
                lines.append(json.loads(line.removeprefix(SIGN)))
                if "time" in lines[-1]:
                    skew_s = _skew(lines[-1]["time"], asked_at, time.time())
        code = process.wait()
        ended_s = time.monotonic()
        timer.cancel()
        with suppress(BrokenPipeError):
            process.stdin.close()
        errors.seek(0)
        said = errors.read()
    what, mend = _fault(host, said, code, bool(lines))
    if code and ended_s - begin >= limit_s:
        what = f"gave no answer within {limit_s:g} s"
        mend = f"see whether {host} is up and whether a network disk hangs there"
    return Answer(host, lines, what, mend, skew_s, ended_s)


def ask_all(
    hosts: Sequence[str],
    reach: Reach,
    source: str,
    request: dict[str, Any],
    limit_s: float,
    together: bool = False,
) -> list[Answer]:
    """Run `source` on every host at once and return what each answers, in the order of `hosts`.

    Args:
        request: each gets it, with its own `number` and `limit_s`.
        together: the programs wait for each other: when one has failed, the others are ended soon after.

    However it ends, after `limit_s` or by an exception, no process of this machine is left; the programs themselves end
    when their limit is over or their standard input is closed.
    """
    running: list[subprocess.Popen[str]] = []
    with ThreadPoolExecutor(max_workers=len(hosts)) as pool:
        try:
            asked = [
                pool.submit(_ask, host, reach(host), source, {**request, "number": number, "limit_s": limit_s}, running)
                for number, host in enumerate(hosts)
            ]
            for done in as_completed(asked):
                if together and done.result().fault:
                    wait(asked, GRACE_S)
                    break
        finally:
            _end(*running)
        return [answer.result() for answer in asked]
