"""docs/migrate.md: its worked example, by the encoder and by plain transformers, and its commands on such a folder.

T tokens of the row, k latents, H hidden, n merged features of the helper.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pictures import noise
from support.shell_lines import shown_in
from torch.nn import functional
from transformers import Qwen2_5_VLForConditionalGeneration

from mirage_ds import cli, load
from mirage_ds.data.encode import Encoder
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.record import make_record
from mirage_ds.data.sample import IGNORE, Sample

PAGE = Path(__file__).parents[3] / "docs/migrate.md"
TEXT = PAGE.read_text()
DATA = Path(__file__).parents[3] / "data"
K = 4


def block(after: str, kind: str = "") -> str:
    """The first fenced block of a kind behind some words of the page."""
    found = re.search(rf"^```{kind}\n(.*?)^```", TEXT[TEXT.index(after) :], re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


RECORD = block("## Token for token", "json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures of the page's record."""
    made = tmp_path_factory.mktemp("migrate")
    noise((56, 84), 80).save(made / "map.png")
    noise((84, 84), 70).save(made / "path.png")
    return made


@pytest.fixture
def encoded(nano: Path, folder: Path) -> Callable[[str], tuple[Encoder, Sample]]:
    def encode(stage: Any) -> tuple[Encoder, Sample]:
        encoder = load_encoder([str(nano)], ImageFinder((folder,)), stage, K)
        return encoder, encoder.encode(make_record(RECORD, 1), row=0)

    return encode


def span(text: str) -> range:
    first, _, last = text.partition("–")
    return range(int(first), int(last or first) + 1)


def spelt(text: str) -> str:
    """A row's text as the page writes it, turned back."""
    repeated = re.fullmatch(r"(\d+) × (.*)", text)
    plain = repeated[2] * int(repeated[1]) if repeated else text
    return plain.replace("⏎", "\n").replace("␣", " ")


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_row_of_the_page(encoded: Callable, stage: str) -> None:
    encoder, sample = encoded(stage)
    lines = [re.split(r" {2,}", line) for line in block("In stage 1 and stage 2 the row").splitlines()]
    assert lines[0] == ["places", "label", "positions", "tokens"]
    seen = []
    for places, label, positions, text in lines[1:]:
        here = list(span(places))
        seen += here
        assert encoder.tokenizer.decode(sample.input_ids[here]) == spelt(text)
        assert set((sample.labels[here] != IGNORE).tolist()) == {label == "yes"}
        where, stated = sample.position_ids[:, here], span(positions)
        assert (int(where.min()), int(where.max())) == (stated[0], stated[-1])
        learnt = sample.labels[here][sample.labels[here] != IGNORE]
        assert torch.equal(learnt, sample.input_ids[here][: len(learnt)])
    assert seen == list(range(len(sample.input_ids)))
    assert sample.runs == ((39, K),)
    assert f"the row's {int((sample.labels != IGNORE).sum())} labels" in TEXT


def test_the_row_without_latents_is_that_of_sft(encoded: Callable) -> None:
    _, with_latents = encoded("stage2")
    encoder, without = encoded("sft")
    kept = torch.cat([with_latents.input_ids[:38], with_latents.input_ids[44:]])
    assert "text without 38 to 43" in TEXT
    assert encoder.tokenizer.decode(without.input_ids) == encoder.tokenizer.decode(kept)
    assert without.runs == ()


def test_the_ids_of_a_released_folder(nano: Path) -> None:
    """Three tokens behind all others, in the page's order; nano's numbers are smaller."""
    stated = dict(re.findall(r"^\| `(<\\\|latent_\w+\\\|>)` \| (\d+) \|", TEXT, re.MULTILINE))
    assert list(stated.values()) == ["151665", "151666", "151667"]
    encoder = load_encoder([str(nano)], ImageFinder(()), "sft", K)
    ids = [encoder.id_of(token.replace("\\", "")) for token in stated]
    assert ids == list(range(ids[0], ids[0] + 3))
    assert ids[-1] + 1 == len(encoder.tokenizer)


