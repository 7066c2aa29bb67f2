"""The doctor: every fault that it names, provoked once.

What these machines cannot have is injected as what the probe would say: GPUs, drivers, NCCL, InfiniBand, clocks that
differ, other software on another host. tests/cluster/test_doctor.py provokes on real hosts what hosts can have;
test_doctor_hosts.py holds what runs on the hosts.
"""

from __future__ import annotations

import copy
import json
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_ds.cli import main
from mirage_ds.cluster.doctor.bandwidth import Bandwidth, judge, requests, rounds, slow
from mirage_ds.cluster.doctor.checks import CHECKS, run_checks
from mirage_ds.cluster.doctor.finding import HERE, Finding, Here, Plan, Seen
from mirage_ds.cluster.doctor.report import as_json, print_table, summary
from mirage_ds.cluster.doctor.transport import Answer
from mirage_ds.cluster.hosts import Host

GB = 10**9
NAMES = ("a", "b", "c")
GPU = {"index": 0, "name": "NVIDIA H100", "driver": "580.95.05", "total_mib": 81559, "used_mib": 4, "ecc_faults": 0}
PACKAGES = {
    **{
        "mirage-ds": "0.1.0",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "deepspeed": "0.19.8",
        "accelerate": "1.10.0",
    },
    **{
        "datasets": "4.0.0",
        "flash-attn": None,
        "peft": None,
        "nvidia-cuda-runtime": "13.0.48",
        "nvidia-cuda-runtime-cu12": None,
    },
    **{"nvidia-nccl-cu13": "2.29.7", "nvidia-nccl-cu12": None},
}
MODEL = {"files": {"config.json": 2000, "model.safetensors": 15 * GB}, "elements": 7_000_000_000, "fault": None}
MODEL |= {"config": {"model_type": "qwen2_5_vl"}, "head": True}


def host_facts(number: int) -> dict[str, Any]:
    """A host on which nothing is wrong."""
    address = f"10.0.0.{number + 1}"
    return {
        "errors": {},
        "place": {
            **{"hostname": f"node-{NAMES[number]}", "own_addresses": [address], "addresses": [address]},
            **{"master_address": "10.0.0.1", "interfaces": ["eth0", "lo"], "infiniband": ["mlx5_0"]},
        },
        "python": {"version": "3.11.7", "path": "/env/bin/python", "packages": dict(PACKAGES)},
        "code": {"folder": "/code/mirage_ds", "hash": "a" * 64, "commit": "c" * 40, "changed": False},
        "gpus": {"there": True, "gpus": [{**GPU, "index": index, "pids": []} for index in range(2)]},
        "limits": {
            "ulimits": {"nofile": 65536, "memlock": None, "nproc": 100_000, "core": 0},
            "shm_bytes": 64 * GB,
        },
        "locks": {"locks": [], "compilers": []},
        "variables": {"NCCL_DEBUG": "WARN", "PATH": f"/{number}"},
        "port": {"fault": None, "free": 40000} if number == 0 else {},
        "models": {"--model": copy.deepcopy(MODEL)},
        "data": {"--data_path": {"bytes": 1000, "fault": None}, "--deepspeed": {"bytes": 100, "fault": None}},
        "folder": {"there": True, "shared": True, "free_bytes": 1000 * GB, "write_bytes_s": 2e9},
    }


@pytest.fixture
def healthy(tmp_path: Path) -> Seen:
    """Three hosts of two GPUs on which nothing is wrong, under pdsh."""
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    return Seen(
        plan=Plan(
            launcher="pdsh",
            models={"--model": "/models/7b"},
            files={"--data_path": Path("/data/rows.jsonl"), "--deepspeed": tmp_path / "ds.json"},
            run_folder=Path("/runs/x"),
            deepspeed=tmp_path / "ds.json",
        ),
        here=Here(variables={"NCCL_DEBUG": "WARN", "PATH": "/here"}, env_files={Path(".deepspeed_env"): "A=1\n"}),
        hosts=tuple(Host(name, 2) for name in NAMES),
        answers={name: Answer(name, [], "", "", 0.01, 0.02) for name in NAMES},
        facts={name: host_facts(number) for number, name in enumerate(NAMES)},
        bandwidth=Bandwidth(
            all_reduce=180e9,
            all_gather=170e9,
            pairs=dict.fromkeys(combinations(NAMES, 2), 45e9),
            nccl=dict.fromkeys(NAMES, "2.29.7"),
        ),
    )


