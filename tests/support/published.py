"""Small model folders in the layouts of published checkpoints and of the releases of transformers that saved them.

Each is written in full size first, with every key where the publishers have it, and then shrunk: dimensions are cut, no
key is added but those whose default is too large. The files that were really published go through the same `shrink`.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirage_ds.model.init import CHAT_TEMPLATE

Values = dict[str, Any]

WORDS = 151_643  # entries of the public tokenizer before its added tokens
SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]
TOOLS = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
]
THINK = ["<tool_response>", "</tool_response>", "<think>", "</think>"]
LATENTS = ["<|latent_pad|>", "<|latent_start|>", "<|latent_end|>"]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen3-VL's writes no system turn of its own.
TEMPLATE_3 = re.sub(r"\{%- if loop\.first.*?endif %\}", "", CHAT_TEMPLATE, count=1, flags=re.DOTALL)
REAL = Path(__file__).parents[3] / "shared/published"


@dataclass(frozen=True)
class Layout:
    """One way in which a checkpoint is published.

    Attributes:
        name: for people; config: its config.json in full size.
        processor: its preprocessor_config.json; None where the publisher has none.
        generation: its generation_config.json.
        added: tokens behind the words.
        template: files that hold the chat template: of "tokenizer", "json", "jinja".
        old_maps: added_tokens.json and special_tokens_map.json stand beside it too.
    """

    name: str
    config: Values
    processor: Values | None
    generation: Values
    added: tuple[str, ...]
    template: tuple[str, ...] = ("tokenizer", "json")
    old_maps: bool = False

    @property
    def kind(self) -> str:
        return self.config["model_type"]

    @property
    def tied(self) -> bool:
        return bool(self.config["tie_word_embeddings"])


# ----------------------------------------------------------------------------------------------- config.json, full size


def _text(hidden: int, layers: int, heads: int, kv: int, inner: int, rows: int) -> Values:
    return {
        **{"attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu"},
        **{"hidden_size": hidden, "initializer_range": 0.02, "intermediate_size": inner, "max_window_layers": layers},
        **{"max_position_embeddings": 128000, "num_attention_heads": heads, "num_hidden_layers": layers},
        **{"num_key_value_heads": kv, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768},
        **{"use_cache": True, "use_sliding_window": False, "vocab_size": rows},
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }


TEXT_7B = _text(3584, 28, 28, 4, 18944, 152064)
TEXT_3B = _text(2048, 36, 16, 2, 11008, 151936)
IDS = {
    **{"vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654},
    **{"image_token_id": 151655, "video_token_id": 151656},
}
VISION_25 = {
    **{"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
    **{"in_chans": 3, "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14},
    **{"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2},
}
VISION_2 = {
    **{"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": 3584},
    **{"patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2},
}
# What up to 4.49 was left of it: where it differs from the class's defaults.
LEFT_25 = {
    **{"hidden_size": 1280, "in_chans": 3, "intermediate_size": 3456, "model_type": "qwen2_5_vl"},
    **{"out_hidden_size": 5120, "spatial_patch_size": 14, "tokens_per_second": 2},
}
LEFT_2 = {"in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14}


def _outer(kind: str, tied: bool, vision: Values, version: str) -> Values:
    whole = {"qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration", "qwen2_vl": "Qwen2VLForConditionalGeneration"}[kind]
    return {
        **{"architectures": [whole], "model_type": kind, "tie_word_embeddings": tied, "torch_dtype": "bfloat16"},
        **{"transformers_version": version, "vision_config": vision},
        **IDS,
    }


def flat(kind: str, text: Values, vision: Values, tied: bool = False, version: str = "4.41.2") -> Values:
    """The form of the publishers of Qwen2-VL and Qwen2.5-VL."""
    return _outer(kind, tied, vision, version) | text


def _resaved(text: Values) -> Values:
    return text | {"rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}}


def saved_445(kind: str, text: Values, left: Values, version: str) -> Values:
    """The form of transformers 4.45 to 4.49: of the tower only what differs from its class's defaults."""
    return flat(kind, _resaved(text), left, version=version)


def saved_450(text: Values, version: str = "4.50.0") -> Values:
    """The form of 4.50 and 4.51."""
    return flat(
        "qwen2_5_vl", _resaved(text), VISION_25 | {"in_channels": 3, "model_type": "qwen2_5_vl"}, False, version
    )


