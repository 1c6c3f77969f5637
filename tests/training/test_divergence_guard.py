"""What a spike is: a multiple of the median of the norms before it, and of those alone."""

import json
import math
from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.training.divergence_guard import (
    FEWEST_STEPS,
    MOST_SKIPS,
    WINDOW_STEPS,
    DivergedError,
    DivergenceGuard,
)

NORMS = st.floats(0.0625, 128, width=32)


def accepts(guard: DivergenceGuard, norm: float) -> bool:
    """The decision on the device, which the host notes at once."""
    accepted = bool(guard.accept(torch.tensor(norm)))
    guard.record(norm, accepted=accepted)
    return accepted


@given(norms=st.lists(NORMS, max_size=200), factor=st.floats(1.5, 10), seen=st.integers(1, 200))
def test_what_passes_is_at_most_the_factor_times_the_median_before_it(
    norms: list[float], factor: float, seen: int
) -> None:
    """Whenever the host reads it."""
    guard = DivergenceGuard(factor, skips=True)
    passed: list[float] = []
    pending: list[tuple[float, Tensor]] = []
    rejected = 0
    for norm in norms:
        window = passed[-WINDOW_STEPS:]
        wanted = len(window) < FEWEST_STEPS or norm <= factor * median(window)
        wanted = wanted and rejected <= MOST_SKIPS
        rejected = 0 if wanted else rejected + 1
        pending.append((norm, guard.accept(torch.tensor(norm))))
        if wanted:
            passed.append(norm)
        if len(pending) == seen or norm is norms[-1]:
            for value, accepted in pending:
                guard.record(value, accepted=bool(accepted))
            pending.clear()
            assert guard.norms == passed[-WINDOW_STEPS:]
            assert guard.skipped == rejected


@pytest.mark.parametrize("norm", [math.nan, math.inf])
@pytest.mark.parametrize("factor", [0.0, 5.0])
def test_what_is_no_number_never_passes(norm: float, factor: float) -> None:
    guard = DivergenceGuard(factor, skips=True)
    assert not accepts(guard, norm)
    assert accepts(guard, 1e30)  # without a factor, or a history, any finite one does


@pytest.mark.parametrize("policy", ["stop", "rewind"])
def test_after_a_step_that_ends_or_rewinds_the_run_none_passes_until_it_went_on(
    policy: str,
) -> None:
    guard = DivergenceGuard.of(policy, 0.0)
    assert [bool(guard.accept(torch.tensor(norm))) for norm in (1.0, math.nan, 1.0, 1.0)] == [
        True,
        False,
        False,
        False,
    ]
    guard.record(1.0, accepted=True)
    guard.record(math.nan, accepted=False)
    guard.resume(guard.facts())
    assert (guard.norms, guard.skipped) == ([1.0], 1)
    assert accepts(guard, 2.0)
    assert (guard.norms, guard.skipped) == ([1.0, 2.0], 0)
    assert not accepts(guard, math.nan)


@given(norms=st.lists(NORMS | st.just(math.nan), max_size=60), cut=st.integers(0, 60))
def test_a_guard_that_is_restored_judges_alike(norms: list[float], cut: int) -> None:
    whole, first, second = (DivergenceGuard(2.0, skips=True) for _ in range(3))
    wanted = [accepts(whole, norm) for norm in norms]
    found = [accepts(first, norm) for norm in norms[:cut]]
    second.resume(json.loads(json.dumps(first.facts())))
    assert found + [accepts(second, norm) for norm in norms[cut:]] == wanted
    assert (second.exhausted, second.norms) == (whole.exhausted, whole.norms)


def test_it_is_exhausted_at_once_or_after_many_in_a_row() -> None:
    assert DivergenceGuard(skips=False).exhausted
    guard = DivergenceGuard(skips=True)
    for _ in range(MOST_SKIPS):
        assert not accepts(guard, math.nan)
        assert not guard.exhausted
    assert accepts(guard, 1.0)
    for _ in range(MOST_SKIPS + 1):
        assert not guard.exhausted
        assert not accepts(guard, math.nan)
    assert guard.exhausted
    assert not accepts(guard, 1.0)  # no update of a run that has ended


def test_a_spike_shows_its_limit() -> None:
    error = DivergedError(7, 12.5, 3.25, ["a", "b"])
    assert "step 7: the gradient's norm is 12.5, over 3.25, from 2 samples: a, b;" in str(error)
