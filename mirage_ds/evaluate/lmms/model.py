"""A trained folder in lmms-eval, decoded with its latents by plain transformers (the folder's custom_generate).

    lmms-eval --model mirage --model_args pretrained=runs/stage2 --batch_size 8 --tasks mmstar

N rows of a batch, S tokens of a prompt, T of the longest answer.
"""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval import utils
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

# Of an answer, where neither the task nor --gen_kwargs says it: as `mirage-ds evaluate`.
NEW_TOKENS = 1024
# Of generate, where a task's generation_kwargs name them.
KNOWN = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty")


def settings_of(asked: dict[str, Any]) -> dict[str, Any]:
    """Return generate's arguments for a task's generation_kwargs; greedy unless a temperature is given."""
    found = {name: asked[name] for name in KNOWN if asked.get(name) is not None}
    found["do_sample"] = bool(found.get("temperature")) and found.get("do_sample", True)
    if not found["do_sample"]:
        found |= dict.fromkeys(("temperature", "top_p", "top_k"))
    # Not generation_config.json's own penalty, which `mirage-ds evaluate` does not know either.
    return {"max_new_tokens": NEW_TOKENS, "repetition_penalty": 1.0, **found}


class Mirage(lmms):
    """The model; see lmms-eval's own classes.

    Args:
        pretrained: a folder of training or export, or its name on the hub.
        min_pixels, max_pixels: of a picture; those of training if not given.
        dtype: of the weights; float32 on a CPU, else bfloat16 if not given.

    Raises:
        ValueError: transformers would decode it without latents.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = torch.device(device) if device and self._world_size == 1 else self.accelerator.device
        self.batch_size = int(batch_size)
        dtype = dtype or ("float32" if self.device.type == "cpu" else "bfloat16")
        model: Any = AutoModelForImageTextToText.from_pretrained(pretrained, trust_remote_code=True, dtype=dtype)
        if "generate" not in vars(model):
            raise ValueError(
                f"{pretrained} has no custom_generate/generate.py, and would be decoded without latents, without a "
                "word; `mirage-ds export` writes it for a model whose answers see latents"
            )
        self.model = model.to(self.device).eval()
        self.pad = model.config.mirage["latent_tokens"][0]
        limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        limits = {name: value for name, value in limits.items() if value}
        # As in training, by PIL.
        self.processor = AutoProcessor.from_pretrained(pretrained, use_fast=False, padding_side="left", **limits)

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        """Answer requests; `reasoning_tokens` of an answer are the latents that were fed."""
        order = utils.Collator(
            [one.args for one in requests], lambda args: -len(args[0]), group_fn=lambda args: args[2], grouping=True
        )
        found = []
        with tqdm(total=len(requests), desc="Model Responding", disable=self.rank != 0) as bar:
            for chunk in order.get_batched(n=self.batch_size, batch_fn=None):
                answers = self.answers(chunk)
                for (context, _, asked, *_), answer in zip(chunk, answers, strict=True):
                    self.cache_hook.add_partial("generate_until", (context, asked), answer)
                found += answers
                bar.update(len(answers))
        return list(order.get_original(found))

    @torch.inference_mode()
    def answers(self, chunk: Iterable[tuple[Any, ...]]) -> list[GenerationResult]:
        """Answer a batch of requests that are decoded alike."""
        _, messages, asked, rows, tasks, splits = zip(*chunk, strict=True)
        docs = [self.task_dict[task][split][row] for row, task, split in zip(rows, tasks, splits, strict=True)]
        chats = [ChatMessages(messages=make(doc)) for make, doc in zip(messages, docs, strict=True)]
        texts = [
            self.processor.apply_chat_template(one.to_hf_messages(), tokenize=False, add_generation_prompt=True)
            for one in chats
        ]
        # Where training's prompt ends: the line break is the answer's first token.
        texts = [text.removesuffix("\n") for text in texts]
        images = [image for one in chats for image in one.extract_media()[0]]
        inputs = self.processor(text=texts, images=images or None, padding=True, return_tensors="pt").to(self.device)
        # (N, S + T)
        made = self.model.generate(**inputs, **settings_of(asked[0]))[:, inputs["input_ids"].shape[1] :]
        lengths = (made != self.processor.tokenizer.pad_token_id).sum(1).tolist()
        latents = (made == self.pad).sum(1).tolist()
        read = self.processor.batch_decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        prompts = inputs["attention_mask"].sum(1).tolist()
        return [
            GenerationResult(text, TokenCounts(*counts))
            for text, *counts in zip(read, prompts, lengths, latents, strict=True)
        ]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Refuse: an answer's likelihood depends on its latents (`mirage-ds controls` measures it)."""
        raise NotImplementedError("mirage answers generate_until alone; `mirage-ds controls` measures likelihoods")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Refuse: a question is answered once."""
        raise NotImplementedError("mirage answers one question after the other")
