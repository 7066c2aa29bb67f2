"""Encoding: one Record to one Sample, exactly the sequence that Mirage trains on.

T tokens of the row, n images, P patches (14 × 14 × 2 pixels × 3 channels = 1176 numbers), k latents a block.

The row is the chat template's text: the user turn with its image slots, then the answer with each helper mark replaced
by `<|latent_start|>` + k × `<|latent_pad|>` + `<|latent_end|>`. Every token after `<|im_start|>assistant` is a label
but `<|latent_pad|>` (arXiv 2506.17218, section 3).

`--compress_strategy region`: a row has as many pads as its region has cells, and pads are labels too, or nothing would
teach the model when a block ends (LVR's public code leaves them out, and feeds a fixed number in its evaluation).

`--slots pause`: k pads are placed, and no latent block is noted (`Encoder.fill`): they are ordinary embeddings without
labels. Decoding feeds the same embedding (model/slots.py, pause).

`--bottleneck`: what follows a row's first latent block, its end token first, does not attend to the tokens of the input
images, from `<|vision_start|>` to `<|vision_end|>`; latents of all blocks do, and so does what stands before the first
block: the question, and words of the answer. LIVR (arXiv 2512.21218, section 3.2) hides the same tokens, from its
prompt's text too; Monet (arXiv 2511.21395) hides its helper image. Positions are as without it.

What a user's text spells out, `<|im_end|>` say, stays text: only the template and the encoder place special tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mirage_ds.config.run import HELPED, Compress, Slots, Stage
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.literals import Literals
from mirage_ds.data.messages import REGION, TURNS_BEFORE
from mirage_ds.data.pooling import pool_groups
from mirage_ds.data.record import HELPER_MARK, IMAGE_MARK, Record
from mirage_ds.data.region import Cells, cells_of, count_of, groups_of
from mirage_ds.data.sample import IGNORE, Grid, Layout, Measure, Sample, mrope_positions, picture_places
from mirage_ds.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

LATENT_PAD, LATENT_START, LATENT_END = "<|latent_pad|>", "<|latent_start|>", "<|latent_end|>"
# In this order, so that on a public Qwen2.5-VL tokenizer (151,665 entries) they get ids 151665, 151666, 151667.
LATENT_TOKENS = (LATENT_PAD, LATENT_START, LATENT_END)
IMAGE_PAD = "<|image_pad|>"
ASSISTANT = "<|im_start|>assistant"
# Features of a field's images where they were kept.
Kept = torch.Tensor | None


def _items(text: str) -> list[dict[str, str]]:
    """Split a text into the chat template's items at its `<image>` marks."""
    items: list[dict[str, str]] = []
    for number, part in enumerate(text.split(IMAGE_MARK)):
        items += [{"type": "image"}] if number else []
        items += [{"type": "text", "text": part}] if part else []
    return items


