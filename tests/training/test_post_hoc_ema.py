"""Power-function averages against high-precision integrals and against averages that were tracked.

The toy training is a random walk of 20 weights in float64, whose averages are cheap to track.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.training.post_hoc_ema import (
    WIDEST,
    gamma_of,
    power_decay,
    profile_error,
    reconstruct_ema,
    weights,
)

STEPS, SIZE = 1024, 20
widths = st.floats(0.01, WIDEST - 1e-9)


@cache
def tracked(sigma_rel: float) -> Tensor:
    """The average of the random walk after each of its steps, [STEPS, SIZE] float64."""
    walk = torch.randn(STEPS, SIZE, dtype=torch.float64, generator=torch.manual_seed(0)).cumsum(0)
    mean, gamma, after = torch.zeros(SIZE, dtype=torch.float64), gamma_of(sigma_rel), []
    for step, now in enumerate(walk):
        mean = torch.lerp(mean, now, 1 - power_decay(gamma, step))
        after.append(mean)
    return torch.stack(after)


def kept(sigmas: Sequence[float], count: int) -> tuple[list[int], list[float], list[Tensor]]:
    """Steps, exponents and averages of `count` evenly spaced looks at each tracked width."""
    at = [STEPS * (i + 1) // count for i in range(count)]
    ts, gammas = at * len(sigmas), [gamma_of(sigma) for sigma in sigmas for _ in at]
    return ts, gammas, [tracked(sigma)[t - 1].float() for sigma in sigmas for t in at]


def error(sigma_rel: float, sigmas: Sequence[float], count: int) -> float:
    """Relative distance of the average that is made afterwards from the tracked one."""
    ts, gammas, averages = kept(sigmas, count)
    w = weights(ts, gammas, STEPS, gamma_of(sigma_rel))
    made = reconstruct_ema(({"w": each} for each in averages), w)["w"]
    wanted = tracked(sigma_rel)[-1]
    return float((made - wanted).norm() / wanted.norm())


@given(widths)
def test_the_exponent_gives_the_width_that_quadrature_measures(sigma_rel: float) -> None:
    """The standard deviation of the density (gamma + 1) x^gamma on 0..1, integrated by mpmath."""
    gamma = mpmath.mpf(gamma_of(sigma_rel))
    first, second = (
        mpmath.quad(lambda x, k=k: (gamma + 1) * x ** (gamma + k), [0, 0.9, 1]) for k in (1, 2)
    )
    assert float(mpmath.sqrt(second - first**2)) == pytest.approx(sigma_rel, rel=1e-6)


def test_published_exponents() -> None:
    """Karras et al. 2024, section 3.1: widths 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert gamma_of(WIDEST) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.3, float("nan")])
def test_a_width_that_no_profile_has_is_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=r"sigma_rel is .* at most 0.2887 .* try 0.1"):
        gamma_of(sigma_rel)


