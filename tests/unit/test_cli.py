"""The command line: check, init, export; and the shapes that presets stand for."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import click
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mirage_ds import __version__
from mirage_ds.cli import cli, main
from mirage_ds.model import init
from mirage_ds.model.load import check_folder
from mirage_ds.model.presets import PRESETS, preset


class Said(NamedTuple):
    code: int
    out: str
    error: str


Call = Callable[..., Said]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run `mirage-ds` in this process."""
    # Wide enough that no table cell wraps.
    monkeypatch.setenv("COLUMNS", "500")

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["mirage-ds", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as leave:
            code = int(leave.code or 0)
        streams = capsys.readouterr()
        return Said(code, streams.out, streams.err)

    return run


def refusal(said: Said) -> str:
    assert said.code == 2
    assert said.error.startswith("error: ")
    assert said.error.count("\n") == 1
    return said.error


def test_a_log_level_that_is_none(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIRAGE_LOG_LEVEL", "warn")
    said = refusal(call("data", "--help"))
    assert said == "error: MIRAGE_LOG_LEVEL=warn: give debug, info, warning, error, critical\n"


# data check


def write_rows(folder: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    Image.effect_noise((84, 56), 80).save(tmp_path / "i.png")
    whole = (tmp_path / "i.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def row(**changed: Any) -> dict[str, Any]:
    return {"text_input": "q", "text_output": "a", "image_input": "i.png", "image_output": "i.png"} | changed


def test_check_finds_no_fault_in_a_good_file(call: Call, mixed: Path, images: Path, nano: Path) -> None:
    said = call("data", "check", mixed, "--stage", "stage2")
    assert (said.code, said.out.splitlines()[0]) == (0, f"{mixed}: 12 records, no fault")
    good = write_rows(images, row(), "", row(text_output="b <output_image>"))
    assert "2 records, no fault" in call("data", "check", good, "--model", nano).out


BOXED = r"\boxed{1}"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{}, {"text_output": "42"}], "no task is named, and the answers have no \\boxed{…}: evaluate needs --task"),
        ([{"text_output": BOXED}, {}], "no task is named, and 1 answer(s) have no \\boxed{…}: evaluate needs --task"),
        ([{"text_output": BOXED}], ""),
        ([{"task": "sat"}], ""),
    ],
)
def test_check_says_when_nothing_scores_the_answers(
    rows: list[dict[str, Any]], says: str, call: Call, images: Path
) -> None:
    file = write_rows(images, *[row(**one) for one in rows])
    said = call("data", "check", file)
    first, *more = said.out.splitlines()
    assert (said.code, first) == (0, f"{file}: {len(rows)} records, no fault")
    assert len(more) == bool(says)
    assert all(line.startswith(says) for line in more)


def test_check_wants_a_latent_block_for_stage2(call: Call, images: Path) -> None:
    said = call("data", "check", write_rows(images, row(image_output=None)), "--stage", "stage2")
    assert (said.code, "no record has any (a helper image, or <output_image>" in said.out) == (2, True)
    assert call("data", "check", write_rows(images, row(image_output=None), row()), "--stage", "stage2").code == 0


def test_check_lists_every_fault_with_line_field_what_and_how(call: Call, images: Path) -> None:
    file = write_rows(
        images,
        row(),
        "{",
        row(image_input="gone.png"),
        row(text_output=""),
        row(image_output=["cut.png"]),
        row(image_output=[]),
    )
    said = call("data", "check", file)
    assert said.code == 2
    assert "5 fault(s) in 6 records" in said.out
    cells = [[cell.strip() for cell in line.strip(" │┃").split("│")] for line in said.out.splitlines() if "│" in line]
    assert [cell[:2] for cell in cells] == [
        ["2", "json"],
        ["3", "image_input"],
        ["4", "text_output"],
        ["5", "image_output"],
        ["6", "image_output"],
    ]
    whats = [
        "not valid JSON",
        "no image 'gone.png': looked for",
        "empty answer",
        "cannot be decoded",
        "stage1 needs a helper image",
    ]
    hows = ["one object a line", "--image_root", "write the answer", "replace the file", "add its path"]
    for cell, what, how in zip(cells, whats, hows, strict=True):
        assert what in cell[2]
        assert how in cell[3]


