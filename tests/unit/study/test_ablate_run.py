"""Running a study with nodes that only pretend: order, failures, stops, going on, a thousand of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from rich.progress import Progress
from support.studies import opened, pretend, write_study

from mirage_ds.cli import cli
from mirage_ds.cluster.hosts import Host
from mirage_ds.config.run import RunConfig
from mirage_ds.errors import UserError
from mirage_ds.run import events
from mirage_ds.study import command as commands
from mirage_ds.study import execute
from mirage_ds.study.execute import Place, command, environment, here, parts
from mirage_ds.study.nodes import Node, Study
from mirage_ds.study.overview import (
    TAIL_BYTES,
    Bars,
    by_arm,
    estimate,
    overview,
    reached,
    shown_hours,
    steps_of,
)
from mirage_ds.study.slurm import arrays, write_scripts
from mirage_ds.study.store import Store


@pytest.fixture
def small(tmp_path: Path, nano: Path) -> tuple[Study, Store]:
    return opened(write_study(tmp_path, nano))


def run(
    study: Study,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    modes: dict[str, str] | None = None,
    places: int = 2,
    asked: Callable[[], bool] = lambda: False,
    patient: bool = True,
) -> tuple[bool, list[str]]:
    monkeypatch.setattr(execute, "command", pretend(store, modes or {}))
    said: list[str] = []
    return execute.Runner(study, store, [Place(1)] * places, said.append).run(asked, patient), said


def states_of(study: Study, store: Store) -> dict[str, str]:
    return {line.node.key: line.state for line in overview(study, store)}


def began(said: list[str]) -> list[str]:
    return [line.split(" begins")[0] for line in said if " begins" in line]


def test_everything_runs_once_and_nothing_before_what_it_needs(small, monkeypatch: pytest.MonkeyPatch) -> None:
    study, store = small
    finished, said = run(study, store, monkeypatch)
    assert finished
    order = began(said)
    assert sorted(order) == sorted(node.folder for node in study.nodes.values())
    for node in study.nodes.values():
        if node.parent:
            ended = next(i for i, line in enumerate(said) if line.startswith(f"{node.parent.folder}: "))
            assert ended < next(i for i, line in enumerate(said) if line.startswith(f"{node.folder} begins"))
    assert set(states_of(study, store).values()) == {"done"}
    # A second start has nothing to do.
    assert run(study, store, monkeypatch) == (True, [])


def test_a_failing_arm_is_tried_again_and_the_others_go_on(small, monkeypatch: pytest.MonkeyPatch) -> None:
    study, store = small
    finished, said = run(study, store, monkeypatch, {"stage1": "fail", "sft": "once"})
    assert finished
    stage1 = [node for node in study.nodes.values() if node.name == "stage1"]
    assert all(began(said).count(node.folder) == 2 for node in stage1)
    assert any("failed" in line and "this one always fails" in line for line in said)
    assert by_arm(study, overview(study, store)) == {"text": {"done": 2}, "mirage": {"failed": 2}}
    states = states_of(study, store)
    assert [states[key] for key, node in study.nodes.items() if node.name == "stage2"] == ["blocked"] * 2
    assert [len(store.attempts(node)) for node in stage1] == [2, 2]
    assert run(study, store, monkeypatch, {"stage1": "fail"}) == (True, [])
    for node in stage1:
        store.forget_failures(node)
    run(study, store, monkeypatch)
    assert by_arm(study, overview(study, store))["mirage"] == {"done": 2}


def test_what_a_user_has_to_fix_is_not_tried_again(small, monkeypatch: pytest.MonkeyPatch) -> None:
    study, store = small
    _, said = run(study, store, monkeypatch, {"base": "user"})
    assert len(began(said)) == 1
    assert "exit code 2: a user has to fix this" in said[-1]
    assert by_arm(study, overview(study, store)) == {"text": {"failed": 2}, "mirage": {"failed": 2}}


def test_no_node_goes_on_without_the_study(small, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk at the end of a node: the others are ended before this process leaves, and said to go on."""
    study, store = small
    run(study, store, monkeypatch, {"sft": "user", "stage1": "user"})
    nodes = [node for node in study.nodes.values() if node.name in ("sft", "stage1")]
    for node in nodes:
        store.forget_failures(node)
    slow, quick = nodes[0], nodes[1]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(store.place(quick)))

    monkeypatch.setattr(store, "finish", full)
    with pytest.raises(UserError, match="No space left on device"):
        run(study, store, monkeypatch, {slow.folder: "deaf"})
    assert not store.is_held(slow)
    assert subprocess.run(["pgrep", "-f", str(store.place(slow))], check=False).returncode == 1


