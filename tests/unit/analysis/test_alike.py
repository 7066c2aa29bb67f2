"""How alike latents are, against double loops over pairs, and where the answer is known.

N rows, k latents a row, H hidden.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.alike import slowly

from mirage_ds.analysis import alike
from mirage_ds.analysis.alike import by_degree, effective_rank, measures, rows_of, sentence
from mirage_ds.config.run import LATENT_MEASURES


def drawn(rows: int = 5, k: int = 3, width: int = 7, seed: int = 0) -> torch.Tensor:
    """Latents with a mean, with rows and with slots that differ, in lengths too."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    together = 1 + normal(rows, 1, width) + 0.7 * normal(1, k, width) + 0.3 * normal(rows, k, width)
    return together * (1 + torch.rand(rows, k, 1, generator=draw))


# More vectors than numbers in one, and fewer: another Gram matrix.
@pytest.mark.parametrize("shape", [(5, 3, 7), (4, 2, 30), (2, 2, 3), (9, 4, 2)])
def test_measures_are_the_slow_loops(shape: tuple[int, int, int]) -> None:
    latents = drawn(*shape)
    found, wanted = measures(latents), slowly(latents)
    assert tuple(found) == tuple(wanted) == LATENT_MEASURES == tuple(alike.LABELS)
    assert found == pytest.approx(wanted, rel=1e-9)


def test_equal_latents() -> None:
    found = measures(drawn(1, 1, 6).expand(5, 3, 6))
    wanted = dict(cosine_within=1, cosine_between=1, share_between=0, share_slots=0, effective_rank=1)
    assert found == pytest.approx(wanted, abs=1e-9)


def test_latents_that_differ_by_float32s_rounding_do_not_vary() -> None:
    latents = drawn(1, 1, 64).expand(5, 3, 64) * (1 + 1e-7 * torch.randn(5, 3, 64, generator=torch.Generator()))
    assert measures(latents)["share_between"] == measures(latents)["share_slots"] == 0


def test_orthogonal_latents() -> None:
    found = measures(torch.eye(12).view(4, 3, 12))
    assert found["cosine_within"] == found["cosine_between"] == 0
    assert found["effective_rank"] == pytest.approx(12)


def test_latents_that_differ_by_slot_alone() -> None:
    found = measures(drawn(1, 3, 6).expand(5, 3, 6))
    assert (found["share_between"], found["share_slots"], found["cosine_between"]) == pytest.approx((0, 1, 1))
    assert found["cosine_within"] < 0.99


def test_latents_that_differ_by_row_alone() -> None:
    found = measures(drawn(5, 1, 6).expand(5, 3, 6))
    assert (found["share_between"], found["share_slots"], found["cosine_within"]) == pytest.approx((1, 0, 1))
    assert found["cosine_between"] < 0.99


def test_latents_whose_difference_by_row_is_another_at_each_slot() -> None:
    """What rows add at single slots, with mean zero over slots, is neither share."""
    found = measures(torch.tensor([[[1.0, 0], [-1, 0]], [[-1, 0], [1, 0]]]))
    assert (found["share_between"], found["share_slots"]) == (0, 0)


def test_effective_rank_by_hand() -> None:
    # Singular values 3 and 1: p = 3/4, 1/4.
    assert effective_rank(torch.tensor([[3.0, 0, 0], [0, 1, 0]])) == pytest.approx(4 / 3**0.75)


def test_what_is_not_defined_is_left_out() -> None:
    assert list(measures(drawn(5, 1))) == ["cosine_between", "share_between", "share_slots", "effective_rank"]
    assert list(measures(drawn(1, 5))) == ["cosine_within", "share_between", "share_slots", "effective_rank"]
    broken = drawn()
    broken[2, 1, 0] = math.nan
    assert measures(broken) == {}
    # A zero vector has no direction: it is like no other.
    latents = torch.stack([torch.ones(2, 4), torch.zeros(2, 4)])
    assert (measures(latents)["cosine_within"], measures(latents)["cosine_between"]) == pytest.approx((0.5, 0))
    assert math.isfinite(measures(torch.zeros(2, 2, 4))["effective_rank"])


def test_as_many_vectors_whatever_k() -> None:
    assert [rows_of(k) for k in (1, 2, 4, 8, 3000)] == [1024, 512, 256, 128, 2]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"cosine_between": 0.96, "cosine_within": 0.31},
         "Latents of different rows are nearly alike (mean cosine 0.96): little of them depends on the row; those of "
         "one row are unlike (0.31)."),
        ({"cosine_between": 0.5},
         "Latents of different rows are partly alike (mean cosine 0.50): part of them depends on the row."),
        ({"cosine_between": -1.0},
         "Latents of different rows are unlike (mean cosine -1.00): they depend on the row."),
        ({"cosine_within": 0.8}, "Latents of one row are nearly alike (0.80)."),
        ({}, ""),
    ],
)  # fmt: skip
def test_the_sentence(found: dict[str, float], said: str) -> None:
    assert sentence(found) == said


def test_arms_are_named_by_how_alike_their_latents_are() -> None:
    said = by_degree({"a": 0.9, "b": 0.1, "c": 0.85, "d": 0.6})
    groups = "nearly alike in a (0.90), c (0.85); partly alike in d (0.60); unlike in b (0.10)"
    assert said == f"Latents of different rows are {groups}."
    assert by_degree({}) == ""
