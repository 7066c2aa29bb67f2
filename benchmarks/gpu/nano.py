"""Three stages of nano through the launcher, on the GPU if there is one; losses against those of a CPU in float32.

`--record` writes what a CPU finds into losses.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click

REPO, LOSSES = Path(__file__).parents[2], Path(__file__).with_name("losses.json")
RECORDS = REPO / "data/sample.jsonl"
STAGES = ("sft", "stage1", "stage2")
SETTINGS = dict(max_steps=5, global_batch_size=4, learning_rate=1e-3, warmup_steps=0, report_to="none", latent_size=2)
# Of a loss, relative. The first is one forward in bf16; later ones drift with the weights. In float32 on another CPU
# sums come in another order.
FIRST, LATER, FLOAT32 = 5e-3, 5e-2, 1e-3


def start(stage: str, model: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Start a stage as a user does."""
    where = dict(model=model, data_path=RECORDS, save_model_path=folder / stage, cache_dir=folder / f"cache-{stage}")
    words = [f"--{name}={value}" for name, value in {**where, **SETTINGS, "stage": stage}.items()]
    own = os.environ | {"MIRAGE_RANKS": "1", "MIRAGE_PYTHON": sys.executable, "MIRAGE_JOB": f"nano-{stage}"}
    # The console belongs to the answer.
    return subprocess.Popen([str(REPO / "launch/local.sh"), *words], env=own, stdout=sys.stderr)


def losses_of(run: Path) -> list[float]:
    """Read a run's losses; none where it has not come so far."""
    log = run / "run/log.jsonl"
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()] if log.is_file() else []


def near(got: list[float], wanted: list[float], exact: bool) -> bool:
    """Tell whether losses are those of the CPU."""
    if len(got) != len(wanted):
        return False
    apart = [abs(a - b) / b for a, b in zip(got, wanted, strict=True)]
    return max(apart) <= FLOAT32 if exact else apart[0] <= FIRST and max(apart) <= LATER


@click.command()
@click.option("--record", is_flag=True, help="Write losses.json.")
def main(record: bool) -> None:
    """Print the losses of each stage; exit code 1 where one is not the CPU's."""
    from mirage_ds.model.init import init_model

    cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    with tempfile.TemporaryDirectory(prefix="mirage-nano-") as place:
        folder = Path(place)
        init_model("nano", folder / "nano", texts=[RECORDS], tokenizer_size=576)
        running = [start(stage, folder / "nano", folder) for stage in STAGES]
        codes = [one.wait() for one in running]
        got = {stage: losses_of(folder / stage) for stage in STAGES}
    if record:
        LOSSES.write_text(json.dumps(got, indent=1) + "\n")
    wanted = json.loads(LOSSES.read_text())
    good = {stage: near(got[stage], wanted[stage], cpu) for stage in STAGES}
    print(json.dumps({"codes": codes, "as_on_the_cpu": good, "losses": got, "cpu": wanted}))
    sys.exit(0 if all(good.values()) and not any(codes) else 1)


if __name__ == "__main__":
    main()
