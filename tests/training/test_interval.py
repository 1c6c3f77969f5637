"""The interval around a score: Student's own where that is exact, and what it covers elsewhere."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ddpm_ray.measures.frechet import frechet_distance
from ddpm_ray.training.interval import (
    GROUPS,
    groups_of,
    interval_of_mean,
    jackknife_interval,
    student_95,
)


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
