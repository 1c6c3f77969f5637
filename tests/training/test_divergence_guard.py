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
    Guard,
)

NORMS = st.floats(0.01, 100)


@given(norms=st.lists(NORMS, max_size=300), factor=st.floats(1.5, 10))
def test_what_passes_is_within_the_factor_of_the_median_before_it(
    norms: list[float], factor: float
) -> None:
    guard = Guard(factor)
    passed: list[float] = []
    for norm in norms:
        window = passed[-WINDOW_STEPS:]
        wanted = len(window) < FEWEST_STEPS or norm <= factor * median(window)
        assert guard.passes(norm) == wanted
        if wanted:
            passed.append(norm)
    assert guard.norms == passed[-WINDOW_STEPS:]


@pytest.mark.parametrize("norm", [math.nan, math.inf])
@pytest.mark.parametrize("factor", [0.0, 5.0])
def test_what_is_no_number_never_passes(norm: float, factor: float) -> None:
    guard = Guard(factor)
    assert not guard.passes(norm)
    assert guard.passes(1e30)  # without a factor, or a history, any finite one does


@given(norms=st.lists(NORMS | st.just(math.nan), max_size=60), cut=st.integers(0, 60))
def test_a_guard_that_is_restored_judges_alike(norms: list[float], cut: int) -> None:
    whole, first, second = Guard(2.0, skips=True), Guard(2.0, skips=True), Guard(2.0, skips=True)
    wanted = [whole.passes(norm) for norm in norms]
    found = [first.passes(norm) for norm in norms[:cut]]
    second.resume(json.loads(json.dumps(first.facts())))
    assert found + [second.passes(norm) for norm in norms[cut:]] == wanted
    assert (second.gives_up, second.norms) == (whole.gives_up, whole.norms)


def test_it_gives_up_at_once_or_after_many_in_a_row() -> None:
    assert Guard(skips=False).gives_up
    guard = Guard(skips=True)
    for _ in range(MOST_SKIPS):
        guard.passes(math.nan)
        assert not guard.gives_up
    guard.passes(math.nan)
    assert guard.gives_up
    guard.passes(1.0)
    assert not guard.gives_up


def test_a_spike_tells_its_limit() -> None:
    error = DivergedError(7, 12.5, 3.25, ["a", "b"])
    assert "step 7: the gradient's norm is 12.5, over 3.25, from 2 samples: a, b;" in str(error)
