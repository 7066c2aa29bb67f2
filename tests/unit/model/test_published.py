"""Published layouts (tests/support/published.py) without training: what is read, and how what is saved is spelt."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open
from support.published import BY_NAME, LAYOUTS, PIXELS, REAL, Layout, published_name, real_layouts, shrink, write_layout
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from mirage_ds.cli import cli
from mirage_ds.curate.rationalize.local import Local
from mirage_ds.curate.rationalize.prompt import Questions
from mirage_ds.curate.spec import RationalizeSpec
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder, load_tokenizer
from mirage_ds.engine.save import change_rows
from mirage_ds.engine.spelling import config_json, read_base, read_trained, write_image_processor, write_tokenizer
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import load_decoder, run_limits
from mirage_ds.model.family import FAMILIES
from mirage_ds.model.load import read_config
from mirage_ds.plan.shape import read_shape, sizes

TEXTS = ("Where does the way go? Left.", "system\nYou are a helpful assistant.\nuser\n")
TRAINED = {"stage": "stage1", "latent_size": 6, "slots": None, "compress_strategy": "grid"}
LATENTS = ["<|latent_pad|>", "<|latent_start|>", "<|latent_end|>"]
ALL = [pytest.param(layout, id=layout.name) for layout in (*LAYOUTS, *real_layouts())]


def put(folder: Path, name: str, values: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write a layout's folder without weights, once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = write_layout(BY_NAME[name], tmp_path_factory.mktemp("layouts") / "base", TEXTS, weights=False)
        return made[name]

    return make


# ---------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("layout", ALL)
def test_tie_and_dtype_are_what_the_publisher_says(layout: Layout, tmp_path: Path) -> None:
    folder = put(tmp_path, "config.json", layout.config)
    assert ("lm_head.weight" not in read_shape(str(folder)).shapes) == layout.tied
    assert read_config(folder).dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ALL)
def test_a_study_counts_the_parameters_of_a_saved_folder(layout: Layout, tmp_path: Path) -> None:
    folder = put(tmp_path, "config.json", shrink(layout.config))
    base = read_base(folder, AutoTokenizerOf(folder))
    saved = put(
        tmp_path / "saved",
        "config.json",
        json.loads(config_json(base, torch.bfloat16, TRAINED, FAMILIES[layout.kind].whole)),
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    vision = sum(p.numel() for p in model.model.visual.parameters())
    found = sizes(read_shape(str(saved / "config.json")))
    assert (found.text, found.vision) == (sum(p.numel() for p in model.parameters()) - vision, vision)


class AutoTokenizerOf:
    """Says where a tokenizer would have been read from."""

    def __init__(self, folder: Path):
        self.name_or_path = str(folder)


@pytest.mark.parametrize("file", sorted(REAL.glob("*/index.keys.json")), ids=lambda file: file.parent.name)
def test_the_builders_names_are_the_published_ones(file: Path) -> None:
    keys = json.loads(file.read_text())["keys"]
    kind = json.loads((file.parent / "config.json").read_text())["model_type"]
    if kind not in FAMILIES or isinstance(keys, str) or "Embedding" in str(file):
        pytest.skip("no model that is trained here, or no names")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(file.parent))
    names = {re.sub(r"\.\d+\.", ".N.", published_name(name, kind)) for name, _ in model.named_parameters()}
    assert names == set(keys)


def test_k_is_read_from_a_public_mirage_folder() -> None:
    mirage = AutoConfig.for_model(**shrink(BY_NAME["mirage"].config))
    assert read_trained(mirage) == {"stage": "stage2", "latent_size": 3, "compress_strategy": "average"}
    # What mirage_ds has written into it since is newer.
    mirage.mirage = TRAINED
    assert read_trained(mirage) == TRAINED
    assert read_trained(AutoConfig.for_model(**shrink(LAYOUTS[0].config))) == {}


def test_a_public_mirage_folder_decodes_with_its_k(tmp_path: Path, folder_of: Callable[[str], Path]) -> None:
    folder = write_layout(BY_NAME["mirage"], tmp_path / "released", TEXTS)
    decoder = load_decoder(folder, ImageFinder(()), processor=folder_of("qwen2.5-vl-7b"))
    assert run_limits(decoder, 9, 8, "trained").fixed_run == 3


@pytest.mark.parametrize("pixels", [name for name in PIXELS if name != "qwen3"])
def test_limits_of_every_era_are_read(pixels: str, tmp_path: Path, folder_of: Callable[[str], Path]) -> None:
    folder = put(tmp_path, "preprocessor_config.json", PIXELS[pixels])
    encoder = load_encoder([str(folder), str(folder_of("qwen2.5-vl-7b"))], ImageFinder(()), "sft", 1)
    assert encoder.images.size == {"shortest_edge": 3136, "longest_edge": 12845056}


def test_a_template_that_only_the_processor_has(nano: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(nano, tmp_path / "nano")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    put(folder, "chat_template.json", {"chat_template": template})
    assert load_tokenizer([str(folder)], None).chat_template == template
    for broken, said in (("{", "cannot be read"), ('{"chat_template": 3}', "no chat template"), ("[]", "no chat")):
        (folder / "chat_template.json").write_text(broken)
        with pytest.raises(UserError, match=said):
            load_tokenizer([str(folder)], None)


# --------------------------------------------------------------------------------------------------------- refusing

MOE = {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe"}
SAID_EMBEDDING = "a model that writes no text, such as an embedding model"
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    # from which layout, keys changed in config.json, further files, what is said
    "experts": ("qwen3-vl-8b", MOE, {}, "a mixture of experts, a model of type 'qwen3_vl_moe'; mirage_ds trains the"),
    "base class": ("qwen3-vl-4b", {"architectures": ["Qwen3VLModel"]}, {}, SAID_EMBEDDING),
    "reward": ("qwen2-vl-2b", {"architectures": ["Qwen2VLForSequenceClassification"]}, {}, SAID_EMBEDDING),
    "sentence-transformers": ("qwen3-vl-4b", {}, {"modules.json": []}, rf"{SAID_EMBEDDING} \(modules.json stands"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_one_sentence(case: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    layout, changed, files, said = REFUSED[case]
    folder = put(
        shutil.copytree(folder_of(layout), tmp_path / "m"), "config.json", shrink(BY_NAME[layout].config) | changed
    )
    for name, values in files.items():
        put(folder, name, values)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text_input": "Where?", "text_output": "\\\\boxed{There}"}\n')
    # Training reads it by the same function.
    with pytest.raises(UserError, match=said):
        read_config(folder)
    for words in (
        ["evaluate", folder, "--data_path", rows, "--task", "boxed", "--no_latents"],
        ["generate", folder, "--prompt", "Where?", "--no_latents"],
        ["plan", "--model", folder, "--stage", "sft"],
        ["doctor", "--model", folder, "--only", "model"],
    ):
        result = CliRunner().invoke(cli, [str(word) for word in words], env={"COLUMNS": "900"})
        text = str(result.exception) if isinstance(result.exception, UserError) else result.output
        # Doctor's table has the cure in a column of its own.
        assert re.search(said.replace("; ", ";? "), re.sub(r"\s+", " ", text)), (words, text)
        assert isinstance(result.exception, UserError) or result.exit_code == 2


# --------------------------------------------------------------------------------------------------------- spelling


@pytest.mark.parametrize("layout", ALL)
def test_config_keeps_the_keys_of_its_base(layout: Layout, tmp_path: Path) -> None:
    config = shrink(layout.config)
    folder = put(tmp_path, "config.json", config)
    base = read_base(folder, AutoTokenizerOf(folder))
    saved = json.loads(config_json(base, torch.float16, TRAINED, FAMILIES[layout.kind].whole))
    assert saved.pop("mirage") == TRAINED
    for block, other in ((saved, config), *((saved[k], v) for k, v in config.items() if isinstance(v, dict))):
        assert set(block) - set(other) <= ({"dtype"} if other is config else set())
        for key, value in other.items():
            if key in ("dtype", "torch_dtype"):
                assert block[key] == "float16"
            elif key in ("stage", "latent_size", "compress_strategy"):
                assert block[key] == TRAINED[key]
            elif not isinstance(value, dict):
                assert block[key] == value, key
    # The base itself is not changed: a second save, with a better score, begins from it again.
    assert base.config == config


@pytest.mark.parametrize("name", ["qwen2.5-vl-3b", "qwen2-vl-4.46", "qwen3-vl-8b", "mirage"])
def test_tokenizer_keeps_the_keys_of_its_base(name: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of(name)
    tokenizer = load_tokenizer([str(folder)], None)
    write_tokenizer(tokenizer, read_base(folder, tokenizer), tmp_path)
    for file, content in read_base(folder, tokenizer).files.items():
        (tmp_path / file).write_bytes(content)
    before, after = (json.loads((place / "tokenizer_config.json").read_text()) for place in (folder, tmp_path))
    assert after["tokenizer_class"] == "Qwen2Tokenizer"
    assert "extra_special_tokens" not in after
    assert after["additional_special_tokens"] == before.pop("additional_special_tokens") + LATENTS
    added, known = after["added_tokens_decoder"], before.pop("added_tokens_decoder")
    ids = tokenizer.convert_tokens_to_ids(LATENTS)
    assert added == known | {str(i): dict(known["151644"], content=t) for i, t in zip(ids, LATENTS, strict=True)}
    assert {key: after[key] for key in before} == before
    assert {"vocab.json", "merges.txt", "generation_config.json"} <= {file.name for file in tmp_path.iterdir()}
    # Transformers 5 reads of it what it was.
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|latent_start|><|latent_pad|><|latent_end|> Where, to the Left? <|im_end|>\n"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(again(text)["input_ids"], skip_special_tokens=True) == " Where, to the Left? \n"
    assert again.chat_template == tokenizer.chat_template


def test_image_limits_stand_in_both_places(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    encoder = load_encoder([str(folder_of("qwen3-vl-8b"))], ImageFinder(()), "sft", 1, (3136, 784_000))
    write_image_processor(encoder.images, tmp_path)
    said = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert said["size"] == {"shortest_edge": 3136, "longest_edge": 784_000}
    assert (said["min_pixels"], said["max_pixels"]) == (3136, 784_000)
    assert (said["patch_size"], said["image_mean"]) == (16, [0.5, 0.5, 0.5])


@pytest.mark.parametrize("name", ["qwen2.5-vl-4.52", "qwen3-vl-4b"])
def test_other_rows_keep_every_other_key(name: str, tmp_path: Path) -> None:
    base = write_layout(BY_NAME[name], tmp_path / "base", TEXTS)
    change_rows(base, tmp_path / "out", 151_680, 151_672)
    for file in base.glob("*.json"):
        if "safetensors" not in file.name and file.name != "config.json":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    before, after = (json.loads((place / "config.json").read_text()) for place in (base, tmp_path / "out"))
    for block in (before, before["text_config"]):
        if "vocab_size" in block:
            block["vocab_size"] = 151_680
    assert after == before
    old, new = (AutoModelForImageTextToText.from_pretrained(place).eval() for place in (base, tmp_path / "out"))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(old(input_ids=ids).logits[..., :151_680], new(input_ids=ids).logits)
    with safe_open(next((tmp_path / "out").glob("*.safetensors")), "pt") as tensors:
        # What vLLM maps from: `visual.` and `model.` of the older families, `model.…` of Qwen3-VL.
        starts = {
            "qwen2.5-vl-4.52": r"visual\.|model\.(layers|embed_tokens|norm)\.|lm_head\.",
            "qwen3-vl-4b": r"model\.(visual|language_model)\.",
        }
        assert all(re.match(starts[name], one) for one in tensors.keys())  # noqa: SIM118


# ------------------------------------------------------------------------------------------------------- rationales


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_rationales_are_drawn_by_their_own_settings(kind: str, nano: Path, tmp_path: Path) -> None:
    from support.published import SAMPLING

    folder = shutil.copytree(nano, tmp_path / "nano")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text_input": "Where?", "text_output": "<output_image>\\\\boxed{A}", "image_output": "h.png"}\n')
    Image.new("RGB", (56, 56)).save(tmp_path / "h.png")

    def written(temperature: float) -> list[str]:
        samples, own = 3 if temperature else 1, {"model": str(folder), "max_new_tokens": 12, "task": "boxed"}
        spec = RationalizeSpec(out=tmp_path / "o", temperature=temperature, samples=samples, **own)
        local = Local(Questions.read(rows, spec))
        return [reply.text for _, reply in local.replies([(0, sample) for sample in range(samples)])]

    plain = [written(1.0), written(0.0)]
    ends = json.loads((folder / "generation_config.json").read_text())
    put(folder, "generation_config.json", SAMPLING[kind] | ends | {"pad_token_id": None, "bos_token_id": None})
    assert [written(1.0), written(0.0)] == plain
    assert len(set(plain[0])) == 3
