"""lmms-eval and VLMEvalKit, each in an environment of its own, ask the server and the folder about eight maps.

The environments are built the first time (benchmarks/venvs.py), where a package index is in reach.
"""

from __future__ import annotations

import base64
import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.peers import python_of
from support.pictures import noise
from test_latent_generate import saved

from mirage_ds.analysis.controls.report import compare

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytestmark = pytest.mark.slow

REPO = Path(__file__).parents[2]
MAPS, TOKENS = 8, 24
# torchvision is a build for CUDA beside a torch without it.
START = f"""
import runpy, sys
sys.path.insert(0, {str(REPO / "benchmarks")!r})
from peer_steps import import_torchvision
import_torchvision()
del sys.path[0]
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
task: eight_maps
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, temperature: 0, do_sample: false}}
process_results: !function utils.process_results
metric_list:
  - {{metric: maps_acc, aggregation: !function utils.share, higher_is_better: true}}
"""
UTILS = """
from PIL import Image


def doc_to_visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def process_results(doc, results):
    return {"maps_acc": {"question_id": doc["image"], "score": float(doc["answer"] in results[0])}}


def share(results):
    return sum(one["score"] for one in results) / len(results)
"""


def run(python: Path, *words: object, **variables: str) -> str:
    """Run a harness's module without this package on its path."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    quiet = dict(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", OPENAI_API_KEY="none")
    command = [python, "-P", "-c", START, *map(str, words)]
    done = subprocess.run(
        command, env=kept | quiet | variables, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(nano: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(nano, mixed, tmp_path_factory.mktemp("trained"))[1]


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of lmms-eval, and the same as VLMEvalKit's table."""
    place = tmp_path_factory.mktemp("maps")
    rows, table = [], ["index\timage\tquestion\tA\tB\tanswer"]
    for number in range(MAPS):
        picture = place / f"{number}.png"
        noise((112 + 28 * (number % 4), 112), 40 + number, number).save(picture)
        question = f"Here is the map. Question {'again ' * (3 * number)}?"
        rows.append({"image": str(picture), "question": question, "answer": "f"})
        code = base64.b64encode(picture.read_bytes()).decode()
        table.append(f"{number}\t{code}\t{question}\tf\t{'another way ' * 9}\tA")
    (place / "Maps.tsv").write_text("\n".join(table) + "\n")
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "maps.yaml").write_text(TASK.format(rows=place / "rows.jsonl"))
    (place / "utils.py").write_text(UTILS)
    return place


@contextmanager
def serving(folder: Path, latents: str) -> Iterator[str]:
    words = ("-m", "mirage_ds", "serve", folder, "--port", "0", "--latents", latents, "--max_new_tokens", TOKENS)
    server = subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = re.search(r"http\S+", server.stdout.readline())
        assert url
        yield url[0]
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[dict[str, str]]:
    """Addresses of two servers: of the folder's own latents, and of latents that are zero."""
    with serving(folder, "own") as own, serving(folder, "zero") as zero:
        yield {"own": own, "zero": zero}


@pytest.fixture(scope="module")
def lmms_eval(maps: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Ask a model of lmms-eval about the maps; returns its log of the samples."""
    python = python_of("lmms-eval", REPO)

    def ask(model: str, batch: int = 1, **settings: object) -> Path:
        out = tmp_path_factory.mktemp(model)
        given = ",".join(f"{name}={value}" for name, value in settings.items())
        words = ("--model", model, "--model_args", given, "--tasks", "eight_maps", "--include_path", maps)
        words += ("--gen_kwargs", f"max_new_tokens={TOKENS}", "--log_samples", "--output_path", out)
        said = run(python, "lmms_eval", *words, "--batch_size", batch)
        # It ends with 0 all the same.
        assert "Error during evaluation" not in said, said[-3000:]
        (log,) = out.rglob("*_samples_*.jsonl")
        return log

    return ask


def answers(log: Path) -> list[tuple[str, dict[str, int]]]:
    samples = [json.loads(line) for line in log.read_text().splitlines()]
    return [(one["filtered_resps"], *one["token_counts"]) for one in sorted(samples, key=lambda one: one["doc_id"])]


def test_lmms_eval_gets_the_same_latents_from_the_server_and_from_the_folder(
    lmms_eval: Callable[..., Path], folder: Path, served: dict[str, str]
) -> None:
    logs = {
        latents: lmms_eval(
            "openai", model_version=folder.name, base_url=url, timeout=600, max_retries=1, num_concurrent=4
        )
        for latents, url in served.items()
    }
    logs["folder"] = lmms_eval("mirage", batch=3, pretrained=folder)
    found = {name: answers(log) for name, log in logs.items()}
    assert found["folder"] == found["own"]
    assert all(counts["reasoning_tokens"] >= 3 for _, counts in found["folder"])
    # More than the task's own four.
    assert max(counts["output_tokens"] for _, counts in found["own"]) == TOKENS
    # So that it could have been seen.
    assert [text for text, _ in found["zero"]] != [text for text, _ in found["own"]]
    # The class that lmms-eval has for such a folder says nothing and decodes another model.
    stock = lmms_eval("qwen2_5_vl", pretrained=folder, device="cpu", device_map="cpu")
    assert all("reasoning_tokens" not in counts for _, counts in answers(stock))
    assert not {text for text, _ in answers(stock)} & {text for text, _ in found["own"]}
    report = compare([logs["own"], logs["zero"], logs["folder"], stock], None, seed=1)
    assert (report["task"], report["metric"], report["records"]) == ("eight_maps", "maps_acc", MAPS)
    assert report["files"][str(logs["folder"])]["difference"]["mean"] == 0
    assert report["files"][str(logs["own"])]["mean"] == sum("f" in text for text, _ in found["own"]) / MAPS


def test_lmms_eval_is_not_given_a_folder_without_latents(nano: Path, lmms_eval: Callable[..., Path]) -> None:
    with pytest.raises(AssertionError, match=r"has no custom_generate/generate.py, and would be decoded without"):
        lmms_eval("mirage", pretrained=nano)


def test_vlmevalkit_asks_the_server(folder: Path, maps: Path, served: dict[str, str], tmp_path: Path) -> None:
    python = python_of("vlmevalkit")
    tables = []
    for latents, url in served.items():
        words = ("--data", "Maps", "--model", folder.name, "--base-url", url, "--max-tokens", TOKENS, "--retry", 1)
        words += ("--temperature", 0, "--judge", "exact_matching", "--work-dir", tmp_path / latents)
        run(python, "vlmeval.run", *words, LMUData=str(maps), PRED_FORMAT="tsv")
        tables += (tmp_path / latents).rglob("*_result.tsv")
    own, zero = (list(csv.DictReader(table.open(newline=""), delimiter="\t")) for table in tables)
    assert all(one["prediction"] for one in own)
    assert [one["prediction"] for one in own] != [one["prediction"] for one in zero]
    report = compare(tables, None, seed=1)
    assert (report["metric"], report["records"]) == ("hit", MAPS)
