"""A study on parts of a hostfile, and as arrays of a real Slurm."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from .hosts import Cluster, wait_until
from .jobs import PYTHON, ROOT
from .slurm import Slurm

MIRAGE = (PYTHON, "-m", "mirage_ds")
ENVIRONMENT = {
    "PATH": f"{PYTHON.parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    "PYTHONPATH": str(ROOT),
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def write_study(folder: Path, nano: Path, mixed: Path, arms: dict, **more: dict) -> Path:
    values = {
        "name": "small",
        "out": "runs",
        "common": {
            "model": str(nano),
            "data_path": str(mixed),
            "max_steps": 2,
            "global_batch_size": 4,
            "warmup_steps": 0,
            "latent_size": 2,
            "num_workers": 0,
            "report_to": ["none"],
            "feature_dir": str(folder / "features"),
            "cache_dir": str(folder / "cache"),
        },
        "stages": {"base": {"stage": "sft", "seed": 0}, "sft": {"stage": "sft"}, "stage2": {"stage": "stage2"}},
        "arms": arms,
        "seeds": [0],
    } | more
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def losses(place: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (place / "model/run/log.jsonl").read_text().splitlines()]


def test_runs_share_a_hostfile(cluster: Cluster, tmp_path: Path, nano: Path, mixed: Path) -> None:
    arms = {"text": {"chain": ["sft"]}, "latents": {"chain": ["stage2"]}}
    asked = [json.loads(line) | {"options": ["left", "right"]} for line in mixed.read_text().splitlines()[:2]]
    questions = mixed.parent / "questions.jsonl"
    questions.write_text("".join(json.dumps(one) + "\n" for one in asked))
    evaluations = {"test": {"data_path": str(questions), "task": "sat", "max_new_tokens": 4}}
    study = write_study(tmp_path, nano, mixed, arms, evaluations=evaluations, launch={"environment": {"MY_OWN": "a b"}})
    hostfile = cluster.hostfile(tmp_path / "hosts", 1, cluster.hosts[:2])
    command = [*MIRAGE, "ablate", "run", study, "--hostfile", hostfile]
    said = cluster.hosts[0].run(command, timeout_s=240, env=ENVIRONMENT, cwd=tmp_path).stdout
    places = sorted((tmp_path / "runs/runs").iterdir())
    used = {(place / "hosts").read_text().split()[0] for place in places}
    assert used == {host.name for host in cluster.hosts[:2]}, said
    assert all((place / "done.json").is_file() for place in places), said
    trained = [place for place in places if not place.name.startswith("evaluate")]
    assert [len(losses(place)) for place in trained] == [2, 2]
    # Evaluations run on the hosts too, one process each.
    scored = [place for place in places if place not in trained]
    assert [len(json.loads((place / "result.json").read_text())["answers"]) for place in scored] == [2, 2]
    assert all((place / "hosts").read_text().endswith(" slots=1\n") for place in scored)
    assert all("MY_OWN=" in (place / "deepspeed_env").read_text() for place in places)


def test_a_study_of_slurm_arrays(slurm: Slurm, tmp_path: Path, nano: Path, mixed: Path) -> None:
    """The second array waits for the first; a node that fails leaves its hole, the other chain goes on."""
    arms = {
        "text": {"chain": ["base", "sft"]},
        "broken": {"chain": ["base", "stage2"], "settings": {"stage2.max_length": 2, "stage2.latent_size": 1}},
    }
    study = write_study(tmp_path, nano, mixed, arms)
    options = "--gpus-per-node=0 --cpus-per-task=1 --ntasks=1"
    command = [*MIRAGE, "ablate", "run", study, "--slurm", "--sbatch", options]
    said = slurm.login.run(command, env=ENVIRONMENT, cwd=tmp_path).stdout
    assert said.startswith("2 array(s)")

    def over() -> bool:
        return not slurm.login.run(["squeue", "--noheader"]).stdout.strip()

    wait_until(over, "end of both arrays", 240, 0.5)
    status = slurm.login.run([*MIRAGE, "ablate", "status", study, "--json"], env=ENVIRONMENT, cwd=tmp_path).stdout
    logs = "\n".join(file.read_text() for file in (tmp_path / "runs/slurm/logs").glob("*.log"))
    assert json.loads(status)["arms"] == {"text": {"done": 1}, "broken": {"failed": 1}}, logs
    # Nothing left to submit.
    again = slurm.login.run(command, env=ENVIRONMENT, cwd=tmp_path).stdout
    assert again.startswith("0 array(s)")
