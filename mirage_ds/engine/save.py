"""Saving the trained model: a folder of safetensors that plain transformers opens.

A run writes one at its end. `mirage-ds export` makes one from a sharded checkpoint, or from a model folder one with
another number of vocabulary rows.

V vocabulary rows, H hidden.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from mirage_ds.config.extras import need
from mirage_ds.data.encode import LATENT_TOKENS
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder, load_tokenizer
from mirage_ds.engine.adapter import Adapter, adapter_name, lora_of, stored_adapter, trained_adapter
from mirage_ds.engine.card import model_card, write_card
from mirage_ds.engine.checkpoint import STATE_FILE, check_whole, read_state
from mirage_ds.engine.frozen import Notes, digest
from mirage_ds.engine.private import unheard
from mirage_ds.engine.spelling import Base, config_json, read_base, write_image_processor, write_tokenizer
from mirage_ds.errors import UserError
from mirage_ds.files import GENERATE, HEADS, TARGETS, TARGETS_NOTE, delete_apart, whole_folder, write_atomically
from mirage_ds.model import latent_generate
from mirage_ds.model.family import FAMILIES, Family, family_of
from mirage_ds.model.folder import resolve_folder, weight_files
from mirage_ds.model.forward import MirageModel
from mirage_ds.model.gathered import gathered
from mirage_ds.model.latent_heads import PREFIX
from mirage_ds.model.latents import INPUTS
from mirage_ds.model.load import check_folder, expected_shapes, public_name, read_config
from mirage_ds.model.shards import ShardWriter, write_tensors
from mirage_ds.model.target_encoder import PREFIX as ENCODER
from mirage_ds.model.targets import write_encoder


def trained_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model folder says of its training, from what a checkpoint says of its run (run/setup.state_of)."""
    # Checkpoints from before there were arms say nothing of them.
    slots, compress, *_ = state.get("latents") or (None, "average")
    # Who decodes it meets no latent block, as with sft.
    stage = "sft" if state.get("latent_policy") == "text" else state["stage"]
    # Of regions the longest, which decoding ends a block at.
    k = state.get("longest", state["latent_size"])
    trained = dict(stage=stage, latent_size=k, slots=slots, compress_strategy=compress)
    if (passes := state.get("latent_passes")) is not None:
        trained["latent_passes"] = passes
    if state.get("bottleneck"):
        trained["bottleneck"] = True
    if lora := state.get("lora"):
        trained["lora"] = {name: lora[name] for name in ("rank", "alpha", "targets")}
    return trained


VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")


class Parts(NamedTuple):
    """What a model folder holds besides its weights.

    Attributes:
        base: the small files of the folder that the model was loaded from; source: that folder.
        tokenizer, image_processor: transformers' own.
        trained: what trained_of gives, kept in config.json.
        card: the text of README.md (card.model_card); none is written where it is empty.
    """

    base: Base
    tokenizer: Any
    image_processor: Any
    source: Path
    trained: dict[str, Any]
    card: str = ""

    @property
    def family(self) -> Family:
        """The model's."""
        return FAMILIES[self.base.config["model_type"]]


def finish_folder(
    writer: ShardWriter, dtype: torch.dtype, parts: Parts, adapter: Adapter | None, heads: dict[str, torch.Tensor]
) -> None:
    """Put weights and everything else in place, the adapter that is merged into them, and LatentHeads or LatentInputs.

    config.json is written last: a folder without it is no model, so that an interrupted save is never taken for one.
    """
    folder = writer.folder
    for old in ("config.json", TARGETS, TARGETS_NOTE):
        (folder / old).unlink(missing_ok=True)
    writer.finish()
    write_tokenizer(parts.tokenizer, parts.base, folder)
    write_image_processor(parts.image_processor, folder)
    for name, content in parts.base.files.items():
        write_atomically(folder / name, content)
    if adapter:
        adapter.write(folder, parts.source)
    if parts.card:
        write_card(folder, parts.card)
    trained = dict(parts.trained)
    if trained.get("stage", "sft") != "sft":
        # transformers loads this file as the model's `generate`, where it is allowed to.
        (folder / GENERATE).parent.mkdir(exist_ok=True)
        write_atomically(folder / GENERATE, Path(latent_generate.__file__).read_bytes())
        trained["latent_tokens"] = parts.tokenizer.convert_tokens_to_ids(list(LATENT_TOKENS))
    else:
        # Of an earlier model in this folder.
        delete_apart(folder, GENERATE)
    delete_apart(folder, HEADS)
    if heads:
        (folder / HEADS).parent.mkdir(exist_ok=True)
        write_tensors({name.removeprefix(PREFIX): one for name, one in heads.items()}, folder / HEADS)
        if INPUTS not in heads:
            trained["latent_heads"] = "gaussian"
    write_atomically(folder / "config.json", config_json(parts.base, dtype, trained, parts.family.whole))


