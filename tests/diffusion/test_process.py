"""The forward process and its posterior: laws for any schedule, and Bayes by brute force."""

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.diffusion import (
    NoiseSchedule,
    add_noise,
    posterior,
    schedules,
)

betas = st.lists(st.floats(1e-4, 0.9), min_size=1, max_size=12)


def from_beta(beta: list[float]) -> NoiseSchedule:
    alpha_bar = [1.0]
    for b in beta:
        alpha_bar.append(alpha_bar[-1] * (1 - b))
    return NoiseSchedule(torch.tensor(alpha_bar, dtype=torch.float64))


def every_step(schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """Steps 1..T, and a zero image for each."""
    t = torch.arange(1, schedule.num_steps + 1)
    return t, torch.zeros(len(t), 1, 1, dtype=torch.float64)


@given(betas)
def test_one_jump_is_as_many_small_steps(beta: list[float]) -> None:
    """x_t has the mean and variance of t draws of eq. 2, sqrt(1-b) x_{t-1} + sqrt(b) z."""
    schedule = from_beta(beta)
    t, zero = every_step(schedule)
    mean, variance, means, variances = 1.0, 0.0, [], []
    for b in beta:
        mean, variance = mean * (1 - b) ** 0.5, variance * (1 - b) + b
        means.append(mean)
        variances.append(variance)
    assert add_noise(schedule, zero + 1, t, zero).flatten().tolist() == pytest.approx(means)
    spread = add_noise(schedule, zero, t, zero + 1).flatten()
    assert spread.square().tolist() == pytest.approx(variances)


@given(betas)
def test_both_roads_to_the_previous_step_agree(beta: list[float]) -> None:
    """x_0 -> x_t -> x_{t-1} has the mean and the variance of x_0 -> x_{t-1} (eq. 4 with 6, 7)."""
    schedule = from_beta(beta)
    t, zero = every_step(schedule)
    x_0 = zero + 0.7
    mean, _ = posterior(schedule, x_0, add_noise(schedule, x_0, t, zero), t)
    torch.testing.assert_close(mean, add_noise(schedule, x_0, t - 1, zero))
    of_x_t, variance = posterior(schedule, zero, add_noise(schedule, zero, t, zero + 1), t)
    direct = add_noise(schedule, zero, t - 1, zero + 1).square()
    torch.testing.assert_close(of_x_t.square() + variance, direct)


@given(betas, st.floats(-2, 2), st.floats(-2, 2))
def test_posterior_is_what_bayes_says(beta: list[float], x_0: float, x_t: float) -> None:
    """p(x_{t-1} | x_t, x_0) on a fine grid: q(x_{t-1} | x_0) times q(x_t | x_{t-1}), normalised."""
    schedule = from_beta([0.05, *beta])
    t = torch.tensor([schedule.num_steps])
    b, kept = beta[-1], float(schedule.alpha_bar[-2])
    grid = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    before = -(grid - kept**0.5 * x_0).square() / (2 * (1 - kept))  # log densities, but for sums
    after = -(x_t - (1 - b) ** 0.5 * grid).square() / (2 * b)
    weight = torch.softmax(before + after, 0)
    mean = (weight * grid).sum()
    variance = (weight * (grid - mean).square()).sum()
    one = torch.ones(1, 1, dtype=torch.float64)
    found_mean, found_variance = posterior(schedule, x_0 * one, x_t * one, t)
    assert found_mean.item() == pytest.approx(mean.item(), abs=1e-8)
    assert found_variance.item() == pytest.approx(variance.item(), rel=1e-6)


def test_the_first_step_has_no_variance_left() -> None:
    schedule, x = NoiseSchedule(schedules.linear(10)), torch.randn(1, 3, 4, 4)
    mean, variance = posterior(schedule, x, 5 * x, torch.tensor([1]))
    torch.testing.assert_close(mean, x)
    assert variance.flatten().tolist() == [0.0]
    assert torch.equal(add_noise(schedule, x, torch.tensor([0]), 5 * x), x)


def test_float32_images_stay_float32_and_keep_the_first_beta() -> None:
    """At t = 1 the noise has variance 1e-4; float32 arithmetic on alpha_bar gives 1.0002e-4."""
    schedule, zero = NoiseSchedule(schedules.linear(1000)), torch.zeros(1, 1)
    x_t = add_noise(schedule, zero, torch.tensor([1]), zero + 1)
    assert x_t.dtype == torch.float32
    assert x_t.item() ** 2 == pytest.approx(1e-4, rel=1e-6)
    mean, variance = posterior(schedule, zero, zero, torch.tensor([2]))
    assert mean.dtype == variance.dtype == torch.float32


def test_log_snr_has_fifty_digits_behind_it() -> None:
    schedule = NoiseSchedule(schedules.linear(1000))
    with mpmath.workdps(50):
        alpha_bar, reference = mpmath.mpf(1), []
        for k in range(1000):
            alpha_bar *= 1 - (mpmath.mpf("1e-4") + k * mpmath.mpf("0.0199") / 999)
            reference.append(float(mpmath.log(alpha_bar / (1 - alpha_bar))))
    found = schedule.log_snr(torch.arange(1001))
    assert found[0].item() == float("inf")
    assert found[1:].tolist() == pytest.approx(reference, abs=1e-11)


@pytest.mark.parametrize(
    "alpha_bar, complaint",
    [
        (
            torch.tensor([1.0, 0.5]),
            r"alpha_bar is torch.float32 of shape \[2\]; it must be float64",
        ),
        (torch.ones(2, 2).double(), r"float64 of shape \[2, 2\]; it must be float64 \[T\+1\]"),
        (torch.ones(1).double(), "with T >= 1"),
        (torch.tensor([0.9, 0.5]).double(), r"alpha_bar\[0\] is 0\.9; step 0 is the clean image"),
        (torch.tensor([1, 0.5, 0.5]).double(), r"alpha_bar\[2\] is 0\.5 after 0\.5; it must fall"),
        (torch.tensor([1, 0.0, 0.0]).double(), r"alpha_bar\[2\] is 0 after 0; it must fall"),
        (torch.tensor([1, -0.1]).double(), r"alpha_bar\[1\] is -0\.1 after 1; .* no less than 0"),
        (torch.tensor([1, torch.nan]).double(), r"alpha_bar\[1\] is nan after 1;"),
    ],
)
def test_a_table_that_is_no_schedule_is_refused(alpha_bar: Tensor, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        NoiseSchedule(alpha_bar)
