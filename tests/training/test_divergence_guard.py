"""What a spike is: a multiple of the median of the norms before it, and of those alone."""

import json
import math
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.training.divergence_guard import (
    FEWEST_STEPS,
    MOST_SKIPS,
    WINDOW_STEPS,
    DivergedError,
    DivergenceGuard,
)

NORMS = st.floats(0.01, 100)


@given(norms=st.lists(NORMS, max_size=300), factor=st.floats(1.5, 10))
def test_what_passes_is_within_the_factor_of_the_median_before_it(
    norms: list[float], factor: float
) -> None:
    guard = DivergenceGuard(factor)
    passed: list[float] = []
    for norm in norms:
        window = passed[-WINDOW_STEPS:]
        wanted = len(window) < FEWEST_STEPS or norm <= factor * median(window)
        assert guard.accept(norm) == wanted
        if wanted:
            passed.append(norm)
    assert guard.norms == passed[-WINDOW_STEPS:]


@pytest.mark.parametrize("norm", [math.nan, math.inf])
@pytest.mark.parametrize("factor", [0.0, 5.0])
def test_what_is_no_number_never_passes(norm: float, factor: float) -> None:
    guard = DivergenceGuard(factor)
    assert not guard.accept(norm)
    assert guard.accept(1e30)  # without a factor, or a history, any finite one does


@given(norms=st.lists(NORMS | st.just(math.nan), max_size=60), cut=st.integers(0, 60))
def test_a_guard_that_is_restored_judges_alike(norms: list[float], cut: int) -> None:
    whole, first, second = (DivergenceGuard(2.0, skips=True) for _ in range(3))
    wanted = [whole.accept(norm) for norm in norms]
    found = [first.accept(norm) for norm in norms[:cut]]
    second.resume(json.loads(json.dumps(first.facts())))
    assert found + [second.accept(norm) for norm in norms[cut:]] == wanted
    assert (second.exhausted, second.norms) == (whole.exhausted, whole.norms)


def test_it_is_exhausted_at_once_or_after_many_in_a_row() -> None:
    assert DivergenceGuard(skips=False).exhausted
    guard = DivergenceGuard(skips=True)
    for _ in range(MOST_SKIPS):
        guard.accept(math.nan)
        assert not guard.exhausted
    guard.accept(math.nan)
    assert guard.exhausted
    guard.accept(1.0)
    assert not guard.exhausted


def test_a_spike_shows_its_limit() -> None:
    error = DivergedError(7, 12.5, 3.25, ["a", "b"])
    assert "step 7: the gradient's norm is 12.5, over 3.25, from 2 samples: a, b;" in str(error)
