"""A model folder that contradicts itself is one sentence; what transformers opens as it is, passes.

Whether a folder is sound is transformers' to say: it loads it, and tells what it found, missed and left out.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from mirage_ds import api
from mirage_ds.cli import cli
from mirage_ds.cluster.doctor.check_run import check_model
from mirage_ds.cluster.doctor.spec import DoctorSpec
from mirage_ds.curate.rationalize.local import Local
from mirage_ds.curate.rationalize.prompt import Questions, load_template
from mirage_ds.curate.rewrite import Source
from mirage_ds.curate.spec import RationalizeSpec
from mirage_ds.engine.checkpoint import STATE_FILE
from mirage_ds.errors import UserError
from mirage_ds.model.family import FAMILIES
from mirage_ds.model.folder import INDEX, SINGLE, resolve_folder, stored_tensors, weight_files
from mirage_ds.model.init import init_model
from mirage_ds.model.load import check_folder, open_weights

Tensors = dict[str, torch.Tensor]
UP, NORM = "model.layers.0.mlp.up_proj", "model.norm.weight"
FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
BASES = ("nano", "nano-qwen2-vl", "nano-qwen3-vl", "untied")


@pytest.fixture(scope="module")
def bases(nano: Path, untied: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound folder of each family, and one whose head is a matrix of its own."""
    made = {"nano": nano, "untied": untied}
    for name in BASES[1:3]:
        made[name] = tmp_path_factory.mktemp("models") / name
        init_model(name, made[name], texts=[])
    return made


@pytest.fixture
def copy(nano: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(nano, tmp_path / "model"))


def save(tensors: Tensors, file: Path) -> None:
    save_file({name: one.clone().contiguous() for name, one in tensors.items()}, file, metadata={"format": "pt"})


def tensors_of(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    save(change(load_file(folder / SINGLE)), folder / SINGLE)


def values_of(file: Path, **values: Any) -> None:
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | values))