@given(st.floats(0, 30), st.integers(1, 60))
def test_a_tracked_average_weighs_step_i_by_the_profile_over_it(gamma: float, t: int) -> None:
    """The weight of what stood from i - 1 to i is the integral of the profile there, by mpmath."""
    shares = torch.zeros(t, dtype=torch.float64)
    for step in range(t):
        shares *= power_decay(gamma, step)
        shares[step] += 1 - power_decay(gamma, step)
    exponent, whole = mpmath.mpf(gamma), mpmath.mpf(t)
    for i in {1, (t + 1) // 2, t}:
        part = mpmath.quad(lambda x: (exponent + 1) / whole * (x / whole) ** exponent, [i - 1, i])
        assert shares[i - 1].item() == pytest.approx(float(part), rel=1e-9, abs=1e-15)


def test_at_gamma_0_it_is_the_plain_mean() -> None:
    mean = 0.0
    for step, value in enumerate([4.0, 8.0, -3.0, 7.0]):
        mean += (1 - power_decay(0, step)) * (value - mean)
    assert mean == pytest.approx(4.0)


@given(
    st.lists(st.tuples(st.integers(1, 2000), st.floats(0, 20)), min_size=1, max_size=1),
    st.integers(1, 2000),
    st.floats(0, 20),
)
def test_one_average_is_weighed_by_the_projection_that_quadrature_finds(
    known: list[tuple[int, float]], target_t: int, target_gamma: float
) -> None:
    """<p, q> / <p, p> with both inner products integrated by mpmath, in units of the target's t."""
    ((t, gamma),) = known
    target_t = min(target_t, t)
    share = mpmath.mpf(target_t) / t

    def profile(x: mpmath.mpf, end: mpmath.mpf, exponent: float) -> mpmath.mpf:
        return (exponent + 1) * (x / end) ** mpmath.mpf(exponent) / end

    cross = mpmath.quad(
        lambda x: profile(x, mpmath.mpf(1), gamma) * profile(x, share, target_gamma),
        [0, share / 2, share],
    )
    own = mpmath.quad(lambda x: profile(x, mpmath.mpf(1), gamma) ** 2, [0, 0.5, 1])
    found = weights([t], [gamma], target_t, target_gamma).item()
    assert found == pytest.approx(float(cross / own), rel=1e-6, abs=1e-12)


def test_two_profiles_are_fitted_to_a_line_by_hand() -> None:
    """A slope by two plain means, least squares of steps to a line.

    p_1 = 1 on 0..1, p_2 = 1/2 on 0..2, target x/2: the normal equations [[1, .5], [.5, .5]] w =
    [1/4, 1/2] have the solution w = (-1/2, 3/2), which leaves 1/24 of the target's square, 2/3.
    """
    assert weights([1, 2], [0, 0], 2, 1).tolist() == pytest.approx([-0.5, 1.5])
    assert profile_error([1, 2], [0, 0], 2, 1) == pytest.approx((1 / 24 / (2 / 3)) ** 0.5)


@pytest.mark.parametrize("count", [4, 32])
@pytest.mark.parametrize("sigma_rel", [0.05, 0.1])
def test_a_width_that_was_tracked_comes_back(sigma_rel: float, count: int) -> None:
    """At the last step and at one in between, to float32's rounding."""
    ts, gammas, averages = kept([0.05, 0.1], count)
    for t in (STEPS, STEPS // 2):
        w = weights(ts, gammas, t, gamma_of(sigma_rel))
        made = reconstruct_ema(({"w": each} for each in averages), w)["w"]
        torch.testing.assert_close(made, tracked(sigma_rel)[t - 1].float(), rtol=1e-5, atol=1e-5)
        assert profile_error(ts, gammas, t, gamma_of(sigma_rel)) < 1e-6


@pytest.mark.parametrize("sigma_rel", [0.03, 0.075, 0.15, 0.2, 0.25])
def test_another_width_comes_near_the_one_that_is_tracked(sigma_rel: float) -> None:
    """More looks bring it nearer, and 32 of two widths within half a per cent."""
    few, many = (error(sigma_rel, [0.05, 0.1], count) for count in (4, 32))
    assert many < 5e-3
    assert many < few / 20


def test_the_profile_error_says_which_width_cannot_be_made() -> None:
    ts, gammas, _ = kept([0.05, 0.1], 4)
    near, far = (profile_error(ts, gammas, STEPS, gamma_of(sigma)) for sigma in (0.075, 0.01))
    assert near < 0.05 < 0.5 < far < 1


def test_a_long_run_and_narrow_profiles_stay_finite() -> None:
    """t^gamma is 1e2000 here; neighbours are parallel to four digits."""
    ts, narrow = list(range(10**6, 10**8, 10**6)), gamma_of(0.003)
    w = weights(ts * 2, [narrow] * len(ts) + [gamma_of(0.1)] * len(ts), 10**8 - 10**6, narrow)
    assert w.isfinite().all()
    assert w[len(ts) - 1].item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "ts, gammas, target_t, reason",
    [
        ([], [], 1, "ts has 0 entries"),
        ([1, 2], [1.0], 1, "ts has 2 entries and gammas 1"),
        ([0, 2], [1.0, 1.0], 1, "t of at least 1"),
        ([1, 2], [1.0, 1.0], 3, r"target_t is 3; it must be in 1\.\.2"),
        ([1, 2], [1.0, 1.0], 0, r"target_t is 0; it must be in 1\.\.2"),
    ],
)
def test_what_cannot_be_made_is_refused(
    ts: list[int], gammas: list[float], target_t: int, reason: str
) -> None:
    for ask in (weights, profile_error):
        with pytest.raises(ValueError, match=reason):
            ask(ts, gammas, target_t, 1.0)


def test_snapshots_are_added_one_at_a_time_in_float64() -> None:
    """Large parts that cancel leave what float32 sums would lose; whole numbers are the last's."""
    alive: list[int] = []

    def snapshots() -> Iterator[dict[str, Tensor]]:
        for number, value in enumerate([1e8, 1.0, -1e8]):
            alive.append(number)
            yield {"w": torch.full((2,), value), "n": torch.tensor(number)}

    made = reconstruct_ema(snapshots(), torch.tensor([0.5, 3.0, 0.5], dtype=torch.float64))
    assert made["w"].tolist() == [3, 3]
    assert made["w"].dtype == torch.float32
    assert made["n"].item() == 2
    assert alive == [0, 1, 2]


def test_snapshots_of_another_network_are_refused() -> None:
    pair = [{"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}]
    with pytest.raises(ValueError, match="snapshots differ in 'b'"):
        reconstruct_ema(pair, torch.ones(2))
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is longer"):
        reconstruct_ema(pair[:1], torch.ones(2))