def saved_452(text: Values, version: str, dtype_key: str) -> Values:
    """The form of 4.52 to 4.57: the text twice, flat and in `text_config`."""
    own = _resaved(text) | {
        **{"architectures": ["Qwen2_5_VLForConditionalGeneration"], "image_token_id": None, "video_token_id": None},
        **{"vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654},
        **{"model_type": "qwen2_5_vl_text", dtype_key: "bfloat16"},
        "layer_types": ["full_attention"] * text["num_hidden_layers"],
    }
    made = saved_450(text, version) | {"text_config": own}
    made["vision_config"] = made["vision_config"] | {"initializer_range": 0.02}
    made[dtype_key] = made.pop("torch_dtype")
    return made


def nested(text: Values) -> Values:
    """Text keys in `text_config`, and the tie at the top alone."""
    return _outer("qwen2_5_vl", False, VISION_25, "4.52.0.dev0") | {
        "text_config": text | {"model_type": "qwen2_5_vl_text"}
    }


def mirage(text: Values) -> Values:
    """What the public Mirage code saves."""
    return saved_450(text | {"vocab_size": 151668}, "4.50.0.dev0") | {
        **{"latent_token_id": 151665, "latent_start_id": 151666, "latent_end_id": 151667},
        **{"latent_size": 3, "stage": "stage2", "compress_strategy": "average"},
    }


def qwen3(hidden: int, layers: int, heads: int, inner: int, tied: bool, deep: list[int], depth: int) -> Values:
    """The form of Qwen3-VL's publishers: the dtype in `text_config` alone, the tie there only where there is one."""
    text = {
        **{"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "dtype": "bfloat16"},
        **{"eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": hidden},
        **{"initializer_range": 0.02, "intermediate_size": inner, "max_position_embeddings": 262144},
        **{"model_type": "qwen3_vl_text", "num_attention_heads": heads, "num_hidden_layers": layers},
        **{"num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_theta": 5000000, "use_cache": True},
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        **({"tie_word_embeddings": True} if tied else {}),
        "vocab_size": 151936,
    }
    vision = {
        **{"deepstack_visual_indexes": deep, "depth": depth, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1152},
        **{"in_channels": 3, "initializer_range": 0.02, "intermediate_size": 4304, "model_type": "qwen3_vl"},
        **{"num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": hidden, "patch_size": 16},
        **{"spatial_merge_size": 2, "temporal_patch_size": 2},
    }
    return {
        **{"architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": 151655, "model_type": "qwen3_vl"},
        **{"text_config": text, "tie_word_embeddings": tied, "transformers_version": "4.57.0.dev0"},
        **{"video_token_id": 151656, "vision_config": vision},
        **{"vision_end_token_id": 151653, "vision_start_token_id": 151652},
    }


# -------------------------------------------------------------------------------------------------- the other files

CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
LIMITS = {"min_pixels": 3136, "max_pixels": 12845056}
PATCHES = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
PIXELS = {
    "published": {**LIMITS, **PATCHES, **CLIP, "image_processor_type": "Qwen2VLImageProcessor"},
    "4.46": {
        **{"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3},
        **{"rescale_factor": 1 / 255, "image_processor_type": "Qwen2VLImageProcessor"},
        **(LIMITS | PATCHES | CLIP),
        "size": dict(LIMITS),
    },
    "qwen3": {
        **{"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16, "temporal_patch_size": 2},
        **{"merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "processor_class": "Qwen3VLProcessor"},
        "image_processor_type": "Qwen2VLImageProcessorFast",
    },
}
PIXELS["4.50"] = PIXELS["4.46"] | {"size": {"longest_edge": 12845056, "shortest_edge": 3136}}

_ENDS = {"bos_token_id": 151643, "pad_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643]}
SAMPLING = {
    "qwen2_5_vl": _ENDS | {"repetition_penalty": 1.05, "temperature": 0.000001, "transformers_version": "4.37.0"},
    "qwen2_vl": _ENDS | {"repetition_penalty": 1.0, "temperature": 0.01, "top_p": 0.001, "top_k": 1},
    "qwen3_vl": _ENDS | {"top_k": 20, "top_p": 0.8, "repetition_penalty": 1.0, "temperature": 0.7},
}


def _layout(name: str, config: Values, pixels: str | None, added: list[str], **more: Any) -> Layout:
    processor = PIXELS[pixels] if pixels else None
    return Layout(name, config, processor, SAMPLING[config["model_type"]], (*SPECIAL, *added), **more)


LAYOUTS = (
    _layout("qwen2.5-vl-7b", flat("qwen2_5_vl", TEXT_7B, VISION_25), "published", TOOLS),
    _layout("qwen2-vl-7b", flat("qwen2_vl", TEXT_7B, VISION_2), "published", []),
    _layout("qwen3-vl-8b", qwen3(4096, 36, 32, 12288, False, [8, 16, 24], 27), "qwen3", [*TOOLS, *THINK]),
    _layout("qwen2.5-vl-3b", flat("qwen2_5_vl", TEXT_3B, VISION_25, True), "published", TOOLS, template=("json",)),
    _layout("qwen2.5-vl-nested", nested(TEXT_7B), "published", TOOLS),
    _layout("qwen2.5-vl-32b", saved_445("qwen2_5_vl", TEXT_7B, LEFT_25, "4.49.0"), "4.50", TOOLS),
    _layout("qwen2.5-vl-4.57", saved_452(TEXT_7B, "4.57.1", "dtype"), "4.50", TOOLS, template=("jinja",)),
    _layout("qwen2.5-vl-4.52", saved_452(TEXT_7B, "4.52.4", "torch_dtype"), "4.50", TOOLS, template=("jinja",)),
    _layout("mirage", mirage(TEXT_7B), None, [*TOOLS, *LATENTS], template=("tokenizer",), old_maps=True),
    _layout("qwen2-vl-4.46", saved_445("qwen2_vl", TEXT_7B, LEFT_2, "4.46.1"), "4.46", [], old_maps=True),
    _layout("qwen2-vl-2b", flat("qwen2_vl", TEXT_3B, VISION_2, True), "published", []),
    _layout("qwen3-vl-4b", qwen3(2560, 36, 32, 9728, True, [5, 11, 17], 24), "qwen3", [*TOOLS, *THINK]),
)
BY_NAME = {layout.name: layout for layout in LAYOUTS}


def real_layouts() -> list[Layout]:
    """The published files themselves, where they are at hand; what one lacks is its family's."""
    found = []
    for file in sorted(REAL.glob("**/config.json")):
        config = json.loads(file.read_text())
        if config["model_type"] not in SAMPLING or "quantization_config" in config or "Embedding" in str(file):
            continue
        like = next(one for one in LAYOUTS if one.kind == config["model_type"])
        files = {name: _json(file.parent / f"{name}.json") for name in ("preprocessor_config", "generation_config")}
        tokenizer = _json(file.parent / "tokenizer_config.json") or {}
        decoder = tokenizer.get("added_tokens_decoder", {})
        added = tuple(decoder[key]["content"] for key in sorted(decoder, key=int)) or like.added
        if "latent_size" in config:
            added = (*added, *LATENTS)
        processor = files["preprocessor_config"] or like.processor
        name = f"real {file.parent.name}"
        found.append(Layout(name, config, processor, files["generation_config"] or like.generation, added))
    return found


def new_forms() -> list[Layout]:
    """Those of the published files whose form is none of LAYOUTS, one of each form."""
    found = {_form(shrink(one.config)): one for one in reversed(real_layouts())}
    for one in LAYOUTS:
        found.pop(_form(shrink(one.config)), None)
    return list(found.values())


# They change neither what is read nor what is computed.
_NO_MATTER = ("transformers_version", "_name_or_path", "max_position_embeddings", "sliding_window", "use_cache")


def _form(config: Values) -> str:
    kept = {
        key: _form(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _NO_MATTER
    }
    return json.dumps(kept, sort_keys=True)


def _json(file: Path) -> Values | None:
    return json.loads(file.read_text()) if file.is_file() else None


# --------------------------------------------------------------------------------------------------------- smaller


def shrink(config: Values) -> Values:
    """Cut a configuration's dimensions: 32 wide, two layers, and the vocabulary as it is."""
    made = copy.deepcopy(config)
    third = made["model_type"] == "qwen3_vl"
    for text in (made, made.get("text_config", {})):
        if "hidden_size" in text:
            text |= dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
            text["num_key_value_heads"] = 1
            text["rope_scaling"] = text["rope_scaling"] | {"mrope_section": [4, 4, 4] if third else [2, 3, 3]}
            text |= {key: 2 for key in ("max_window_layers",) if key in text}
            text |= {key: 24 for key in ("head_dim",) if key in text}
            text |= {key: text[key][:2] for key in ("layer_types",) if key in text}
    vision = made["vision_config"]
    small = dict(num_heads=4, depth=2, fullatt_block_indexes=[1], num_position_embeddings=144)
    if third:
        small |= dict(depth=3, deepstack_visual_indexes=[0, 1])
    vision |= {key: value for key, value in small.items() if key in vision}
    # Too large by default.
    if made["model_type"] == "qwen2_vl":
        vision |= dict(embed_dim=64, hidden_size=32)
    else:
        vision |= dict(hidden_size=64, intermediate_size=48, out_hidden_size=32)
    return made


# --------------------------------------------------------------------------------------------------------- folders


@functools.cache
def _words(texts: tuple[str, ...]) -> tuple[dict[str, int], list[str]]:
    """A byte-level vocabulary of WORDS entries, most of which no text uses, and its merges."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    model = json.loads(made.to_str())["model"]
    vocabulary = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    vocabulary |= {f"unused{number}": number for number in range(len(vocabulary), WORDS)}
    return vocabulary, [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]


def _added(token: str, number: int) -> Values:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **flags, "special": token.startswith("<|") and token not in TOOLS}


def _write_json(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values, indent=1, ensure_ascii=False))


def write_tokenizer(layout: Layout, folder: Path, texts: tuple[str, ...]) -> None:
    """Write tokenizer.json, vocab.json, merges.txt, tokenizer_config.json and the chat template."""
    vocabulary, merges = _words(texts)
    added = [_added(token, WORDS + at) for at, token in enumerate(layout.added)]
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {
        **{"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": ""},
        **{"end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False},
        **{"vocab": vocabulary, "merges": merges},
    }
    whole = {
        **{"version": "1.0", "truncation": None, "padding": None, "added_tokens": added},
        **{"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}},
        **{"post_processor": level, "decoder": level, "model": model},
    }
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False))
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    template = TEMPLATE_3 if layout.kind == "qwen3_vl" else CHAT_TEMPLATE
    settings: Values = {
        **{"add_bos_token": False, "add_prefix_space": False},
        "added_tokens_decoder": {str(one["id"]): {k: v for k, v in one.items() if k != "id"} for one in added},
        "additional_special_tokens": [token for token in SPECIAL[1:]],
        **{"bos_token": None, "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace"},
        **{"model_max_length": 131072, "pad_token": "<|endoftext|>", "split_special_tokens": False},
        **{"tokenizer_class": "Qwen2Tokenizer", "unk_token": None},
    }
    if "tokenizer" in layout.template:
        settings["chat_template"] = template
    if "json" in layout.template:
        _write_json(folder / "chat_template.json", {"chat_template": template})
    if "jinja" in layout.template:
        (folder / "chat_template.jinja").write_text(template)
    if layout.old_maps:
        _write_json(folder / "added_tokens.json", {one["content"]: one["id"] for one in added})
        ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        _write_json(folder / "special_tokens_map.json", {"additional_special_tokens": SPECIAL[1:], **ends})
    _write_json(folder / "tokenizer_config.json", settings)


def published_name(name: str, kind: str) -> str:
    """What the publishers call a parameter of today's transformers."""
    if kind == "qwen3_vl":
        return name
    return re.sub(r"^model\.(?=visual\.)", "", name).replace("model.language_model.", "model.")


def write_weights(folder: Path, shards: int = 2) -> None:
    """Write random bf16 weights under the published names, in several files with an index."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(11)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    tensors = {}
    for name, parameter in model.named_parameters():
        drawn = torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.5 / parameter.shape[-1] ** 0.5)
        norm = "norm" in name or "ln_q" in name
        tensors[published_name(name, config.model_type)] = (drawn + norm).bfloat16()
    size = sum(tensor.numel() * 2 for tensor in tensors.values())
    parts: list[dict[str, Any]] = [{}]
    for name, tensor in tensors.items():
        if parts[-1] and len(parts) < shards and sum(t.numel() * 2 for t in parts[-1].values()) > size / shards:
            parts.append({})
        parts[-1][name] = tensor
    where = {}
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})


def write_layout(layout: Layout, folder: Path, texts: tuple[str, ...], weights: bool = True) -> Path:
    """Write a whole folder.

    Args:
        texts: the tokenizer's merges are learnt from them.
    """
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", shrink(layout.config))
    _write_json(folder / "generation_config.json", layout.generation)
    if layout.processor:
        _write_json(folder / "preprocessor_config.json", layout.processor)
    write_tokenizer(layout, folder, texts)
    if weights:
        write_weights(folder)
    return folder
