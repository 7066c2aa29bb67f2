"""The doctor: every fault that it names, provoked once.

What these machines cannot have is injected as what the probe would say: GPUs, drivers, NCCL, InfiniBand, clocks that
differ, other software on another host. tests/cluster/test_doctor.py provokes on real hosts what hosts can have;
test_doctor_hosts.py holds what runs on the hosts.
"""

from __future__ import annotations

import asyncio
import copy
import json
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mirage_ds.cli import main
from mirage_ds.cluster.doctor import bandwidth, check_run, checks
from mirage_ds.cluster.doctor.bandwidth import Bandwidth, counterparts, judge, slow
from mirage_ds.cluster.doctor.checks import CHECKS, run_checks
from mirage_ds.cluster.doctor.finding import HERE, Finding, Seen
from mirage_ds.cluster.doctor.report import as_json, print_table
from mirage_ds.cluster.doctor.spec import DoctorSpec
from mirage_ds.cluster.doctor.transport import Answer, _skew, local
from mirage_ds.cluster.environment import parse
from mirage_ds.cluster.guard import judge as guard_judge
from mirage_ds.cluster.guard.wire import Bounds, Client
from mirage_ds.cluster.here import free_ports
from mirage_ds.cluster.hosts import Host
from mirage_ds.errors import UserError

GB = 10**9
NAMES = ("a", "b", "c")
GPU = {"index": 0, "name": "NVIDIA H100", "driver": "580.95.05", "total_mib": 81559, "used_mib": 4, "ecc_faults": 0}
PACKAGES = {
    "mirage-ds": "0.1.0",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "deepspeed": "0.19.8",
    "accelerate": "1.10.0",
    "datasets": "4.0.0",
    "flash-attn": None,
    "peft": None,
    "nvidia-nccl-cu13": "2.29.7",
    "nvidia-nccl-cu12": None,
}
MODEL = {"files": {"config.json": 2000, "model.safetensors": 14 * GB}, "weights": 7_000_000_000, "fault": None}


def host_facts(number: int) -> dict[str, Any]:
    """A host on which nothing is wrong."""
    address = f"10.0.0.{number + 1}"
    return {
        "errors": {},
        "place": {
            "hostname": f"node-{NAMES[number]}",
            "own_addresses": [address],
            "addresses": [address],
            "master_addresses": ["10.0.0.1"],
            "infiniband": ["mlx5_0"],
        },
        "python": {"version": "3.11.7", "path": "/env/bin/python", "packages": dict(PACKAGES)},
        "code": {"folder": "/code/mirage_ds", "hash": "a" * 64, "commit": "c" * 40, "changed": False},
        "gpus": {"there": True, "gpus": [{**GPU, "index": index, "pids": []} for index in range(2)]},
        "limits": {
            "ulimits": {"nofile": 65536, "memlock": None, "nproc": 100_000},
            "shm_bytes": 64 * GB,
        },
        "locks": {"locks": [], "compilers": []},
        "variables": {"NCCL_DEBUG": "WARN", "PATH": f"/{number}"},
        "ports": {"faults": {}, "free": 40000} if number == 0 else {},
        "models": {"--model": copy.deepcopy(MODEL)},
        "data": {
            "--data_path": {"files": {"together": 1000}, "fault": None},
            "--deepspeed": {"files": {"together": 100}, "fault": None},
        },
        "folder": {"there": True, "shared": True, "free_bytes": 1000 * GB, "write_bytes_s": 2e9},
    }


