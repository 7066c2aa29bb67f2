"""Which of a helper's merged features are averaged into which latent's target.

F merged features of a helper, in raster order on a grid of R rows and C columns; k latents a block.
"""

import numpy as np

from mirage_ds.config.run import Compress

# Permutations of `random` differ with F and k alone, so that a slot means the same places in every helper of one size.
SEED = 2506_17218
DROPPED = -1


def grid_sides(rows: int, columns: int, k: int) -> tuple[int, int] | None:
    """Choose into how many bands of rows and of columns `grid` cuts: a · b = k, blocks as square as can be.

    Returns:
        (a, b); None where no such pair fits into R × C.
    """
    pairs = [(a, k // a) for a in range(1, k + 1) if k % a == 0 and a <= rows and k // a <= columns]
    # Of equally square ones the one with more bands of rows.
    return min(pairs, key=lambda ab: (abs(np.log(rows / ab[0]) - np.log(columns / ab[1])), -ab[0]), default=None)


def pool_groups(rows: int, columns: int, k: int, compress: Compress) -> np.ndarray:
    """Assign a helper's features to its k targets.

    average: k equal contiguous groups in raster order, the last F mod k dropped, as the public code does (arXiv
    2506.17218, equation 2). grid: k blocks of a two-dimensional grid (grid_sides), none dropped. random: k equal groups
    of a fixed permutation of the places, F mod k dropped. first: the first k features, one each.

    Returns:
        (F,) int64: the group of each feature, DROPPED where it is in none.

    Raises:
        ValueError: fewer features than latents, or no grid of k blocks; the message says what the helper has.
    """
    count = rows * columns
    if count < k:
        raise ValueError(f"has {count} merged tokens, fewer than latent_size {k}")
    groups = np.full(count, DROPPED, dtype=np.int64)
    if compress == "first":
        groups[:k] = np.arange(k)
        return groups
    if compress == "grid":
        sides = grid_sides(rows, columns, k)
        if sides is None:
            raise ValueError(f"has {rows} × {columns} merged tokens, which cannot be cut into {k} blocks")
        bands, stripes = (np.arange(n) * side // n for n, side in zip((rows, columns), sides, strict=True))
        return (bands[:, None] * sides[1] + stripes).reshape(-1).astype(np.int64)
    size = count // k
    places = np.arange(count)
    if compress == "random":
        places = np.random.default_rng((SEED, count, k)).permutation(count)
    groups[places[: k * size]] = np.repeat(np.arange(k), size)
    return groups