def bad(seen: Seen) -> list[Finding]:
    return [finding for finding in run_checks(seen) if finding.status != "pass"]


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
    "python": (set_at("python", "version", to="3.12.1"), "python", "fail", "3.12.1, on a 3.11.7", "same on every host"),
    "python's patch": (set_at("python", "version", to="3.11.9"), "python", "warn", "3.11.9", "same on every host"),
    "package version": (set_at("python", "packages", "transformers", to="5.24.0"),
                        "packages", "fail", "transformers 5.24.0 (on a 5.23.0)", "same versions"),
    "package missing": (set_at("python", "packages", "deepspeed", to=None),
                        "packages", "fail", "not installed: deepspeed", "same versions"),
    "optional package": (set_at("python", "packages", "flash-attn", to="2.8.3"),
                         "packages", "fail", "flash-attn 2.8.3 (on a missing)", "same versions"),
    "no code": (set_at("code", to={"folder": None}), "code", "fail", "mirage_ds cannot be imported", "checkout"),
    "other code": (set_at("code", "hash", to="b" * 64), "code", "fail", "other code than on a (bbbbbbbb, not aaaaaaaa)",
                   "same commit"),
    "other commit, same code": (set_at("code", "commit", to="d" * 40), "commit", "warn", "dddddddd, on a cccccccc",
                                "git checkout cccccccc"),
    "uncommitted": (set_at("code", "changed", to=True), "commit", "warn", "not committed", "commit them"),
    "nvidia-smi": (set_at("gpus", to={"there": True, "gpus": [], "fault": "Failed to initialize NVML: mismatch"}),
                   "gpus", "fail", "nvidia-smi: Failed to initialize NVML", "restart the host"),
    "no gpu": (set_at("gpus", to={"there": False, "gpus": []}), "gpus", "fail", "no GPU is seen", "DS_ACCELERATOR=cpu"),
    "no nvidia-smi": (set_at("gpus", to={"there": True, "gpus": []}), "gpus", "fail", "nvidia-smi is not installed",
                      "install the driver"),
    "too few gpus": (lambda facts: facts["gpus"]["gpus"].pop(), "gpus", "fail", "1 GPU(s) for 2 slots", "slots=1"),
    "gpu memory errors": (set_at("gpus", "gpus", 1, "ecc_faults", to=3), "gpus", "fail",
                          "GPU 1: 3 uncorrected memory errors", "leave this GPU out"),
    "gpus of another kind": (lambda facts: [gpu.update(name="NVIDIA A100") for gpu in facts["gpus"]["gpus"]],
                             "gpus", "warn", "NVIDIA A100; on a NVIDIA H100", "one kind"),
    "gpu memory in use": (lambda facts: facts["gpus"]["gpus"][1].update(used_mib=30_000, pids=[4711]), "gpu-memory",
                          "fail", "GPU 1: 30,000 of 81,559 MiB in use by process 4711", "end what runs there"),
    "another driver": (lambda facts: [gpu.update(driver="590.10") for gpu in facts["gpus"]["gpus"]],
                       "driver", "warn", "driver 590.10, on a 580.95.05", "one driver"),
    "same machine twice": (set_at("place", "hostname", to="node-a"), "host-name", "warn", "called node-a, as a is",
                           "one line in the hostfile"),
    "open files": (set_at("limits", "ulimits", "nofile", to=1024), "ulimits", "warn", "ulimit -n is 1024", "nofile"),
    "processes": (set_at("limits", "ulimits", "nproc", to=512), "ulimits", "warn", "ulimit -u is 512", "nproc"),
    "locked memory": (set_at("limits", "ulimits", "memlock", to=65536), "ulimits", "fail",
                      "ulimit -l is 65.5 kB: RDMA over mlx5_0", "memlock"),
    "small shm": (set_at("limits", "shm_bytes", to=67_108_864), "shm", "fail",
                  "/dev/shm has 67.1 MB free for 2 slot(s)", "--shm-size=2g"),
    "smallish shm": (set_at("limits", "shm_bytes", to=GB), "shm", "warn", "/dev/shm has 1 GB", "--shm-size=2g"),
    "stale lock": (set_at("locks", "locks", to=[LOCK]), "locks", "fail", "4000 s old, and nothing compiles",
                   f"rm {LOCK['path']}"),
    "young lock": (set_at("locks", "locks", to=[{**LOCK, "age_s": 30.0}]), "locks", "warn",
                   "30 s old: something is being", "wait for it"),
    "compiling": (set_at("locks", to={"locks": [{**LOCK, "age_s": 600.0}], "compilers": ["nvcc"]}), "locks", "warn",
                  "600 s old: something is being compiled", "wait for it"),
    "variable lost": (lambda facts: facts["variables"].pop("NCCL_DEBUG"), "environment", "warn",
                      "NCCL_DEBUG: set here, not or otherwise there", "mirage_ds.cluster.environment"),
    "variable of its own": (set_at("variables", "NCCL_IB_HCA", to="mlx5_1"), "environment", "warn",
                            "NCCL_IB_HCA is mlx5_1, on a not set", "alike"),
    "model missing": (set_at("models", "--model", to={"hub": "/c", "kept": False}), "model", "fail",
                      "--model /models/7b: no such folder", "every host sees"),
    "model cut off": (set_at("models", "--model", "fault", to="model.safetensors: is cut off"), "model", "fail",
                      "model.safetensors: is cut off", "anew"),
    "model of other files": (set_at("models", "--model", "files", "model.safetensors", to=1), "model", "fail",
                             "not the files of a: model.safetensors", "shared disk"),
    "model without weights": (set_at("models", "--model", "elements", to=0), "model", "fail", "no weights",
                              "*.safetensors"),
    "data missing": (set_at("data", "--data_path", to={"bytes": None, "fault": "No such file or directory"}), "data",
                     "fail", "--data_path /data/rows.jsonl: No such file", "every host sees"),
    "data of another size": (set_at("data", "--data_path", "bytes", to=999), "data", "fail", "999 bytes, on a 1,000",
                             "shared disk"),
    "run folder not shared": (set_at("folder", "shared", to=False), "shared-folder", "fail",
                              "/runs/x is another folder", "every host mounts"),
    "run folder not there": (set_at("folder", to={"there": False}), "shared-folder", "fail", "/runs/x is not there",
                             "every host mounts"),
    "run folder read-only": (lambda facts: facts["folder"].update(fault="Read-only file system"), "disk", "fail",
                             "cannot be written to: Read-only file system", "mount options"),
    "disk full": (set_at("folder", "free_bytes", to=200 * GB), "disk", "warn",
                  "200 GB free; 3 checkpoints and the model of 7,000,000,000 weights need 266 GB",
                  "--keep_checkpoints"),
    "disk slow": (set_at("folder", "write_bytes_s", to=5e6), "disk", "warn",
                  "writes 5 MB/s, synced, 3 host(s) at once: a checkpoint takes about 1.6 h", "--save_every"),
}  # fmt: skip


