"""Distances against closed forms, exact fractions and SciPy's matrix root."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.evaluation import frechet
from ddpm_ray.evaluation.frechet import (
    Moments,
    frechet_distance,
    frechet_distance_of_features,
    kernel_distance,
)

seeds = st.integers(0, 2**32)


def normals(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def covariance(seed: int, width: int, rank: int | None = None) -> Tensor:
    root = normals(seed, width, rank or 2 * width)
    return root @ root.T / width


def rotation(seed: int, width: int) -> Tensor:
    q: Tensor = torch.linalg.qr(normals(seed, width, width))[0]
    return q


def moments_of(features: Tensor) -> Moments:
    moments = Moments.zeros(features.shape[1])
    moments.update(features)
    return moments


@given(seeds, st.lists(st.integers(0, 12), min_size=1, max_size=6))
def test_moments_are_the_same_however_the_vectors_arrive(seed: int, sizes: list[int]) -> None:
    features = (5 + normals(seed, 2 + sum(sizes), 3)).float()  # a mean far from 0
    merged = moments_of(features[:2])
    for part in torch.split(features[2:], sizes):
        merged.merge(moments_of(part))
    assert int(merged.count) == len(features)
    exact = features.double().numpy()
    torch.testing.assert_close(merged.mean(), torch.from_numpy(exact.mean(0)))
    unbiased = torch.from_numpy(np.cov(exact, rowvar=False))
    torch.testing.assert_close(merged.covariance(), unbiased, rtol=1e-10, atol=1e-10)


def test_moments_travel_as_plain_tensors() -> None:
    moments = moments_of(normals(0, 9, 4).float())
    again = Moments(*moments.tensors())
    assert [tensor.shape for tensor in again.tensors()] == [(1,), (4,), (4, 4)]
    assert {tensor.dtype for tensor in again.tensors()} == {torch.float64}
    assert torch.equal(again.covariance(), moments.covariance())


def test_one_vector_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="1 feature vector: no covariance; at least 2"):
        moments_of(normals(0, 1, 4)).covariance()
    with pytest.raises(ValueError, match="1 feature vector:"):
        frechet_distance_of_features(normals(0, 5, 4), normals(0, 1, 4))
    with pytest.raises(ValueError, match="1 feature vector:"):
        kernel_distance(normals(0, 5, 4), normals(0, 1, 4))


@given(seeds, st.lists(st.tuples(*[st.floats(0, 5)] * 4), min_size=1, max_size=6))
def test_commuting_gaussians_are_apart_by_means_and_standard_deviations(
    seed: int, axes: list[tuple[float, float, float, float]]
) -> None:
    """Sum of (m_1 - m_2)^2 + (s_1 - s_2)^2 over shared axes, singular ones and rotated ones too."""
    m_1, m_2, s_1, s_2 = torch.tensor(axes, dtype=torch.float64).T
    expected = float((m_1 - m_2).square().sum() + (s_1 - s_2).square().sum())
    q = rotation(seed, len(axes))
    cov_1, cov_2 = q @ s_1.square().diag() @ q.T, q @ s_2.square().diag() @ q.T
    found = frechet_distance(q @ m_1, cov_1, q @ m_2, cov_2)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-5)  # half the digits where singular


@given(seeds)
def test_distance_is_symmetric_and_does_not_see_rotations(seed: int) -> None:
    mean_1, mean_2 = normals(seed, 2, 8)
    cov_1, cov_2, q = covariance(seed + 1, 8), covariance(seed + 2, 8), rotation(seed + 3, 8)
    there = frechet_distance(mean_1, cov_1, mean_2, cov_2)
    assert frechet_distance(mean_2, cov_2, mean_1, cov_1) == pytest.approx(there, rel=1e-9)
    rotated = frechet_distance(q @ mean_1, q @ cov_1 @ q.T, q @ mean_2, q @ cov_2 @ q.T)
    assert rotated == pytest.approx(there, rel=1e-9)
    assert frechet_distance(mean_1, cov_1, mean_1, cov_1) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_distance_agrees_with_the_matrix_root_of_scipy(seed: int) -> None:
    mean_1, mean_2 = normals(seed, 2, 64)
    cov_1, cov_2 = covariance(seed + 10, 64), covariance(seed + 20, 64)
    root = scipy.linalg.sqrtm((cov_1 @ cov_2).numpy())
    reference = float((mean_1 - mean_2).square().sum() + (cov_1 + cov_2).trace())
    reference -= 2 * float(np.trace(root).real)
    found = frechet_distance(mean_1, cov_1, mean_2, cov_2)
    assert found == pytest.approx(reference, rel=1e-9)


def test_a_singular_covariance_takes_the_other_root() -> None:
    """Of rank 1, u u^T: the cross term is sqrt(u^T S u), by hand."""
    u, zero, full = normals(0, 16), torch.zeros(16, dtype=torch.float64), covariance(1, 16)
    flat = torch.outer(u, u)
    assert int(torch.linalg.cholesky_ex(flat).info) != 0, "not the case that is meant"
    expected = float(u @ u + full.trace() - 2 * (u @ full @ u).sqrt())
    assert frechet_distance(zero, flat, zero, full) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(zero, full, zero, flat) == pytest.approx(expected, rel=1e-6)


def test_distance_of_features_by_hand() -> None:
    """Variances 2 and 8, means 1 and 3: (1 - 3)^2 + (sqrt 2 - sqrt 8)^2 = 6, turned or not."""
    one, other = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])
    assert frechet_distance_of_features(one, other) == pytest.approx(6)
    axis = rotation(0, 12)[:1]
    assert frechet_distance_of_features(one.double() @ axis, other.double() @ axis) == (
        pytest.approx(6)
    )


@given(seeds, st.integers(2, 20), st.floats(0.1, 10))
def test_few_vectors_keep_all_digits(seed: int, count: int, factor: float) -> None:
    """Vectors `factor` times as long have that times the deviations: (1 - factor)^2 tr(cov)."""
    one = normals(seed, count, 32)
    centred = one - one.mean(0)
    expected = (1 - factor) ** 2 * float(centred.square().sum()) / (count - 1)
    found = frechet_distance_of_features(centred, factor * centred)
    assert found == pytest.approx(expected, rel=1e-11, abs=1e-10)


@given(seeds, st.integers(2, 40), st.integers(2, 40))
def test_distance_of_features_is_that_of_their_moments(seed: int, n_1: int, n_2: int) -> None:
    """For more vectors than features and for fewer, where the covariances are singular."""
    one, other = normals(seed, n_1, 12), 2 * normals(seed + 1, n_2, 12) + 1
    first, second = moments_of(one), moments_of(other)
    by_moments = frechet_distance(
        first.mean(), first.covariance(), second.mean(), second.covariance()
    )
    assert frechet_distance_of_features(one, other) == pytest.approx(by_moments, rel=1e-5)


def test_kernel_distance_by_hand() -> None:
    """D = 1, so (x y + 1)^3. Within {0, 1}: 1. Within {1, 2}: 27. Between: (1 + 1 + 8 + 27) / 4."""
    one, other = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    assert kernel_distance(one, other) == float(1 + 27 - 2 * Fraction(37, 4))
    assert kernel_distance(one.repeat(1, 8), other.repeat(1, 8)) == 9.5  # x . y / D is the same


@pytest.mark.parametrize(
    "points, squared_mmd",
    [
        ((0.0, 1.0), 0),  # the same law twice
        ((1.0, 2.0), Fraction(1 + 1 + 1 + 8, 4) + Fraction(8 + 27 + 27 + 125, 4) - Fraction(37, 2)),
    ],
)
def test_kernel_distance_is_unbiased(points: tuple[float, float], squared_mmd: Fraction) -> None:
    """Its mean over every outcome of 2 + 3 fair draws is the laws' own squared MMD, exactly."""
    outcomes = [
        kernel_distance(torch.tensor(one)[:, None], torch.tensor(other)[:, None])
        for one in itertools.product((0.0, 1.0), repeat=2)
        for other in itertools.product(points, repeat=3)
    ]
    assert math.fsum(outcomes) / len(outcomes) == pytest.approx(float(squared_mmd), abs=1e-12)


def test_kernel_distance_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = normals(0, 10, 5).float(), normals(1, 7, 5).float()
    whole = kernel_distance(one, other)
    monkeypatch.setattr(frechet, "_BLOCK", 3)
    assert kernel_distance(one, other) == pytest.approx(whole, rel=1e-12)
