"""Schedule diagnostics against torch's own formulas and fifty digits."""

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.diffusion import NoiseSchedule, schedules
from ddpm_ray.diffusion.schedule_diagnostics import diagnose_schedule


def test_the_published_schedule_says_next_to_nothing_of_the_image() -> None:
    """L_T of linear at T = 1000 is -ln(1 - alpha_bar_T) / 2 nats for E[x^2] = 1; fifty digits."""
    with mpmath.workdps(50):
        beta = [mpmath.mpf("1e-4") + k * mpmath.mpf("0.0199") / 999 for k in range(1000)]
        a = mpmath.fprod(1 - b for b in beta)
        bits = float(-mpmath.log(1 - a) / 2 / mpmath.log(2))
    found = diagnose_schedule(NoiseSchedule(schedules.linear(1000)), 1.0, 32 * 32)
    assert found.alpha_bar_T == pytest.approx(float(a), rel=1e-12)
    assert found.prior_bits_per_dim == pytest.approx(bits, rel=1e-9)
    assert found.prior_bits_per_dim == pytest.approx(2.9112e-05, rel=1e-4)
    assert found.wasted_step_fraction == 0


@given(
    pixels=st.lists(st.floats(-1, 1), min_size=1, max_size=20),
    num_steps=st.integers(1, 300),
)
def test_the_prior_term_is_torchs_divergence_over_the_data(
    pixels: list[float], num_steps: int
) -> None:
    schedule = NoiseSchedule(schedules.linear(num_steps))
    x_0, a = torch.tensor(pixels, dtype=torch.float64), schedule.alpha_bar[-1]
    ends = torch.distributions.Normal(a.sqrt() * x_0, (1 - a).sqrt())
    nats = torch.distributions.kl_divergence(ends, torch.distributions.Normal(0.0, 1.0)).mean()
    found = diagnose_schedule(schedule, max(float(x_0.square().mean()), 1e-12), 1)
    assert found.prior_bits_per_dim == pytest.approx(float(nats) / math.log(2), rel=1e-9, abs=1e-12)


def test_few_steps_of_the_published_betas_leave_the_image_in_x_T() -> None:  # noqa: N802
    few, many = (
        diagnose_schedule(NoiseSchedule(schedules.linear(n)), 0.5, 1024) for n in (100, 1000)
    )
    assert few.prior_bits_per_dim > 0.1 > 1e-4 > many.prior_bits_per_dim


def test_steps_in_the_dark_are_counted() -> None:
    """A schedule of two halves: T steps from the picture to -9.9, then T steps that only go on."""
    log_snr = torch.cat([torch.linspace(8, -9.9, 50), torch.linspace(-20, -30, 50)]).double()
    schedule = NoiseSchedule(torch.cat([torch.ones(1).double(), torch.sigmoid(log_snr)]))
    assert diagnose_schedule(schedule, 1.0, 32 * 32).wasted_step_fraction == 0.5


def test_steps_below_half_a_grey_level_are_counted() -> None:
    sigma = torch.tensor([0.2 / 255, 0.9 / 255, 1.1 / 255, 0.5], dtype=torch.float64)
    alpha_bar = 1 / (1 + sigma.square())
    schedule = NoiseSchedule(torch.cat([torch.ones(1).double(), alpha_bar]))
    assert diagnose_schedule(schedule, 1.0, 64).wasted_step_fraction == 0.5


@given(size=st.sampled_from([8, 16, 32, 64, 128]))
def test_larger_images_use_more_of_the_noise(size: int) -> None:
    """Averaging over pixels lifts an image out of noise that hides a small one."""
    schedule = NoiseSchedule(schedules.linear(2000))
    here, larger = (
        diagnose_schedule(schedule, 0.5, n**2).wasted_step_fraction for n in (size, 2 * size)
    )
    assert larger < here


def test_a_schedule_that_ends_in_noise_alone_says_nothing_and_wastes_its_last_step() -> None:
    """L_T is 0 where x_T is independent of x_0; by hand, 999 : 1 is the most noise before."""
    found = diagnose_schedule(NoiseSchedule(schedules.one_over_t(1000)), 0.5, 64)
    assert found.alpha_bar_T == 0
    assert found.prior_bits_per_dim == 0
    assert found.wasted_step_fraction == 1 / 1000
