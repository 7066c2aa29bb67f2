"""launch/: what can be checked without a cluster; what the scripts do on one is in tests/cluster."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from mirage_ds.cluster.hosts import read_hosts
from mirage_ds.config.run import RunConfig
from mirage_ds.errors import EXIT_STOPPED

LAUNCH = Path(__file__).parents[3] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
# Indexed Jobs and podFailurePolicy are stable in it.
KUBERNETES = "1.31"


def manifest() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck (`make cluster-packages`)")
def test_scripts_are_clean() -> None:
    done = subprocess.run(["shellcheck", *SCRIPTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert len(SCRIPTS) == 5


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_user_can_run_it(script: Path) -> None:
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in script.read_text()
    assert script.suffix == ".sbatch" or script.stat().st_mode & 0o111 == 0o111


def test_the_example_hostfile_is_one() -> None:
    assert [(host.name, host.slots) for host in read_hosts(LAUNCH / "hostfile.example")] == [("node1", 8), ("node2", 8)]


def test_the_manifest_is_what_kubernetes_takes() -> None:
    service, job = manifest()
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    for one in (service, job):
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
    wrong = copy.deepcopy(job)
    wrong["spec"]["completionModus"] = "Indexed"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_the_manifest_agrees_with_itself_and_with_the_trainer() -> None:
    service, job = manifest()
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert spec["parallelism"] == spec["completions"] == int(environment["NODES"])
    assert environment["SLOTS"] == container["resources"]["limits"]["nvidia.com/gpu"]
    # Kubernetes calls the pod of index 0 so.
    assert environment["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    settings = dict(re.fullmatch(r"--(\w+)=(.*)", word).groups() for word in container["args"])  # type: ignore[union-attr]
    assert RunConfig(**settings).resume == "auto"
    ignored = [rule for rule in spec["podFailurePolicy"]["rules"] if rule["action"] == "Ignore"]
    assert ignored[0]["onExitCodes"]["values"] == [EXIT_STOPPED]