def save_model(model: MirageModel, tower: nn.Module | None, folder: Path, rank: int, parts: Parts) -> None:
    """Write the trained model, its frozen tower re-joined, as a model folder. All ranks call it; rank 0 writes.

    Adapters are merged, and written beside.

    Args:
        tower: the frozen tower, or None where the tower is part of `model`.

    Raises:
        OSError: on rank 0, once all ranks have done their part: what is gathered needs every rank.
    """
    writer = ShardWriter(folder, parts.family) if rank == 0 else None
    failure: OSError | None = None
    adapter, heads = trained_adapter(model, keep=rank == 0), dict[str, torch.Tensor]()
    for stored, parameter in model.named_parameters():
        if adapter_name(stored) is not None:
            continue
        # One at a time.
        with gathered([parameter]):
            tensor = parameter.detach().cpu().clone() if writer and failure is None else None
        if writer and tensor is not None:
            name = public_name(stored)
            try:
                if name.startswith(PREFIX) or name == INPUTS:
                    heads[name] = tensor
                else:
                    writer.add(name, adapter.merged(name, tensor) if adapter else tensor)
            except OSError as error:
                failure = error
    if failure is not None:
        raise failure
    if not writer:
        return
    if tower is not None:
        for name, tensor in tower.state_dict().items():
            writer.add(f"visual.{name}", tensor.cpu())
    finish_folder(writer, model.head.weight.dtype, parts, adapter, heads)


def export_checkpoint(checkpoint: Path, out: Path, dtype: torch.dtype, parts: Parts) -> None:
    """Turn a sharded checkpoint into a model folder; tensors that were not trained come from `parts.source`.

    Its adapters, if it has any, are merged, and written beside.

    Args:
        checkpoint: a global_step<N> folder; the model card is written from what it says of itself.
        dtype: of the written weights; the checkpoint holds float32 masters.

    Raises:
        UserError: a file differs from the checkpoint's manifest, or what is in the source is not what
            was frozen in training.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    check_whole(checkpoint)
    state = read_state(checkpoint)
    lora = lora_of(state)
    if lora:
        need("lora", f"{checkpoint}, which holds adapters,")
    frozen: Notes = {public_name(name): note for name, note in state.get("kept", {}).items()}
    expected = expected_shapes(read_config(parts.source))
    with unheard():
        masters = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name, lazy_mode=True)
    with whole_folder(out) as folder:
        writer = ShardWriter(folder, parts.family)
        tied = "lm_head.weight" not in expected
        adapter = stored_adapter(lora, masters.items(), dtype, tied) if lora else None
        written, heads = set(), dict[str, torch.Tensor]()
        for stored, tensor in masters.items():
            # A tied head stands there twice, and buffers are no weights.
            name = public_name(stored)
            if name in expected and name not in written:
                writer.add(name, tensor.contiguous().to(dtype))
                written.add(name)
            elif name.startswith(PREFIX) or name == INPUTS:
                heads[name] = tensor.contiguous().to(dtype)
        missing = expected.keys() - written
        for file in weight_files(parts.source):
            with safe_open(file, "pt") as tensors:
                for stored in tensors.keys():  # noqa: SIM118  # safe_open is no dict
                    name = public_name(stored)
                    if name in missing:
                        tensor = tensors.get_tensor(stored).to(dtype)
                        tensor = _same(tensor, name, parts.source, checkpoint, frozen)
                        writer.add(name, adapter.merged(name, tensor) if adapter else tensor)
        if not heads and any(name.startswith(PREFIX) for name in frozen):
            heads = _frozen_heads(checkpoint, parts.source, frozen, dtype)
        finish_folder(writer, dtype, parts._replace(card=model_card(state)), adapter, heads)


def export_encoder(checkpoint: Path, out: Path, dtype: torch.dtype) -> None:
    """Turn a sharded checkpoint of --stage scaffold into its folder.

    Raises:
        UserError: a file differs from the checkpoint's manifest.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    check_whole(checkpoint)
    state = read_state(checkpoint)
    with unheard():
        masters = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name, lazy_mode=True)
    tensors = {
        name.removeprefix(ENCODER): one.contiguous().to(dtype)
        for name, one in masters.items()
        if name.startswith(ENCODER)
    }
    with whole_folder(out) as folder:
        write_encoder(tensors, folder, {**state["scaffold"], "step": state["step"]})