def test_check_counts_regions_and_finds_faulty_boxes(call: Call, images: Path, nano: Path) -> None:
    good = [row(image_output=None, region=[0, 0, 5, 5]), row(image_output="gone.png", region=[0, 0, 84, 56])]
    file = write_rows(images, *good, row(region=[0, 0, 85, 56]), row())
    said = call("data", "check", file, "--compress_strategy", "region")
    assert said.code == 2
    assert "3 of 4 records have a region (stage1 --compress_strategy region)" in said.out
    cells = [[cell.strip() for cell in line.strip(" │┃").split("│")] for line in said.out.splitlines() if "│" in line]
    assert [cell[:2] for cell in cells] == [["3", "region"], ["4", "region"]]
    assert "[0, 0, 85, 56] is no box in an image of 84×56 pixels" in cells[0][2]
    file = write_rows(images, *good)
    for more in ([], ["--model", nano]):
        said = call("data", "check", file, "--compress_strategy", "region", *more)
        assert (said.code, "2 records, no fault" in said.out) == (0, True)
    # Unasked, a region is a key like any other: this stage needs helpers.
    assert call("data", "check", file).code == 2


def test_check_shows_at_most_as_many_as_asked(call: Call, images: Path) -> None:
    """What is alike stands there once, with its number."""
    said = call("data", "check", write_rows(images, *5 * ["{"], "[]", "[]"), "--most", "1")
    assert said.code == 2
    assert said.out.count("not valid JSON") == 1
    assert "1, 2, 3 and 2 more" in said.out
    assert "… and 2 more (--most)" in said.out


def test_check_with_a_model_applies_its_limits(call: Call, images: Path, nano: Path) -> None:
    """84 × 56 pixels are 6 merged tokens."""
    file = write_rows(images, row())
    assert call("data", "check", file, "--model", nano, "--latent_size", 6).code == 0
    said = call("data", "check", file, "--model", nano, "--latent-size", 7)
    assert said.code == 2
    assert "6 merged tokens, fewer than latent_size 7" in said.out


def test_check_finds_images_under_the_image_root(call: Call, images: Path, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    file = write_rows(tmp_path / "rows", row())
    assert call("data", "check", file).code == 2
    assert call("data", "check", file, "--image_root", images).code == 0


@pytest.mark.parametrize("name", ["maps[/3].png", "a[red]b.png"])
def test_check_shows_brackets_in_a_path_as_they_are(name: str, call: Call, images: Path) -> None:
    said = call("data", "check", write_rows(images, row(image_input=name)))
    assert said.code == 2
    assert f"'{name}'" in said.out
    folder = images / "[run]"
    folder.mkdir()
    shutil.copy(images / "i.png", folder)
    assert str(folder) in call("data", "check", write_rows(folder, row())).out


def test_check_refuses_what_is_not_there(call: Call, images: Path) -> None:
    assert "gone.jsonl: no such file" in refusal(call("data", "check", images / "gone.jsonl"))
    assert "no such folder" in refusal(call("data", "check", write_rows(images, row()), "--model", images / "gone"))


# the command line itself


def test_init_names_every_preset(call: Call) -> None:
    words = {word.rstrip(",;.") for word in call("init", "--help").out.split()}
    assert PRESETS.keys() <= words


def test_unknown_commands_and_flags_are_one_sentence_with_exit_code_2(call: Call) -> None:
    assert "trane" in refusal(call("trane"))
    assert "--presets" in refusal(call("init", "--presets", "nano"))
    assert "--preset" in refusal(call("init"))


def groups(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Group]]:
    yield words, group
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        if isinstance(command, click.Group):
            yield from groups(command, (*words, name))


def test_alone_each_group_shows_all_of_its_commands_and_cuts_no_line(call: Call) -> None:
    found = dict(groups(cli))
    assert len(found) >= 6
    for words, group in found.items():
        said = call(*words)
        assert (said.code, said.error) == (0, "")
        listed = {line.split()[0]: line for line in said.out.splitlines() if re.match(r"  [a-z]", line)}
        assert set(group.list_commands(click.Context(group))) <= set(listed), words
        assert "..." not in said.out.partition("\n")[2], words
    # Each line of the first page fits.
    assert max(map(len, call("-h").out.splitlines())) < 80
    assert call("-h").out == call().out


@pytest.mark.parametrize("words", [("-h",), ("init", "-h"), ("data", "check", "-h"), ("train", "-h"), ("train",)])
def test_help_has_a_short_name(words: tuple[str, ...], call: Call) -> None:
    said = call(*words)
    assert said.code == 0
    assert "-h, --help" in said.out


