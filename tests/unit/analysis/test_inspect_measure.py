"""Numbers about latents against loops and numpy.

n latents, F features, V vocabulary, H hidden, N vectors.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mirage_ds.analysis.inspect import measure


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    a, b = one.tolist(), other.tolist()
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def test_cosines_are_those_of_a_loop() -> None:
    latents, features = drawn(3, 7), 5 * drawn(4, 7, seed=1)
    slow = [[cosine(latent, feature) for feature in features] for latent in latents]
    assert measure.cosines(latents, features).tolist() == [pytest.approx(row, abs=1e-6) for row in slow]


def test_nearest_words_are_ranked_by_cosine_and_not_by_length() -> None:
    latents, matrix = drawn(3, 6), drawn(20, 6, seed=1) * torch.arange(1, 21)[:, None]
    found = measure.nearest(latents, matrix, 4)
    for number, latent in enumerate(latents):
        ranked = sorted(((cosine(latent, word), i) for i, word in enumerate(matrix)), reverse=True)[:4]
        assert found.ids[number].tolist() == [i for _, i in ranked]
        assert found.scores[number].tolist() == pytest.approx([score for score, _ in ranked], abs=1e-6)


def test_the_lens_is_the_softmax_of_the_head() -> None:
    latents, matrix = drawn(2, 6), drawn(9, 6, seed=2)
    found = measure.lens(latents, matrix, 5)
    for number, latent in enumerate(latents.double()):
        powers = [math.exp(float(latent @ word)) for word in matrix.double()]
        ranked = sorted(((power / sum(powers), i) for i, power in enumerate(powers)), reverse=True)[:5]
        assert found.ids[number].tolist() == [i for _, i in ranked]
        assert found.scores[number].tolist() == pytest.approx([score for score, _ in ranked], abs=1e-6)


def test_targets_are_means_of_neighbours_without_the_rest() -> None:
    features = drawn(11, 3)
    pairs = [features[0:2], features[2:4], features[4:6], features[6:8], features[8:10]]
    torch.testing.assert_close(measure.targets(features[None], 5), torch.stack([(a + b) / 2 for a, b in pairs]))


@pytest.mark.parametrize("count", [40, 5])
def test_components_are_those_of_the_centred_matrix(count: int) -> None:
    """Also where there are fewer vectors than dimensions."""
    vectors = drawn(count, 12) * torch.linspace(3, 0.2, 12) + 4
    points, share = measure.components(vectors, 3)
    centred = vectors.double().numpy() - vectors.double().numpy().mean(0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    signs = [np.sign(one[np.abs(one).argmax()]) for one in directions[:3]]
    expected = directions[:3] * np.array(signs)[:, None]
    np.testing.assert_allclose(share.numpy(), singular[:3] ** 2 / (singular**2).sum(), atol=1e-6)
    np.testing.assert_allclose(points.numpy(), centred @ expected.T, atol=1e-4)