def shard(folder: Path, change: Callable[[dict[str, str]], dict[str, str]] = lambda said: said) -> None:
    """Write the weights as two shards; `change` is what their index says."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names, said = sorted(tensors), {}
    for file, part in ((FIRST, names[::2]), (SECOND, names[1::2])):
        save({name: tensors[name] for name in part}, folder / file)
        said |= dict.fromkeys(part, file)
    values_of(folder / INDEX, metadata={}, weight_map=change(said))


def renamed(change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda folder: tensors_of(folder, lambda all_: {change(name): one for name, one in all_.items()})


def added(**more: torch.Tensor) -> Callable[[Path], None]:
    """Put tensors beside; `__` stands for a dot."""
    return lambda folder: tensors_of(folder, lambda all_: all_ | {k.replace("__", "."): v for k, v in more.items()})


def config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: values_of(folder / "config.json", **values)


def text_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        known = json.loads((folder / "config.json").read_text())["text_config"]
        values_of(folder / "config.json", text_config=known | values)

    return change


def beside(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def codes(dtype: torch.dtype, **scales: torch.Tensor) -> Callable[[Path], None]:
    """Store one weight as codes, with these beside it."""

    def change(folder: Path) -> None:
        more = {f"{UP}.{name.replace('__', '.')}": one for name, one in scales.items()}
        tensors_of(folder, lambda all_: all_ | {f"{UP}.weight": all_[f"{UP}.weight"].to(dtype)} | more)

    return change


def replaced(**parts: torch.Tensor) -> Callable[[Path], None]:
    """Store other tensors in place of one weight."""

    def change(all_: Tensors) -> Tensors:
        kept = {name: one for name, one in all_.items() if name != f"{UP}.weight"}
        return kept | {f"{UP}.{name.replace('__', '.')}": one for name, one in parts.items()}

    return lambda folder: tensors_of(folder, change)


def processor(**values: Any) -> Callable[[Path], None]:
    return lambda folder: values_of(folder / "preprocessor_config.json", **values)


def stale(folder: Path) -> None:
    whole = load_file(folder / SINGLE)
    shard(folder)
    save(whole, folder / SINGLE)


def dangling(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("../../blobs/gone")


def split(folder: Path) -> None:
    """Half of the weights under a name that nothing opens."""
    whole = load_file(folder / SINGLE)
    for at, file in enumerate((SINGLE, "more.safetensors")):
        save({name: whole[name] for name in sorted(whole)[at::2]}, folder / file)


def called(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / SINGLE).rename(folder / name)


def cut_index(folder: Path) -> None:
    shard(folder)
    (folder / INDEX).write_text((folder / INDEX).read_text()[:500])


def swapped(said: dict[str, str]) -> dict[str, str]:
    return said | {NORM: FIRST if said[NORM] == SECOND else SECOND}


def then(*steps: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for step in steps:
            step(folder)

    return change


one, byte = torch.ones(1), torch.zeros(4, dtype=torch.uint8)
QUANTISED = {
    "compressed-tensors": config(
        quantization_config={"quant_method": "compressed-tensors", "format": "pack-quantized"}
    ),
    "mxfp4 in text_config": text_config(quantization_config={"quant_method": "mxfp4"}),
    "old compressed-tensors": config(compression_config={"format": "int-quantized"}),
    "MLX": config(quantization={"group_size": 64, "bits": 4}),
    "ModelOpt's file": beside("hf_quant_config.json", b'{"quantization": {"quant_algo": "NVFP4"}}'),
    "AutoGPTQ's file": beside("quantize_config.json", b'{"bits": 4}'),
    "fp8 weights": codes(torch.float8_e4m3fn),
    "fp8 with scales": codes(torch.float8_e5m2, weight_scale_inv=one),
    "int8": codes(torch.int8, SCB=one),
    "int4 in int32": codes(torch.int32),
    "bitsandbytes": replaced(weight=byte, weight__absmax=one, weight__quant_state__bitsandbytes__nf4=byte),
    "awq": replaced(qweight=byte, scales=one, qzeros=byte),
    "gptq": replaced(qweight=byte, g_idx=byte),
    "packed": replaced(weight_packed=byte, weight_shape=byte),
    "scales alone": added(**{f"{UP.replace('.', '__')}__input_scale": one}),
    "hqq": replaced(W_q=byte, meta=one),
    "exl3": replaced(trellis=byte),
}
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{name: (change, "this checkpoint is quantised") for name, change in QUANTISED.items()},
    "adapter beside": (beside("adapter_config.json", b'{"base_model_name_or_path": "Qwen/B"}'), "adapter of Qwen/B"),
    "adapter file": (beside("adapter_model.safetensors", b"x"), "merge it into its base"),
    "adapter of another name": (
        lambda folder: save({"layers.0.lora_a.weight": one}, folder / "lora.safetensors"), "lora.safetensors: holds an"
    ),
    "adapter inside": (replaced(base_layer__weight=one, lora_A__weight=one), "holds an adapter beside the weights"),
    "adapter among": (added(**{f"{UP.replace('.', '__')}__lora_A__default__weight": one}), "merge it into its base"),
    "index names no file": (
        lambda folder: shard(folder, lambda said: {k: v.replace("00002-of", "00003-of") for k, v in said.items()}),
        "names 1 file(s) that are not there, the first is model-00003-of-00002.safetensors",
    ),
    "index omits a shard": (
        lambda folder: shard(folder, lambda said: {k: v for k, v in said.items() if v == FIRST}),
        f"{SECOND} would not be opened",
    ),
    "index omits a tensor": (
        lambda folder: shard(folder, lambda said: {k: v for k, v in said.items() if k != NORM}),
        f"{NORM} is in {SECOND}, {INDEX} does not name it",
    ),
    "index names a tensor too many": (lambda folder: shard(folder, lambda said: said | {"lm_head.weight": FIRST}),
                                      f"lm_head.weight is in no file, {INDEX} says {FIRST}"),
    "index puts it elsewhere": (lambda folder: shard(folder, swapped), f"{NORM} is in {SECOND}, {INDEX} says {FIRST}"),
    "index cut": (cut_index, f"{INDEX}: not valid JSON"),
    "index without map": (then(shard, beside(INDEX, b'{"metadata": {}}')), "has no 'weight_map'"),
    "index without metadata": (then(shard, beside(INDEX, b'{"weight_map": {"a": "b"}}')), "has no 'metadata'"),
    "no index": (then(shard, lambda folder: (folder / INDEX).unlink()), f"has {FIRST}, but no {INDEX}"),
    "a set beside the shards": (stale, f"{FIRST} and 1 more file(s) would not be opened, only {SINGLE}"),
    "a variant beside": (lambda f: shutil.copy(f / SINGLE, f / "model.fp16.safetensors"), "fp16.safetensors would"),
    "half elsewhere": (split, "more.safetensors would not be opened"),
    "an old index": (
        lambda folder: values_of(folder / INDEX, metadata={}, weight_map={NORM: FIRST}),
        f"is in {SINGLE}, {INDEX} does not name it; copy or download both again, or delete the index",
    ),
    "variant alone": (called("model.fp16.safetensors"), "has model.fp16.safetensors, but"),
    "consolidated alone": (called("consolidated.safetensors"), "has consolidated.safetensors, but"),
    "other file in config": (config(transformers_weights="w.safetensors"), "'transformers_weights' has w.safetensors"),
    "pickle": (called("pytorch_model.bin"), "pickles are never read"),
    "dangling": (dangling, f"{SINGLE}: a link to ../../blobs/gone, which is not there"),
    "shard dangling": (
        then(shard, lambda f: (f / FIRST).unlink(), lambda f: (f / FIRST).symlink_to("gone")), "a link to gone, which"
    ),
    "empty": (beside(SINGLE, b""), f"{SINGLE}: an empty file"),
    "cut": (lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:-9]), f"{SINGLE}: not a whole safetensors"),
    "lfs": (beside(SINGLE, b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"), "git lfs pull"),
    "lfs, config": (beside("preprocessor_config.json", b"version https://git-lfs"), "git lfs pull"),
    "module.": (renamed(lambda name: f"module.{name}"), "take the prefix 'module.' off the names"),
    "_orig_mod.": (renamed(lambda name: f"_orig_mod.{name}"), "take the prefix '_orig_mod.' off"),
    "base_model.model.": (renamed(lambda name: f"base_model.model.{name}"), "the prefix 'base_model.model.' off"),
    "model.model.": (renamed(lambda name: f"model.{name}"), "take the prefix 'model.' off"),
    "inner wrapper": (
        renamed(lambda name: name.replace("model.layers.0.", "model.layers.0._orig_mod.")),
        "model.layers.0._orig_mod.input_layernorm.weight for model.layers.0.input_layernorm.weight",
    ),
    "one layer missing": (
        lambda f: tensors_of(f, lambda all_: {k: v for k, v in all_.items() if "layers.1." not in k}),
        "tensor(s) missing, the first is model.layers.1.",
    ),
    "another model's": (renamed(lambda name: name.replace("layers", "blocks.h")), "are there and not the model's"),
    "a layer too many": (
        added(**{f"model__layers__7__{name}": one for name in ("norm__weight", "mlp__weight")}),
        "holds 2 tensor(s) that config.json knows nothing of, the first is model.layers.7.",
    ),
    "a strange scale": (added(logit_scale=one), "config.json knows nothing of, the first is logit_scale"),
    "twice": (added(model__language_model__norm__weight=torch.ones(128)), "which are the same"),
    "other shape": (added(model__norm__weight=torch.ones(64)), "norm.weight has shape (64,), config.json says (128,)"),
    "head apart": (
        lambda f: tensors_of(f, lambda all_: all_ | {"lm_head.weight": all_["model.embed_tokens.weight"] + 1e-3}),
        "config.json ties the head to the embedding",
    ),
    "head missing": (
        then(config(tie_word_embeddings=False), text_config(tie_word_embeddings=False)), "lm_head.weight; an embedding"
    ),
    "patch size": (processor(patch_size=16), "patch_size is 16, config.json's vision_config has 14"),
    "merge size": (processor(merge_size=4), "merge_size is 4, config.json's vision_config has 2"),
    "processor type": (processor(image_processor_type="CLIPImageProcessor"), "type is 'CLIPImageProcessor'"),
    "nested processor": (
        beside("processor_config.json", b'{"image_processor": {"patch_size": 16}}'), "processor_config.json: patch_size"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_contradicts_itself_is_one_sentence(name: str, copy: Path) -> None:
    change, says = BROKEN[name]
    change(copy)
    with pytest.raises(UserError) as caught:
        check_folder(copy)
    assert says in str(caught.value)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


SOUND: dict[str, Callable[[Path], Any]] = {
    "shards": shard,
    "an index of the one file": lambda folder: values_of(
        folder / INDEX, metadata={}, weight_map=dict.fromkeys(load_file(folder / SINGLE), SINGLE)
    ),
    "a pickle beside": then(beside("pytorch_model.bin", b"x"), beside("pytorch_model.bin.index.json", b"{}")),
    "half precision": lambda folder: tensors_of(folder, lambda all_: {k: v.half() for k, v in all_.items()}),
    "bf16": lambda folder: tensors_of(folder, lambda all_: {k: v.bfloat16() for k, v in all_.items()}),
    "the tied head stored": lambda folder: tensors_of(
        folder, lambda all_: all_ | {"lm_head.weight": all_["model.embed_tokens.weight"].clone()}
    ),
    "old buffers": added(
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8), visual__rotary_pos_emb__inv_freq=torch.ones(8)
    ),
    "an adapter in its folder": lambda folder: (
        (folder / "adapter").mkdir(),
        beside("adapter/adapter_config.json", b"{}")(folder),
        beside("adapter/adapter_model.safetensors", b"x")(folder),
    ),
    "other tensors beside": lambda folder: save({"latents.0": torch.ones(2)}, folder / "answer.safetensors"),
    "null": config(quantization_config=None),
    "the first name of the processor": processor(image_processor_type="Qwen2_5_VLImageProcessor"),
    "an old processor_config": beside("processor_config.json", b'{"processor_class": "Qwen2VLProcessor"}'),
}


def told_by_transformers(folder: Path) -> dict[str, Any]:
    kind = FAMILIES[AutoConfig.from_pretrained(folder).model_type].model_class()
    return dict(kind.from_pretrained(folder, output_loading_info=True)[1])


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_folder_passes(name: str, copy: Path) -> None:
    SOUND[name](copy)
    check_folder(copy)
    assert not told_by_transformers(copy)["missing_keys"]


# How a family's flat names may be spelled.
SPELLINGS: dict[str, Callable[[str], str]] = {
    "flat": lambda name: name,
    "nested": lambda name: name.replace("visual.", "model.visual.").replace("model.l", "model.language_model.l")
    .replace("model.e", "model.language_model.e").replace("model.n", "model.language_model.n"),
    "without model": lambda name: name.replace("model.", "language_model."),
    "MLX": lambda name: name.replace("model.", "language_model.model.").replace("visual.", "vision_tower."),
    "wrapped": lambda name: f"module.{name}",
    "a MirageModel's": lambda name: name.replace("model.", "language_model.").replace("lm_head.", "head."),
    "short": lambda name: name.removeprefix("model."),
}  # fmt: skip


@pytest.mark.parametrize("base", BASES)
def test_names_pass_where_transformers_finds_them(base: str, bases: dict[str, Path], tmp_path: Path) -> None:
    verdicts = {}
    for spelling, change in SPELLINGS.items():
        folder = Path(shutil.copytree(bases[base], tmp_path / spelling))
        flat = {name.replace("model.visual", "visual").replace("model.language_model", "model"): one
                for name, one in load_file(folder / SINGLE).items()}  # fmt: skip
        save({change(name): one for name, one in flat.items()}, folder / SINGLE)
        told = told_by_transformers(folder)
        try:
            check_folder(folder)
            verdicts[spelling] = True
        except UserError:
            verdicts[spelling] = False
        assert verdicts[spelling] == (not told["missing_keys"] and not told["unexpected_keys"]), (spelling, told)
    assert verdicts["nested"]
    assert not verdicts["wrapped"]
    # Qwen3-VL was never published with flat names, and transformers would make its decoder up.
    assert verdicts["flat"] == (base != "nano-qwen3-vl")


def test_what_is_checked_is_what_is_opened(copy: Path) -> None:
    kind = FAMILIES["qwen2_5_vl"].model_class()
    shard(copy)
    assert weight_files(copy) == [copy / FIRST, copy / SECOND]
    whole = {**load_file(copy / FIRST), **load_file(copy / SECOND)}
    assert torch.equal(open_weights(kind, copy).model.language_model.norm.weight, whole[NORM])
    save(whole | {NORM: whole[NORM] + 1}, copy / SINGLE)
    assert weight_files(copy) == [copy / SINGLE]
    assert torch.equal(open_weights(kind, copy).model.language_model.norm.weight, whole[NORM] + 1)


def test_a_tensor_that_transformers_made_up_is_refused_whatever_the_check_says(copy: Path) -> None:
    tensors_of(copy, lambda all_: {name: one for name, one in all_.items() if name != NORM})
    with pytest.raises(UserError, match=r"does not find model\.language_model\.norm\.weight"):
        open_weights(FAMILIES["qwen2_5_vl"].model_class(), copy)


def test_an_unreadable_file_is_called_so(nano: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(nano, Path(place) / "model"))
        for part in (Path(place), folder):
            part.chmod(0o755)
        (folder / SINGLE).chmod(0)
        own = os.geteuid()
        # Root reads everything.
        os.seteuid(own or 65534)
        try:
            with pytest.raises(UserError, match=r"model\.safetensors: cannot be read \(Permission denied\)"):
                stored_tensors(folder)
        finally:
            os.seteuid(own)


def test_another_folders_processor_is_looked_at_where_the_model_has_none(
    copy: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    (copy / "preprocessor_config.json").unlink()
    check_folder(copy, [bases["nano"]])
    with pytest.raises(UserError, match=r"nano-qwen3-vl/preprocessor_config\.json: .* copy the file that goes with"):
        check_folder(copy, [bases["nano-qwen3-vl"]])


def of_checkpoint(folder: Path, tmp_path: Path) -> list[Any]:
    """Export a checkpoint whose base is the folder; nothing else of it is read before."""
    place = tmp_path / "global_step1"
    place.mkdir()
    values_of(place / STATE_FILE, sources=["gone"], pixels=[None, None], stage="sft", dtype="float32")
    return ["export", place, tmp_path / "out", "--model", folder]


ENTRIES: dict[str, Callable[[Path, Path, Path], list[Any]]] = {
    "evaluate": lambda folder, data, out: ["evaluate", folder, "--data_path", data, "--no_latents"],
    "generate": lambda folder, data, out: ["generate", folder, "--prompt", "Where?", "--no_latents"],
    "controls": lambda folder, data, out: ["controls", folder, "--data_path", data, "--latents", "zero"],
    "inspect": lambda folder, data, out: ["inspect", folder, "--data_path", data, "--out", out / "page"],
    "export rows": lambda folder, data, out: ["export", folder, out / "wide", "--vocab_rows", 999],
    "export": lambda folder, data, out: of_checkpoint(folder, out),
    "rationalize": lambda folder, data, out: [
        "data",
        "rationalize",
        data,
        "--model",
        folder,
        "--out",
        out / "made",
        "--most",
        1,
    ],
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_command_says_it_and_writes_nothing(entry: str, copy: Path, mixed: Path, tmp_path: Path) -> None:
    BROKEN["fp8 weights"][0](copy)
    # Before anything else of the folder is opened.
    (copy / "tokenizer.json").write_text("{")
    words = ENTRIES[entry](copy, mixed, tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="this checkpoint is quantised"):
        cli.main([str(word) for word in words], standalone_mode=False)
    assert sorted(tmp_path.iterdir()) == before


def test_the_interface_and_the_local_writer_say_it(copy: Path, mixed: Path, tmp_path: Path) -> None:
    BROKEN["fp8 weights"][0](copy)
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="this checkpoint is quantised"):
        api.load(copy)
    spec = RationalizeSpec(out=tmp_path, model=str(copy), temperature=0, samples=1)
    with pytest.raises(UserError, match="this checkpoint is quantised"):
        Local(Questions(spec, Source.read(mixed, spec), load_template(None), []))


def test_an_adapter_alone_is_called_so(copy: Path) -> None:
    """As training with --lora_rank writes it, in a folder beside the merged weights."""
    for file in copy.iterdir():
        file.unlink()
    values_of(copy / "adapter_config.json", base_model_name_or_path="/base")
    with pytest.raises(UserError, match=r"--model .*: holds an adapter of /base and no model; merge it"):
        resolve_folder(str(copy), "--model", None)


def test_the_doctor_says_it(copy: Path) -> None:
    spec = DoctorSpec(model=str(copy))
    check_model(spec)
    BROKEN["fp8 weights"][0](copy)
    with pytest.raises(UserError, match="this checkpoint is quantised"):
        check_model(spec)