class Plain:
    """The row through plain transformers, every prefix anew, without a cache."""

    def __init__(self, nano: Path, sample: Sample, helper: torch.Tensor, helper_grid: torch.Tensor):
        self.model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(nano, dtype=torch.float32).eval()
        self.sample = sample
        self.helper = self.features(helper, helper_grid)
        x = self.model.model.language_model.embed_tokens(sample.input_ids)
        place = sample.image_positions
        self.x = x.index_copy(0, place, self.features(sample.pixel_values, sample.image_grid_thw))

    def features(self, pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        return torch.cat(list(self.model.model.get_image_features(pixels, grid, return_dict=True).pooler_output))

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """Final-norm states (T, H) of a prefix whose embeddings are x."""
        places = self.sample.position_ids[:, None, : len(x)]
        text = self.model.model.language_model
        return text(inputs_embeds=x[None], position_ids=places, use_cache=False).last_hidden_state[0]

    def ce(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.model.lm_head(hidden)
        return functional.cross_entropy(logits[:-1], self.sample.labels[1:], ignore_index=IGNORE)


@torch.no_grad()
def test_both_losses_of_the_page(nano: Path, folder: Path, encoded: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    mirage = load(nano, latent_size=K, device="cpu")
    _, sample = encoded("stage1")
    plain = Plain(nano, sample, sample.helper_pixel_values, sample.helper_grid_thw)

    # Stage 1: t₀ … t₃ stand at 39 … 42, and the state before each is compared with it.
    n = len(plain.helper)
    assert n == 9
    targets = torch.stack([(plain.helper[2 * j] + plain.helper[2 * j + 1]) / 2 for j in range(n // 2)])
    hidden = plain.hidden(torch.cat([plain.x[:39], targets, plain.x[43:]]))
    sim = 1 - sum(functional.cosine_similarity(hidden[38 + j], targets[j], dim=0) for j in range(K)) / K
    ours = mirage.loss(mirage.batch([mirage.rows([json.loads(RECORD)], stage="stage1")[0]]))
    torch.testing.assert_close(ours.sim, sim, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.loss, 0.1 * plain.ce(hidden) + sim, atol=1e-5, rtol=0)

    # Stage 2: h₃₈ … h₄₁ stand there, each made before the next.
    x = plain.x.clone()
    for place in range(39, 43):
        x[place] = plain.hidden(x[:place])[-1]
    ours = mirage.loss(mirage.batch([mirage.rows([json.loads(RECORD)], stage="stage2")[0]]))
    torch.testing.assert_close(ours.loss, plain.ce(plain.hidden(x)), atol=1e-5, rtol=0)
    # One place further, and it would not agree.
    x[42] = plain.hidden(x[:44])[-1]
    assert abs(ours.loss - plain.ce(plain.hidden(x))) > 1e-3


@pytest.fixture(scope="module")
def released(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with RELEASED, as the public code saves it: a row a token, no image processor, k on top."""
    here = tmp_path_factory.mktemp("released")
    shutil.copytree(nano, here / "BASE")
    shutil.copytree(nano, here / "RELEASED")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (here / "RELEASED" / name).unlink(missing_ok=True)
    config = json.loads((here / "RELEASED/config.json").read_text())
    assert "mirage" not in config
    config |= {"stage": "stage2", "latent_size": K, "compress_strategy": "average"}
    (here / "RELEASED/config.json").write_text(json.dumps(config))
    rows = [json.loads(line) for line in (DATA / "sample_planning.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["level"] == 4][:4]
    for row in rows:
        row |= {key: str(DATA / row[key]) for key in ("image_input", "image_output")}
    for name in ("train", "test"):
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(rows[0]["image_input"], here / "map.png")
    return here


OURS = [one for one in shown_in(PAGE) if "RELEASED" in one.words and one.words[0] == "mirage-ds"]


@pytest.mark.parametrize("shown", OURS, ids=str)
def test_a_command_on_a_released_folder_runs(shown: Any, released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(released)
    words = list(shown.words[1:])
    if "--max_new_tokens" in words:
        words[words.index("--max_new_tokens") + 1] = "3"
    elif words[0] in ("evaluate", "generate", "controls"):
        words += ["--max_new_tokens", "3"]
    # nano has 512 tokens, not 151,668: more rows than that.
    words = ["600" if word == "152064" else word for word in words]
    cli.cli.main(words, standalone_mode=False)
    made = {"evaluate": "scores.json", "controls": "controls.md", "export": "wide/model.safetensors"}
    if words[0] in made and ("--out" in words or words[0] != "evaluate"):
        assert (released / made[words[0]]).is_file()


def test_the_list_of_those_commands_is_whole() -> None:
    assert sorted({one.words[1] for one in OURS}) == ["controls", "evaluate", "export", "generate"]
    assert len(OURS) == 5


@pytest.mark.slow
def test_training_goes_on_from_a_released_folder(released: Path) -> None:
    (shown,) = [one for one in shown_in(PAGE) if "RELEASED" in one.words and one.words[0] == "deepspeed"]
    words = [*shown.words[3:], "--max_steps", "1", "--global_batch_size", "2", "--num_workers", "0"]
    assert shown.words[:3] == ("deepspeed", "--module", "mirage_ds.train")
    command = [sys.executable, "-m", "mirage_ds.train", *words]
    done = subprocess.run(command, cwd=released, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    saved = released / "runs/further"
    assert (saved / "preprocessor_config.json").is_file()
    assert json.loads((saved / "config.json").read_text())["mirage"]["latent_size"] == K