@pytest.mark.parametrize("fault", ON_ONE_HOST)
def test_a_fault_of_one_host_is_named_once_with_its_cure(fault: str, healthy: Seen) -> None:
    change, check, status, says, mend = ON_ONE_HOST[fault]
    change(healthy.facts["b"])
    (found,) = bad(healthy)
    assert (found.check, found.host, found.status) == (check, "b", status)
    assert says in found.says
    assert mend in found.mend


def test_another_commit_with_other_code_fails_both_checks(healthy: Seen) -> None:
    healthy.facts["c"]["code"].update(commit="d" * 40, hash="b" * 64)
    assert [(one.check, one.host, one.status) for one in bad(healthy)] == [
        ("code", "c", "fail"),
        ("commit", "c", "fail"),
    ]


def test_a_driver_too_old_for_torchs_cuda_fails(healthy: Seen) -> None:
    for facts in healthy.facts.values():
        for gpu in facts["gpus"]["gpus"]:
            gpu["driver"] = "570.86"
    assert {(one.check, one.status) for one in bad(healthy)} == {("driver", "fail")}
    assert "driver 570.86 is too old for torch's CUDA 13.0.48, which needs 580" in bad(healthy)[0].says
    for facts in healthy.facts.values():
        facts["python"]["packages"].update({"nvidia-cuda-runtime": None, "nvidia-cuda-runtime-cu12": "12.6.77"})
    assert bad(healthy) == []