def test_a_node_outlives_a_study_that_is_killed_and_is_left_alone(tmp_path: Path, nano: Path, monkeypatch) -> None:
    file = write_study(tmp_path, nano, arms={"a": {"chain": ["base"]}}, seeds=[0], evaluations={})
    study, store = opened(file)
    (base,) = study.nodes.values()
    script = (
        "import sys; from pathlib import Path; from support.studies import opened, pretend\n"
        "from mirage_ds.study import execute\n"
        "from mirage_ds.study.execute import Place\n"
        "study, store = opened(Path(sys.argv[1])); execute.command = pretend(store, {'base': 'some'})\n"
        "execute.Runner(study, store, [Place(1)], print).run()"
    )
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", script, str(file)], env=here, stdout=subprocess.DEVNULL) as runner:
        until = time.monotonic() + 30
        begun = f"\nworking on {base.folder}"
        while not (store.log(base).is_file() and begun in store.log(base).read_text()):
            assert time.monotonic() < until
            time.sleep(0.05)
        runner.kill()
        runner.wait()
        assert store.state(base) == "running"
        finished, said = run(study, store, monkeypatch)
    assert finished
    assert said == ["waiting for 1 run(s) that another process works at"]
    assert store.state(base) == "done"
    assert store.log(base).read_text().count(begun) == 1


