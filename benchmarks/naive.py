"""The plain way to train Mirage with transformers, to compare speeds with. No code of the product's forward is in it.

T tokens of the longest row, R rows of a micro-batch, k latents of the run, H hidden, V vocabulary.

The vision tower in every step, logits of all T positions over the whole vocabulary in float32, stage 2 as k + 1 calls
over a cache with gradient through it. One row at a time, as the public code does, or several padded to the longest of
them; stage 2 is always row by row. Weights are float32, and bf16 runs the forward under torch.autocast; or weights,
gradients and AdamW's states are bf16 too. Layers are recomputed in backward if asked.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mirage_ds.data.sample import IGNORE, Sample


class Naive:
    """Trains a model folder with torch's AdamW.

    Args:
        gamma: weight of the cross-entropy.
        dtype: of the products; weights: of the weights and all that is kept of them.
        batch: rows of a micro-batch, at most.
        device: of everything; rows come on the CPU.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        gamma: float,
        dtype: torch.dtype,
        optimizer: dict[str, Any],
        max_norm: float,
        batch: int = 1,
        device: str = "cpu",
        weights: torch.dtype = torch.float32,
        checkpointing: bool = False,
    ):
        import transformers
        from transformers import Qwen2_5_VLForConditionalGeneration

        transformers.utils.logging.disable_progress_bar()
        self.model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=weights, attn_implementation="sdpa"
        ).to(device)
        self.model.model.visual.requires_grad_(False)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.train()
        self.device, self.casts = torch.device(device), dtype != weights
        self.stage, self.gamma, self.dtype, self.max_norm, self.batch = stage, gamma, dtype, max_norm, batch
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        matrices, vectors = ([p for p in self.trained if (p.ndim > 1) == wide] for wide in (True, False))
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, **optimizer, fused=True if device == "cuda" else None)

    def step(self, rows: list[Sample]) -> float:
        """Take one optimizer step over the rows; return their mean loss."""
        total = 0.0
        for at in range(0, len(rows), self.batch):
            with self._casting():
                loss = self._loss(rows[at : at + self.batch]) / len(rows)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.trained, self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def _casting(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype) if self.casts else nullcontext()

    def _features(self, pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.model.model.visual(pixels.to(self.device), grid_thw=grid.to(self.device)).pooler_output

    def _loss(self, rows: list[Sample]) -> torch.Tensor:
        """Sum of the rows' losses."""

        def padded(parts: list[torch.Tensor], value: int) -> torch.Tensor:
            return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value).to(self.device)

        ids, labels = padded([row.input_ids for row in rows], 0), padded([row.labels for row in rows], IGNORE)
        positions = padded([row.position_ids.T for row in rows], 0).permute(2, 0, 1)
        lengths = torch.tensor([len(row.input_ids) for row in rows])
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).to(self.device)
        x = self.model.get_input_embeddings()(ids)
        images = self._features(
            torch.cat([row.pixel_values for row in rows]), torch.cat([row.image_grid_thw for row in rows])
        ).to(x.dtype)
        x = x.masked_scatter((ids == self.model.config.image_token_id)[..., None], images)
        runs = [row.runs[0] if row.runs else (0, 0) for row in rows]
        targets = []
        if self.stage == "stage1":
            x = x.clone()
            for i, (row, (start, k)) in enumerate(zip(rows, runs, strict=True)):
                helper = self._features(row.helper_pixel_values, row.helper_grid_thw)
                targets.append(helper[: len(helper) // k * k].view(k, -1, helper.shape[1]).mean(1).to(x.dtype))
                x[i, start : start + k] = targets[-1]
        if self.stage == "stage2":
            hidden = self._recurrence(x, positions, *runs[0])
        else:
            hidden = self._walk(x, positions, None if mask.all() else mask)
        logits = self.model.lm_head(hidden).float()
        # A copy, as transformers made at the time of the public code.
        shifted = logits[:, :-1].contiguous().view(-1, logits.shape[-1])
        each = functional.cross_entropy(shifted, labels[:, 1:].reshape(-1), reduction="none", ignore_index=IGNORE)
        loss = self.gamma * (each.view(len(rows), -1).sum(1) / (labels[:, 1:] != IGNORE).sum(1)).sum()
        for own, target, (start, k) in zip(hidden, targets, runs, strict=bool(targets)):
            cosine = functional.cosine_similarity(own[start - 1 : start + k - 1].float(), target.float(), dim=-1)
            loss = loss + 1 - cosine.mean()
        return loss

    def _walk(
        self, x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None = None, cache: Any = None
    ) -> torch.Tensor:
        """Run the decoder over (R, T, H) at positions (3, R, T), with a mask (R, T) where rows are padded."""
        text = self.model.model.language_model
        return text(
            inputs_embeds=x,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def _recurrence(self, x: torch.Tensor, positions: torch.Tensor, start: int, k: int) -> torch.Tensor:
        """Feed each latent of one row the hidden state before it, one call a latent."""
        from transformers import DynamicCache

        cache = DynamicCache()
        parts = [self._walk(x[:, :start], positions[..., :start], cache=cache)]
        for at in range(start, start + k):
            latent = parts[-1][:, -1:]
            if at == start + k - 1:
                rest = torch.cat([latent, x[:, at + 1 :]], dim=1)
                parts.append(self._walk(rest, positions[..., at:], cache=cache))
            else:
                parts.append(self._walk(latent, positions[..., at : at + 1], cache=cache))
        return torch.cat(parts, dim=1)