@pytest.fixture
def healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Three hosts of two GPUs on which nothing is wrong, under pdsh."""
    monkeypatch.setattr(checks, "which", lambda name: f"/usr/bin/{name}")
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    return Seen(
        spec=DoctorSpec(
            model="/models/7b",
            data_path=Path("/data/rows.jsonl"),
            deepspeed=tmp_path / "ds.json",
            save_model_path=Path("/runs/x"),
        ),
        launcher="pdsh",
        hosts=tuple(Host(name, 2) for name in NAMES),
        reach=local,
        env_files={Path(".deepspeed_env"): []},
        variables={"NCCL_DEBUG": "WARN"},
        answers={name: Answer(name, []) for name in NAMES},
        facts={name: host_facts(number) for number, name in enumerate(NAMES)},
        bandwidth=Bandwidth(
            all_reduce=180e9,
            all_gather=170e9,
            pairs=[(*pair, 45e9) for pair in combinations(NAMES, 2)],
        ),
    )


def bad(seen: Seen) -> list[Finding]:
    return [finding for finding in run_checks(seen) if finding.status != "pass"]


def with_spec(seen: Seen, **changed: Any) -> Seen:
    return replace(seen, spec=seen.spec.model_copy(update=changed))


def test_nothing_is_said_of_hosts_on_which_nothing_is_wrong(healthy: Seen) -> None:
    findings = run_checks(healthy)
    assert bad(healthy) == []
    # `probe` has nothing to say then; every other check passes, on every host that it is about.
    passed = {finding.check for finding in findings}
    assert passed == CHECKS.keys() - {"probe"}
    assert {finding.host for finding in findings if finding.check == "clock"} == set(NAMES)


Change = Callable[[dict[str, Any]], object]


def set_at(*keys: Any, to: Any) -> Change:
    """Set facts[k1][k2]… of the changed host."""

    def change(facts: dict[str, Any]) -> None:
        *way, last = keys
        for key in way:
            facts = facts[key]
        facts[last] = to

    return change


LOCK = {"path": "/home/u/.cache/torch_extensions/py311_cu130/cpu_adam/lock", "age_s": 4000.0}
# What is changed on host b → (check, status, words of what is seen, words of the cure).
ON_ONE_HOST: dict[str, tuple[Change, str, str, str, str]] = {
    "working directory": (lambda facts: (facts.clear(), facts.update(cwd="No such file or directory")),
                          "probe", "fail", "working directory: No such file", "every host sees"),
    "section of the probe": (lambda facts: (facts.pop("locks"), facts["errors"].update(locks="Stale file handle")),
                             "probe", "warn", "locks: cannot be found out (Stale file handle)", "look by hand"),
    "python": (set_at("python", "version", to="3.12.1"), "packages", "fail", "Python 3.12 (on a 3.11)",
               "same versions"),
    "nccl": (set_at("python", "packages", "nvidia-nccl-cu13", to="2.28.3"), "packages", "fail",
             "nvidia-nccl-cu13 2.28.3 (on a 2.29.7)", "same versions"),
    "package version": (set_at("python", "packages", "transformers", to="5.24.0"),
                        "packages", "fail", "transformers 5.24.0 (on a 5.23.0)", "same versions"),
    "package missing": (set_at("python", "packages", "deepspeed", to=None),
                        "packages", "fail", "not installed: deepspeed", "same versions"),
    "optional package": (set_at("python", "packages", "flash-attn", to="2.8.3"),
                         "packages", "fail", "flash-attn 2.8.3 (on a missing)", "same versions"),
    "no code": (set_at("code", to={"folder": None}), "code", "fail", "mirage_ds cannot be imported", "checkout"),
    "other code": (set_at("code", "hash", to="b" * 64), "code", "fail", "other code than on a (bbbbbbbb, not aaaaaaaa)",
                   "same commit"),
    "other commit, same code": (set_at("code", "commit", to="d" * 40), "code", "warn", "dddddddd (on a cccccccc)",
                                "git checkout cccccccc"),
    "uncommitted": (set_at("code", "changed", to=True), "code", "warn", "not committed", "commit them"),
    "nvidia-smi": (set_at("gpus", to={"there": True, "gpus": [], "fault": "Failed to initialize NVML: mismatch"}),
                   "gpus", "fail", "nvidia-smi: Failed to initialize NVML", "restart the host"),
    "no gpu": (set_at("gpus", to={"there": False, "gpus": []}), "gpus", "fail", "no GPU is seen", "DS_ACCELERATOR=cpu"),
    "no nvidia-smi": (set_at("gpus", to={"there": True, "gpus": []}), "gpus", "fail", "nvidia-smi is not installed",
                      "install the driver"),
    "too few gpus": (lambda facts: facts["gpus"]["gpus"].pop(), "gpus", "fail", "1 GPU(s) for 2 slots", "slots=1"),
    "gpu memory errors": (set_at("gpus", "gpus", 1, "ecc_faults", to=3), "gpus", "fail",
                          "GPU 1: 3 uncorrected memory errors", "leave this GPU out"),
    "gpus of another kind": (lambda facts: [gpu.update(name="NVIDIA A100") for gpu in facts["gpus"]["gpus"]],
                             "gpus", "warn", "NVIDIA A100 with driver 580.95.05 (on a NVIDIA H100 with", "one kind"),
    "gpu memory in use": (lambda facts: facts["gpus"]["gpus"][1].update(used_mib=30_000, pids=[4711]), "gpus",
                          "fail", "GPU 1: 30,000 of 81,559 MiB in use by process 4711", "end what runs there"),
    "another driver": (lambda facts: [gpu.update(driver="590.10") for gpu in facts["gpus"]["gpus"]],
                       "gpus", "warn", "driver 590.10 (on a NVIDIA H100 with driver 580.95.05)", "one driver"),
    "same machine twice": (set_at("place", "hostname", to="node-a"), "host-name", "warn", "called node-a, as a is",
                           "one line in the hostfile"),
    "open files": (set_at("limits", "ulimits", "nofile", to=1024), "ulimits", "warn", "ulimit -n is 1024", "nofile"),
    "processes": (set_at("limits", "ulimits", "nproc", to=512), "ulimits", "warn", "ulimit -u is 512", "nproc"),
    "locked memory": (set_at("limits", "ulimits", "memlock", to=65536), "ulimits", "fail",
                      "ulimit -l is 65.5 kB: RDMA over mlx5_0", "memlock"),
    "small shm": (set_at("limits", "shm_bytes", to=67_108_864), "shm", "fail",
                  "/dev/shm has 67.1 MB free for 2 slot(s)", "--shm-size=2g"),
    "smallish shm": (set_at("limits", "shm_bytes", to=GB), "shm", "warn", "/dev/shm has 1.0 GB", "--shm-size=2g"),
    "stale lock": (set_at("locks", "locks", to=[LOCK]), "locks", "fail", "4000 s old, and nothing compiles",
                   f"rm {LOCK['path']}"),
    "young lock": (set_at("locks", "locks", to=[{**LOCK, "age_s": 30.0}]), "locks", "warn",
                   "30 s old: something is being", "wait for it"),
    "compiling": (set_at("locks", to={"locks": [{**LOCK, "age_s": 600.0}], "compilers": ["nvcc"]}), "locks", "warn",
                  "600 s old: something is being compiled", "wait for it"),
    "variable lost": (lambda facts: facts["variables"].pop("NCCL_DEBUG"), "environment", "warn",
                      "NCCL_DEBUG: set here, not or otherwise there", "mirage_ds.cluster.environment"),
    "variable of its own": (set_at("variables", "NCCL_IB_HCA", to="mlx5_1"), "environment", "warn",
                            "NCCL_IB_HCA mlx5_1 (on a missing)", "alike"),
    "model missing": (set_at("models", "--model", to={"fault": "no such folder", "hub": "/c", "kept": False}), "model",
                      "fail", "--model /models/7b: no such folder", "every host sees"),
    "model of other files": (set_at("models", "--model", "files", "model.safetensors", to=1), "model", "fail",
                             "--model /models/7b: model.safetensors 1 bytes (on a 14,000,000,000 bytes)", "shared"),
    "broken weights": (set_at("models", "--model", "fault", to="model.safetensors is cut off"), "model", "fail",
                       "--model /models/7b: model.safetensors is cut off", "again"),
    "data missing": (set_at("data", "--data_path", "fault", to="/data/rows.jsonl: No such file or directory"), "data",
                     "fail", "/data/rows.jsonl: No such file", "every host sees"),
    "data of another size": (set_at("data", "--data_path", "files", "together", to=999), "data", "fail",
                             "--data_path /data/rows.jsonl: together 999 bytes (on a 1,000 bytes)",
                             "shared disk"),
    "run folder not shared": (set_at("folder", "shared", to=False), "shared-folder", "fail",
                              "/runs/x is another folder", "every host mounts"),
    "run folder not there": (set_at("folder", to={"there": False}), "shared-folder", "fail", "/runs/x is not there",
                             "every host mounts"),
    "run folder read-only": (lambda facts: facts["folder"].update(fault="Read-only file system"), "disk", "fail",
                             "cannot be written to: Read-only file system", "mount options"),
    "disk full": (set_at("folder", "free_bytes", to=200 * GB), "disk", "warn",
                  "200.0 GB free; 3 checkpoints and the model of 7,000,000,000 weights need 266.0 GB",
                  "--keep_checkpoints"),
    "disk slow": (set_at("folder", "write_bytes_s", to=5e6), "disk", "warn",
                  "writes 5.0 MB/s, synced, 3 host(s) at once: a checkpoint takes about 93.3 min", "--save_every"),
}  # fmt: skip


@pytest.mark.parametrize("fault", ON_ONE_HOST)
def test_a_fault_of_one_host_is_named_once_with_its_cure(fault: str, healthy: Seen) -> None:
    change, check, status, says, mend = ON_ONE_HOST[fault]
    change(healthy.facts["b"])
    (found,) = bad(healthy)
    assert (found.check, found.host, found.status) == (check, "b", status)
    assert says in found.says
    assert mend in found.mend


def test_another_commit_with_other_code_is_one_fault(healthy: Seen) -> None:
    healthy.facts["c"]["code"].update(commit="d" * 40, hash="b" * 64)
    assert [(one.check, one.host, one.status) for one in bad(healthy)] == [("code", "c", "fail")]


@pytest.mark.parametrize(("skew", "status", "says"), [(2.5, "warn", "2.5 s ahead"), (-75, "fail", "75.0 s behind")])
def test_a_clock_that_differs_is_named(skew: float, status: str, says: str, healthy: Seen) -> None:
    answers = {**healthy.answers, "b": Answer("b", [], skew_s=skew)}
    (found,) = bad(replace(healthy, answers=answers))
    assert (found.check, found.host, found.status) == ("clock", "b", status)
    assert says in found.says


def test_a_clock_counts_as_right_where_it_may_have_been_read_in_time() -> None:
    # Asked at 100, heard of at 103: the host looked at its clock in between.
    for shown, skew in ((100, 0), (102, 0), (103.5, 0.5), (99, -1)):
        assert _skew(shown, 100, 103) == skew


def test_cpu_ranks_on_some_hosts_only_fail(healthy: Seen) -> None:
    healthy.facts["b"]["variables"]["DS_ACCELERATOR"] = "cpu"
    (found,) = bad(healthy)
    assert (found.check, found.host, found.status) == ("environment", "b", "fail")
    assert "DS_ACCELERATOR cpu (on a missing)" in found.says


def on_cpu(seen: Seen) -> None:
    for facts in seen.facts.values():
        facts["variables"]["DS_ACCELERATOR"] = "cpu"
        facts["gpus"] = {"there": False, "gpus": []}


def test_a_run_on_cpus_needs_no_gpu_and_a_name_that_leads_here(healthy: Seen) -> None:
    healthy.facts["b"]["place"]["own_addresses"] = ["127.0.1.1"]
    # NCCL does not look its host's name up.
    assert bad(healthy) == []
    on_cpu(healthy)
    (found,) = bad(healthy)
    assert (found.check, found.host, found.status) == ("host-name", "b", "fail")
    assert "node-b leads to 127.0.1.1" in found.says
    assert "/etc/hosts" in found.mend
    for facts in healthy.facts.values():
        facts["variables"]["GLOO_SOCKET_IFNAME"] = "eth0"
    assert bad(healthy) == []


def test_no_gpu_anywhere_is_a_warning(healthy: Seen) -> None:
    for facts in healthy.facts.values():
        facts["gpus"] = {"there": False, "gpus": []}
    assert [(one.check, one.host, one.status) for one in bad(healthy)] == [("gpus", name, "warn") for name in NAMES]


@pytest.mark.parametrize(("port", "says"), [(29500, "port 29500"), (29501, "port 29501, the guards',")])
def test_a_taken_port_fails_on_the_first_host(port: int, says: str, healthy: Seen) -> None:
    healthy.facts["a"]["ports"]["faults"] = {str(port): "Address already in use"}
    (found,) = bad(healthy)
    assert (found.check, found.host, found.status) == ("master", "a", "fail")
    assert found.says == f"{says} cannot be listened on: Address already in use"
    assert "--master_port" in found.mend


def test_a_master_without_an_address_fails(healthy: Seen) -> None:
    healthy.facts["a"]["place"]["addresses"] = []
    (found,) = bad(healthy)
    assert (found.check, found.host, found.status) == ("master", "a", "fail")
    assert "--master_addr" in found.mend


@pytest.mark.parametrize(
    ("launcher", "master_addr", "status"),
    [("slurm", None, "fail"), ("pdsh", None, "warn"), ("pdsh", "head", "fail")],
)
def test_the_masters_name_has_to_lead_to_it(launcher: Any, master_addr: str | None, status: str, healthy: Seen) -> None:
    """launch/deepspeed.sh and Slurm give the name; `deepspeed` alone asks the first host for its address."""
    healthy.facts["b"]["place"]["master_addresses"] = []
    healthy.facts["c"]["place"]["master_addresses"] = ["127.0.1.1"]
    found = bad(with_spec(replace(healthy, launcher=launcher), master_addr=master_addr))
    name = master_addr or "a"
    assert [tuple(one[:4]) for one in found] == [
        ("master", "b", status, f"the name {name} leads to nothing"),
        ("master", "c", status, f"the name {name} leads to 127.0.1.1"),
    ]


def test_a_model_of_the_hub_should_be_there_before_the_job(healthy: Seen) -> None:
    healthy = with_spec(healthy, model="Qwen/Qwen2.5-VL-7B-Instruct")
    for facts in healthy.facts.values():
        facts["models"]["--model"] = {
            "fault": "no such folder",
            "hub": "/home/u/.cache/huggingface/hub/models--Qwen--Q",
            "kept": False,
        }
    found = bad(healthy)
    assert {(one.check, one.status) for one in found} == {("model", "warn")}
    assert "rank 0 downloads it" in found[0].says
    for facts in healthy.facts.values():
        facts["models"]["--model"]["kept"] = True
    assert bad(healthy) == []


def test_a_model_folder_that_no_host_has_fails_on_all(healthy: Seen) -> None:
    for facts in healthy.facts.values():
        facts["models"]["--model"] = {"fault": "no such folder", "hub": "/c", "kept": False}
    assert [(one.check, one.host, one.status) for one in bad(healthy)] == [("model", name, "fail") for name in NAMES]


def test_a_model_that_contradicts_itself_is_what_is_said_of_it(healthy: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = "/m: this checkpoint is quantised (fp8, says config.json); give the original weights"

    def refuse(spec: DoctorSpec) -> None:
        raise UserError(fault)

    monkeypatch.setattr(check_run, "check_model", refuse)
    found = bad(healthy)
    assert [(one.check, one.host, one.status) for one in found] == [("model", HERE, "fail")]
    assert (found[0].says, found[0].mend) == tuple(fault.split("; "))


def test_a_faulty_environment_file_is_named_with_its_line(healthy: Seen) -> None:
    files = {Path("/home/u/.deepspeed_env"): parse("A=1\n\nB=$HOME\n")[1]}
    (found,) = bad(replace(healthy, env_files=files))
    assert (found.check, found.host, found.status) == ("deepspeed-env", HERE, "fail")
    assert found.says.startswith("/home/u/.deepspeed_env line 2: '' is not NAME=value")
    assert found.mend == "remove it"


def test_a_missing_pdsh_is_a_warning(healthy: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "which", lambda name: None)
    (found,) = bad(healthy)
    assert (found.check, found.status) == ("ssh", "warn")
    assert "pdsh is not installed" in found.says


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"zero_optimisation": {}}', "no key 'zero_optimisation'"),
        ("{", "cannot be read as JSON"),
        (None, "no such file"),
    ],
)
def test_a_faulty_json_is_told_in_the_words_of_the_run(text: str | None, says: str, healthy: Seen) -> None:
    file = healthy.spec.deepspeed
    file.write_text(text) if text else file.unlink()
    (found,) = bad(healthy)
    assert (found.check, found.host, found.status) == ("ds-config", "here", "fail")
    assert says in found.says
    assert found.mend


def test_a_silent_host_fails_one_check_and_no_pass_speaks_for_it(healthy: Seen) -> None:
    answers = {**healthy.answers, "b": Answer("b", [], "cannot be reached", "look at its cable")}
    facts = {name: healthy.facts[name] for name in ("a", "c")}
    seen = replace(healthy, answers=answers, facts=facts, bandwidth=None, unmeasured="not measured: b cannot be asked")
    assert [(one.check, one.host, one.status) for one in bad(seen)] == [
        ("ssh", "b", "fail"),
        ("bandwidth", "here", "warn"),
    ]
    assert all(one.host != "b" for one in run_checks(seen) if one.status == "pass")
    nobody = replace(seen, facts={}, answers={name: Answer(name, [], "cannot be reached", "x") for name in NAMES})
    assert {one.check for one in run_checks(nobody) if one.status == "pass"} == {"deepspeed-env", "ds-config"}


def test_slow_hosts_and_slow_links_are_told_apart(healthy: Seen) -> None:
    names = "abcdef"
    rates = [(*pair, 1e9 if "c" in pair else 2e9 if pair == ("a", "e") else 10e9) for pair in combinations(names, 2)]
    found = bad(replace(healthy, bandwidth=Bandwidth(all_reduce=1e9, all_gather=1e9, pairs=rates)))
    assert [(one.check, one.host, one.status) for one in found] == [
        ("bandwidth", "c", "warn"),
        ("bandwidth", "a, e", "warn"),
    ]
    assert found[0].says == "1.0 GB/s at best; the hosts' median is 10.0 GB/s"
    assert slow([("a", "b", 10.0), ("a", "c", 1.0), ("b", "c", 1.0)])[0] == {"c": 1.0}
    assert slow([("a", "b", 10.0), ("a", "c", 6.0), ("b", "c", 6.0)])[0] == {}


# Rounds, requests, rates


@given(st.integers(2, 40))
def test_rounds_are_disjoint_and_hold_each_pair_once(count: int) -> None:
    by_host = [counterparts([1] * count, host) for host in range(count)]
    assert {len(one) for one in by_host} == {count}
    found = []
    for turn in range(count):
        met = {host: one[turn][2] for host, one in enumerate(by_host) if one[turn][2] is not None}
        assert all(
            met[other] == host and by_host[host][turn][:2] == (*sorted((host, other)),) for host, other in met.items()
        )
        found += [(host, other) for host, other in met.items() if host < other]
    assert sorted(found) == list(combinations(range(count), 2))


def test_every_slot_meets_its_like_on_each_other_host() -> None:
    by_rank = [counterparts([2, 3, 2], rank) for rank in range(7)]
    met = [(rank, *one) for rank, rounds_of in enumerate(by_rank) for one in rounds_of if one[2] is not None]
    assert all((other, a, b, rank) in met for rank, a, b, other in met)
    pairs = sorted((rank, other, a, b) for rank, a, b, other in met if rank < other)
    assert [pair[:2] for pair in pairs] == [(0, 2), (0, 5), (1, 3), (1, 6), (2, 5), (3, 6)]
    assert [pair[2:] for pair in pairs] == [(0, 1), (0, 2), (0, 1), (0, 2), (1, 2), (1, 2)]


HOSTS = [Host("a", 2), Host("b", 2)]


def answers_of(**changed: Any) -> list[Answer]:
    measured = {"bytes": 16 << 20, "all_reduce_s": (16 << 20) / 1e9, "all_gather_s": (16 << 20) / 2e9}
    lines = [{"rank": rank, **measured, "pairs": [(0, 1, (16 << 20) / 1e9)]} for rank in range(4)]
    lines[0].update(changed)
    return [Answer("a", [{"started": True}, *lines[:2]]), Answer("b", lines[2:])]


def test_rates_follow_from_the_slowest_rank() -> None:
    found = judge(HOSTS, answers_of(), "10.0.0.1")
    # W = 4: 2 · 3 / 4 · 1 GB/s; 3 / 4 · 2 GB/s; two slots at 1 GB/s each.
    assert (found.all_reduce, found.all_gather) == pytest.approx((1.5e9, 1.5e9))
    assert found.pairs == [("a", "b", pytest.approx(2e9))]
    slower = judge(HOSTS, answers_of(all_reduce_s=(16 << 20) / 0.5e9), "10.0.0.1")
    assert slower.all_reduce == pytest.approx(0.75e9)


UNREACHED = "ended with exit code 69: guard: the guard of rank 0 at 10.0.0.1:29501 was not reached within 15 s"
ABSENT = "ended with exit code 69: guard: rank(s) 2, 3 of 4 did not start within 15 s; heard from a"
KILLED = "ended with exit code 137: guard: rank 3 on b was killed by SIGKILL"
ENDED = "ended with exit code -15: "


@pytest.mark.parametrize(
    ("a", "b", "says", "mend"),
    [
        # (fault, seconds) of each host → b is named, whoever ended first.
        ((ABSENT, 2.0), (UNREACHED, 1.0), UNREACHED, "let the hosts reach 10.0.0.1 on any port"),
        ((ENDED, 2.0), (UNREACHED, 1.0), UNREACHED, "which address `hostname -I` gives first on a "),
        # Behind a cut cable nothing is heard of it.
        ((ABSENT, 1.0), ("ended with exit code 255: Timeout, server b not responding.", 9.0), ABSENT, "firewalls"),
        ((ABSENT, 9.0), ("ended with exit code 255: Timeout, server b not responding.", 1.0), ABSENT, "firewalls"),
        ((KILLED, 1.0), (KILLED, 1.1), KILLED, "NCCL_SOCKET_IFNAME"),
        ((ENDED, 6.0), ("ended with exit code 1: RuntimeError: connect", 5.0), "RuntimeError: connect", "read that"),
    ],
)
def test_who_began_it_is_blamed_and_not_who_waited(
    a: tuple[str, float], b: tuple[str, float], says: str, mend: str
) -> None:
    answers = [Answer("a", [], a[0], ended_s=a[1]), Answer("b", [], b[0], ended_s=b[1])]
    found = judge(HOSTS, answers, "10.0.0.1").faults
    assert found.keys() == {"b"}
    assert says in found["b"][0]
    assert mend in found["b"][1]


def test_the_guards_words_are_those_that_are_looked_for() -> None:
    bounds = Bounds(gather=15)
    late = guard_judge.judge([guard_judge.Member(0, "a", 20.0)], 4, bounds, 0.0, 20.0)
    assert late is not None
    assert ABSENT.endswith(late.lines[-1].replace("1, 2, 3", "2, 3"))
    client = Client("127.0.0.1", free_ports(), "j", 1, Bounds(gather=0.2))
    asyncio.run(client.run(lambda message: None))
    assert client.verdict is not None
    assert bandwidth.UNREACHED in client.verdict.lines[-1]


# The command


class Said(NamedTuple):
    code: int
    out: str
    error: str


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run `mirage-ds doctor` in this process."""

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["mirage-ds", "doctor", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as leave:
            code = int(leave.code or 0)
        streams = capsys.readouterr()
        return Said(code, streams.out, streams.err)

    return run


def test_json_is_one_object_and_nothing_else(call: Callable[..., Said], tmp_path: Path, nano: Path) -> None:
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    said = call("--json", "--model", nano, "--save_model_path", tmp_path / "runs/new", "--master_port", port)
    found = json.loads(said.out)
    assert (said.code, found["ok"]) == (0, True), found["findings"]
    assert found["hosts"] == [{"name": "localhost", "slots": 1}]
    assert found["facts"]["localhost"]["models"]["--model"]["weights"] > 1e6
    assert {finding["check"] for finding in found["findings"]} >= {"packages", "code", "model", "disk", "shm"}
    # Folders made for the look are gone again.
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_exit_code_2_and_a_row_in_the_table(call: Callable[..., Said], tmp_path: Path) -> None:
    said = call("--data_path", tmp_path / "gone.jsonl", "--no_bandwidth", "--only", "data,shm")
    assert said.code == 2
    rows = [line.split() for line in said.out.splitlines() if line.strip()]
    assert rows[2][:3] == ["fail", "data", "here"]
    assert rows[-2][:2] == ["pass", "shm"]
    assert rows[-1][-6:] == ["1", "fail,", "0", "warn,", "1", "pass"]
    assert not said.error.strip()


def test_a_runs_yaml_says_where_its_files_are(call: Callable[..., Said], tmp_path: Path, nano: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"stage: stage1\nmodel: {nano}\ndata-path: {tmp_path / 'gone.jsonl'}\nepochs: 3\n"
    )
    found = json.loads(call("--config", tmp_path / "run.yaml", "--json", "--only", "model,data").out)
    assert [(one["check"], one["status"]) for one in found["findings"]] == [("data", "fail"), ("model", "pass")]
    (tmp_path / "run.yaml").write_text("data_pth: x\n")
    said = call("--config", tmp_path / "run.yaml")
    assert (said.code, "did you mean 'data_path'" in said.error) == (2, True)


def _picture(file: Path) -> bytes:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (56, 56), "red").save(file)
    return file.read_bytes()


