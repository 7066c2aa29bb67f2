"""Scoring, model folders as they come, and the two decoding commands."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from math import sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from mirage_ds.cli import main
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record import Record
from mirage_ds.data.record_files import scan
from mirage_ds.engine import setup
from mirage_ds.engine.save import change_rows
from mirage_ds.engine.setup import World
from mirage_ds.errors import UserError
from mirage_ds.evaluate import prompts
from mirage_ds.evaluate.decoder import (
    Decoder,
    answer_records,
    decoding_dtype,
    load_decoder,
    run_limits,
)
from mirage_ds.evaluate.report import evaluate_file, write_report
from mirage_ds.evaluate.scoring import Prediction, better, check_metric, score, task_of, wilson
from mirage_ds.evaluate.spec import EvaluateSpec, Sampling
from mirage_ds.model.load import load_model
from mirage_ds.model.slots import Limits

PLANNING, REASONING = "vsp-spatial-planning", "vsp-spatial-reasoning"
SAMPLE = Path(__file__).parents[3] / "data/sample_planning.jsonl"
PROCESSOR = ("preprocessor_config.json", "processor_config.json")


def write_jsonl(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Said(NamedTuple):
    code: int
    out: str
    error: str


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run `mirage-ds` in this process."""
    monkeypatch.setenv("COLUMNS", "500")

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["mirage-ds", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as leave:
            code = int(leave.code or 0)
        return Said(code, *capsys.readouterr())

    return run


def refused(said: Said, *parts: object) -> None:
    assert said.code == 2, said
    assert said.error.startswith("error: ")
    assert said.error.count("\n") == 1
    assert all(str(part) in said.error for part in parts), said.error


def changed(folder: Path, out: Path, without: Sequence[str] = (), **config: Any) -> Path:
    """Copy a model folder without some files, with other values in config.json."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns(*without))
    values = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(values | config))
    return out


@pytest.fixture(scope="module")
def decoder(nano: Path) -> Decoder:
    return load_decoder(nano, ImageFinder.beside(SAMPLE, None))


def answer(text: str, runs: Sequence[int] = ()) -> Prediction:
    return Prediction(text, list(runs), [])


# ------------------------------------------------------------------------------------------------------- the numbers


def by_hand(successes: int, count: int) -> tuple[float, float]:
    """(s + z²/2 ± z √(s (n − s) / n + z²/4)) / (n + z²), exact but for the root."""
    z = Fraction(1959964, 10**6)
    share = Fraction(successes * (count - successes), count)
    root = Fraction(sqrt(share + z * z / 4))
    low, high = ((successes + z * z / 2 + sign * z * root) / (count + z * z) for sign in (-1, 1))
    return float(low), float(high)


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    # The textbook's numbers; at 0 and at n of n the interval is z² / (n + z²) wide: 3.8415 / 13.8415.
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (1, 2, 0.0945, 0.9055),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilson_gives_the_textbooks_interval(successes: int, count: int, low: float, high: float) -> None:
    assert wilson(successes, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson(successes, count) == pytest.approx(by_hand(successes, count), abs=1e-12)


def test_wilson_of_nothing_is_everything() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


SMALL = [[1, 0, 0], [-1, -1, 0], [0, 0, 2]]  # R R D D
LARGE = [[1, -1, 0, 0], [0, -1, 0, 0], [0, 0, 0, -1], [-1, -1, 0, 2]]  # D D R R D R


def question(line: int, board: list, **extra: Any) -> Record:
    return Record(line, "<image>?", "", ("a.png",), (), {"map_desc": board} | extra)


def test_planning_is_scored_per_level_and_in_all() -> None:
    boxed = ["R,R,D,D", "R,R,U,D,D", "D", "", "D,D,R,R,D,R", "DOWN DOWN RIGHT RIGHT RIGHT"]
    boards = [SMALL] * 4 + [LARGE] * 2
    answers = [answer(f"so \\boxed{{{text}}}" if text else "no answer") for text in boxed]
    answers[0], answers[4] = answer(answers[0].text, [4]), answer(answers[4].text, [2, 3])
    found = score([question(i + 1, board) for i, board in enumerate(boards)], answers, PLANNING)
    assert list(found["levels"]) == ["3", "4"]
    wanted = dict(success=0.5, optimal=0.25, invalid=0.25, moves=10 / 4, runs=0.25, latents=1.0, count=4)
    assert {name: found["levels"]["3"][name] for name in wanted} == wanted
    wanted = dict(success=0.5, optimal=0.5, invalid=0.0, moves=11 / 2, runs=1.0, latents=2.5, count=2)
    assert {name: found["levels"]["4"][name] for name in wanted} == wanted
    assert (found["all"]["success"], found["all"]["count"]) == (0.5, 6)
    for group in (found["all"], *found["levels"].values()):
        assert (group["low"], group["high"]) == wilson(group["success"] * group["count"], group["count"])


def test_reasoning_is_scored_against_the_records_own_letter_and_written_level() -> None:
    records = [
        Record(i + 1, "?", f"\\boxed{{{letter}}}", (), (), {"map_desc": SMALL, "level": level})
        for i, (letter, level) in enumerate([("A", 5), ("B", 5), ("C", "hard"), ("A", "hard")])
    ]
    answers = [answer(text) for text in ("\\boxed{A}", "\\boxed{A}", "\\boxed{B} or \\boxed{C}", "A")]
    found = score(records, answers, REASONING)
    assert {name: (row["correct"], row["invalid"], row["count"]) for name, row in found["levels"].items()} == {
        "5": (0.5, 0.0, 2),
        "hard": (0.5, 0.5, 2),
    }
    assert found["all"]["correct"] == 0.5


def test_record_that_cannot_be_scored_is_named() -> None:
    blind = Record(7, "?", "", (), (), {})
    with pytest.raises(UserError, match=r"record on line 7 has no 'map_desc', which vsp-spatial-planning is scored by"):
        score([blind], [answer("\\boxed{R}")], PLANNING)
    # A question alone has no letter to compare with: no model is wrong for that.
    with pytest.raises(UserError, match=r"record on line 7 has no 'text_output', which vsp-spatial-reasoning is"):
        score([blind], [answer("\\boxed{A}")], REASONING)


def test_task_is_the_named_one_or_the_records_own() -> None:
    file = Path("rows.jsonl")
    bare, planning = question(1, SMALL, task=None), question(2, SMALL, task=PLANNING)
    boxed = replace(question(4, SMALL), text_output="\\boxed{A}")
    other = replace(question(3, SMALL, task="vsp_spatial_reasoning"), text_output="\\boxed{A}")
    assert task_of([planning, planning], file, None) == PLANNING
    assert task_of([bare], file, "VSP_spatial_planning") == PLANNING
    assert task_of([other], file, None) == REASONING
    # --task wins, whatever the records say; where nobody says anything, their boxes are compared.
    strange = [question(number, SMALL, task=task) for number, task in enumerate(("VQA", 3, "own:Task", REASONING), 5)]
    assert task_of([planning, other, *strange], file, PLANNING) == PLANNING
    assert task_of([boxed, replace(boxed, extra={"task": ""})], file, None) == "boxed"
    several = f"rows.jsonl: its records are of several tasks (boxed, {PLANNING}); name one that scores all of them with"
    for records, named, sentence in (
        ([boxed, planning], None, several),
        ([bare], None, "rows.jsonl: neither --task nor its records name a task, and boxed does not fit (record on"),
        ([bare], "vsp-planing", "unknown task 'vsp-planing' (did you mean 'vsp-spatial-planning'?)"),
        (strange[:1], None, "rows.jsonl, line 5, task: unknown task 'VQA'; there are: vsp-spatial-planning, "),
        (
            strange[1:2],
            None,
            "rows.jsonl, line 6, task: expected a name, found 3; write it as a string, or give --task",
        ),
        (strange[2:], None, "rows.jsonl, line 7, task: 'own:Task' is code, which data must not choose; give it with"),
    ):
        with pytest.raises(UserError) as error:
            task_of(records, file, named)
        assert str(error.value).startswith(sentence)


def test_better_is_more_or_less_by_the_metrics_name() -> None:
    assert better("success", 0.2, None)
    assert better("success", 0.3, 0.2)
    assert not better("success", 0.2, 0.2)
    assert not better("success", 0.1, 0.2)
    assert better("loss", 0.1, 0.2)
    assert not better("loss", 0.2, 0.2)
    assert not better("invalid", 0.3, 0.2)
    for metric in ("loss", "success"):
        assert not better(metric, float("nan"), None)


def test_a_metric_that_judges_nothing_or_is_not_measured_is_refused() -> None:
    measured = ["loss", "ce", "success", "invalid", "moves", "latents", "count"]
    check_metric("success", measured)
    for name in ("moves", "count", "correct", "sucess"):
        with pytest.raises(
            UserError, match=rf"^--save_best {name}: no such metric here.*; there are loss, ce, success, inv"
        ):
            check_metric(name, measured)


# ------------------------------------------------------------------------------------------------- folders and records


def test_folder_without_latent_tokens(nano: Path, tmp_path: Path, call: Callable) -> None:
    folder = changed(nano, tmp_path / "model")
    text = (folder / "tokenizer.json").read_text()
    for token in ("pad", "start", "end"):
        text = text.replace(f"<|latent_{token}|>", f"<|other_{token}|>")
    (folder / "tokenizer.json").write_text(text)
    for file in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / file).is_file():
            (folder / file).write_text((folder / file).read_text().replace("<|latent_", "<|other_"))
    command = ("evaluate", folder, "--data_path", SAMPLE, "--most", 2, "--max_new_tokens", 3)
    refused(call(*command), folder, "its tokenizer has no latent tokens", "--no_latents")
    out = tmp_path / "report.json"
    said = call(*command, "--no_latents", "--out", out)
    assert said.code == 0, said
    assert [one["runs"] for one in json.loads(out.read_text())["answers"]] == [[], []]


def test_logits_that_are_not_finite_are_no_answer(nano: Path, tmp_path: Path, call: Callable) -> None:
    folder = changed(nano, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "report.json"
    command = ("evaluate", folder, "--data_path", SAMPLE, "--most", 2, "--max_new_tokens", 3, "--out", out)
    for words in (command, (*command, "--decoding", "paper"), ("generate", folder, "--prompt", "Where?")):
        refused(call(*words), "the logits of record ", "are not finite")
    assert not out.exists()


def test_a_folder_in_fp16_is_decoded_in_another_dtype(nano: Path, tmp_path: Path, call: Callable) -> None:
    weights = load_file(nano / "model.safetensors")
    # Beyond fp16's largest number once gate and up are multiplied.
    for name in ("gate_proj", "up_proj"):
        weights[f"model.layers.0.mlp.{name}.weight"] *= 3000
    folders = {}
    for dtype in (torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        folders[name] = changed(nano, tmp_path / name, dtype=name)
        stored = {key: weight.half().to(dtype) for key, weight in weights.items()}
        save_file(stored, folders[name] / "model.safetensors", metadata={"format": "pt"})
    answers = {}
    for name, folder in folders.items():
        out = tmp_path / f"{name}.json"
        said = call("evaluate", folder, "--data_path", SAMPLE, "--most", 2, "--max_new_tokens", 3, "--out", out)
        assert said.code == 0, said
        assert ("stored in float16, in which these models overflow; decoded in float32" in said.error) == (
            name == "float16"
        )
        answers[name] = json.loads(out.read_text())["answers"]
    assert answers["float16"] == answers["float32"]
    # In fp16 it would not go.
    loaded = load_model(folders["float16"], stage="sft", dtype=torch.float16, device=torch.device("cpu"))
    half = replace(load_decoder(nano, ImageFinder.beside(SAMPLE, None)), loaded=loaded)
    with pytest.raises(UserError, match="not finite"):
        answer_records(half, scan(SAMPLE)[0][:2], Limits(3))


@pytest.mark.parametrize(
    ("stored", "device", "used"),
    [
        (torch.float16, "cuda", torch.bfloat16),
        (torch.bfloat16, "cuda", torch.bfloat16),
        (torch.float32, "cuda", torch.float32),
        (None, "cuda", torch.float32),
        (torch.bfloat16, "cpu", torch.float32),
    ],
)
def test_the_dtype_of_decoding(stored: Any, device: str, used: torch.dtype) -> None:
    assert decoding_dtype(stored, torch.device(device)) == used


def test_folder_without_image_processor(nano: Path, tmp_path: Path, call: Callable) -> None:
    folder = changed(nano, tmp_path / "model", without=PROCESSOR)
    command = ("evaluate", folder, "--data_path", SAMPLE, "--most", 2, "--max_new_tokens", 3, "--out")
    refused(call(*command, tmp_path / "none.json"), folder, "no image processor")
    assert not (tmp_path / "none.json").exists()
    for name, model in (("given", [*command, tmp_path / "given.json", "--processor", nano]), ("own", None)):
        words = model or ["evaluate", nano, *command[2:], tmp_path / "own.json"]
        said = call(*words)
        assert said.code == 0, (name, said)
    given, own = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("given", "own"))
    assert given["answers"] == own["answers"]


def test_folder_as_the_public_code_saves_it(nano: Path, tmp_path: Path) -> None:
    # More rows than tokens, no image processor: the added rows are zeros and are never the likeliest token.
    more = len(AutoTokenizer.from_pretrained(nano)) + 40
    change_rows(nano, tmp_path / "wide", more, tokens=more - 40)
    folder = changed(tmp_path / "wide", tmp_path / "public", without=PROCESSOR)
    assert load_file(folder / "model.safetensors")["model.embed_tokens.weight"].shape[0] == more
    records, finder = scan(SAMPLE)[0][:3], ImageFinder.beside(SAMPLE, None)
    public = load_decoder(folder, finder, processor=nano)
    own = load_decoder(nano, finder)
    limits = Limits(6)
    assert answer_records(public, records, limits) == answer_records(own, records, limits)
    # Where a row without a token is drawn after all, it is left out of the text.
    drawn = answer_records(public, records * 2, Limits(20), "paper")
    assert any(token >= more - 40 for one in drawn for token in one.ids)
    assert all(isinstance(one.marked(public.encoder), str) for one in drawn)


def test_records_need_no_output_fields(decoder: Decoder, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in SAMPLE.read_text().splitlines()[:3]]
    bare = [{key: row[key] for key in ("text_input", "image_input", "map_desc", "task") if key in row} for row in rows]
    for row in [*rows, *bare]:
        row["image_input"] = str(SAMPLE.parent / row["image_input"])
    files = [write_jsonl(tmp_path / f"{name}.jsonl", made) for name, made in (("whole", rows), ("bare", bare))]
    whole, alone = (
        evaluate_file(decoder, EvaluateSpec(data_path=file, task=PLANNING, max_new_tokens=4)) for file in files
    )
    assert whole["answers"] == alone["answers"]
    assert whole["all"] == alone["all"]
    assert len(alone["answers"]) == 3


def test_answers_do_not_depend_on_the_batch(decoder: Decoder, mixed: Path) -> None:
    decoder = replace(decoder, encoder=replace(decoder.encoder, finder=ImageFinder.beside(mixed, None)))
    records = scan(mixed)[0][:7]
    for decoding in ("greedy", "paper"):
        made = [answer_records(decoder, records, Limits(5), decoding, batch_size=size) for size in (1, 3, 7)]
        assert made[0] == made[1] == made[2]
        assert len({tuple(one.ids) for one in made[0]}) > 1
    assert made[0] != answer_records(decoder, records, Limits(5), "paper", seed=43)


def test_sampling_by_numbers_is_the_paper_s_at_the_paper_s_numbers(decoder: Decoder) -> None:
    records = scan(SAMPLE)[0][:2]
    limits = Limits(8)
    paper = answer_records(decoder, records, limits, "paper")
    assert answer_records(decoder, records, limits, Sampling(0.7, 0.9)) == paper
    assert answer_records(decoder, records, limits, Sampling(3.0, 0.9)) != paper
    # So little is kept that the likeliest token alone is left.
    assert answer_records(decoder, records, limits, Sampling(1.0, 1e-9)) == answer_records(decoder, records, limits)


def test_a_record_s_draws_follow_its_place_in_the_file(decoder: Decoder) -> None:
    records = scan(SAMPLE)[0][:3]
    whole = answer_records(decoder, records, Limits(8), "paper")
    assert answer_records(decoder, records[1:], Limits(8), "paper", rows=[1, 2]) == whole[1:]
    assert answer_records(decoder, records[1:], Limits(8), "paper") != whole[1:]


def test_a_broken_image_is_said_before_anything_is_decoded(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "pack", lambda *_: pytest.fail("decoded"))
    (tmp_path / "bad.png").write_bytes(b"none")
    bad = replace(scan(SAMPLE)[0][0], line=9, image_input=(str(tmp_path / "bad.png"),))
    with pytest.raises(UserError, match=r"^record on line 9, image_input: image .*bad.png cannot be decoded"):
        answer_records(decoder, [*scan(SAMPLE)[0][:2], bad], Limits(2))


def test_a_rank_decodes_nothing_where_another_has_no_room_for_a_record(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "pack", lambda *_: pytest.fail("decoded"))
    said = "record 2: keys and values"
    monkeypatch.setattr(setup, "everyone", lambda own, world: [*own, said])
    spec, two = (
        EvaluateSpec(data_path=SAMPLE, task=PLANNING, max_new_tokens=4),
        cast(World, SimpleNamespace(rank=0, size=2)),
    )
    with pytest.raises(UserError, match=f"^{said}$"):
        evaluate_file(decoder, spec, world=two, asked=(scan(SAMPLE)[0], PLANNING, ""))


def test_a_gpu_that_is_too_small_is_one_sentence(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(prompts, "pack", full)
    with pytest.raises(
        UserError, match=r"^--batch_size 2: so many rows at a time do not fit into the GPU's memory; lower it"
    ):
        answer_records(decoder, scan(SAMPLE)[0][:3], Limits(2), batch_size=2)


def test_a_report_holds_all_that_its_scores_follow_from(decoder: Decoder, nano: Path, tmp_path: Path) -> None:
    spec = EvaluateSpec(
        data_path=SAMPLE, task=PLANNING, max_new_tokens=6, longest_run=4, run_length="3", decoding="sampled",
        temperature=1.5, top_p=0.8, seed=5, batch_size=2, most=3,
    )  # fmt: skip
    report = evaluate_file(decoder, spec)
    rows = [json.loads(line) for line in SAMPLE.read_text().splitlines()][:3]
    settings = report["settings"]
    assert settings | {"min_pixels": 0, "max_pixels": 0} == dict(
        decoding="sampled", temperature=1.5, top_p=0.8, seed=5, max_new_tokens=6, longest_run=4, run_length=3,
        latents=True, slots=None, min_pixels=0, max_pixels=0, batch_size=2, ranks=1, device="cpu", dtype="float32",
        prefill_tokens=8192, cache_gb=None, samples=1,
    )  # fmt: skip
    assert 0 < settings["min_pixels"] < settings["max_pixels"]
    sha = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in nano.glob("*.safetensors")}
    assert report["hashes"] == {"data": hashlib.sha256(SAMPLE.read_bytes()).hexdigest(), "model": sha}
    assert report["versions"]["torch"] == torch.__version__
    for number, (row, answer) in enumerate(zip(rows, report["answers"], strict=True)):
        picture = hashlib.sha256((SAMPLE.parent / row["image_input"]).read_bytes()).hexdigest()
        asked = json.dumps([row["text_input"], picture]).encode()
        assert answer["prompt"] == hashlib.sha256(asked).hexdigest()
        assert (answer["line"], answer["row"]) == (number + 1, number)
        text = decoder.encoder.tokenizer.decode(answer["ids"], skip_special_tokens=True).strip()
        assert answer["text"] == text
        assert len(answer["ids"]) <= 6
    for name in report["answers"][0]["metrics"]:
        values = [float(answer["metrics"][name]) for answer in report["answers"]]
        assert report["all"][name] == pytest.approx(sum(values) / 3)
    write_report(report, tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(report))
    assert sum(line.startswith('  {"line"') for line in text.splitlines()) == 3


def test_run_length_trained_model_number_typo(decoder: Decoder, nano: Path, tmp_path: Path) -> None:
    folder = changed(nano, tmp_path / "trained", mirage={"stage": "stage2", "latent_size": 6})
    trained = load_decoder(folder, ImageFinder.beside(SAMPLE, None))
    assert run_limits(trained, 9, 8, "trained") == Limits(9, 8, 6)
    assert run_limits(decoder, 9, 8, "trained") == Limits(9, 8, None)
    assert run_limits(trained, 9, 5, "model") == Limits(9, 5, None)
    assert run_limits(trained, 9, 5, "3") == Limits(9, 5, 3)
    assert run_limits(trained, 9, 5, "0") == Limits(9, 5, 0)
    for typo in ("train", "-1", "2.5", "", "²"):
        with pytest.raises(UserError, match=r"--run_length .*: give 'trained', 'model' or a number of latents"):
            run_limits(trained, 9, 5, typo)


# -------------------------------------------------------------------------------------------------------- the commands


def test_evaluate_writes_scores_and_answers(nano: Path, tmp_path: Path, call: Callable) -> None:
    out = tmp_path / "deep" / "report.json"
    words = ("--max_new_tokens", 5, "--batch_size", 2, "--most", 5, "--out", out)
    said = call("evaluate", nano, "--data_path", SAMPLE, "--task", PLANNING, *words)
    assert said.code == 0, said
    assert PLANNING in said.out
    report = json.loads(out.read_text())
    assert (report["task"], report["model"], report["data"]) == (PLANNING, str(nano), str(SAMPLE))
    assert [one["line"] for one in report["answers"]] == [1, 2, 3, 4, 5]
    assert sum(level["count"] for level in report["levels"].values()) == report["all"]["count"] == 5


def test_evaluate_refuses_in_one_sentence(nano: Path, tmp_path: Path, call: Callable) -> None:
    faulty = write_jsonl(tmp_path / "faulty.jsonl", [{"text_output": "A"}])
    refused(call("evaluate", nano, "--data_path", faulty), faulty, "line 1, text_input: missing")
    lost = write_jsonl(
        tmp_path / "lost.jsonl", [{"text_input": "?", "image_input": "gone.png", "task": PLANNING, "map_desc": SMALL}]
    )
    refused(call("evaluate", nano, "--data_path", lost), "line 1, image_input", "gone.png")
    refused(call("evaluate", tmp_path / "nowhere", "--data_path", SAMPLE), tmp_path / "nowhere")


@pytest.mark.parametrize(("flag", "value"), [("--most", 0), ("--batch_size", 0)])
def test_evaluate_refuses_numbers_that_leave_nothing_to_do(nano: Path, call: Callable, flag: str, value: int) -> None:
    refused(call("evaluate", nano, "--data_path", SAMPLE, "--task", PLANNING, "--max_new_tokens", 2, flag, value), flag)


def test_temperature_and_top_p_are_of_sampling_alone(nano: Path, tmp_path: Path, call: Callable) -> None:
    words = ("evaluate", nano, "--data_path", SAMPLE, "--most", 2, "--max_new_tokens", 6, "--out")
    for name, flags in (
        ("paper", ("--decoding", "paper")),
        ("same", ("--decoding", "sampled", "--temperature", 0.7, "--top_p", 0.9)),
        ("plain", ("--decoding", "sampled")),
    ):
        said = call(*words, tmp_path / f"{name}.json", *flags)
        assert said.code == 0, said
    reports = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("paper", "same", "plain")}
    assert reports["paper"]["answers"] == reports["same"]["answers"]
    assert (reports["plain"]["settings"]["temperature"], reports["plain"]["settings"]["top_p"]) == (1.0, 1.0)
    refused(call(*words, tmp_path / "no.json", "--top_p", 0.9), "--top_p needs --decoding sampled, and it is greedy")
    refused(call(*words, tmp_path / "no.json", "--decoding", "sampled", "--temperature", 0), "--temperature")


def test_generate_answers_one_question(nano: Path, tmp_path: Path, call: Callable, pictures: Path) -> None:
    image = pictures / "w56x84.png"
    words = ("--image", image, "--prompt", "Here is the map: <image> ?", "--max_new_tokens", 6)
    first, second = call("generate", nano, *words), call("generate", nano, *words)
    assert first.code == 0, first
    assert first.out == second.out
    assert "<|" not in first.out
    record = Record(1, "Here is the map: <image> ?", "", (str(image),), ())
    made = answer_records(load_decoder(nano, ImageFinder(())), [record], Limits(6))[0]
    assert first.out.strip() == made.text
    refused(call("generate", nano, "--prompt", "<image>?"), "1 <image> mark(s) for 0 image(s)")


def test_generated_runs_are_marked_with_their_length(decoder: Decoder) -> None:
    encoder = decoder.encoder
    pad, start, end = (encoder.id_of(f"<|latent_{name}|>") for name in ("pad", "start", "end"))
    word = encoder.tokenizer("map", add_special_tokens=False)["input_ids"]
    ids = [*word, start, pad, pad, end, *word, start, end, start, pad, encoder.id_of("<|im_end|>")]
    marked = Prediction("", [2, 0, 1], ids).marked(encoder)
    assert marked == "map[2 latents]map[0 latents][1 latents]"
