"""Loading what encodes: tokenizer and image processors from model folders, checked for what training needs."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirage_ds.config.run import Compress, Slots, Stage
from mirage_ds.data.encode import IMAGE_PAD, LATENT_TOKENS, Encoder
from mirage_ds.data.images import ImageFinder
from mirage_ds.errors import UserError, reason, strict_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SETTINGS = """size patch_size temporal_patch_size merge_size resample rescale_factor image_mean image_std do_resize
do_rescale do_normalize do_convert_rgb""".split()  # noqa: SIM905


def load_tokenizer(folders: list[str], cache_dir: Path | None, add_latents: bool = True) -> PreTrainedTokenizerBase:
    """Load the tokenizer from the first of `folders` that has one, and give it the three latent tokens.

    Args:
        add_latents: False leaves the tokenizer as it is.

    Raises:
        UserError: no folder has a tokenizer, or it is not a Qwen-VL one.
    """
    from transformers import AutoTokenizer

    folder = _first_with(folders, ("tokenizer.json", "vocab.json", "tokenizer_config.json"), "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, cache_dir=cache_dir)
    except Exception as error:  # noqa: BLE001  # tokenizers raises Exception itself, and a wrong type almost any
        raise UserError(f"{folder}: the tokenizer cannot be read ({reason(error)})") from None
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _processor_template(Path(folder))
    if tokenizer.chat_template is None:
        what = "the tokenizer has no chat template (chat_template.jinja or .json)"
        raise UserError(f"{folder}: {what}; copy the model's own")
    try:
        trial: Any = [{"role": "user", "content": [{"type": "text", "text": "Question?"}, {"type": "image"}]}]
        rendered = str(tokenizer.apply_chat_template(trial, tokenize=False))
    except Exception as error:  # noqa: BLE001  # a template is a program, and its mistakes are of every class
        raise UserError(f"{folder}: the chat template cannot be used ({reason(error)}); copy the model's own") from None
    if "Question?" not in rendered or rendered.count(IMAGE_PAD) != 1:
        raise UserError(f"{folder}: the chat template does not write a question with its image; copy the model's own")
    # 150,000 entries, made anew by every call.
    vocabulary = tokenizer.get_vocab()
    unknown = [t for t in (IMAGE_PAD, "<|im_start|>", "<|im_end|>", "<|endoftext|>") if t not in vocabulary]
    if unknown:
        raise UserError(f"{folder}: the tokenizer lacks {', '.join(unknown)}; a Qwen-VL tokenizer is needed")
    missing = [token for token in LATENT_TOKENS if token not in vocabulary]
    if missing and len(missing) < len(LATENT_TOKENS):
        raise UserError(f"{folder}: the tokenizer has some of the latent tokens but not {', '.join(missing)}")
    if missing and add_latents:
        tokenizer.add_tokens(list(LATENT_TOKENS), special_tokens=True)
    return tokenizer


def load_encoder(
    folders: list[str],
    finder: ImageFinder,
    stage: Stage,
    latent_size: int,
    pixels: tuple[int | None, int | None] = (None, None),
    helper_pixels: tuple[int | None, int | None] = (None, None),
    cache_dir: Path | None = None,
    slots: Slots | None = None,
    compress: Compress = "average",
    bottleneck: bool = False,
    latent_passes: int | None = None,
) -> Encoder:
    """Build the encoder from model folders (or hub ids), the first that has a part giving it.

    Args:
        folders: e.g. the --load_model_path, then the --model: the public code saves no image processor, so a stage-1
            folder of its making takes the base model's.
        pixels, helper_pixels: (min, max) pixels of input and of helper images; None keeps the processor's own.
        slots, compress, bottleneck, latent_passes: see Encoder.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    source = _first_with(folders, ("preprocessor_config.json", "processor_config.json"), "image processor")

    def processor(limits: tuple[int | None, int | None], name: str) -> Qwen2VLImageProcessorPil:
        try:
            made = Qwen2VLImageProcessorPil.from_pretrained(source, cache_dir=cache_dir)
        except Exception as error:  # noqa: BLE001  # a wrong type in its JSON leads transformers to almost any
            raise UserError(f"{source}: the image processor cannot be read ({reason(error)})") from None
        low = limits[0] or made.size["shortest_edge"]
        high = limits[1] or made.size["longest_edge"]
        if low > high:
            raise UserError(f"--{name}min_pixels {low} is above --{name}max_pixels {high}")
        made.size = {"shortest_edge": low, "longest_edge": high}
        return made

    tokenizer = load_tokenizer(folders, cache_dir)
    images, helpers = processor(pixels, ""), processor(helper_pixels, "helper_")
    made = (tokenizer, images, helpers, finder, stage, latent_size, slots, compress, latent_passes, bottleneck)
    return Encoder(*made)


def _processor_template(folder: Path) -> str | None:
    """Return the template that a folder keeps for its processor, in chat_template.json; None where it has none."""
    file = folder / "chat_template.json"
    if not file.is_file():
        return None
    try:
        values = strict_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({reason(error)}); copy the model's own") from None
    found = values.get("chat_template") if isinstance(values, dict) else None
    return found if isinstance(found, str) else None


def _first_with(folders: list[str], names: tuple[str, ...], what: str) -> str:
    for folder in folders:
        place = Path(folder)
        # A hub id is no folder here; the hub decides.
        if not place.is_dir() or any((place / name).is_file() for name in names):
            return folder
    raise UserError(f"{', '.join(folders)}: no {what} ({' or '.join(names)}); copy the base model's files there")


def fingerprint(encoder: Encoder) -> dict[str, Any]:
    """Name all that an encoded row is a function of besides its record and the code; it can be written as JSON."""
    import PIL
    import tokenizers
    import transformers

    # What was asked of the tokenizer last is no part of it.
    tokenizer = copy.deepcopy(encoder.tokenizer.backend_tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    text = tokenizer.to_str() + str(encoder.tokenizer.chat_template)
    return dict(
        libraries=[transformers.__version__, tokenizers.__version__, PIL.__version__],
        tokenizer=hashlib.sha256(text.encode()).hexdigest(),
        images=settings_of(encoder.images),
        helpers=settings_of(encoder.helpers),
        # `compress` refuses what cannot be pooled; which feature goes where is no part of a row.
        **{name: getattr(encoder, name) for name in ("stage", "latent_size", "slots", "compress")},
    )


def settings_of(processor: Any) -> dict[str, str]:
    """Name the settings of an image processor that decide what a tower sees."""
    settings = {name: getattr(processor, name) for name in SETTINGS}
    settings["size"] = {edge: int(processor.size[edge]) for edge in ("shortest_edge", "longest_edge")}
    return {name: str(value) for name, value in settings.items()}
