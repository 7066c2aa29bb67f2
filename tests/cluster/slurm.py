"""Slurm on the hosts of a cluster: the controller on the first one, which is the login host; nodes are the others.

    with Slurm(cluster, cpus=2) as slurm:
        slurm.login.run(["srun", "-N", "2", "hostname"])

Two partitions: jobs in `high` take nodes from jobs in `low`, the default, which are requeued. What takes minutes
elsewhere takes seconds: a requeued job starts again after 5 s, a node without power is down after about 10 (more
than 15 were seen once). A time limit is still whole minutes. Not modelled: cgroups, accounting, limits of memory.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import psutil

from .hosts import Cluster, Host, wait_until

# cgroup.conf: slurmd loads a cgroup plugin though nothing uses it; version 1 needs neither cgroups nor systemd.
CGROUPS = "CgroupPlugin=cgroup/v1\n"
# config_overrides: the number of CPUs is what is written here, not what the machine has.
# cred_expire: a requeued job waits that long before it may start again (120 s by default).
CONFIGURATION = """\
ClusterName=cluster
SlurmctldHost={login}
SlurmUser=root
SlurmdUser=root
AuthInfo=cred_expire={requeue_s}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=5
MessageTimeout=5
TCPTimeout=1
KillWait={kill_wait_s}
OverTimeLimit=0
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
NodeName={nodes} CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes={nodes} Default=YES PriorityTier=1 MaxTime=INFINITE
PartitionName=high Nodes={nodes} PriorityTier=2 MaxTime=INFINITE
"""


def _jobs_are_gone(host: Host) -> bool:
    """Kill what jobs run on a host, and say whether there was nothing left to kill."""
    gone = True
    for pid, _ in host.processes():
        try:
            process = psutil.Process(pid)
            if process.name() == "slurmstepd" or "SLURM_JOB_ID" in process.environ():
                process.kill()
                gone = False
        except psutil.NoSuchProcess:
            continue
    return gone


class Slurm:
    """Slurm's daemons; they come back with a host that is powered on again.

    Args:
        cluster: a cluster that is up.
        cpus: CPUs of a node, for Slurm: as many tasks of one CPU fit.
        kill_wait_s: seconds between SIGTERM and SIGKILL at a time limit.
        requeue_s: seconds that a requeued job waits at least.

    Attributes:
        login: the host where srun, sbatch, scancel, scontrol and squeue are run.
        nodes: the hosts where jobs run.
    """

    def __init__(self, cluster: Cluster, cpus: int = 2, kill_wait_s: int = 2, requeue_s: int = 5):
        self.login, *self.nodes = cluster.hosts
        self._folder = cluster.folder / "slurm"
        self._configuration = CONFIGURATION.format(
            login=self.login.name,
            nodes=",".join(node.name for node in self.nodes),
            folder=self._folder,
            cpus=cpus,
            kill_wait_s=kill_wait_s,
            requeue_s=requeue_s,
        )

    def __enter__(self) -> Slurm:
        self._write_files()
        with ExitStack() as stack:
            self._start(stack)
            self._wait_idle()
            self._end = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.close()

    def repair(self) -> None:
        """Cancel all jobs and wait until all nodes, which have to be on, are idle."""
        self.login.run(["scancel", "--user", "root"])
        self._wait_idle()

    def _start(self, stack: ExitStack) -> None:
        """Start the daemons; the stack ends them, and after them the jobs."""

        def serve(host: Host, name: str, *argv: str | Path) -> None:
            host.add_service(name, argv)
            stack.callback(host.remove_service, name)

        for node in self.nodes:
            stack.callback(wait_until, partial(_jobs_are_gone, node), f"end of the jobs on {node.name}")
        for host in (self.login, *self.nodes):
            files = ("--key-file", self._folder / "munge.key", "--seed-file", "/run/munge/seed")
            serve(host, "munged", "/usr/sbin/munged", "--foreground", "--force", *files, "--log-file", "/run/munge/log")
        serve(self.login, "slurmctld", "/usr/sbin/slurmctld", "-D")
        for node in self.nodes:
            serve(node, "slurmd", "/usr/sbin/slurmd", "-D", "-N", node.name)

    def _write_files(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        # Short names: a step's socket is in a node's folder, and its path may have 107 letters.
        for name in ("state", *(node.name for node in self.nodes)):
            (self._folder / name).mkdir(parents=True)
        (self._folder / "slurm.conf").write_text(self._configuration)
        (self._folder / "cgroup.conf").write_text(CGROUPS)
        key = self._folder / "munge.key"
        key.write_bytes(b"no secret: the network of the cluster is its own")
        key.chmod(0o400)

    def _wait_idle(self) -> None:
        ask = ["sinfo", "--noheader", "--Node", "--partition", "low", "--format", "%T"]
        idle = ["idle"] * len(self.nodes)
        log = self.login.log("slurmctld")
        wait_until(
            lambda: self.login.run(ask, check=False).stdout.split() == idle,
            f"all nodes idle, see {log}",
            timeout_s=90,
            every_s=0.1,
        )