def _same(tensor: torch.Tensor, name: str, source: Path, checkpoint: Path, frozen: Notes) -> torch.Tensor:
    """Return a tensor of the source; UserError where it is not what was frozen in training."""
    if name in frozen and frozen[name] != digest(tensor):
        raise UserError(
            f"{name} in {source} is not what {checkpoint} was trained on; name the base that it was, unchanged, with "
            "--model"
        )
    return tensor


def _frozen_heads(checkpoint: Path, source: Path, frozen: Notes, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the LatentHeads that were not trained, from the folder that training began with."""
    if not (source / HEADS).is_file():
        raise UserError(f"{source / HEADS}: no such file, and {checkpoint} was trained with it; copy it back")
    heads = {f"{PREFIX}{name}": one.to(dtype) for name, one in load_file(source / HEADS).items()}
    return {name: _same(one, name, source, checkpoint, frozen) for name, one in heads.items()}


def change_rows(source: Path, target: Path, rows: int, tokens: int) -> None:
    """Copy a model folder with another number of vocabulary rows.

    The public Mirage code writes 151,668 rows, Qwen2.5-VL has 152,064 (7B and larger) or 151,936 (3B); tools differ in
    which they take. Rows that no token uses are cut off, or added as zeros.

    Args:
        rows: V of the copy.
        tokens: entries of the tokenizer; fewer rows than that would lose a token.
    """
    if rows < tokens:
        raise UserError(f"--vocab_rows {rows} would cut off tokens: the tokenizer has {tokens}")
    with whole_folder(target) as folder:
        _copy_rows(source, folder, rows)


def _copy_rows(source: Path, target: Path, rows: int) -> None:
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    writer = ShardWriter(target, family_of(values.get("model_type"), str(source)))
    for file in weight_files(source):
        with safe_open(file, "pt") as tensors:
            for stored in tensors.keys():  # noqa: SIM118  # safe_open is no dict
                name, tensor = public_name(stored), tensors.get_tensor(stored)
                if name in VOCABULARY_TENSORS:
                    added = tensor.new_zeros(max(0, rows - len(tensor)), tensor.shape[1])
                    tensor = torch.cat([tensor[:rows], added])
                writer.add(name, tensor)
    writer.finish()
    apart = [source / GENERATE, source / HEADS]
    for file in (*source.iterdir(), *apart):
        own = file.is_file() and "safetensors" not in file.name and file.name != "config.json"
        if own or (file in apart and file.is_file()):
            place = target / file.relative_to(source)
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(file.read_bytes())
    for block in (values, values.get("text_config", {})):
        if "vocab_size" in block:
            block["vocab_size"] = rows
    write_atomically(target / "config.json", json.dumps(values, indent=2) + "\n")


def _find(source: Path) -> Path:
    """Return the model folder or the checkpoint that `source` names."""
    latest = source / "run" / "checkpoints" / "latest"
    if (source / STATE_FILE).is_file() or (source / "config.json").is_file():
        return source
    if latest.is_file():
        return latest.parent / latest.read_text().strip()
    raise UserError(f"{source}: neither a model folder, nor a run folder with a checkpoint, nor a checkpoint")


def export_folder(source: Path, target: Path, vocab_rows: int | None, base: Path | None) -> str:
    """Export; return one line that says what was written.

    Raises:
        UserError: nothing to export, `target` exists, or the base model is gone.
    """
    if target.exists():
        raise UserError(f"{target} exists already; give a new folder")
    found = _find(source)
    if not (found / STATE_FILE).is_file():
        if vocab_rows is None:
            raise UserError(f"{source}: is a complete model folder already; --vocab_rows changes its vocabulary rows")
        folder = resolve_folder(str(found), "SOURCE", None)
        check_folder(folder)
        change_rows(folder, target, vocab_rows, tokens=len(load_tokenizer([str(folder)], None)))
        return f"{target}: {vocab_rows} vocabulary rows"
    state = read_state(found)
    if vocab_rows is not None:
        raise UserError("--vocab_rows goes with a model folder: export the checkpoint first, then the folder")
    dtype = getattr(torch, state["dtype"])
    if state["stage"] == "scaffold":
        export_encoder(found, target, dtype)
    else:
        sources = [str(base)] if base else state["sources"]
        place = resolve_folder(sources[0], "--model", None)
        check_folder(place, [Path(folder) for folder in sources[1:]])
        encoder = load_encoder(sources, ImageFinder(()), "sft", 1, tuple(state["pixels"]))
        parts = Parts(read_base(place, encoder.tokenizer), encoder.tokenizer, encoder.images, place, trained_of(state))
        export_checkpoint(found, target, dtype, parts)
    return f"{target}: step {state['step']} of {state['stage']}, {state['dtype']}"