@pytest.fixture
def charts(tmp_path: Path) -> Path:
    """Records of every form that training reads, written by pandas, with pictures beside or inside them."""
    content = _picture(tmp_path / "Bild.png")
    _picture(tmp_path / "elsewhere/Skizze.png")
    own = {"Frage": ["Welcher Balken?", "Wie hoch?"], "Wert": [7, 9], "Bild": ["Bild.png"] * 2}
    pd.DataFrame(own | {"Skizze": ["Skizze.png"] * 2}).to_csv(tmp_path / "charts.csv", sep=";", index=False)
    held = {"question": ["How tall?"], "answer": ["7"], "image": [{"bytes": content, "path": None}]}
    (tmp_path / "folder").mkdir()
    pd.DataFrame(held).to_parquet(tmp_path / "folder/a.parquet")
    pd.DataFrame(held).to_parquet(tmp_path / "folder/b.parquet")
    rows = {"text_input": ["Q"], "text_output": ["A"], "image_input": ["Bild.png"]}
    pd.DataFrame(rows).to_json(tmp_path / "rows.json", orient="records")
    pd.DataFrame(rows).to_feather(tmp_path / "rows.arrow")
    return tmp_path


NAMED = "question=Frage,answer=Wert,image=Bild,helper=Skizze"


