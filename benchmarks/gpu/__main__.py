"""What one GPU is asked in fifteen minutes; docs/performance.md ("What a card would be asked") says how to run it.

    python -m benchmarks.gpu first --out runs/gpu           # ten minutes at most
    python -m benchmarks.gpu second --out runs/gpu          # five
    python -m benchmarks.gpu first second --cpu --out …     # the same parts in small, without a GPU

Each part is a command of its own with a time limit. Its JSON line goes to the console and into results.jsonl as soon as
it is done, with what was predicted beside it; what it printed goes into log.txt. A part that fails stops no other.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import click

REPO = Path(__file__).parents[2]
RECORDS = REPO / "data/sample.jsonl"
MINUTES = {"first": 10, "second": 5}
# A CPU takes what it takes; a limit there only ends what hangs.
CPU_TIMES = 10
LIGER = find_spec("liger_kernel") is not None
# Seconds of a call that are left for its own end.
SPARE_S = 10
# A 7B whose weights, gradients and states are bf16 takes more than 80 GB.
LARGE_GB = 120
# By arithmetic for this model and an H200 (4.3 TB/s and 790 TFLOP/s reached), 2026-11-29; memory is the plan's part.
PREDICTED_OF = "qwen2.5-vl-7b"
PREDICTED: dict[str, dict[str, Any]] = {
    "stage1": {"tokens_per_s": 9400, "mfu": 0.37},
    "stage2": {"tokens_per_s": 8600, "over_stage1": 1.1, "thin_pass_ms": 23, "thin_pass_host_ms": 40},
    "decode": {"ms_a_step": 9},
}


class Part(NamedTuple):
    """One question.

    Attributes:
        limit_s: after which it is ended.
        command: prints a JSON line, or is pytest.
        predicted: what it is held against.
    """

    name: str
    limit_s: int
    command: tuple[str, ...]
    predicted: dict[str, Any] | None = None


def python(module: str, *words: object) -> tuple[str, ...]:
    """Return the words of a command."""
    return (sys.executable, "-m", module, *map(str, words))


VERSIONS = """
import json, deepspeed, torch, transformers, mirage_ds.train
gpu = torch.cuda.is_available()
found = {one.__name__: one.__version__ for one in (torch, transformers, deepspeed)}
found |= {"gpu": torch.cuda.get_device_name(), "gb": torch.cuda.mem_get_info()[1] / 1e9} if gpu else {}
print(json.dumps(found))
"""


def machine() -> Part:
    """Ask whether the versions go together, and for the GPU."""
    return Part("machine", 90, (sys.executable, "-c", VERSIONS))


def parts_of(call: str, preset: str, model: Path, cpu: bool) -> list[Part]:
    """List a call's parts, the most important first.

    Args:
        preset: of the model that is timed; model: where it is written.
    """
    small = ("--rows", 2, "--repeats", 1, "--threads", 1)
    size = small if cpu else ("--rows", 24, "--repeats", 4, "--micro_tokens", 20480, "--dtype", "bf16_states")
    common = ("--model", model, "--records", RECORDS, "--checkpointing", *size)

    def step(name: str, limit_s: int, stage: str, *words: object) -> Part:
        return Part(name, limit_s, python("benchmarks.step", "--stage", stage, *common, *words))

    def tests(name: str, limit_s: int, *files: str) -> Part:
        return Part(name, limit_s, python("pytest", "-rs", "-s", *(f"tests/gpu/test_{file}.py" for file in files)))

    texts = ("--text", RECORDS, "--tokenizer_size", 576)
    made = Part("model", 120, python("mirage_ds", "init", "--preset", preset, "--out", model, *texts))
    if call == "first":
        found = [
            step("stage2", 150, "stage2", "--zero", 3, "--profile"),
            # In small, this one is also what the last one would show.
            step("stage1", 120, "stage1", "--zero", 1 if cpu else 3, "--profile"),
            tests("tests", 150, "attention", "forward", "head", "kernels", "launches", "memory"),
            Part("nano", 120, python("benchmarks.gpu.nano")),
            # What ZeRO-3's hooks cost the host.
            *([] if cpu else [step("stage2_zero1", 120, "stage2", "--zero", 1)]),
        ]
    else:
        found = [
            step("sft", 150, "sft", "--zero", 3, "--against", "naive", "--plain_rows", 2 if cpu else 6),
            Part("decode", 80, python("benchmarks.gpu.decode", model, RECORDS, *(("--rows", 2) if cpu else ()))),
            tests("recipes", 120, "ds_configs"),
            # Beside the first call's stage1, which runs without.
            *([step("liger", 100, "stage1", "--zero", 3, "--kernels", "liger")] if LIGER and not cpu else []),
        ]
    if preset == PREDICTED_OF:
        found = [part._replace(predicted=PREDICTED.get(part.name)) for part in found]
    # The second call may find what the first has written.
    return found if model.exists() else [made, *found]


def environment(cpu: bool) -> dict[str, str]:
    """Return the environment of every part."""
    memory = "/dev/shm"
    fast = memory if Path(memory).is_dir() and not cpu else tempfile.gettempdir()
    path = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if cpu else {}
    return os.environ | {
        **hidden,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "DS_ACCELERATOR": "cpu" if cpu else "cuda",
        "OMP_NUM_THREADS": "1" if cpu else "4",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # A process that forks later may look for GPUs, but not start CUDA.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TMPDIR": fast,
    }


def result_of(said: str) -> dict[str, Any]:
    """Return the last JSON object that a part has printed, or pytest's last line."""
    for line in reversed(said.splitlines()):
        if line.startswith("{"):
            return dict(json.loads(line))
        if re.search(r"\d+ (passed|failed|skipped|error)", line):
            return {outcome: int(count) for count, outcome in re.findall(r"(\d+) (\w+)", line.split(" in ")[0])}
    return {"last_lines": said.splitlines()[-5:]}


