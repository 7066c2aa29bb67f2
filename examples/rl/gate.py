"""The gate: which bases have something to learn from. Samples eight answers to each map of gate/, after training.

    python examples/rl/gate.py rl.yaml

Writes gates/NAME.json for each model, gate.json with pass@1 and pass@8, and passed.yaml: the study with the seeds
alone whose base has pass@8 at least MARGIN above pass@1. What is there is not measured again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from mirage_ds.study.store import open_study

MARGIN = 0.1
# The arms without reinforcement: the base, which decides, and the base of text alone, which is told.
DECIDES, TOLD = "base", "words"


def measure(name: str, model: Path, folder: Path) -> dict[str, float]:
    """Return pass@k of a model on the maps of the gate: k as text → share of maps."""
    out = folder / "gates" / f"{name}-{model.parent.name}.json"
    if not out.exists():
        command = ["mirage-ds", "evaluate", model, "--data_path", folder / "gate" / "data.jsonl", "--out", out]
        command += ["--decoding", "sampled", "--samples", 8, "--max_new_tokens", 40, "--batch_size", 256]
        command += ["--no_latents"] if name.startswith(TOLD) else []
        subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text())["samples"]["pass"]


def main(file: Path) -> None:
    """Measure all bases of a study and write which pass."""
    study, store = open_study(file)
    (file.parent / "gates").mkdir(exist_ok=True)
    cells = {f"{cell.arm}-{cell.seed}": cell for cell in study.cells if cell.arm in (DECIDES, TOLD)}
    models = {name: store.model(study.nodes[cell.stages[-1]]) for name, cell in cells.items()}
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda name: measure(name, models[name], file.parent), models)
    passes = dict(zip(models, found, strict=True))
    (file.parent / "gate.json").write_text(json.dumps(passes, indent=1) + "\n")
    values = yaml.safe_load(file.read_text())
    through = [one for one in passes if one.startswith(DECIDES) and passes[one]["8"] - passes[one]["1"] >= MARGIN]
    for name, one in passes.items():
        print(f"{name}: pass@1 {one['1']:.3f}, pass@8 {one['8']:.3f}", "" if name in through else "(no base)")
    values["seeds"] = [one for one in values["seeds"] if f"{DECIDES}-{one['seed']}" in through]
    if not values["seeds"]:
        sys.exit("no base has anything to learn from: pass@8 is less than ten points above pass@1 in all of them")
    (file.parent / "passed.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
