"""`generate` with latents, by plain transformers: custom_generate/generate.py in the folder of a trained model.

    model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
    model.generate(**inputs, do_sample=False, max_new_tokens=512)

transformers does all the rest. Two hooks feed back final hidden states as the inputs of a latent block's slots, and one
logits processor gives each block the length that training gave it. It needs torch and transformers alone.

N rows, S tokens so far, V vocabulary, H hidden.
"""

from functools import lru_cache
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.utils import cached_file

# What a row with latents needs.
ONE_BY_ONE = {"num_beams": 1, "assistant_model": None, "prompt_lookup_num_tokens": None, "use_cache": True}


class LatentBlocks(LogitsProcessor):
    """Says which token comes next inside a latent block, and what its slots are fed.

    Args:
        length: latents of a block.
        tokens: ids of `<|latent_pad|>`, `<|latent_start|>` and `<|latent_end|>`.
        heads: what latents are made with, where a slot is fed h + μ(h) in place of the hidden state h.
    """

    def __init__(self, length: int, tokens: tuple[int, int, int], heads: dict[str, torch.Tensor] | None = None):
        self.length, self.heads = length, heads
        self.pad, self.start, self.end = tokens
        # (N,) latents of the open block, −1 outside; None before the first token.
        self.open: torch.Tensor | None = None
        # (N, H) final hidden states of the last position.
        self.hidden: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Take (N, S) tokens and the next one's (N, V) scores; inside a block one alone stays."""
        last = input_ids[:, -1]
        if self.open is None:
            # A block that the prompt holds is text.
            self.open = torch.full_like(last, -1)
        else:
            self.open = torch.where(last == self.start, 0, torch.where(self.feeds(last), self.open + 1, -1))
        chosen = torch.where(self.open < self.length, self.pad, self.end)[:, None]
        forced = torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)
        return torch.where((self.open >= 0)[:, None], forced, scores)

    def feeds(self, last: torch.Tensor) -> torch.Tensor:
        """Tell for each row (N,) whether its last token is a slot of a block."""
        assert self.open is not None
        return (self.open >= 0) & (self.open < self.length) & (last == self.pad)

    def keep(self, module: Any, arguments: Any, output: Any) -> None:
        """Hook of the language model: keep the last position's final hidden state."""
        del module, arguments
        self.hidden = output[0][:, -1]

    def embed(self, module: Any, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Hook of the embedding: (N, 1, H) inputs of slots are hidden states."""
        del module
        if self.open is None or output.shape[1] != 1:
            return output
        assert self.hidden is not None
        last = arguments[0][:, -1].to(self.open.device)
        feeds = self.feeds(last).to(output.device)
        return torch.where(feeds[:, None, None], self.fed(self.hidden)[:, None].to(output), output)

    def fed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what slots are fed for final hidden states (N, H)."""
        if self.heads is None:
            return hidden
        weight, bias = (self.heads[f"mean.{name}"].to(hidden) for name in ("weight", "bias"))
        return hidden.float() + functional.linear(hidden, weight, bias)


@lru_cache(1)
def heads_of(folder: str) -> dict[str, torch.Tensor]:
    """Load the heads of a model folder, or of a repository of that name."""
    return load_file(str(cached_file(folder, "heads.safetensors", subfolder="latent_heads")))


def generate(*arguments: Any, model: Any, logits_processor: Any = None, **given: Any) -> Any:
    """Generate as transformers does, with the latents that the model was trained with.

    Raises:
        ValueError: what cannot be done with latents.
    """
    trained = getattr(model.config, "mirage", None) or {}
    slots = "none" if "latent_tokens" not in trained else trained.get("slots") or "latents"
    how = "--bottleneck, which is" if trained.get("bottleneck") else ""
    how = "latents made together, which are" if "latent_passes" in trained else how
    slots = "region" if trained.get("compress_strategy") == "region" else slots
    how = how if slots == "latents" else f"slots {slots!r}, which are"
    if how:
        raise ValueError(f"{model.name_or_path} was trained with {how} not known here; `mirage-ds generate` decodes it")
    config = given.get("generation_config") or model.generation_config
    for name, fine in ONE_BY_ONE.items():
        if given.get(name, getattr(config, name, None)) not in (None, fine):
            raise ValueError(f"{name}: a row with latents is decoded token by token, with a cache; leave it out")
    heads = heads_of(model.name_or_path) if "latent_heads" in trained else None
    blocks = LatentBlocks(trained["latent_size"], tuple(trained["latent_tokens"]), heads)
    hooks = [
        model.get_input_embeddings().register_forward_hook(blocks.embed),
        model.model.language_model.register_forward_hook(blocks.keep),
    ]
    try:
        processors = LogitsProcessorList([*(logits_processor or ()), blocks])
        return type(model).generate(model, *arguments, logits_processor=processors, **given)
    finally:
        for hook in hooks:
            hook.remove()