class Asking:
    """Takes parts and writes down what they come to.

    Attributes:
        ends: when the call has to be over, by time.monotonic(); times: by which the parts' own limits are longer.
    """

    def __init__(self, out: Path, minutes: float, environment: dict[str, str], times: int = 1):
        self.ends, self.times = time.monotonic() + times * 60 * minutes - SPARE_S, times
        self.out, self.environment, self.lock = out, environment, Lock()
        out.mkdir(parents=True, exist_ok=True)

    def ask(self, part: Part) -> dict[str, Any]:
        """Run a part; whatever happens, a line comes of it."""
        begun = time.monotonic()
        limit = min(self.times * part.limit_s, self.ends - begun)
        with tempfile.TemporaryFile("w+") as log:
            code = self._run(part.command, limit, log) if limit > 0 else None
            log.seek(0)
            said = log.read()
        line = {
            "part": part.name,
            "ok": code == 0,
            "code": code if code is not None else f"not done within {max(0, limit):.0f} s",
            "seconds": round(time.monotonic() - begun, 1),
            "predicted": part.predicted,
            "result": result_of(said),
        }
        with self.lock:
            print(json.dumps(line), flush=True)
            with (self.out / "results.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            with (self.out / "log.txt").open("a") as file:
                file.write(f"=== {part.name}: {' '.join(part.command)}\n{said}\n")
        return line

    def _run(self, command: tuple[str, ...], limit: float, log: Any) -> int | None:
        """Run a command in a session of its own; return its code, None where its time was up."""
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=REPO, env=self.environment, start_new_session=True
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # Also what a part that is over has left running.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@click.command()
@click.argument("calls", nargs=-1, required=True, type=click.Choice(list(MINUTES)))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of results.jsonl and log.txt.")
@click.option("--cpu", is_flag=True, help="The same in small, without a GPU: nano, a step each.")
@click.option("--model", type=click.Path(path_type=Path), help="Where the random model is kept between two calls.")
def main(calls: tuple[str, ...], out: Path, cpu: bool, model: Path | None) -> None:
    """Ask the GPU of this machine; exit code 1 where a part failed."""
    own = environment(cpu)
    asking = Asking(out, sum(MINUTES[call] for call in calls), own, CPU_TIMES if cpu else 1)
    with tempfile.TemporaryDirectory(prefix="mirage-gpu-", dir=own["TMPDIR"]) as folder:
        first = asking.ask(machine())
        preset = "nano" if cpu else f"qwen2.5-vl-{'7b' if first['result'].get('gb', 0) > LARGE_GB else '3b'}"
        kept = (model or Path(folder)) / preset
        lines = [first]
        for call in calls:
            parts = parts_of(call, preset, kept, cpu)
            if parts[0].name == "model":
                lines.append(asking.ask(parts.pop(0)))
            # A GPU is asked one thing at a time; without one, parts share the cores.
            with ThreadPoolExecutor(2 if cpu else 1) as pool:
                lines += pool.map(asking.ask, parts)
    sys.exit(0 if all(line["ok"] for line in lines) else 1)


if __name__ == "__main__":
    main()
