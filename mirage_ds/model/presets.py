"""Shapes of models by name, as plain numbers: no torch, no transformers, so that planning commands are quick.

What is not said here, such as the size of a patch, is as transformers has it.
"""

import copy
from typing import Any

from mirage_ds.errors import UserError, closest

PUBLIC_ROWS = 152_064


def _text(hidden: int, layers: int, heads: int, kv: int, intermediate: int, rows: int, tied: bool) -> dict[str, Any]:
    half = hidden // heads // 2
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": intermediate,
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128_000,
        # M-RoPE splits half the head width 1 : 1.5 : 1.5 between time, height and width ([16, 24, 24] at width 128).
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8],
        },
    }


def _vision(depth: int, hidden: int, heads: int, intermediate: int, full: list[int], output: int) -> dict[str, Any]:
    return {
        "depth": depth,
        "hidden_size": hidden,
        "num_heads": heads,
        "intermediate_size": intermediate,
        "fullatt_block_indexes": full,
        "out_hidden_size": output,
        "tokens_per_second": 2,
    }


def _small_start(preset: dict[str, Any]) -> dict[str, Any]:
    """Let a small model learn from nothing in minutes (docs/log.md, 2026-11-23).

    At rope_theta 1e6 and head width 32, two neighbouring columns of a picture differ by 2e-4 rad and the model does not
    see where a cell is; at 10 by 0.24 rad. Weights start at 1/√H instead of the large models' 0.02.
    """
    preset["text_config"]["rope_parameters"]["rope_theta"] = 10.0
    for part in ("text_config", "vision_config"):
        preset[part]["initializer_range"] = 0.08
    return preset


def _nano(tied: bool) -> dict[str, Any]:
    return _small_start(
        {"text_config": _text(128, 4, 4, 2, 384, 0, tied), "vision_config": _vision(2, 96, 3, 192, [1], 128)}
    )


def _public(
    hidden: int, layers: int, heads: int, kv: int, intermediate: int, rows: int, tied: bool, inside: int
) -> dict[str, Any]:
    """Describe a public Qwen2.5-VL; `inside` is the intermediate size of its tower."""
    return {
        "text_config": _text(hidden, layers, heads, kv, intermediate, rows, tied),
        "vision_config": _vision(32, 1280, 16, inside, [7, 15, 23, 31], hidden),
    }


# 3B and 7B as their stored configurations say; 32B and 72B from the published model cards.
PRESETS: dict[str, dict[str, Any]] = {
    "nano": _nano(tied=True),
    # An output matrix of its own, as the 7B has: what is fed back need not lie among the words' embeddings.
    "nano-untied": _nano(tied=False),
    # The other families, as small: for tests, and for trying a run on.
    "nano-qwen2-vl": _small_start(
        {
            "model_type": "qwen2_vl",
            "text_config": _text(128, 4, 4, 2, 384, 0, tied=True),
            "vision_config": {"depth": 2, "embed_dim": 96, "num_heads": 3, "mlp_ratio": 2, "hidden_size": 128},
        }
    ),
    "nano-qwen3-vl": _small_start(
        {
            "model_type": "qwen3_vl",
            # Heads wider than hidden / heads, as in the 4B.
            "text_config": {**_text(128, 4, 4, 2, 384, 0, tied=True), "head_dim": 48, "attention_bias": False}
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 8, 8]}},
            "vision_config": {
                "depth": 3,
                "hidden_size": 96,
                "num_heads": 3,
                "intermediate_size": 192,
                "out_hidden_size": 128,
                # A grid of 12 × 12 places, and features for the first two decoder layers.
                "num_position_embeddings": 144,
                "deepstack_visual_indexes": [0, 1],
            },
        }
    ),
    # Where the vocabulary does not dominate: for measuring the decoder.
    "bench-40m": {
        "text_config": _text(512, 12, 8, 4, 1536, 4096, tied=False),
        "vision_config": _vision(8, 160, 5, 320, [3, 7], 512),
    },
    "bench-87m": {
        "text_config": _text(256, 8, 4, 2, 768, 151_668, tied=False),
        "vision_config": _vision(8, 160, 5, 320, [3, 7], 256),
    },
    "qwen2.5-vl-3b": _public(2048, 36, 16, 2, 11_008, 151_936, True, 3420),
    "qwen2.5-vl-7b": _public(3584, 28, 28, 4, 18_944, PUBLIC_ROWS, False, 3420),
    "qwen2.5-vl-32b": _public(5120, 64, 40, 8, 27_648, PUBLIC_ROWS, False, 3456),
    "qwen2.5-vl-72b": _public(8192, 80, 64, 8, 29_568, PUBLIC_ROWS, False, 3456),
}
# `mirage-ds init` draws their weights on a GPU, if there is one, in bfloat16; --config_only leaves them out.
LARGE = tuple(name for name in PRESETS if name.startswith("qwen"))


def preset(name: str) -> dict[str, Any]:
    """Return the configuration of a preset as keyword arguments of its family's configuration, and `model_type`.

    Raises:
        UserError: no such preset.
    """
    known = name.lower().replace("_", "-")
    if known not in PRESETS:
        raise UserError(f"no preset '{name}'{closest(known, PRESETS)}; there are {', '.join(PRESETS)}")
    found = copy.deepcopy(PRESETS[known])
    return {"model_type": "qwen2_5_vl", "tie_word_embeddings": found["text_config"]["tie_word_embeddings"], **found}
