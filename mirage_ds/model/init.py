"""`mirage-ds init`: a random model from a preset, with a tokenizer trained on the task's own text.

V vocabulary rows.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirage_ds.config.columns import Columns, parse_columns
from mirage_ds.data.encode import IMAGE_PAD, LATENT_TOKENS
from mirage_ds.data.load import load_tokenizer
from mirage_ds.data.record import HELPER_MARK, IMAGE_MARK
from mirage_ds.data.record_files import read_records
from mirage_ds.errors import UserError
from mirage_ds.files import whole_folder, write_atomically
from mirage_ds.model.family import FAMILIES, Family
from mirage_ds.model.presets import LARGE, preset

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Qwen2.5-VL's special tokens that the trainer and the chat template use, in the order of their public ids.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    IMAGE_PAD,
    "<|video_pad|>",
)
# The template's output is Qwen2.5-VL's: default system prompt, one turn a message, an image slot per image item.
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
# GPT-2's split with single digits: words, numbers and punctuation never merge across each other.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
# What the chat template adds to every row.
TEMPLATE_TEXT = "system\nYou are a helpful assistant.\nuser\nassistant\n"


def train_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE of at most `size` entries, with Qwen2.5-VL's special tokens and the three latent ones."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = 256 + len(SPECIAL_TOKENS) + len(LATENT_TOKENS)
    if size < smallest:
        raise UserError(f"--tokenizer_size {size}: the bytes and special tokens alone need {smallest}")
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL_TOKENS) - len(LATENT_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    fast.add_tokens([*SPECIAL_TOKENS, *LATENT_TOKENS], special_tokens=True)
    return fast


def _texts(files: Sequence[Path], columns: Columns) -> list[str]:
    texts = [TEMPLATE_TEXT]
    for file in files:
        for record in read_records(file, columns=columns):
            question, answer = record.text_input.replace(IMAGE_MARK, ""), record.text_output.replace(HELPER_MARK, "")
            texts += [TEMPLATE_TEXT, question, answer]
    return texts


def image_settings(vision: Any, family: Family) -> dict[str, Any]:
    """Return the image processor's settings: from 4 to 1,280 merged tokens an image, as Qwen2.5-VL's has it."""
    token = (vision.patch_size * vision.spatial_merge_size) ** 2
    made = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "size": {"shortest_edge": 4 * token, "longest_edge": 1280 * token},
    }
    if family.pixel_mean is not None:
        made |= {"image_mean": 3 * [family.pixel_mean], "image_std": 3 * [family.pixel_mean]}
    return made


def drawing_place(count: int, name: str) -> torch.device:
    """Return where a large preset's weights are drawn: on the GPU where there is one, in seconds; on a CPU in minutes.

    Args:
        count: elements, of two bytes.

    Raises:
        UserError: there is no room for them.
    """
    import psutil
    import torch

    gpu = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if gpu else psutil.virtual_memory().available
    if 2 * count > free:
        raise UserError(
            f"preset '{name}': its weights take {2 * count / 1e9:,.0f} GB in bfloat16 and {free / 1e9:,.0f} are free "
            f"on {'the GPU' if gpu else 'this machine'}; free some, take a smaller preset, or add --config_only"
        )
    return torch.device("cuda" if gpu else "cpu")


def write_weights(config: Any, folder: Path, device: torch.device, seed: int) -> None:
    """Draw a model in the dtype of its configuration and write it; the host holds one shard of what is on a GPU."""
    import torch
    from transformers import AutoModelForImageTextToText

    from mirage_ds.model.load import public_name
    from mirage_ds.model.shards import ShardWriter

    torch.manual_seed(seed)
    with device:
        # A copy: from_config writes the dtype into it a second time.
        model = AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=config.dtype)
    writer = ShardWriter(folder, FAMILIES[config.model_type])
    for parameter_name, parameter in model.named_parameters():
        writer.add(public_name(parameter_name), parameter.detach().to("cpu"))
    writer.finish()


def init_model(
    name: str,
    out: Path,
    *,
    texts: Sequence[Path],
    columns: str | None = None,
    tokenizer_from: Path | None = None,
    tokenizer_size: int = 512,
    seed: int = 42,
    config_only: bool = False,
) -> int:
    """Write a model folder.

    Args:
        name: a preset; the large ones are written in bfloat16, the small ones in float32.
        texts: record files whose text trains the tokenizer; columns: their own columns, as --columns names them.
        tokenizer_from: a folder whose tokenizer is taken instead.
        tokenizer_size: entries of the trained tokenizer.
        config_only: write config.json, tokenizer and image processor, no weights.

    Returns:
        The number of parameters (0 with `config_only`).
    """
    import torch
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from mirage_ds.model.load import expected_shapes

    values, large = preset(name), name.lower().replace("_", "-") in LARGE
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out}: not empty; give a new folder")
    transformers.utils.logging.set_verbosity_error()
    if tokenizer_from:
        tokenizer = load_tokenizer([str(tokenizer_from)], None)
    else:
        tokenizer = train_tokenizer(_texts(texts, parse_columns(columns)), tokenizer_size)
    text = values["text_config"]
    text["vocab_size"] = text["vocab_size"] or len(tokenizer)
    if len(tokenizer) > text["vocab_size"]:
        raise UserError(f"preset '{name}' has {text['vocab_size']} rows, the tokenizer {len(tokenizer)} entries")
    ids: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text |= dict(bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"])
    family = FAMILIES[values.pop("model_type")]
    config = family.config_class()(
        **values,
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        architectures=[family.whole],
        dtype="bfloat16" if large else "float32",
    )
    count = 0 if config_only else sum(map(math.prod, expected_shapes(config).values()))
    device = drawing_place(count, name) if large and count else torch.device("cpu")
    with whole_folder(out) as folder:
        if count:
            write_weights(config, folder, device, seed)
        tokenizer.save_pretrained(folder)
        Qwen2VLImageProcessorPil(**image_settings(config.vision_config, family)).save_pretrained(folder)
        write_atomically(folder / "generation_config.json", json.dumps({"eos_token_id": ids["<|im_end|>"]}) + "\n")
        write_atomically(folder / "config.json", config.to_json_string())
    return count