@dataclass(frozen=True)
class Encoder:
    """Turns Records into Samples for one stage. Build it with `load_encoder`.

    Attributes:
        tokenizer: with the three latent tokens.
        images, helpers: the image processors of input and helper images (they differ in their pixel limits).
        finder: finds image files.
        stage: sft drops the latents; only stage1 and scaffold read the helper images; in rl a row is its prompt alone.
        latent_size: k.
        slots: what stands where the helper stood, as config.RunConfig.slots.
        compress: how the helper's features become k targets.
        latent_passes: of a block's latents together, as config.RunConfig.latent_passes.
        bottleneck: text behind a row's first latent block does not see the input images.
    """

    tokenizer: PreTrainedTokenizerBase
    images: Qwen2VLImageProcessorPil
    helpers: Qwen2VLImageProcessorPil
    finder: ImageFinder
    stage: Stage
    latent_size: int
    slots: Slots | None = None
    compress: Compress = "average"
    latent_passes: int | None = None
    bottleneck: bool = False

    @cached_property
    def literals(self) -> Literals:
        """What keeps a user's text text."""
        return Literals(self.tokenizer)

    @cached_property
    def _head(self) -> list[int]:
        """Ids of the answer's head; asked for by every row, so kept."""
        return list(self.tokenizer(ASSISTANT, add_special_tokens=False)["input_ids"])

    @property
    def _bare(self) -> bool:
        """Nothing stands where the helper stood."""
        return self.stage == "sft" and self.slots is None

    @property
    def pools(self) -> bool:
        """Whether k targets are what is kept of a helper; scaffold needs all of its features."""
        return self.stage == "stage1"

    @property
    def regions(self) -> bool:
        """Whether latents imitate a region of the input image."""
        return self.stage == "stage1" and self.compress == "region"

    @property
    def helped(self) -> bool:
        """Whether helper images are read."""
        return self.stage in HELPED and not self.regions

    @property
    def auxiliary(self) -> bool:
        """Whether the answer does not attend to the latents."""
        return self.slots == "auxiliary"

    def id_of(self, token: str) -> int:
        """Return the id of a special token."""
        number: Any = self.tokenizer.convert_tokens_to_ids(token)
        return int(number)

    def _grid(self, processor: Any, height: int, width: int) -> Grid:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        patch, size = processor.patch_size, processor.size
        limits = size["shortest_edge"], size["longest_edge"]
        rows, columns = smart_resize(height, width, patch * processor.merge_size, *limits)
        return 1, rows // patch, columns // patch

    def _merged(self, grid: Grid) -> int:
        return grid[0] * grid[1] * grid[2] // self.images.merge_size**2

    @property
    def patch_width(self) -> int:
        """Numbers of a patch: 1176 in most families."""
        return int(3 * self.images.temporal_patch_size * self.images.patch_size**2)

    def groups_of(self, grid: Grid) -> np.ndarray:
        """Assign a helper's merged features to its k targets, (F,); see pooling.pool_groups."""
        return pool_groups(*self.sides(grid), self.latent_size, self.compress)

    def sides(self, grid: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the merged features of an image of this grid."""
        return grid[1] // self.images.merge_size, grid[2] // self.images.merge_size

    def _prompt(self, record: Record) -> str:
        """Write the turns up to the question and the head of the answer's turn."""
        turns: list[Any] = record.turns_before
        turns = [turn | {"content": _items(turn["content"])} if turn["role"] == "user" else turn for turn in turns]
        first = [] if record.marks else [{"type": "image"}] * len(record.image_input)
        turns.append({"role": "user", "content": [*first, *_items(record.text_input)]})
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False)) + ASSISTANT

    def _text(self, record: Record, pads: int) -> str:
        """Write the whole row, with so many pads a latent block."""
        latents = "" if self._bare else LATENT_START + LATENT_PAD * pads + LATENT_END
        given = record.image_output or (self.compress == "region" and record.extra.get(REGION))
        first = HELPER_MARK if given and HELPER_MARK not in record.text_output else ""
        answer = (first + record.text_output).replace(HELPER_MARK, latents)
        return f"{self._prompt(record)}\n{answer}<|im_end|>\n"

    def _veil(self, record: Record) -> tuple[Record, dict[str, str]]:
        """Replace special tokens that the user's texts spell out; see Literals.veil."""
        # Without slots the marks are left out, and what stood on both sides of one may then spell a token.
        answer = record.text_output.replace(HELPER_MARK, "") if self._bare else record.text_output
        texts, veils = self.literals.veil([*record.texts, answer])
        if not veils:
            return record, veils
        *before, question, answer = texts
        extra = record.extra
        if before:
            turns = [{**turn, "content": text} for turn, text in zip(record.turns_before, before, strict=True)]
            extra = {**extra, TURNS_BEFORE: turns}
        return replace(record, text_input=question, text_output=answer, extra=extra), veils

    def measure(self, record: Record) -> Measure:
        """Count a row's tokens, labels, runs and patches without decoding its images.

        Raises:
            RecordError: the record cannot be used in this stage.
        """
        return self.measure_of(self.lay_out(record))

    def lay_out(self, record: Record, prompt: bool = False) -> Layout:
        """Place every token of a row; reads the images' headers only.

        Args:
            prompt: only up to the head of the answer; in rl always.

        Raises:
            RecordError: the record cannot be used in this stage.
        """
        prompt = prompt or self.stage == "rl"
        record, veils = self._veil(record)
        sizes = [self.finder.size(record, "image_input", path) for path in record.image_input]
        grids = [self._grid(self.images, *size) for size in sizes]
        helper_grids: list[Grid] = []
        region: Cells | None = None
        if self.regions and not prompt:
            region = cells_of(record, sizes, [self.sides(grid) for grid in grids])
        if self.helped and not prompt:
            record.need_helper(self.stage)
            for path in record.image_output:
                grid = self._grid(self.helpers, *self.finder.size(record, "image_output", path))
                try:
                    self.groups_of(grid)
                except ValueError as error:
                    how = "raise --helper_min_pixels, or choose another --latent_size or --compress_strategy"
                    raise record.fault("image_output", f"helper {path} {error}", how) from None
                helper_grids.append(grid)
        pads = count_of(region) if region else 0 if self.slots == "marks" else self.latent_size
        text = self._prompt(record) if prompt else self._text(record, pads)
        first, *pieces = text.split(IMAGE_PAD)
        slots = [IMAGE_PAD * self._merged(grid) for grid in grids]
        ids = self.literals.tokenize(first + "".join(map("".join, zip(slots, pieces, strict=True))), veils)
        # The answer starts behind the last `<|im_start|>` and the role's name.
        head = self._head
        turn = len(ids) - 1 - ids[::-1].index(head[0])
        if ids[turn : turn + len(head)] != head:
            raise UserError(f"the tokenizer does not keep {ASSISTANT!r} apart from what follows; use the model's own")
        return Layout(ids, turn + len(head), grids, helper_grids, region)

    def measure_of(self, layout: Layout) -> Measure:
        """Count what a row holds."""
        tokens, pads = len(layout.input_ids), list(layout.input_ids).count(self.id_of(LATENT_PAD))
        latents = 0 if self.stage == "sft" else pads
        runs = 1 if layout.region else latents // self.latent_size
        images, helpers = (tuple(map(self._merged, grids)) for grids in (layout.grids, layout.helper_grids))
        labels = tokens - layout.answer_start - (0 if layout.region else pads)
        return Measure(tokens, labels, runs, images, helpers, latents)

    def encode(self, record: Record, row: int) -> Sample:
        """Encode one record.

        Raises:
            RecordError: the record cannot be used in this stage, or an image does not decode.
        """
        return self.fill(self.lay_out(record), record, row)

    def fill(
        self, layout: Layout, record: Record, row: int, image_features: Kept = None, helper_features: Kept = None
    ) -> Sample:
        """Make the Sample of a row that is laid out already; of the record only its line and its paths are looked at.

        Args:
            image_features: (F, H) features of its images, which are then not decoded.
            helper_features: (blocks · k, H) targets that its helpers were pooled to, in scaffold (F, W) their features;
                they are then not decoded.

        Raises:
            RecordError: an image does not decode, or is another one than when the row was laid out.
        """
        ids = np.array(layout.input_ids, dtype=np.int64)
        pad = self.id_of(LATENT_PAD)
        labels = ids.copy()
        labels[: layout.answer_start] = IGNORE
        if not layout.region:
            labels[ids == pad] = IGNORE
        # Pause tokens and bare marks are ordinary text.
        starts = np.flatnonzero((ids == self.id_of(LATENT_START)) & (self.stage != "sft")) + 1
        length = count_of(layout.region) if layout.region else self.latent_size
        pixels, grids = self._images(record, "image_input", layout.grids, image_features)
        helper_pixels, helper_grids = self._images(record, "image_output", layout.helper_grids, helper_features)
        image_pad = self.id_of(IMAGE_PAD)
        positions = mrope_positions(ids, layout.grids, image_pad, self.images.merge_size)
        if self.auxiliary:
            # What follows a block stands where it would without it; another block's latents are not there either.
            earlier = np.cumsum(ids == pad)
            positions -= np.where(ids == pad, (earlier - 1) // self.latent_size * self.latent_size, earlier)
        image_positions = np.flatnonzero(ids == image_pad)
        groups = [
            # What was pooled before is a mean of one.
            np.arange(self.latent_size) if helper_features is not None and self.pools else self.groups_of(grid)
            for grid in layout.helper_grids
        ]
        groups = [run * self.latent_size * (own >= 0) + own for run, own in enumerate(groups)]
        if layout.region:
            groups = [groups_of(layout.region, self.sides(layout.grids[0])[1], int((ids == image_pad).sum()))]
        return Sample(
            row=row,
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(positions),
            image_positions=torch.from_numpy(image_positions),
            pixel_values=pixels,
            image_grid_thw=grids,
            runs=tuple((int(start), length) for start in starts),
            helper_pixel_values=helper_pixels,
            helper_grid_thw=helper_grids,
            helper_groups=torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *groups])),
            image_features=image_features,
            helper_features=helper_features,
            hidden=torch.from_numpy(picture_places(image_positions)) if self.bottleneck else None,
        )

    def encode_prompt(self, record: Record, row: int) -> Sample:
        """Encode the question alone, up to `<|im_start|>assistant`: what decoding starts from. It has no labels.

        Raises:
            RecordError: an image is missing or does not decode.
        """
        return self.fill(self.lay_out(record, prompt=True), record, row)

    def pixels(self, record: Record, name: str, paths: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode images of a record: pixel patches (P, 1176) and grids (n, 3).

        Args:
            name: "image_input" or "image_output", which says whose pixel limits hold.

        Raises:
            RecordError: an image is missing or does not decode.
        """
        if not paths:
            return torch.empty(0, self.patch_width), torch.empty(0, 3, dtype=torch.int64)
        processor: Any = self.images if name == "image_input" else self.helpers
        images = [self._resized(processor, self.finder.load(record, name, path)) for path in paths]
        output = processor(images=images, do_resize=False, return_tensors="pt")
        return output["pixel_values"].to(torch.float32), output["image_grid_thw"].to(torch.int64)

    def _images(
        self, record: Record, name: str, expected: list[Grid], features: Kept
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode the images of a field unless their features are at hand."""
        if features is None:
            pixels, grids = self.pixels(record, name, getattr(record, name) if expected else ())
            same = [tuple(grid) for grid in grids.tolist()] == expected
        else:
            pixels, grids = self.pixels(record, name, ())[0], torch.tensor(expected, dtype=torch.int64)
            pooled = name == "image_output" and self.pools
            kept = [self.latent_size if pooled else self._merged(grid) for grid in expected]
            same = len(features) == sum(kept)
        if not same:
            raise record.fault(name, "an image changed its size since it was measured", "start the run again")
        return pixels, grids.reshape(-1, 3)

    def _resized(self, processor: Any, image: Image.Image) -> Image.Image:
        """Resize as the processor does it, but before it copies a large photograph several times."""
        _, rows, columns = self._grid(processor, image.height, image.width)
        return image.resize((columns * processor.patch_size, rows * processor.patch_size), processor.resample)

    def dummy(self, runs: int) -> Sample:
        """Make a row of weight zero: `<|endoftext|>`, then `runs` latent blocks, then one labelled token.

        It keeps a rank that has nothing to do in step with the others: every pass of the recurrent stage finds a token
        on it, and its loss is multiplied by zero.
        """
        end = self.id_of("<|endoftext|>")
        pads = [self.id_of(LATENT_PAD)] * (runs * self.latent_size)
        layout = Layout([end, *pads, end], 1 + len(pads), [], [])
        starts = range(1, 1 + len(pads), self.latent_size)
        sample = self.fill(layout, Record(0, "", "", (), ()), -1)
        return sample._replace(runs=tuple((start, self.latent_size) for start in starts))


def beside_each(encoder: Encoder, files: Sequence[Path], pictures: Path) -> list[Encoder]:
    """Return an encoder for each file of records: its rows look for images beside it.

    Args:
        pictures: where pictures that came inside records files lie.
    """
    beside = {folder: encoder.finder.of(folder / "any", pictures) for folder in {file.parent for file in files}}
    finders = [beside[file.parent] for file in files]
    return [encoder if finder == encoder.finder else replace(encoder, finder=finder) for finder in finders]