@pytest.mark.parametrize(
    "words",
    [
        ["--data_path", "charts.csv", "--columns", NAMED, "--image_root", "elsewhere"],
        ["--data_path", "charts.csv", "--columns", NAMED, "--stage", "stage2"],
        ["--data_path", "folder/a.parquet", "--eval_data_path", "rows.json"],
        ["--data_path", "folder"],
        ["--data_path", "folder/*.parquet:2", "--data_path", "rows.arrow:1"],
        ["--config", "run.yaml"],
    ],
)
def test_records_are_read_as_training_reads_them(
    words: list[str], charts: Path, call: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(charts)
    (charts / "run.yaml").write_text(f"stage: sft\ndata_path: [charts.csv]\ncolumns: {NAMED}\nsave_model_path: run\n")
    before = sorted(charts.rglob("*"))
    said = call(*words, "--only", "data", "--json")
    found = json.loads(said.out)
    assert (said.code, [one["status"] for one in found["findings"]]) == (0, ["pass"]), found["findings"]
    assert all(facts["files"]["together"] for facts in found["facts"]["localhost"]["data"].values())
    assert sorted(charts.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["charts.csv", "--columns", "question=Frag"], "--columns question=Frag: charts.csv has no such column"),
        (["charts.csv", "--columns", NAMED], "charts.csv: line 2, image_output: no image 'Skizze.png'"),
        (["folder/a.parquet", "--stage", "stage1"], "a.parquet: line 1, image_output: stage1 needs a helper image"),
        (["rows-*.jsonl"], "rows-*.jsonl: no file has such a name"),
        (["empty.jsonl"], "empty.jsonl: holds no record"),
        (["Bild.png"], "Bild.png"),
    ],
)
def test_what_training_would_refuse_is_said_in_its_words(
    words: list[str], says: str, charts: Path, call: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(charts)
    (charts / "empty.jsonl").touch()
    said = call("--data_path", *words, "--only", "data", "--json")
    (found,) = json.loads(said.out)["findings"]
    assert (said.code, found["host"], found["status"]) == (2, HERE, "fail")
    assert found["says"].startswith("--data_path: ")
    assert says in found["says"]
    assert found["mend"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "sh"], "--only sh: no such check (did you mean 'ssh'?)"),
        (["--hostfile", "gone"], "--hostfile gone: cannot be read"),
        (["--hostfile", "x", "--slurm"], "give one of them"),
        (["--slurm"], "not inside a Slurm job"),
        (["--master_port", "70000"], "--master_port"),
        (["--config", "gone.yaml"], "gone.yaml: no such file"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], says: str, call: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    said = call(*arguments)
    assert said.code == 2
    assert said.error.startswith("error: ")
    assert says in said.error
    assert said.error.count("\n") == 1


def test_the_table_folds_hosts_that_say_the_same_and_fits_100_columns(healthy: Seen) -> None:
    from io import StringIO

    from rich.console import Console

    for name in NAMES:
        healthy.facts[name]["limits"]["ulimits"]["nofile"] = 1024
    healthy.facts["b"]["models"]["--model"]["files"] = {"model-00003-of-00005.safetensors [x]": 1}
    text = StringIO()
    findings = run_checks(healthy)
    print_table(findings, healthy, 3.21, Console(file=text, width=100))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    first = [line.split() for line in lines if line.split()[:1] in (["fail"], ["warn"], ["pass"])]
    assert [row[:3] for row in first[:2]] == [["fail", "model", "b"], ["warn", "ulimits", "all"]]
    assert sum(row[1] == "shm" for row in first) == 1
    assert "[x]" in text.getvalue()
    assert lines[-1].startswith("3 host(s), 6 slot(s), 3.2 s: 1 fail, 1 warn, ")
    assert json.loads(as_json(findings, healthy, 3.21))["bandwidth"]["pairs"][0] == ["a", "b", 45e9]
