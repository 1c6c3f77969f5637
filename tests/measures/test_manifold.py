"""Precision and recall by brute force, and on sets whose overlap is known; the score's two ends."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.measures import manifold
from ddpm_ray.measures.extrapolation import extrapolated
from ddpm_ray.measures.manifold import inception_score, precision_recall


def drawn(count: int, width: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) * scale + shift


def by_brute_force(data: Tensor, samples: Tensor, k: int) -> tuple[float, float]:
    """One pair at a time, in numpy."""

    def covered(balls: Tensor, points: Tensor) -> float:
        ball, point = balls.double().numpy(), points.double().numpy()
        radii = [sorted(np.linalg.norm(ball - b, axis=1))[k] for b in ball]
        inside = [
            any(np.linalg.norm(p - b) <= r for b, r in zip(ball, radii, strict=True)) for p in point
        ]
        return float(np.mean(inside))

    return covered(data, samples), covered(samples, data)


@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize("k", [1, 3])
def test_it_is_what_brute_force_finds(k: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifold, "CHUNK", chunk)
    data, samples = drawn(40, 3, 1), drawn(25, 3, 2, 1.5, 0.5)
    assert precision_recall(data, samples, k) == by_brute_force(data, samples, k)


def test_equal_sets_cover_each_other_and_distant_ones_nothing() -> None:
    data = drawn(50, 4, 3)
    assert precision_recall(data, data.clone()) == (1, 1)
    assert precision_recall(data, data + 100) == (0, 0)


def test_samples_of_one_spot_are_precise_and_recall_little() -> None:
    precision, recall = precision_recall(drawn(300, 2, 4), drawn(300, 2, 5, 0.05))
    assert precision > 0.95
    assert recall < 0.1


def test_a_set_without_neighbours_is_refused() -> None:
    with pytest.raises(ValueError, match="samples has 3 vectors; a radius to the 3rd neighbour"):
        precision_recall(drawn(9, 2, 6), drawn(3, 2, 7))


def test_sure_and_even_classes_score_their_number_and_a_constant_1() -> None:
    sure = torch.eye(7).repeat(20, 1)
    assert inception_score(sure, splits=4) == pytest.approx((7, 0))
    assert inception_score(torch.full((60, 7), 1 / 7)) == pytest.approx((1, 0))


def test_two_kinds_of_doubt_by_hand() -> None:
    """p = (0.9, 0.1) and (0.1, 0.9) in turn: log 2 minus the entropy of 0.9, exponentiated."""
    p = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).repeat(30, 1)
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert inception_score(p, splits=5)[0] == pytest.approx(math.exp(math.log(2) - entropy))
    with pytest.raises(ValueError, match="there are 4 images for 5 splits; draw more"):
        inception_score(p[:4], splits=5)


@given(
    st.floats(-50, 50), st.floats(-1e4, 1e4),
    st.lists(st.integers(10, 10**6), min_size=3, max_size=9, unique=True),
)  # fmt: skip
def test_a_straight_line_in_1_over_n_is_followed_to_its_end(
    end: float, slope: float, counts: list[int]
) -> None:
    value, error = extrapolated(counts, [end + slope / n for n in counts])
    size = abs(end) + max(abs(slope) / n for n in counts)
    spread = max(1 / n for n in counts) / (max(1 / n for n in counts) - min(1 / n for n in counts))
    assert abs(value - end) <= 1e-9 * (1 + size) * spread**2
    assert error <= 1e-6 * (1 + size) * spread**2


def test_the_error_is_the_intercepts_of_ordinary_least_squares() -> None:
    """scipy's linregress, on a line with noise."""
    from scipy.stats import linregress

    counts = [500, 1000, 2000, 4000, 8000]
    scores = [9.1, 7.0, 6.2, 5.4, 5.3]
    fit = linregress([1 / n for n in counts], scores)
    assert extrapolated(counts, scores) == pytest.approx((fit.intercept, fit.intercept_stderr))


@pytest.mark.parametrize("counts", [[10, 20], [10, 20, 20]])
def test_too_few_counts_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="a line and its error need 3 different ones"):
        extrapolated(counts, [1.0] * len(counts))