def test_two_nccl_versions_fail_whether_installed_or_run(healthy: Seen) -> None:
    healthy.facts["b"]["python"]["packages"]["nvidia-nccl-cu13"] = "2.28.3"
    # What ran counts more.
    assert bad(healthy) == []
    assert [(one.check, one.host) for one in bad(replace(healthy, bandwidth=None))] == [("nccl", "b")]
    healthy.bandwidth.nccl["c"] = "2.27.5"
    (found,) = bad(healthy)
    assert (found.check, found.host, found.status, found.says) == ("nccl", "c", "fail", "NCCL 2.27.5, on a 2.29.7")


@pytest.mark.parametrize(
    ("offset", "error", "status", "says"),
    [(2.5, 0.1, "warn", "2.5 s ahead (± 0.10 s)"), (-75, 0.1, "fail", "75.0 s behind"), (1.5, 0.6, None, "")],
)
def test_a_clock_that_differs_by_more_than_the_round_trip_explains_is_named(
    offset: float, error: float, status: str | None, says: str, healthy: Seen
) -> None:
    answers = {**healthy.answers, "b": Answer("b", [], "", "", offset, error)}
    found = bad(replace(healthy, answers=answers))
    assert [(one.check, one.host, one.status) for one in found] == ([("clock", "b", status)] if status else [])
    assert all(says in one.says for one in found)


def test_cpu_ranks_on_some_hosts_only_fail(healthy: Seen) -> None:
    healthy.facts["b"]["variables"]["DS_ACCELERATOR"] = "cpu"
    (found,) = bad(healthy)
    assert (found.check, found.host, found.status) == ("environment", "b", "fail")
    assert "DS_ACCELERATOR is cpu, on a not set" in found.says


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


def test_a_taken_master_port_fails_on_the_first_host(healthy: Seen) -> None:
    healthy.facts["a"]["port"]["fault"] = "Address already in use"
    (found,) = bad(healthy)
    assert (found.check, found.host, found.status) == ("master", "a", "fail")
    assert "port 29500" in found.says
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
    healthy.facts["b"]["place"]["master_address"] = None
    healthy.facts["c"]["place"]["master_address"] = "127.0.1.1"
    found = bad(replace(healthy, plan=replace(healthy.plan, launcher=launcher, master_addr=master_addr)))
    name = master_addr or "a"
    assert [tuple(one[:4]) for one in found] == [
        ("master", "b", status, f"the name {name} leads to nothing"),
        ("master", "c", status, f"the name {name} leads to 127.0.1.1"),
    ]


def test_a_model_of_the_hub_should_be_there_before_the_job(healthy: Seen) -> None:
    plan = replace(healthy.plan, models={"--model": "Qwen/Qwen2.5-VL-7B-Instruct"})
    for facts in healthy.facts.values():
        facts["models"]["--model"] = {"hub": "/home/u/.cache/huggingface/hub/models--Qwen--Q", "kept": False}
    found = bad(replace(healthy, plan=plan))
    assert {(one.check, one.status) for one in found} == {("model", "warn")}
    assert "rank 0 downloads it" in found[0].says
    for facts in healthy.facts.values():
        facts["models"]["--model"]["kept"] = True
    assert bad(replace(healthy, plan=plan)) == []


def test_a_model_folder_that_no_host_has_fails_on_all(healthy: Seen) -> None:
    for facts in healthy.facts.values():
        facts["models"]["--model"] = {"hub": "/c", "kept": False}
    assert [(one.check, one.host, one.status) for one in bad(healthy)] == [("model", name, "fail") for name in NAMES]


def test_a_model_that_contradicts_itself_is_what_is_said_of_it(healthy: Seen) -> None:
    faults = {"--model": "/m: this checkpoint is quantised (fp8, says config.json); give the original weights"}
    found = bad(replace(healthy, here=replace(healthy.here, model_faults=faults)))
    assert [(one.check, one.host, one.status) for one in found] == [("model", HERE, "fail")]
    assert (found[0].says, found[0].mend) == tuple(faults["--model"].split("; "))