def test_the_version(call: Call) -> None:
    assert call("--version").out == f"mirage-ds, version {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "there"),
    [("tra", "train"), ("train --max_", "--max_steps"), ("data ch", "check")],
)
def test_a_shell_completes(typed: str, there: str) -> None:
    """As click's scripts for bash, zsh and fish ask."""
    words = ["mirage-ds", *typed.split()]
    asked = {"_MIRAGE_DS_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    code = "import sys; sys.argv = ['mirage-ds']; from mirage_ds.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert f"plain,{there}" in done.stdout.splitlines(), done


def test_help_is_quick_since_it_imports_no_torch() -> None:
    code = """
import sys
from mirage_ds.cli import cli, main
commands = [[], *([name] for name in cli.commands), *(["data", name] for name in cli.commands["data"].commands)]
for words in commands:
    sys.argv = ["mirage-ds", *words, "--help"]
    try:
        main()
    except SystemExit as leave:
        assert not leave.code, words
print("shown", len(commands))
print("loaded", sorted({"torch", "transformers", "deepspeed", "datasets", "gymnasium"} & sys.modules.keys()))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.count("Usage: ") >= 6
    assert shown.endswith(f"shown {shown.count('Usage: ')}\nloaded []\n")


# init


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--preset", "nanno"], ["no preset 'nanno'", "did you mean 'nano'"]),
        (["--preset", "nano", "--tokenizer_size", "200"], ["--tokenizer_size 200", "need 267"]),
        (["--preset", "nano", "--text", "gone.jsonl"], ["gone.jsonl: no such file"]),
        (["--preset", "nano", "--tokenizer", "gone/folder/deep"], ["gone/folder/deep"]),
    ],
)
def test_init_refuses_what_it_cannot_make_and_writes_nothing(
    arguments: list[str], parts: list[str], call: Call, tmp_path: Path
) -> None:
    said = refusal(call("init", *arguments, "--out", tmp_path / "new"))
    assert all(part in said for part in parts), said
    assert not (tmp_path / "new").exists()


def test_init_says_which_line_of_the_text_is_faulty(call: Call, tmp_path: Path) -> None:
    file = write_rows(tmp_path, row(), "{")
    assert "line 2, json" in refusal(call("init", "--preset", "nano", "--text", file, "--out", tmp_path / "new"))


def test_init_overwrites_neither_a_folder_nor_a_file(call: Call, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    assert "not empty" in refusal(call("init", "--preset", "nano", "--out", tmp_path / "full"))
    (tmp_path / "file").write_text("x")
    assert "--out" in refusal(call("init", "--preset", "nano", "--out", tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "x"


def test_init_writes_the_same_weights_for_the_same_seed_and_says_how_many(call: Call, tmp_path: Path) -> None:
    counts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        said = call("init", "--preset", "nano", "--out", tmp_path / name, "--seed", seed)
        assert said.code == 0, said.error
        counts.append(int(said.out.split()[-2].replace(",", "")))
    stored = [tensors_of(tmp_path / name) for name in "abc"]
    assert counts == [sum(tensor.numel() for tensor in stored[0].values())] * 3
    same = [all(torch.equal(stored[0][name], other[name]) for name in stored[0]) for other in stored[1:]]
    assert same == [True, False]


def test_init_draws_a_large_model_in_bfloat16_if_there_is_room(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init, "LARGE", ("nano-untied",))
    free = SimpleNamespace(available=1 << 40)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    for name, dtype in (("nano-untied", torch.bfloat16), ("nano", torch.float32)):
        assert call("init", "--preset", name, "--out", tmp_path / name).code == 0
        assert {tensor.dtype for tensor in tensors_of(tmp_path / name).values()} == {dtype}
        assert check_folder(tmp_path / name).dtype == dtype
    # Both are of one shape, but for the output matrix, and two bytes an element have to be free.
    elements = sum(tensor.numel() for tensor in tensors_of(tmp_path / "nano-untied").values())
    free.available = 2 * elements - 1
    said = refusal(call("init", "--preset", "nano-untied", "--out", tmp_path / "new"))
    assert all(part in said for part in ("'nano-untied'", "GB", "--config_only")), said
    assert not (tmp_path / "new").exists()


def test_init_config_only_writes_a_folder_without_weights(call: Call, tmp_path: Path, nano: Path) -> None:
    out = tmp_path / "7b"
    said = call("init", "--preset", "qwen2.5-vl-7b", "--config_only", "--tokenizer", nano, "--out", out)
    assert (said.code, list(out.glob("*.safetensors"))) == (0, [])
    assert AutoConfig.from_pretrained(out).text_config.vocab_size == 152_064


# export


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # safe_open is no dict
                assert name not in found
                found[name] = tensors.get_tensor(name)
    return found


VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("model", ["nano", "untied"])
def test_export_pads_and_cuts_vocabulary_rows_and_nothing_else(
    model: str, call: Call, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(model)
    assert call("export", source, tmp_path / "more", "--vocab_rows", 600).code == 0
    assert call("export", tmp_path / "more", tmp_path / "fewer", "--vocab_rows", 520).code == 0
    original = Qwen2_5_VLForConditionalGeneration.from_pretrained(source)
    rows = original.config.text_config.vocab_size
    for name, count in (("more", 600), ("fewer", 520)):
        made = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / name)
        assert made.config.text_config.vocab_size == count
        for parameter, theirs in original.named_parameters():
            mine = made.get_parameter(parameter)
            if mine.shape != theirs.shape:
                assert mine.shape == (count, theirs.shape[1])
                assert not mine[rows:].any()
                mine = mine[:rows]
            assert torch.equal(mine, theirs), parameter
        names = tensors_of(tmp_path / name).keys()
        assert set(VOCABULARY) & names == set(VOCABULARY[: 1 if model == "nano" else 2])
        assert (tmp_path / name / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_export_refuses_to_lose_a_token_to_overwrite_and_to_copy_nothing(
    call: Call, tmp_path: Path, nano: Path
) -> None:
    tokens = Qwen2_5_VLConfig.from_pretrained(nano).text_config.vocab_size
    said = refusal(call("export", nano, tmp_path / "x", "--vocab_rows", tokens - 1))
    assert f"--vocab_rows {tokens - 1}" in said
    assert f"the tokenizer has {tokens}" in said
    assert not (tmp_path / "x").exists()
    assert "exists already" in refusal(call("export", nano, tmp_path, "--vocab_rows", tokens))
    assert str(tmp_path / "gone") in refusal(call("export", tmp_path / "gone", tmp_path / "x", "--vocab_rows", tokens))
    assert "--vocab_rows" in refusal(call("export", nano, tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_export_of_a_folder_without_safetensors_is_refused(call: Call, tmp_path: Path, nano: Path) -> None:
    shutil.copytree(nano, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    assert "safetensors" in refusal(call("export", tmp_path / "pickled", tmp_path / "x", "--vocab_rows", 600))
    assert not (tmp_path / "x" / "config.json").exists()


# presets


def counts(name: str, rows: int = 512) -> tuple[int, int]:
    """(all parameters, those of the vision tower) without making any."""
    values = preset(name)
    values["text_config"]["vocab_size"] = values["text_config"]["vocab_size"] or rows
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**values))
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.model.visual.parameters())


def test_presets_have_the_parameters_they_are_named_for() -> None:
    assert 1.2e6 <= counts("nano")[0] <= 1.5e6
    assert 85e6 <= counts("bench-87m")[0] <= 89e6
    whole, tower = counts("qwen2.5-vl-7b")
    # As published, to the last printed digit.
    assert (round(whole / 1e9, 2), round(tower / 1e9, 2)) == (8.29, 0.68)


PUBLIC = {
    "3b": (2048, 36, 16, 2, 11008, 151936, True, 3420, 2048),
    "7b": (3584, 28, 28, 4, 18944, 152064, False, 3420, 3584),
    "32b": (5120, 64, 40, 8, 27648, 152064, False, 3456, 5120),
    "72b": (8192, 80, 64, 8, 29568, 152064, False, 3456, 8192),
}


@pytest.mark.parametrize("size", PUBLIC)
def test_public_presets_have_the_public_shapes(size: str) -> None:
    values = preset(f"Qwen2.5_VL-{size.upper()}")
    config = Qwen2_5_VLConfig(**values)
    text, vision = config.text_config, config.vision_config
    assert PUBLIC[size] == (
        text.hidden_size,
        text.num_hidden_layers,
        text.num_attention_heads,
        text.num_key_value_heads,
        text.intermediate_size,
        text.vocab_size,
        config.tie_word_embeddings,
        vision.intermediate_size,
        vision.out_hidden_size,
    )
    assert text.hidden_size // text.num_attention_heads == 128
    assert text.rope_parameters["mrope_section"] == [16, 24, 24]
    assert (text.rope_parameters["rope_theta"], text.rms_norm_eps) == (1e6, 1e-6)
    assert (vision.depth, vision.hidden_size, vision.num_heads) == (32, 1280, 16)
    assert (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size) == (14, 2, 2)
    assert (vision.window_size, vision.tokens_per_second) == (112, 2)
    assert vision.fullatt_block_indexes == [7, 15, 23, 31]


def test_a_preset_is_a_copy_that_may_be_changed() -> None:
    preset("nano")["text_config"]["hidden_size"] = 1
    assert PRESETS["nano"]["text_config"]["hidden_size"] == 128