@pytest.mark.parametrize("mode", ["long", "deaf"])
def test_a_stop_is_passed_on_and_the_next_start_continues(small, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Also where the run does not listen yet and SIGTERM ends it."""
    study, store = small
    since = time.monotonic()
    running = next(node for node in study.nodes.values() if node.name == "stage1")
    asked = lambda: store.log(running).is_file() and "working" in store.log(running).read_text()  # noqa: E731
    finished, said = run(study, store, monkeypatch, {"stage1": mode, "sft": mode}, asked=asked)
    assert not finished
    assert time.monotonic() - since < 30
    assert any(line.startswith("stopping: ") for line in said)
    # A stop is no failure.
    assert all(not store.attempts(node) for node in study.nodes.values())
    assert store.state(running) == "waiting"
    finished, said = run(study, store, monkeypatch)
    assert finished
    assert not any(name.startswith("base") for name in began(said))
    assert set(states_of(study, store).values()) == {"done"}


def test_a_result_whose_end_was_not_written_down_is_not_made_again(small, monkeypatch: pytest.MonkeyPatch) -> None:
    study, store = small
    base = next(iter(study.nodes.values()))
    store.model(base).mkdir(parents=True)
    (store.model(base) / "config.json").write_text("{}")
    _, said = run(study, store, monkeypatch)
    assert base.folder not in began(said)
    assert store.state(base) == "done"


def test_a_finished_run_leaves_no_checkpoint_unless_asked(small) -> None:
    study, store = small
    base = next(iter(study.nodes.values()))
    for kept in (True, False):
        checkpoint = store.model(base) / "run/checkpoints/global_step2"
        checkpoint.mkdir(parents=True, exist_ok=True)
        Store(store.root, 1, keep_checkpoints=kept).finish(base, 0.0)
        assert checkpoint.exists() == kept


def test_two_processes_share_a_study(small, monkeypatch: pytest.MonkeyPatch) -> None:
    study, store = small
    base = next(iter(study.nodes.values()))
    with store.hold(base) as mine:
        assert mine
        assert store.state(base) == "running"
        with store.hold(base) as again:
            assert not again
        assert run(study, store, monkeypatch, patient=False) == (True, [])
        # It waits as long as it is let.
        calls = iter(range(30))
        finished, said = run(study, store, monkeypatch, asked=lambda: next(calls) > 5)
        assert (finished, said) == (False, ["waiting for 1 run(s) that another process works at"])
    assert store.state(base) == "waiting"
    found: list[list[str]] = []
    monkeypatch.setattr(execute, "command", pretend(store, {}))

    def work() -> None:
        said: list[str] = []
        while len([node for node in study.nodes.values() if store.is_done(node)]) < len(study.nodes):
            execute.Runner(study, store, [Place(1)], said.append).run()
        found.append(began(said))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found[0] + found[1]) == sorted(node.folder for node in study.nodes.values())


@pytest.mark.slow
def test_a_thousand_runs_are_listed_and_resumed_in_seconds(tmp_path: Path, nano: Path, monkeypatch) -> None:
    arms = {"a": {"chain": ["sft"], "grid": {"learning_rate": [1e-5 * (1 + n) for n in range(50)]}}}
    file = write_study(tmp_path, nano, arms=arms, seeds=list(range(20)), evaluations={})
    study, store = opened(file)
    assert len(study.nodes) == 1000
    last = list(study.nodes.values())[-1]
    for node in study.nodes.values():
        if node is not last:
            store.place(node).mkdir(parents=True)
            store.finish(node, 0.0)
    begun = time.process_time()
    study, store = opened(file)
    assert sum(line.state == "done" for line in overview(study, store)) == 999
    _, said = run(study, store, monkeypatch)
    assert began(said) == [last.folder]
    assert time.process_time() - begun < 5


# --------------------------------------------------------------------------------------------------- places, commands


def test_places_of_this_machine_and_of_a_hostfile() -> None:
    assert here(1, None, gpus=[], cores=2) == [Place(1), Place(1)]
    assert here(2, None, gpus=[], cores=3) == [Place(2)]
    assert here(4, None, gpus="01234567", cores=64) == [Place(4, tuple(gpus), (), 8) for gpus in ("0123", "4567")]
    assert here(1, 3, gpus=["4", "7"], cores=64) == [Place(1, (gpu,), (), 21) for gpu in "474"]
    with pytest.raises(UserError, match=r"launch\.ranks 8: there are 2 GPUs here"):
        here(8, None, gpus="01", cores=64)
    hosts = tuple(Host(f"n{i}", 8) for i in range(5))
    assert [one.name for one in parts(hosts, 2)] == ["n0, n1", "n2, n3"]
    assert parts(hosts, 2)[0].ranks == 16


def test_an_evaluation_takes_one_gpu_of_one_host(small) -> None:
    study, store = small
    node = next(node for node in study.nodes.values() if node.kind == "evaluate")
    assert Place(2, ("4", "5")).of(node) == Place(1, ("4",))
    hosts = Place(16, None, (Host("n0", 8), Host("n1", 8)))
    assert hosts.of(node.parent) is hosts
    used = hosts.of(node)
    assert used == Place(1, None, (Host("n0", 1),))
    words = command(node, store, used)
    assert words[words.index("--master_addr") + 1] == "n0"
    assert words[words.index("mirage_ds") + 1] == "evaluate"


def test_command_lines(small, tmp_path: Path) -> None:
    study, store = small
    by_name = {(node.name if node.kind == "train" else node.kind): node for node in study.nodes.values()}
    alone = command(by_name["base"], store, Place(1))
    assert alone[1:] == ["-m", "mirage_ds.train", "--config", str(store.place(by_name["base"]) / "config.yaml")]
    two = command(by_name["base"], store, Place(2))
    assert two[1:3] == ["-m", "mirage_ds.cluster.guard.launch"]
    assert two[two.index("--num_accelerators") + 1] == "2"
    # The launcher ignores CUDA_VISIBLE_DEVICES beside a number of ranks, and takes the first GPUs.
    gpus = Place(2, ("2", "3"))
    second = command(by_name["base"], store, gpus)
    assert second[second.index("--include") + 1] == "localhost:2,3"
    assert "--num_accelerators" not in second
    assert "CUDA_VISIBLE_DEVICES" not in environment(gpus, tmp_path, {"CUDA_VISIBLE_DEVICES": "0,1"})
    hosts = Place(16, None, (Host("n0", 8), Host("n1", 8)))
    many = command(by_name["base"], store, hosts)
    assert many[many.index("--hostfile") + 1] == str(store.place(by_name["base"]) / "hosts")
    assert many[many.index("--master_addr") + 1] == "n0"
    # An sft model opens no run, a stage2 model does.
    scored = [node for node in study.nodes.values() if node.kind == "evaluate"]
    flags = {node.parent.name: "--no_latents" in command(node, store, Place(1))
             for node in scored}  # fmt: skip
    assert flags == {"sft": True, "stage2": False}


def test_what_a_part_of_a_hostfile_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"DS_ACCELERATOR": "cpu", "HOME": "/root", "CUDA_VISIBLE_DEVICES": "0", "X": "y"}.items():
        monkeypatch.setenv(name, value)
    place = Place(16, None, (Host("n0", 8), Host("n1", 8)))
    found = environment(place, tmp_path, {"MY_NAME": "x"})
    assert (tmp_path / "hosts").read_text() == "n0 slots=8\nn1 slots=8\n"
    sent = (tmp_path / "deepspeed_env").read_text().splitlines()
    assert {"DS_ACCELERATOR=cpu", "MY_NAME=x"} <= set(sent)
    assert not {"HOME", "CUDA_VISIBLE_DEVICES", "X"} & {line.partition("=")[0] for line in sent}
    assert found["DS_ENV_FILE"] == str(tmp_path / "deepspeed_env")
    assert "BatchMode=yes" in found["PDSH_SSH_ARGS_APPEND"]


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = environment(Place(1, ("4",), threads=7), tmp_path, {"A": "b"})
    assert (found["CUDA_VISIBLE_DEVICES"], found["OMP_NUM_THREADS"], found["A"]) == ("4", "3", "b")
    assert "CUDA_VISIBLE_DEVICES" not in environment(Place(1), tmp_path, {}).keys() - os.environ.keys()
    assert not list(tmp_path.iterdir())


def test_a_stage_is_prepared_to_go_on_from_its_parent(small) -> None:
    study, store = small
    node = next(node for node in study.nodes.values() if node.name == "stage1")
    parent = node.parent
    store.prepare(node)
    text = (store.place(node) / "config.yaml").read_text()
    assert f"load_model_path: {store.model(parent)}" in text
    assert "resume: auto" in text
    assert json.loads((store.place(node) / "node.json").read_text())["parent"] == parent.key


# -------------------------------------------------------------------------------------------------------------- Slurm


def test_slurm_arrays_depend_on_each_other(tmp_path: Path, nano: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    arms = {
        "text": {"chain": ["base", "sft"]},
        "mirage": {"chain": ["base", "stage1", "stage2"]},
        "b": {"chain": ["base"]},
    }
    file = write_study(tmp_path, nano, arms=arms)
    study, store = opened(file)
    found = arrays(study, store, study.nodes)
    assert sorted(key for one in found for key in one.keys) == sorted(study.nodes)
    for one in found:
        for key in one.keys:
            parent = study.nodes[key].parent
            assert (study.nodes[key].kind != "train") == one.evaluates
            assert parent is None if one.after is None else parent.key in found[one.after].keys
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    calls = tmp_path / "calls"
    (bin_ / "sbatch").write_text(f'#!/bin/sh\necho "$@" >> {calls}\necho $(wc -l < {calls})\n')
    (bin_ / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    options = ["--sbatch", "--gres gpu:8", "--sbatch_evaluate", "--gres gpu:1", "--at_once", "3"]
    cli.main(["ablate", "run", str(file), "--slurm", *options], standalone_mode=False)
    said = [line.split() for line in calls.read_text().splitlines()]
    assert [line[-1] for line in said] == [str(one.script) for one in found]
    assert [line[:3] for line in said] == [
        ["--parsable", "--gres", f"gpu:{1 if one.evaluates else 8}"] for one in found
    ]
    waits = [[word for word in line if "dependency" in word] for line in said]
    assert waits == [[] if one.after is None else [f"--dependency=afterany:{one.after + 1}"] for one in found]
    # Two training arrays side by side with evaluations, so that one waits for another than the array before it.
    assert [one.after for one in found] == [None, 0, 0, 1, 1, 3]
    for one in found:
        script = one.script.read_text()
        assert f"--array=0-{len(one.keys) - 1}%3" in script
        assert f"keys=({' '.join(one.keys)})" in script
        assert subprocess.run(["bash", "-n", str(one.script)], check=False).returncode == 0


def test_slurm_takes_only_the_arms_that_are_asked_for(tmp_path: Path, nano: Path) -> None:
    study, store = opened(write_study(tmp_path, nano))
    wanted = study.wanted(["text"], [])
    names = [[study.nodes[key].name for key in keys] for keys in (one.keys for one in arrays(study, store, wanted))]
    assert names == [["base"], ["sft", "sft"], ["test", "test"]]


@pytest.mark.slow
def test_an_array_task_runs_its_node(tmp_path: Path, nano: Path) -> None:
    """The script itself, with a user's error in the records: the task ends with code 1 and leaves the attempt."""
    file = write_study(tmp_path, nano)
    (tmp_path / "data.jsonl").write_text("no json\n")
    study, store = opened(file)
    write_scripts(study, store, file, study.nodes, None)
    made = subprocess.run(
        ["bash", str(tmp_path / "runs/slurm/train0.sbatch")],
        env={**os.environ, "SLURM_ARRAY_TASK_ID": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    base = next(iter(study.nodes.values()))
    assert made.returncode == 1, made.stderr
    assert "data.jsonl" in store.attempts(base)[0]["why"]
    assert store.state(base) == "failed"


def test_no_sbatch_is_said(tmp_path: Path, nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch on this machine"):
        cli.main(["ablate", "run", str(write_study(tmp_path, nano)), "--slurm"], standalone_mode=False)


# ------------------------------------------------------------------------------------------------- the other commands


def test_plan_counts_steps_and_hours(tmp_path: Path, nano: Path, capsys) -> None:
    common = {"model": "Qwen/Qwen2.5-VL-7B-Instruct", "data_path": "data.jsonl", "epochs": 2, "global_batch_size": 4}
    file = write_study(tmp_path, nano, rows=10, common=common)
    study, _ = opened(file)
    config = next(iter(study.nodes.values())).config
    assert steps_of(config) == 5
    found = estimate(config, {"nodes": 1, "gpus_per_node": 8})
    assert found.problem is None
    double = estimate(config.model_copy(update={"epochs": 4.0}), {"nodes": 1, "gpus_per_node": 8})
    assert double.hours == pytest.approx(2 * found.hours)
    assert "does not fit" in estimate(config, {"gpus_per_node": 1, "gpu_memory": 4}).problem
    cli.main(["ablate", "plan", str(file), "--json"], standalone_mode=False)
    said = json.loads(capsys.readouterr().out)
    trained = [node for node in said["nodes"] if node["kind"] == "train"]
    assert said["gpu_hours"] == pytest.approx(sum(node["gpu_hours"] for node in trained))
    assert len(trained) == 7
    cli.main(["ablate", "plan", str(file)], standalone_mode=False)
    assert "7 training runs instead of 10" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.parquet", "rows.feather"])
def test_plan_counts_the_rows_of_every_form(name: str, tmp_path: Path, nano: Path) -> None:
    frame = pd.DataFrame({"text_input": ["one\ntwo, three"] * 10, "text_output": ["\n\\boxed{UP}"] * 10})
    write = {"json": partial(frame.to_json, orient="records", indent=1), "csv": frame.to_csv,
             "parquet": frame.to_parquet, "feather": frame.to_feather}[name.partition(".")[2]]  # fmt: skip
    write(tmp_path / name)
    config = RunConfig(model="m", data_path=tmp_path / name, save_model_path=tmp_path, stage="sft", epochs=2)
    assert steps_of(config.model_copy(update={"global_batch_size": 4})) == 5


def test_status_and_exit_codes(tmp_path: Path, nano: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    file = write_study(tmp_path, nano)
    _, store = opened(file)
    monkeypatch.setattr(execute, "command", pretend(store, {"stage1": "user"}))
    with pytest.raises(SystemExit) as left:
        cli.main(["ablate", "run", str(file), "--jobs", "2"], standalone_mode=False)
    assert left.value.code == commands.EXIT_HOLES
    cli.main(["ablate", "status", str(file), "--json"], standalone_mode=False)
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["arms"] == {"text": {"done": 2}, "mirage": {"failed": 2}}
    assert said["runs"]["stage2"] == {"blocked": 2}
    assert set(said["failed"].values()) == {"exit code 2: a user has to fix this"}
    cli.main(["ablate", "status", str(file)], standalone_mode=False)
    assert "a user has to fix this" in capsys.readouterr().out
    monkeypatch.setattr(execute, "command", pretend(store, {}))
    cli.main(["ablate", "run", str(file), "--again", "--arms", "mirage"], standalone_mode=False)
    with pytest.raises(UserError, match="--arms: no arm 'mirag'"):
        cli.main(["ablate", "run", str(file), "--arms", "mirag"], standalone_mode=False)
    with pytest.raises(UserError, match="--only x: the study has no such run"):
        cli.main(["ablate", "run", str(file), "--only", "x"], standalone_mode=False)


def write_log(store: Store, node: Node, steps: int, until: int, half: str = "") -> None:
    """What a run leaves that is at a step."""
    run = store.model(node) / "run"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"steps": steps}))
    (run / "config.yaml").write_text("stage: sft\n")
    now = time.time()
    began = [{"event": events.LOAD_BEGINS, "time": now - 60}, {"event": events.LOAD_ENDS, "time": now - 50, "step": 0}]
    (run / events.FILE).write_text("".join(json.dumps(one) + "\n" for one in began))
    lines = [{"step": at, "loss": 2.0, "seconds": 0.5, "time": now - (until - at) * 0.5} for at in range(1, until + 1)]
    (run / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines) + half)


def test_a_run_at_work_shows_its_step(small, tmp_path: Path) -> None:
    study, store = small
    base, other, evaluation = (
        next(node for node in study.nodes.values() if node.name == name) for name in ("base", "stage1", "test")
    )
    assert reached(base, store) == (0, None)
    write_log(store, base, 5000, 1200, half='{"step": 12')
    assert (store.model(base) / "run" / "log.jsonl").stat().st_size > 2 * TAIL_BYTES
    assert reached(base, store) == (1200, 5000)
    (store.model(base) / "run" / "run.json").rename(tmp_path / "run.json")
    assert reached(base, store) == (0, None), "a run that begins anew"
    (tmp_path / "run.json").rename(store.model(base) / "run" / "run.json")
    store.place(other).mkdir()
    store.finish(other, 0.0)
    bar = Progress(disable=True)
    bars = Bars(bar, store, "small", [base, other, evaluation])
    bars.show([base, evaluation])
    assert [(task.description.strip(), task.completed, task.total) for task in bar.tasks] == [
        ("small", 1, 3),
        (base.folder, 1200, 5000),
        (evaluation.folder, 0, None),
    ]
    bars.show([other])
    assert [task.description.strip() for task in bar.tasks] == ["small", other.folder]
    bars.show([])
    assert [task.description for task in bar.tasks] == ["small"]


def test_who_looks_sees_what_is_at_work_and_then_nothing(small, monkeypatch: pytest.MonkeyPatch) -> None:
    study, store = small
    monkeypatch.setattr(execute, "command", pretend(store, {"base": "some"}))
    seen: list[list[str]] = []

    def look(nodes: list[Node]) -> None:
        seen.append([node.name for node in nodes])

    assert execute.Runner(study, store, [Place(1)], lambda line: None).run(look=look)
    # The base takes 3 s, and every other second somebody looks.
    assert seen[:2] == [["base"], ["base"]]
    assert seen[-1] == []


def test_status_shows_how_far_the_runs_at_work_are(tmp_path: Path, nano: Path, capsys) -> None:
    file = write_study(tmp_path, nano)
    study, store = opened(file)
    base = next(node for node in study.nodes.values() if node.name == "base")
    test = next(node for node in study.nodes.values() if node.kind == "evaluate")
    write_log(store, base, 80, 20)
    with store.hold(base), store.hold(test):
        cli.main(["ablate", "status", str(file), "--json"], standalone_mode=False)
        said = json.loads(capsys.readouterr().out)["running"]
        assert said[base.folder]["eta_seconds"] == pytest.approx(60 * 0.5)
        assert said[test.folder] is None
        cli.main(["ablate", "status", str(file)], standalone_mode=False)
        shown = capsys.readouterr().out
    assert re.search(rf"{base.folder} +sft +training +20/80 +30 s", shown)
    assert f"running: {test.folder}" in shown
    assert f"running: {base.folder}" not in shown


def test_half_a_line_of_attempts_and_an_older_attempts_words_mislead_nobody(small, tmp_path: Path) -> None:
    study, store = small
    node = next(iter(study.nodes.values()))
    store.place(node).mkdir(parents=True)
    (store.place(node) / "attempts.jsonl").write_text('{"begun": 1, "en')
    store.ended(node, 0.0, 70, "again")
    assert [one["why"] for one in store.attempts(node)] == ["again"]
    log = tmp_path / "log"
    log.write_text("\n$ first\nerror: old cause\n\n$ second\nKilled\n")
    assert execute.why(log, -9) == "exit code -9: Killed"


@pytest.mark.parametrize(
    ("hours", "digits", "said"),
    [(0, 1, "0.0"), (0.004, 1, "under 0.1"), (0.004, 2, "under 0.01"), (0.1, 1, "0.1"), (1234.56, 1, "1,234.6")],
)
def test_a_small_study_does_not_read_as_none(hours: float, digits: int, said: str) -> None:
    assert shown_hours(hours, digits) == said
