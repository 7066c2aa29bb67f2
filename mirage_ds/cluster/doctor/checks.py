"""The table of checks, in the order in which a job meets what they look at."""

from __future__ import annotations

from collections.abc import Callable, Collection

from mirage_ds.cluster.doctor import check_gpus, check_hosts, check_run
from mirage_ds.cluster.doctor.finding import HERE, Finding, Seen, Verdict

CHECKS: dict[str, Callable[[Seen], Verdict]] = {
    "ssh": check_hosts.ssh,
    "probe": check_hosts.probe,
    "python": check_run.python,
    "packages": check_run.packages,
    "code": check_run.code,
    "commit": check_run.commit,
    "gpus": check_gpus.gpus,
    "gpu-memory": check_gpus.gpu_memory,
    "driver": check_gpus.driver,
    "nccl": check_gpus.nccl,
    "host-name": check_hosts.host_name,
    "master": check_hosts.master,
    "bandwidth": check_gpus.bandwidth,
    "clock": check_hosts.clock,
    "ulimits": check_hosts.ulimits,
    "shm": check_hosts.shm,
    "locks": check_hosts.locks,
    "environment": check_hosts.environment,
    "deepspeed-env": check_hosts.deepspeed_env,
    "model": check_run.model,
    "data": check_run.data,
    "shared-folder": check_run.shared_folder,
    "disk": check_run.disk,
    "ds-config": check_run.ds_config,
}
# These look at files of the launching machine alone.
ABOUT_HERE = ("deepspeed-env", "ds-config")
ORDER = {"fail": 0, "warn": 1, "pass": 2}


def run_checks(seen: Seen, only: Collection[str] = ()) -> list[Finding]:
    """Run the checks named in `only` (all when empty); failures first, then warnings, then one pass a check."""
    findings = []
    for name, check in CHECKS.items():
        if only and name not in only:
            continue
        says, bad = check(seen)
        findings += [Finding(name, *one) for one in bad]
        # Hosts that did not answer are no part of a pass.
        about = [HERE] if name in ABOUT_HERE else list(seen.facts)
        if not bad and says is not None:
            findings += [Finding(name, host, "pass", says) for host in about]
    return sorted(findings, key=lambda finding: ORDER[finding.status])
