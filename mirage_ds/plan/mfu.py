"""Model FLOPs of an optimizer step, and their share of what the GPUs could do. Imports no torch.

Convention: PaLM's model FLOPs utilization (arXiv 2204.02311, appendix B). The FLOPs are those that the step's forward
and backward need, whatever is recomputed; the denominator is seconds × ranks × the GPU's peak. Where PaLM estimates,
this counts: attention over the keys that a token sees (half of PaLM's number, which leaves out the causal mask), the
output matrix at labelled tokens alone, the input embedding not at all. Every token runs once, in whichever of stage2's
k + 1 passes, and attends to the same keys as in one pass.

P patches of an image, h × w of a frame's grid of them; H hidden width of the tower, T tokens.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from mirage_ds.model.shape import Shape
from mirage_ds.plan.formulas import flops
from mirage_ds.plan.gpus import PEAKS
from mirage_ds.plan.shape import Sizes, sizes


class Tower:
    """A vision tower.

    Attributes:
        embedding: elements of the matrix that a patch goes through first.
        layer: of the matrices of one layer; layers: how many; full: those that attend to a whole frame.
        width: H.
        merger: elements of the two matrices that merged tokens go through.
        merge: patches to a side of a merged token; window: merged tokens to a side of an attention window.
    """

    def __init__(self, model: Shape):
        """Read it from the model's shape."""
        vision: dict[str, Any] = model.config["vision_config"]
        window: int | None = vision.get("window_size")
        self.layers, self.merge = model.layers("visual.blocks."), int(vision["spatial_merge_size"])
        self.embedding = sum(model.elements("visual.patch_embed.", matrices=True))
        self.layer = sum(model.elements("visual.blocks.0.", matrices=True))
        self.full = len(vision["fullatt_block_indexes"]) if window else self.layers
        self.width = model.shapes["visual.blocks.0.attn.proj.weight"][0]
        # DeepStack has a merger for each layer that it adds to.
        self.merger = sum(model.elements("visual.merger", True) + model.elements("visual.deepstack_merger", True))
        self.window = window // self.merge // vision["patch_size"] if window else 1

    def forward(self, grid: Sequence[int]) -> float:
        """FLOPs of encoding one image.

        Args:
            grid: (frames, h, w) in patches.
        """
        frames, rows, columns = grid
        patches = frames * rows * columns
        windowed = _squares(rows, self.window * self.merge) * _squares(columns, self.window * self.merge)
        keys = frames * (self.full * (rows * columns) ** 2 + (self.layers - self.full) * windowed)
        products = patches * (self.embedding + self.layers * self.layer) + patches / self.merge**2 * self.merger
        return 2 * (products + 2 * self.width * keys)

    def backward(self, grid: Sequence[int]) -> float:
        """FLOPs of an image's backward; nobody asks for the pixels' gradient."""
        frames, rows, columns = grid
        return 2 * self.forward(grid) - 2 * frames * rows * columns * self.embedding


def _squares(side: int, window: int) -> int:
    """Sum of the squared lengths of the windows along one side."""
    return side // window * window**2 + (side % window) ** 2


class ModelFlops:
    """Counts what a run's steps need.

    Args:
        train_vision: the tower's backward over input images belongs to the step; train_helpers: that over helpers.
        frozen_text: the text model's weights get no gradient, only its inputs do (scaffold).
    """

    def __init__(self, model: Shape, train_vision: bool, train_helpers: bool, frozen_text: bool = False):
        self.text: Sizes = sizes(model)
        self.tower = Tower(model)
        self.train_vision, self.train_helpers, self.frozen_text = train_vision, train_helpers, frozen_text

    def of_text(self, lengths: Sequence[int], labels: int) -> float:
        """FLOPs of the text model's forward and backward over whole rows.

        Args:
            lengths: tokens of each row; labels: labelled tokens of all of them.
        """
        tokens = sum(lengths)
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        return flops(self.text, tokens, labels, pairs / max(1, tokens), False, self.frozen_text)

    def of_images(self, grids: Iterable[Sequence[int]], helpers: Iterable[Sequence[int]]) -> float:
        """FLOPs of the tower over the images that a step encodes; none where their features were kept.

        Args:
            grids: (frames, h, w) in patches of each input image; helpers: of each helper.
        """
        total = 0.0
        for images, trained in ((grids, self.train_vision), (helpers, self.train_helpers)):
            for grid in images:
                total += self.tower.forward(grid) + (self.tower.backward(grid) if trained else 0)
        return total


def peak_flops(given: float | None, device_name: str | None, precision: str) -> float | None:
    """Peak FLOP/s of a rank; None where neither the settings nor the table say it.

    Args:
        given: --peak_tflops.
        device_name: torch's name of the GPU; None on a CPU.
        precision: "bf16", "tf32" or "fp32" (gpus.Peak).
    """
    if given is not None:
        return given * 1e12
    found = PEAKS.get((device_name or "").removeprefix("NVIDIA ").strip())
    return None if found is None else float(getattr(found, precision))