def test_a_faulty_environment_file_is_named_with_its_line(healthy: Seen) -> None:
    files = {Path("/home/u/.deepspeed_env"): "A=1\n\nB=$HOME\n"}
    found = bad(replace(healthy, here=replace(healthy.here, env_files=files)))
    assert [(one.check, one.host, one.status) for one in found] == [
        ("deepspeed-env", "here", "fail"),
        ("deepspeed-env", "here", "warn"),
    ]
    assert found[0].says.startswith("/home/u/.deepspeed_env line 2: an empty line")
    assert found[1].says.startswith("/home/u/.deepspeed_env line 3: B: a shell on each host expands")


def test_a_missing_pdsh_is_a_warning(healthy: Seen) -> None:
    (found,) = bad(replace(healthy, here=replace(healthy.here, pdsh=False)))
    assert (found.check, found.status) == ("ssh", "warn")
    assert "pdsh is not installed" in found.says


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"zero_optimisation": {}}', "no key 'zero_optimisation'"),
        ("{", "line 1: not valid JSON"),
        (None, "no such file"),
    ],
)
def test_a_faulty_json_is_told_in_the_words_of_the_run(text: str | None, says: str, healthy: Seen) -> None:
    file = healthy.plan.deepspeed
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
    rates = dict.fromkeys(combinations(names, 2), 10e9)
    for pair in rates:
        rates[pair] = 1e9 if "c" in pair else rates[pair]
    rates["a", "e"] = 2e9
    found = bad(replace(healthy, bandwidth=Bandwidth(all_reduce=1e9, all_gather=1e9, pairs=rates)))
    assert [(one.check, one.host, one.status) for one in found] == [
        ("bandwidth", "c", "warn"),
        ("bandwidth", "a, e", "warn"),
    ]
    assert found[0].says == "1 GB/s at best; the hosts' median is 10 GB/s"
    assert slow({("a", "b"): 10.0, ("a", "c"): 1.0, ("b", "c"): 1.0})[0] == {"c": 1.0}
    assert slow({("a", "b"): 10.0, ("a", "c"): 6.0, ("b", "c"): 6.0})[:2] == ({}, {})


# Rounds, requests, rates


@given(st.integers(2, 40))
def test_rounds_are_disjoint_and_hold_each_pair_once(count: int) -> None:
    found = rounds(count)
    assert len(found) == (count - 1 if count % 2 == 0 else count)
    for pairs in found:
        names = [name for pair in pairs for name in pair]
        assert len(names) == len(set(names)) == count - count % 2
    assert sorted(pair for pairs in found for pair in pairs) == list(combinations(range(count), 2))


def test_every_slot_meets_its_like_on_each_other_host() -> None:
    hosts = [Host("a", 2), Host("b", 3), Host("c", 2)]
    asked = requests(hosts, "10.0.0.1", 29500, "gloo", "/")
    assert [request["ranks"] for request in asked] == [[0, 1], [2, 3, 4], [5, 6]]
    assert all({**request, "ranks": 0} == {**asked[0], "ranks": 0} for request in asked)
    met = [(int(one), other) for meets in asked[0]["rounds"] for one, other in meets.items()]
    assert all((other, one) in met for one, other in met)
    assert sorted(pair for pair in met if pair[0] < pair[1]) == [(0, 2), (0, 5), (1, 3), (1, 6), (2, 5), (3, 6)]


def answers_of(asked: list[dict[str, Any]], **changed: Any) -> list[Answer]:
    size = asked[0]["elements"] * 4
    lines = {
        rank: {
            **{"rank": rank, "stage": "measured", "all_reduce_s": size / 1e9, "all_gather_s": size / 2e9, "nccl": None},
            "pairs": {str(number): size / 1e9 for number, meets in enumerate(asked[0]["rounds"]) if str(rank) in meets},
        }
        for request in asked
        for rank in request["ranks"]
    }
    lines[0].update(changed)
    return [Answer(name, [lines[rank] for rank in request["ranks"]]) for name, request in zip("ab", asked, strict=True)]


