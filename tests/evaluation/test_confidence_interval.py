"""The interval around a score: Student's own where that is exact, and what it covers elsewhere."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ddpm_ray.evaluation.confidence_interval import (
    GROUPS,
    at_infinity,
    enough_for_infinity,
    groups_of,
    interval_of_mean,
    jackknife_interval,
    student_95,
)
from ddpm_ray.evaluation.frechet import frechet_distance


@pytest.mark.parametrize("degrees", [*range(1, 40), 63, 100, 399, 1000, 9999, 50_000])
def test_students_quantile_is_scipys(degrees: int) -> None:
    assert student_95(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-9)


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=30))
def test_the_interval_of_a_mean_is_scipys(values: list[float]) -> None:
    error = stats.sem(values)
    if error < 1e-6:
        return  # scipy's interval of equal values is not a number
    expected = np.mean(values), *stats.t.interval(0.95, len(values) - 1, np.mean(values), error)
    found = interval_of_mean(len(values), sum(values), sum(v**2 for v in values))
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(st.lists(st.floats(10, 20), min_size=GROUPS, max_size=GROUPS))
def test_around_a_mean_it_is_students(groups: list[float]) -> None:
    """Of the mean over equal groups, whose own means are the data of a t interval."""
    total = sum(groups)
    without = [(total - value) / (GROUPS - 1) for value in groups]
    error = stats.sem(groups)
    if error < 1e-9:
        return  # scipy's interval of equal values is not a number
    wanted = stats.t.interval(0.95, GROUPS - 1, loc=total / GROUPS, scale=error)
    assert jackknife_interval(total / GROUPS, without) == pytest.approx(wanted, rel=1e-9)


def test_it_covers_where_the_distance_falls_on_average() -> None:
    """400 draws of 300 Gaussian samples each, seeded: 95 % wanted, 3 standard errors allowed."""
    generator, scores, intervals = np.random.default_rng(0), [], []
    mean, covariance = torch.zeros(3).double(), torch.eye(3).double()

    def distance(samples: torch.Tensor) -> float:
        return frechet_distance(mean, covariance, samples.mean(0), samples.T.cov())

    for _ in range(400):
        samples = torch.from_numpy(generator.normal(0.4, 1.3, size=(300, 3)))
        group = torch.arange(300) % GROUPS
        without = [distance(samples[group != g]) for g in range(GROUPS)]
        scores.append(distance(samples))
        intervals.append(jackknife_interval(scores[-1], without))
    average = float(np.mean(scores))
    covered = np.mean([low <= average <= high for low, high in intervals])
    assert 0.92 <= covered <= 0.98


@pytest.mark.parametrize("features, count", [(3, 20), (8, 20)])
def test_it_covers_the_mean_distance_of_the_fewest_samples_too(features: int, count: int) -> None:
    """Two samples a group, also where the features are nearly as many: 400 draws, seeded."""
    scores, without = zip(*(drawn(features, count, seed) for seed in range(400)), strict=True)
    average = float(np.mean(scores))
    ends = [jackknife_interval(*each) for each in zip(scores, without, strict=True)]
    covered = np.mean([low <= average <= high for low, high in ends])
    assert 0.92 <= covered <= 0.995


@pytest.mark.parametrize("features", [2, 16, 64])
def test_the_distance_of_infinitely_many_samples_is_within_its_interval(features: int) -> None:
    """Of N(0, 1.3^2) beside N(0, 1), known: 0.09 a feature. The fewest samples that are taken.

    Cover 95 %, 3 standard errors and what is left of the bias allowed; and nearly unbiased where
    the distance itself is several times too large.
    """
    draws, count = 250, enough_for_infinity(features)
    truth, found, plain = 0.09 * features, [], []
    for seed in range(draws):
        score, without = drawn(features, count, seed)
        found.append(at_infinity(score, without))
        plain.append(score)
    values, errors = np.array(found).T
    covered = np.mean(np.abs(values - truth) <= stats.t.ppf(0.975, GROUPS - 1) * errors)
    assert 0.91 <= covered <= 0.995
    assert abs(values.mean() - truth) < 0.15 * (np.mean(plain) - truth)


def drawn(features: int, count: int, seed: int) -> tuple[float, list[float]]:
    """The distance of so many samples of N(0, 1.3^2) to N(0, 1), and without each group."""
    mean, covariance = torch.zeros(features).double(), torch.eye(features).double()
    normals = np.random.default_rng(seed).normal(0, 1.3, size=(count, features))
    samples, group = torch.from_numpy(normals), torch.arange(count) % GROUPS

    def distance(of: torch.Tensor) -> float:
        return frechet_distance(mean, covariance, of.mean(0), of.T.cov())

    return distance(samples), [distance(samples[group != g]) for g in range(GROUPS)]


@given(st.integers(1, 60), st.integers(20, 1500))
def test_groups_are_equal_and_hold_every_label_equally(cycle: int, count: int) -> None:
    index, group = torch.arange(count), groups_of(count, cycle)
    for label in range(min(cycle, count)):
        held = torch.bincount(group[index % cycle == label], minlength=GROUPS)
        assert held.max() - held.min() <= 1
    sizes = torch.bincount(group, minlength=GROUPS)
    assert sizes.max() - sizes.min() <= 1
    if cycle == 1:
        assert torch.equal(group, index % GROUPS)


def test_a_distance_has_no_end_below_0() -> None:
    low, high = jackknife_interval(0.1, [0.0, 1.0] * (GROUPS // 2))
    assert low == 0
    assert high > 1
