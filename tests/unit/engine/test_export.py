"""Saving and loading: what is written opens in plain transformers, what cannot be trained is refused in a sentence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mirage_ds.data.encode import LATENT_TOKENS, Encoder
from mirage_ds.data.load import load_tokenizer
from mirage_ds.data.record import Record
from mirage_ds.data.sample import Sample
from mirage_ds.engine import save as export
from mirage_ds.engine.save import Parts, change_rows, save_model
from mirage_ds.engine.spelling import read_base
from mirage_ds.errors import UserError
from mirage_ds.files import TRAINED_KEY
from mirage_ds.model.folder import resolve_folder
from mirage_ds.model.load import Loaded, check_vocabulary, load_model, read_config
from mirage_ds.model.shards import ShardWriter

CPU = torch.device("cpu")
TRAINED = {"stage": "stage2", "latent_size": 3}


def load(folder: Path, **options: Any) -> Loaded:
    return load_model(folder, stage="stage2", **(dict(dtype=torch.float32, device=CPU) | options))


def save(loaded: Loaded, source: Path, out: Path, tokenizer: Any = None, processor: Any = None) -> None:
    tower = loaded.tower.tower if loaded.tower else None
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(source)
    parts = Parts(read_base(source, tokenizer), tokenizer, processor or Qwen2VLImageProcessorPil(), source, TRAINED)
    save_model(loaded.model, tower, out, 0, parts)


def plain(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()


def names_in(folder: Path) -> list[str]:
    found = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found += list(tensors.keys())
    return sorted(found)


@pytest.fixture(scope="module")
def sample(encoder_for: Callable[..., Encoder]) -> Sample:
    record = Record(1, "Where to? <image>", "<output_image>\\boxed{LEFT}", ("w84x84.png",), ())
    return encoder_for("stage2", 2).encode(record, 0)


@torch.no_grad()
def logits(model: Qwen2_5_VLForConditionalGeneration, sample: Sample) -> torch.Tensor:
    return model(
        input_ids=sample.input_ids[None],
        position_ids=sample.position_ids[:, None],
        pixel_values=sample.pixel_values,
        image_grid_thw=sample.image_grid_thw,
    ).logits[0]


@pytest.mark.parametrize("train_vision", [False, True])
@pytest.mark.parametrize("source", ["nano", "untied"])
def test_what_was_trained_opens_in_plain_transformers_with_equal_logits(
    source: str, train_vision: bool, sample: Sample, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(source)
    loaded = load(folder, train_vision=train_vision)
    expected = plain(folder)
    before = logits(expected, sample)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(1.125)
        for name, parameter in expected.named_parameters():
            if train_vision or ".visual." not in name:
                parameter.mul_(1.125)
    save(loaded, folder, tmp_path / "out")
    after = logits(plain(tmp_path / "out"), sample)
    # The same numbers in the same code: equal to the bit.
    assert torch.equal(after, logits(expected, sample))
    assert not torch.allclose(after, before)


def test_the_saved_names_are_the_public_ones_each_written_once(nano: Path, untied: Path, tmp_path: Path) -> None:
    for source, head in ((nano, False), (untied, True)):
        out = tmp_path / source.name
        save(load(source), source, out)
        names = names_in(out)
        assert len(names) == len(set(names))
        assert {
            re.match(r"(visual\.|model\.(?!visual|language_model)|lm_head\.weight$)", name) is None for name in names
        } == {False}
        assert ("lm_head.weight" in names) is head
        assert "model.embed_tokens.weight" in names
        assert len(names) == len(dict(plain(source).named_parameters()))


def test_the_folder_is_whole_tokenizer_processor_generation_and_dtype(nano: Path, tmp_path: Path) -> None:
    save(load(nano, dtype=torch.bfloat16), nano, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("bfloat16", ["Qwen2_5_VLForConditionalGeneration"])
    # With the ids that custom_generate/generate.py needs.
    trained = TRAINED | {
        "latent_tokens": AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids([*LATENT_TOKENS])
    }
    assert config[TRAINED_KEY] == trained
    assert getattr(AutoConfig.from_pretrained(tmp_path), TRAINED_KEY) == trained
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    text = "a <|latent_pad|> b"
    assert (
        load_tokenizer([str(tmp_path)], None)(text)["input_ids"]
        == AutoTokenizer.from_pretrained(nano)(text)["input_ids"]
    )
    assert (tmp_path / "preprocessor_config.json").is_file()
    assert (tmp_path / "generation_config.json").read_text() == (nano / "generation_config.json").read_text()
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert not [file.name for file in tmp_path.iterdir() if "partial" in file.name]


def test_other_ranks_write_nothing(nano: Path, tmp_path: Path) -> None:
    loaded = load(nano)
    base = read_base(nano, AutoTokenizer.from_pretrained(nano))
    save_model(loaded.model, None, tmp_path / "out", 1, Parts(base, None, None, nano, TRAINED))
    assert not (tmp_path / "out").exists()


def test_shards_hold_their_bound_and_a_later_save_leaves_none_of_them(
    nano: Path, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = 1 << 20
    with monkeypatch.context() as patch:
        patch.setattr(export, "ShardWriter", partial(ShardWriter, shard_bytes=bound))
        save(load(nano), nano, tmp_path)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" for number in range(len(files))]
    total = 0
    for name in files:
        sizes = [tensor.numel() * tensor.element_size() for tensor in load_file(tmp_path / name).values()]
        assert sum(sizes) <= bound or len(sizes) == 1
        total += sum(sizes)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert sorted(index["weight_map"]) == names_in(tmp_path)
    assert torch.equal(logits(plain(tmp_path), sample), logits(plain(nano), sample))
    loaded = load(tmp_path)
    # Somebody's own, near enough in name.
    for name in ("model-merged.safetensors", "model_best_backup.safetensors"):
        (tmp_path / name).write_text("mine")
    save(loaded, nano, tmp_path)
    for name in ("model-merged.safetensors", "model_best_backup.safetensors"):
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    assert [file.name for file in tmp_path.glob("*safetensors*")] == ["model.safetensors"]
    assert torch.equal(logits(plain(tmp_path), sample), logits(plain(nano), sample))


class Interrupted(Exception):
    pass


def interrupt(*_: Any, **__: Any) -> None:
    raise Interrupted


PLACES = ["add", "finish", "tokenizer", "processor"]


def save_until(place: str, loaded: Loaded, source: Path, out: Path, patch: pytest.MonkeyPatch) -> None:
    tokenizer, processor = AutoTokenizer.from_pretrained(source), Qwen2VLImageProcessorPil()
    if place in ("add", "finish"):
        patch.setattr(ShardWriter, place, interrupt)
    else:
        patch.setattr(tokenizer if place == "tokenizer" else processor, "save_pretrained", interrupt)
    with pytest.raises(Interrupted):
        save(loaded, source, out, tokenizer, processor)


@pytest.mark.parametrize("place", PLACES)
def test_an_interrupted_save_is_never_taken_for_a_model(
    place: str, nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_until(place, load(nano), nano, tmp_path / "out", monkeypatch)
    with pytest.raises(UserError, match=r"no config\.json there|no such folder"):
        resolve_folder(str(tmp_path / "out"), "--load_model_path", None)


@pytest.mark.parametrize("place", PLACES)
def test_an_interrupted_save_over_a_model_leaves_the_old_one_or_none(
    place: str, nano: Path, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(nano, out)
    loaded = load(nano)
    with torch.no_grad():
        loaded.model.language_model.embed_tokens.weight.mul_(2)
    save_until(place, loaded, nano, out, monkeypatch)
    if (out / "config.json").is_file():
        assert torch.equal(logits(plain(out), sample), logits(plain(nano), sample))


def test_what_an_interrupted_save_left_is_gone_after_the_next_one(
    nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(nano)
    with monkeypatch.context() as patch:
        patch.setattr(export, "ShardWriter", partial(ShardWriter, shard_bytes=1 << 20))
        save_until("finish", loaded, nano, tmp_path, patch)
    assert list(tmp_path.glob(".model-*.partial"))
    save(loaded, nano, tmp_path)
    assert not list(tmp_path.glob(".model-*.partial"))


OLD_NAMES = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))
NEW_NAMES = ((r"^visual\.", "model.visual."), (r"^model\.(?!visual|language_model)", "model.language_model."))


def rewritten(source: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """A copy of a model folder with other tensors."""
    shutil.copytree(source, out)
    save_file(change(load_file(source / "model.safetensors")), out / "model.safetensors", metadata={"format": "pt"})
    return out


def renamed(
    tensors: dict[str, torch.Tensor], names: tuple[tuple[str, str], ...] = NEW_NAMES
) -> dict[str, torch.Tensor]:
    made = {}
    for name, tensor in tensors.items():
        for pattern, replacement in names:
            if re.match(pattern, name):
                name = re.sub(pattern, replacement, name)  # noqa: PLW2901
                break
        made[name] = tensor
    return made


@pytest.mark.parametrize("model", ["nano", "untied"])
def test_old_and_new_checkpoint_names_load_the_same(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    # Which names transformers writes depends on its version.
    source = rewritten(request.getfixturevalue(model), tmp_path / "old", partial(renamed, names=OLD_NAMES))
    assert any(name.startswith("visual.") for name in names_in(source))
    new = rewritten(source, tmp_path / "new", renamed)
    assert not any(name.startswith(("visual.", "model.embed", "model.layers")) for name in names_in(new))
    for options in ({}, {"train_vision": True}):
        stored = [load(folder, **options) for folder in (source, new)]
        first, second = (
            {**one.model.state_dict(), **(one.tower.tower.state_dict() if one.tower else {})} for one in stored
        )
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), name
        # Not all alike because both are freshly initialised: they hold the file's numbers.
        file = load_file(source / "model.safetensors")
        assert torch.equal(first["language_model.embed_tokens.weight"], file["model.embed_tokens.weight"])
        assert torch.equal(first["head.weight"], file.get("lm_head.weight", file["model.embed_tokens.weight"]))
        visual = "visual.patch_embed.proj.weight"
        assert torch.equal(first[visual if options else visual.removeprefix("visual.")], file[visual])


def dropped(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "visual.merger.ln_q.weight", "model.norm.weight"]
)
def test_a_missing_tensor_is_named(name: str, nano: Path, tmp_path: Path) -> None:
    folder = rewritten(nano, tmp_path / "x", dropped(name))
    with pytest.raises(UserError) as caught:
        load(folder)
    assert str(caught.value) == f"{folder}: 1 tensor(s) missing, the first is {name}; the folder is not whole"


def test_an_untied_model_needs_its_output_matrix_and_a_tied_one_does_not(
    nano: Path, untied: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"missing, the first is lm_head\.weight"):
        load(rewritten(untied, tmp_path / "x", dropped("lm_head.weight")))
    model = load(nano).model
    assert model.head.weight is model.language_model.embed_tokens.weight
    model = load(untied).model
    assert not torch.equal(model.head.weight, model.language_model.embed_tokens.weight)


def test_a_wrong_shape_names_both(nano: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    folder = rewritten(nano, tmp_path / "x", lambda tensors: tensors | {name: tensors[name][:10].contiguous()})
    with pytest.raises(UserError) as caught:
        load(folder)
    for part in (name, "(10, 128)", "(64, 128)"):
        assert part in str(caught.value)


@pytest.fixture
def copy(nano: Path, tmp_path: Path) -> Path:
    shutil.copytree(nano, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_pickle_only_folder_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \*\.safetensors; .*pickles are never read"):
        load(copy)


def test_a_truncated_weight_file_is_one_sentence_that_names_it(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load(copy)


def test_another_architecture_is_refused(copy: Path) -> None:
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(values | {"model_type": "llava"}))
    with pytest.raises(UserError, match=r"a model of type 'llava'; mirage_ds trains Qwen2\.5-VL"):
        read_config(copy)


@pytest.mark.parametrize("text", ['{"model_type": ', "[]", '"qwen2_5_vl"', ""])
def test_a_broken_config_is_one_sentence(text: str, copy: Path) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(copy)


def test_a_folder_without_config_and_no_folder_at_all_are_named_with_their_flag(copy: Path, tmp_path: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match=f"--model {copy}: no config.json there"):
        resolve_folder(str(copy), "--model", None)
    with pytest.raises(UserError, match=f"--model {tmp_path}/a/b: no such folder"):
        resolve_folder(f"{tmp_path}/a/b", "--model", None)
    with pytest.raises(UserError, match=r"--load_model_path owner/name: no such folder$"):
        resolve_folder("owner/name", "--load_model_path", None)
    # Offline here: the hub cannot give it.
    with pytest.raises(UserError, match="--model owner/name: no such folder, and the hub did not give it"):
        resolve_folder("owner/name", "--model", tmp_path)


def test_a_fetch_says_that_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, tqdm_class: Any, **_: Any) -> str:
        with tqdm_class(total=3, disable=True) as bar:
            bar.update(1)
            bar.update(2)
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    ticks: list[int] = []
    assert resolve_folder("owner/name", "--model", None, lambda: ticks.append(1)) == tmp_path / "owner/name"
    assert len(ticks) == 2


def test_token_ids_beyond_the_rows_are_refused(nano: Path) -> None:
    config = AutoConfig.from_pretrained(nano)
    rows, pad = config.text_config.vocab_size, config.image_token_id
    check_vocabulary(config, {"<|image_pad|>": pad, "<|latent_end|>": rows - 1})
    with pytest.raises(UserError) as caught:
        check_vocabulary(config, {"<|image_pad|>": pad, "<|latent_start|>": rows - 1, "<|latent_end|>": rows})
    for part in (f"has {rows} rows", f"<|latent_end|> would be number {rows}", "at least that many rows"):
        assert part in str(caught.value)
    assert "<|latent_start|>" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(nano: Path) -> None:
    config = AutoConfig.from_pretrained(nano)
    with pytest.raises(UserError, match=rf"image_token_id is {config.image_token_id}, the tokenizer's .* is 3"):
        check_vocabulary(config, {"<|image_pad|>": 3})


def test_more_rows_than_tokens_load_and_save_without_a_resize(nano: Path, tmp_path: Path) -> None:
    tokens = len(load_tokenizer([str(nano)], None))
    change_rows(nano, tmp_path / "wide", tokens + 399, tokens)
    loaded = load(tmp_path / "wide")
    assert loaded.model.language_model.embed_tokens.weight.shape == (tokens + 399, 128)
    assert loaded.model.head.weight.shape == (tokens + 399, 128)
    save(loaded, tmp_path / "wide", tmp_path / "again")
    assert plain(tmp_path / "again").get_input_embeddings().weight.shape == (tokens + 399, 128)
