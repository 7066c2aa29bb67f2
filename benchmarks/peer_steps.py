"""Optimizer steps of another trainer, out of its own environment, for benchmarks/peers.py.

    PYTHON benchmarks/peer_steps.py NAME PIPE SETTINGS

All of them are transformers' Trainer in their own ways. A callback lets each take a step only when it is told to, so
that several trainers step by turns. A step's clock runs from that word to the Trainer's log of the step's loss: reading
and encoding its rows belongs to it. Imports nothing of the project.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Of labels: what is not trained on.
IGNORE = -100


def turns(pipe: Connection) -> Any:
    """Make the Trainer's callback: a step a word, and its loss, seconds and processor seconds in return."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def _wait(self) -> None:
            if pipe.recv() is None:
                lines = Path("/proc/self/status").read_text().splitlines()
                pipe.send(next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")))
                # Saving a model or its report would only cost time.
                os._exit(0)
            self.begun = time.perf_counter(), time.process_time()

        def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            model = others["model"]
            pipe.send({
                "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "dtype": str(next(p.dtype for p in model.parameters() if p.requires_grad)),
                "optimizer": str(getattr(args.optim, "value", args.optim)),
            })  # fmt: skip
            self._wait()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            if "loss" in (logs or {}):
                pipe.send((float(logs["loss"]), time.perf_counter() - self.begun[0],
                           time.process_time() - self.begun[1]))  # fmt: skip
                self._wait()

    return Turns()


def common(settings: dict[str, Any]) -> dict[str, Any]:
    """What the arguments of every Trainer are called alike: as the other side trains, and nothing but steps."""
    return dict(
        output_dir=settings["out"], max_steps=10_000, logging_steps=1, save_strategy="no", report_to="none",
        per_device_train_batch_size=settings["batch"],
        gradient_accumulation_steps=settings["rows"] // settings["batch"],
        learning_rate=settings["learning_rate"], lr_scheduler_type="constant", weight_decay=settings["weight_decay"],
        max_grad_norm=settings["max_grad_norm"], adam_beta2=settings["adam_beta2"], dataloader_num_workers=0,
        disable_tqdm=True, seed=0,
    )  # fmt: skip


def loaded(settings: dict[str, Any]) -> tuple[Any, Any]:
    """Load model and processor as transformers has them; the tower is frozen."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(settings["model"], dtype="float32", attn_implementation="sdpa")
    model.model.visual.requires_grad_(False)
    return model, AutoProcessor.from_pretrained(settings["model"])


def conversations(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Read the rows: `messages` of text with <image>, and `images`, paths."""
    return [json.loads(line) for line in Path(settings["records"]).read_text().splitlines()]


def parts(text: str) -> list[dict[str, str]]:
    """Turn text with <image> into the parts of a message."""
    before, *after = text.split("<image>")
    found = [{"type": "text", "text": before}] if before else []
    for one in after:
        found += [{"type": "image"}, {"type": "text", "text": one}]
    return found


class Collator:
    """Rows → tensors: the chat template, its prompt without labels, padded at the right."""

    def __init__(self, processor: Any):
        self.processor = processor
        processor.tokenizer.padding_side = "right"

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Encode rows, and read their images."""
        from PIL import Image

        texts, images, asked = [], [], []
        for row in rows:
            question, answer = (dict(one, content=parts(one["content"])) for one in row["messages"])
            images += [Image.open(path).convert("RGB") for path in row["images"]]
            apply = self.processor.apply_chat_template
            asked.append(apply([question], tokenize=False, add_generation_prompt=True))
            texts.append(apply([question, answer], tokenize=False))
        made = self.processor(text=texts, images=images, padding=True, return_tensors="pt")
        labels = made["input_ids"].masked_fill(made["attention_mask"] == 0, IGNORE)
        tokens = self.processor.tokenizer
        for own, text, whole in zip(labels, asked, texts, strict=True):
            # The prompt's images are all of the row's: the answer's tokens are counted from the end.
            answer = len(tokens(whole[len(text) :])["input_ids"])
            own[: int((own != IGNORE).sum()) - answer] = IGNORE
        return dict(made, labels=labels)


def transformers(settings: dict[str, Any], callback: Any) -> None:
    """Train with transformers' own Trainer."""
    from transformers import Trainer, TrainingArguments

    model, processor = loaded(settings)
    arguments = TrainingArguments(
        **common(settings), gradient_checkpointing=settings["checkpointing"], remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    rows: Any = conversations(settings)
    Trainer(model, arguments, Collator(processor), rows, callbacks=[callback]).train()


def trl(settings: dict[str, Any], callback: Any) -> None:
    """Train with TRL's SFTTrainer, on prompt and completion."""
    from datasets import Dataset, Image
    from trl import SFTConfig, SFTTrainer

    model, processor = loaded(settings)
    # A conversation's texts; the trainer puts the images where <image> was first, so the marks go.
    rows = []
    for row in conversations(settings):
        question, answer = ([dict(one, content=parts(one["content"]))] for one in row["messages"])
        rows.append({"prompt": question, "completion": answer, "images": row["images"]})
    data = Dataset.from_list(rows).cast_column("images", [Image()])
    arguments = SFTConfig(
        **common(settings), gradient_checkpointing=settings["checkpointing"], bf16=False, max_length=None,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    SFTTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=processor, callbacks=[callback]
    ).train()


def ms_swift(settings: dict[str, Any], callback: Any) -> None:
    """Train with `swift sft`."""
    from swift.pipelines.train.sft import SwiftSft

    class Sft(SwiftSft):
        def train(self, trainer: Any) -> Any:
            trainer.add_callback(callback)
            return super().train(trainer)

    told = common(settings) | dict(
        model=settings["model"], model_type="qwen2_5_vl", template="qwen2_5_vl", dataset=settings["records"],
        tuner_type="full",
        torch_dtype="float32", attn_impl="sdpa", gradient_checkpointing=settings["checkpointing"], use_hf=True,
        dataset_shuffle=False, train_dataloader_shuffle=False, split_dataset_ratio=0, check_model=False,
        max_length=8192, freeze_vit=True, freeze_aligner=True,
    )  # fmt: skip
    Sft([word for key, value in told.items() for word in (f"--{key}", str(value))]).main()


def llama_factory(settings: dict[str, Any], callback: Any) -> None:
    """Train with `llamafactory-cli train`."""
    # Imported, and used for sound alone; its wheel asks for CUDA's libraries.
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    from llamafactory.train.tuner import run_exp

    folder = Path(settings["out"])
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"messages": "messages", "images": "images"}
    tags = dict(role_tag="role", content_tag="content", user_tag="user", assistant_tag="assistant")
    described = {"rows": dict(file_name=settings["records"], formatting="sharegpt", columns=columns, tags=tags)}
    (folder / "dataset_info.json").write_text(json.dumps(described))
    run_exp(
        common(settings)
        | dict(
            model_name_or_path=settings["model"], stage="sft", do_train=True, finetuning_type="full", dataset="rows",
            dataset_dir=str(folder), template="qwen2_vl", cutoff_len=8192, disable_shuffling=True, flash_attn="sdpa",
            disable_gradient_checkpointing=not settings["checkpointing"], overwrite_cache=True, bf16=False,
            infer_dtype="float32",
        ),
        [callback],
    )  # fmt: skip


TRAINERS: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "transformers": transformers, "trl": trl, "ms-swift": ms_swift, "llama-factory": llama_factory,
}  # fmt: skip


def import_torchvision() -> None:
    """Import torchvision where the libraries of CUDA that its wheel asks for are not there.

    Nothing compiled is used of it, but it tells torch the shapes of two operators of its own.
    """
    import torch

    try:
        import torchvision
    except RuntimeError:
        own = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            own.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


def main(name: str, pipe: str, settings: str) -> None:
    """Be one trainer."""
    given = json.loads(settings)
    import torch

    torch.set_num_threads(given["threads"])
    import_torchvision()
    TRAINERS[name](given, turns(Connection(int(pipe))))


if __name__ == "__main__":
    main(*sys.argv[1:])
