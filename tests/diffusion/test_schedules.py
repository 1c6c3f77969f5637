"""Schedules against fifty digits, and what a schedule refuses."""

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.diffusion import NoiseSchedule, add_noise, schedules


def test_linear_ends_where_fifty_digits_say() -> None:
    with mpmath.workdps(50):
        beta = [mpmath.mpf("1e-4") + k * mpmath.mpf("0.0199") / 999 for k in range(1000)]
        reference = float(mpmath.fprod(1 - b for b in beta))
    assert reference == pytest.approx(4.0358e-05, rel=1e-4)
    assert schedules.linear(1000)[-1].item() == pytest.approx(reference, rel=1e-12)


def test_rescaled_linear_is_as_dark_in_a_quarter_of_the_steps() -> None:
    with mpmath.workdps(50):
        beta = [mpmath.mpf("4e-4") + k * mpmath.mpf("0.0796") / 249 for k in range(250)]
        reference = float(mpmath.fprod(1 - b for b in beta))
    assert schedules.linear(250, rescale=True)[-1].item() == pytest.approx(reference, rel=1e-12)
    assert schedules.linear(250)[-1].item() > 1000 * reference, "only the explicit choice rescales"


def test_cosine_follows_fifty_digits_until_the_cap() -> None:
    with mpmath.workdps(50):
        angle = [
            (mpmath.mpf(t) / 1000 + mpmath.mpf("0.008")) / mpmath.mpf("1.008") for t in range(1001)
        ]
        f = [mpmath.cos(mpmath.pi / 2 * share) ** 2 for share in angle]
        reference = [float(value / f[0]) for value in f[:1000]]
        reference.append(reference[-1] * (1 - 0.999))  # f(T) = 0, so beta_T would be 1
    found = schedules.cosine(1000)
    assert found.tolist() == pytest.approx(reference, rel=1e-9)


def test_scaled_linear_ends_where_fifty_digits_say() -> None:
    with mpmath.workdps(50):
        first, last = mpmath.sqrt(mpmath.mpf("0.00085")), mpmath.sqrt(mpmath.mpf("0.012"))
        beta = [(first + k * (last - first) / 999) ** 2 for k in range(1000)]
        reference = float(mpmath.fprod(1 - b for b in beta))
    assert reference == pytest.approx(4.66e-3, rel=1e-3)
    assert schedules.scaled_linear(1000)[-1].item() == pytest.approx(reference, rel=1e-12)


def test_scaled_linear_is_rescaled_as_linear_is() -> None:
    """A constant beta has an evenly spaced root too, so there the two schedules are one."""
    beta = 0.01
    flat = schedules.linear(250, beta, beta, rescale=True)
    assert schedules.scaled_linear(250, beta, beta, rescale=True).tolist() == pytest.approx(
        flat.tolist(), rel=1e-12
    )


def test_sigmoid_follows_fifty_digits_until_the_cap() -> None:
    with mpmath.workdps(50):

        def logistic(x: mpmath.mpf) -> mpmath.mpf:
            return 1 / (1 + mpmath.exp(-x))

        at = [mpmath.mpf(-3) + mpmath.mpf(6) * t / 1000 for t in range(1001)]
        low, high = logistic(at[0]), logistic(at[-1])
        reference = [float((high - logistic(x)) / (high - low)) for x in at[:1000]]
    found = schedules.sigmoid(1000).tolist()
    assert found[:1000] == pytest.approx(reference, rel=1e-9)
    assert found[1000] == pytest.approx(reference[-1] * (1 - 0.999), rel=1e-9)


@given(num_steps=st.integers(2, 400), end=st.floats(0.5, 6), tau=st.floats(0.3, 3))
def test_a_sigmoid_seen_from_both_sides_alike_is_symmetric(
    num_steps: int, end: float, tau: float
) -> None:
    """As much image is left t steps after the start as is gone t steps before the end."""
    a = schedules.sigmoid(num_steps, -end, end, tau)[:-1]  # before the cap
    inner = a[1:]
    assert inner.tolist() == pytest.approx((1 - inner.flip(0)).tolist(), abs=1e-9)


def test_a_sigmoid_stretched_far_is_a_straight_line() -> None:
    a = schedules.sigmoid(100, tau=1e4)
    assert a[:-1].tolist() == pytest.approx([1 - t / 100 for t in range(100)], abs=1e-6)


@pytest.mark.parametrize(
    "kind", [schedules.cosine, schedules.linear, schedules.scaled_linear, schedules.sigmoid]
)
@given(num_steps=st.integers(1, 1500))
def test_every_length_is_a_noise_schedule(kind: object, num_steps: int) -> None:
    assert callable(kind)
    schedule = NoiseSchedule(kind(num_steps))  # raises unless it falls from 1 and stays above 0
    assert schedule.num_steps == num_steps


def test_the_end_of_the_chain_hides_the_image() -> None:
    """L_T, the prior term, is about 1e-5 bits per dimension (Ho et al. 2020, section 4).

    The KL from N(m, s^2) to N(0, 1), averaged over an image of unit variance: torch's own formula,
    with m and s as the forward process has them.
    """
    schedule, last = NoiseSchedule(schedules.linear(1000)), torch.tensor([1000, 1000])
    x_0, none = torch.tensor([[1.0], [-1.0]]).double(), torch.zeros(2, 1).double()
    ends = torch.distributions.Normal(
        add_noise(schedule, x_0, last, none), add_noise(schedule, none, last, none + 1)
    )
    prior = torch.distributions.Normal(0.0, 1.0)
    nats = torch.distributions.kl_divergence(ends, prior).mean().item()
    assert nats / math.log(2) == pytest.approx(2.9112e-05, rel=1e-4)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ((0,), "num_steps is 0; a schedule has at least 1 step"),
        ((10, 0.0, 0.5), r"beta_start is 0; a variance lies in \(0, 1\)"),
        ((10, 0.1, 1.5), r"beta_end is 1\.5; a variance lies in \(0, 1\)"),
        ((10, 0.5, 0.1), r"beta_start is 0\.5, above beta_end, 0\.1; swap them"),
    ],
)
def test_linear_says_what_is_wrong(arguments: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        schedules.linear(*arguments)


def test_linear_names_the_rescaling_that_goes_too_far() -> None:
    with pytest.raises(
        ValueError, match=r"beta_end is 0\.02 and 2 after the rescaling by 1000/10;"
    ):
        schedules.linear(10, rescale=True)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ((0,), "num_steps is 0"),
        ((10, 3.0, 3.0), "start is 3 and end 3; start must lie below end"),
        ((10, -3.0, 3.0, 0.0), "tau is 0; it must be above 0"),
        ((10, -3.0, 3.0, 1.0, 1.0), r"max_beta is 1; a variance lies in \(0, 1\)"),
    ],
)
def test_sigmoid_says_what_is_wrong(arguments: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        schedules.sigmoid(*arguments)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ((0,), "num_steps is 0"),
        ((10, -0.1), r"offset is -0\.1; it must be at least 0"),
        ((10, 0.008, 1.0), r"max_beta is 1; a variance lies in \(0, 1\)"),
    ],
)
def test_cosine_says_what_is_wrong(arguments: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        schedules.cosine(*arguments)
