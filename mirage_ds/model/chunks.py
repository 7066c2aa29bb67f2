"""How the loss head divides its work (loss.py). Imports no torch: the planner counts with it too.

M labelled positions, C of them in a chunk, V vocabulary, S words in a slice of it, H hidden.
"""

from math import ceil

FLOAT32 = 4
CPU_BYTES = 256 << 20
# Of a GPU's memory. 80 GB give chunks of up to 512 positions over 152,064 words. Each reads the whole matrix, which
# below some 250 positions takes longer than its products; far above, the head would hold more than backward does.
GPU_SHARE = 128
# A GPU multiplies so many rows or columns together, whether all of them are there or not.
TILE = 128


def chunk_budget(gpu_memory: float) -> int:
    """Return the bytes of a chunk where no setting says them; `gpu_memory` in bytes, 0 on a CPU."""
    return int(gpu_memory) // GPU_SHARE or CPU_BYTES


def even(count: int, most: int, tile: int) -> int:
    """Return the size of the fewest parts of at most `most` that make `count`: even, of whole tiles where one fits."""
    tile = tile if most >= tile else 1
    parts = max(1, ceil(count / max(1, most - most % tile)))
    return min(count, tile * ceil(count / parts / tile))


def divide(positions: int, hidden: int, vocabulary: int, budget: int, on_gpu: bool) -> tuple[int, int]:
    """Return C and S, so that what a chunk or a slice holds fits the budget in bytes.

    A chunk: logits and softmax in float32, 8 C V. A slice: logits in float32, their slope in bf16 and the gradient of
    its words in bf16, S (6 M + 2 H); in float32 S (4 M + 4 H).
    """
    tile = TILE if on_gpu else 1
    rows, words = budget // (2 * FLOAT32 * vocabulary), budget // (2 * FLOAT32 * max(positions, hidden))
    return even(positions, rows, tile), even(vocabulary, words, tile)
