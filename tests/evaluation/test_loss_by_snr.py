"""The loss by log-SNR against denoisers whose loss is known in closed form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.diffusion import NoiseSchedule, schedules
from ddpm_ray.diffusion.process import Denoise
from ddpm_ray.evaluation.loss_by_snr import linear_guess, loss_at_log_snr, steps_at, validation_loss

LEVELS = torch.linspace(-6, 6, 7, dtype=torch.float64)
VARIANCE = 0.3
SCHEDULES = {
    "linear": schedules.linear(1000),
    "cosine of 4000": schedules.cosine(4000),
    "sigmoid of 250": schedules.sigmoid(250),
}


def best(schedule: NoiseSchedule) -> Denoise:
    """E[epsilon | x_t] for x_0 ~ N(0, VARIANCE): the regression of the one on the other."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        a = schedule.at(t, x_t)
        return ((1 - a).sqrt() / (a * VARIANCE + 1 - a)).to(x_t) * x_t

    return denoise


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_best_denoiser_has_the_same_spectrum_under_any_schedule(kind: str) -> None:
    """Of Gaussian data nothing beats the linear guess, so its formula is what is measured."""
    schedule = NoiseSchedule(SCHEDULES[kind])
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(7 * 40, 500, generator=generator, dtype=torch.float64) * VARIANCE**0.5
    noise = torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
    found = loss_at_log_snr(best(schedule), schedule, x_0, noise, LEVELS, VARIANCE)
    # 20,000 pixels a level: a relative standard error of sqrt(2 / 20,000) = 1 %
    assert found.tolist() == pytest.approx(linear_guess(LEVELS, VARIANCE).tolist(), rel=0.04)


def test_the_guess_is_the_variance_of_the_noise_that_is_left() -> None:
    """With equal variances of signal and noise, half of what is seen is noise."""
    even = torch.tensor([0.0], dtype=torch.float64)
    assert linear_guess(even, 1.0).item() == pytest.approx(0.5)
    ends = linear_guess(torch.tensor([-30.0, 30.0], dtype=torch.float64), 1.0)
    assert ends.tolist() == pytest.approx([0, 1], abs=1e-12)


def test_a_level_that_was_never_trained_is_charged_the_guess() -> None:
    """Linear of 100 steps ends at log-SNR -0.56; what the network would say there is not asked."""
    schedule = NoiseSchedule(schedules.linear(100))
    images = torch.zeros(7, 3)
    found = loss_at_log_snr(lambda x, _: x * 0, schedule, images, images + 1, LEVELS, VARIANCE)
    assert found[:3].tolist() == linear_guess(LEVELS, VARIANCE)[:3].tolist()
    assert found[3:].tolist() == [1.0] * 4  # noise of 1 everywhere, guessed as 0


@given(num_steps=st.integers(2, 500), level=st.floats(-12, 12))
def test_the_two_steps_enclose_the_level(num_steps: int, level: float) -> None:
    schedule = NoiseSchedule(schedules.cosine(num_steps))
    wanted = torch.tensor([level], dtype=torch.float64)
    cleaner, noisier, share, reached = steps_at(schedule, wanted)
    high, low = schedule.log_snr(cleaner).item(), schedule.log_snr(noisier).item()
    ends = schedule.log_snr(torch.tensor([1, num_steps]))
    assert reached.item() == (ends[1] <= level <= ends[0])
    if reached:
        assert 0 <= noisier - cleaner <= 1
        assert share.item() * high + (1 - share.item()) * low == pytest.approx(level, abs=1e-9)


@given(st.integers(1, 100))
def test_the_level_of_a_step_is_that_step(t: int) -> None:
    schedule = NoiseSchedule(schedules.linear(100))
    cleaner, noisier, share, reached = steps_at(schedule, schedule.log_snr(torch.tensor([t])))
    at = share * cleaner + (1 - share) * noisier
    assert reached.item()
    assert at.item() == t


def test_each_image_is_seen_at_its_level_with_its_noise() -> None:
    """A denoiser that tells which image it sees: image i adds its loss to level i % K alone."""
    schedule = NoiseSchedule(schedules.linear(1000))
    noise = torch.arange(14.0).view(14, 1)
    found = loss_at_log_snr(lambda x, _: x * 0, schedule, noise * 0, noise, LEVELS, VARIANCE)
    wanted = [(i**2 + (i + 7) ** 2) / 2 for i in range(7)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-12)


def test_between_two_steps_the_loss_is_a_straight_line() -> None:
    """Two steps only, a loss of 0 at the cleaner and of 1 at the noisier one."""
    log_snr = torch.tensor([4.0, -4.0], dtype=torch.float64)
    schedule = NoiseSchedule(torch.cat([torch.ones(1).double(), torch.sigmoid(log_snr)]))
    levels = torch.tensor([2.0, 0.0, -4.0], dtype=torch.float64)
    zeros = torch.zeros(3, 1, dtype=torch.float64)
    found = loss_at_log_snr(
        lambda _, t: 1 - (t[:, None] == 2).double(), schedule, zeros, zeros + 1, levels, VARIANCE
    )
    assert found.tolist() == pytest.approx([0.25, 0.5, 1.0])


@pytest.mark.parametrize("count", [0, 8])
def test_levels_have_equal_shares_of_the_images(count: int) -> None:
    images = torch.zeros(count, 1)
    schedule = NoiseSchedule(schedules.linear(10))
    with pytest.raises(ValueError, match=f"{count} images for 7 levels; give each level the same"):
        loss_at_log_snr(lambda x, _: x, schedule, images, images, LEVELS, VARIANCE)


@given(st.lists(st.floats(0, 1), min_size=7, max_size=7), st.floats(0.01, 1))
def test_the_common_loss_is_a_mean_that_minds_strong_noise_more(
    losses: list[float], more: float
) -> None:
    by_level = torch.tensor(losses, dtype=torch.float64)
    loss = validation_loss(by_level, LEVELS)
    assert min(losses) - 1e-12 <= loss <= max(losses) + 1e-12
    worse = [validation_loss(by_level + more * (level == LEVELS), LEVELS) for level in LEVELS]
    assert worse == sorted(worse, reverse=True)