def test_rates_follow_from_the_slowest_rank() -> None:
    hosts = [Host("a", 2), Host("b", 2)]
    asked = requests(hosts, "10.0.0.1", 29500, "gloo", "/")
    found = judge(hosts, answers_of(asked), asked)
    # W = 4: 2 · 3 / 4 · 1 GB/s; 3 / 4 · 2 GB/s; two slots at 1 GB/s each.
    assert (found.all_reduce, found.all_gather) == pytest.approx((1.5e9, 1.5e9))
    assert found.pairs == pytest.approx({("a", "b"): 2e9})
    slower = judge(hosts, answers_of(asked, all_reduce_s=asked[0]["elements"] * 4 / 0.5e9), asked)
    assert slower.all_reduce == pytest.approx(0.75e9)


def line(rank: int, stage: str, **more: Any) -> dict[str, Any]:
    return {"rank": rank, "stage": stage, **more}


def test_who_could_not_come_is_blamed_and_not_who_waited() -> None:
    hosts = [Host("a", 1), Host("b", 1), Host("c", 1)]
    asked = requests(hosts, "10.0.0.1", 29500, "gloo", "/")
    unmet = "ended with exit code 3: "
    answers = [
        Answer("a", [line(0, "meeting", missing=[1], within_s=8.0)], unmet, ended_s=2.0),
        Answer("b", [line(1, "meeting", fault="No route to host")], unmet, ended_s=1.0),
        Answer("c", [], unmet, ended_s=2.1),
    ]
    found = judge(hosts, answers, asked).faults
    assert found.keys() == {"b"}
    assert found["b"][0] == "does not reach 10.0.0.1:29500: No route to host"
    assert "hostname -I" in found["b"][1]
    # Behind a cut cable nothing is heard of it.
    answers[1] = Answer("b", [], "ended with exit code 255: Timeout, server b not responding.", ended_s=9.0)
    assert judge(hosts, answers, asked).faults == {
        "b": ("does not reach 10.0.0.1:29500: did not come within 8 s", found["b"][1])
    }


def test_of_hosts_that_fail_the_first_is_named_with_how_far_it_came() -> None:
    hosts = [Host("a", 1), Host("b", 1), Host("c", 1)]
    asked = requests(hosts, "10.0.0.1", 29500, "gloo", "/")
    met, joined = [line(1, "met")], [line(1, "met"), line(1, "joined")]
    ended = "ended with exit code -15: "
    crash = Answer("b", met, "ended with exit code 1: RuntimeError: connect", "x", ended_s=5.0)
    found = judge(
        hosts, [Answer("a", met, ended, ended_s=6.0), crash, Answer("c", met, ended, ended_s=6.1)], asked
    ).faults
    assert found.keys() == {"b"}
    assert found["b"][0] == "while joining the ranks: ended with exit code 1: RuntimeError: connect"
    assert "NCCL_SOCKET_IFNAME" in found["b"][1]
    late = [Answer(name, joined, "gave no answer within 66 s", "x", ended_s=66.0) for name in "abc"]
    assert judge(hosts, late, asked).faults == {n: ("while measuring: gave no answer within 66 s", "x") for n in "abc"}


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
    assert found["facts"]["localhost"]["models"]["--model"]["elements"] > 1e6
    assert {finding["check"] for finding in found["findings"]} >= {"python", "packages", "code", "model", "disk", "shm"}
    # Folders made for the look are gone again.
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_exit_code_2_and_a_row_in_the_table(call: Callable[..., Said], tmp_path: Path) -> None:
    said = call("--data_path", tmp_path / "gone.jsonl", "--no_bandwidth", "--only", "data,shm")
    assert said.code == 2
    rows = [line.split() for line in said.out.splitlines() if line.strip()]
    assert rows[2][:3] == ["fail", "data", "localhost"]
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
    healthy.facts["b"]["models"]["--model"]["fault"] = "model-00003-of-00005.safetensors: is cut off [x]"
    text = StringIO()
    findings = run_checks(healthy)
    print_table(findings, healthy, 3.21, Console(file=text, width=100))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    first = [line.split() for line in lines if line.split()[:1] in (["fail"], ["warn"], ["pass"])]
    assert [row[:3] for row in first[:2]] == [["fail", "model", "b"], ["warn", "ulimits", "all"]]
    assert sum(row[1] == "shm" for row in first) == 1
    assert "[x]" in text.getvalue()
    assert lines[-1] == summary(findings, healthy, 3.21)
    assert json.loads(as_json(findings, healthy, 3.21))["bandwidth"]["pairs"][0] == ["a", "b", 45e9]
