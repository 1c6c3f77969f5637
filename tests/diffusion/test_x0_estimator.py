"""The two clips by hand, and the learned variance in a chain whose answer is known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.diffusion import NoiseSchedule, Parameterization, schedules
from ddpm_ray.diffusion.samplers import ancestral, learned_log_variance
from ddpm_ray.diffusion.timestep_spacing import uniform_steps
from ddpm_ray.diffusion.x0_estimator import X0Estimator, clip_to_quantile, clip_to_range

LINEAR = NoiseSchedule(schedules.linear(40, 1e-3, 0.3))


def test_the_quantile_of_each_image_becomes_its_range() -> None:
    """Of 0.1, 0.2, ... 2.0 nine tenths lie at or below 1.8: what is larger is cut to it."""
    image = torch.arange(1, 21, dtype=torch.float64) / 10
    x_0 = torch.stack([image, -image, image / 4])
    clip_to_quantile(0.9)(x_0)
    expected = image.clamp(max=1.8) / 1.8
    torch.testing.assert_close(x_0, torch.stack([expected, -expected, image / 4]))


def test_the_largest_pixel_is_the_whole_quantile() -> None:
    x_0 = torch.tensor([[0.5, -4.0, 2.0]])
    clip_to_quantile(1)(x_0)
    assert x_0.tolist() == [[0.125, -1, 0.5]]


@pytest.mark.parametrize("share", [0, -1, 1.5])
def test_a_share_that_is_no_quantile_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"share is {share}; a quantile lies above 0 and at most"):
        clip_to_quantile(share)


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=9))
def test_in_range_both_clips_leave_all_as_it_is(pixels: list[float]) -> None:
    x_0 = torch.tensor([pixels], dtype=torch.float64)
    inside = x_0.clamp(-1, 1)
    for clip in (clip_to_range, clip_to_quantile(0.5)):
        kept = inside.clone()
        clip(kept)
        assert torch.equal(kept, inside)


def test_an_estimate_is_written_where_it_was_asked_to_be() -> None:
    x_t, out = torch.randn(2, 3), torch.empty(2, 3)
    parameterization = Parameterization.of("x_0", LINEAR)
    estimate = X0Estimator(LINEAR, lambda x, t: 3 * x + t[:, None], parameterization, clip=None)
    assert estimate(x_t, 7, out) is out
    torch.testing.assert_close(out, 3 * x_t + 7)


def test_a_learned_variance_is_the_one_that_is_added() -> None:
    """x_0 = 0 is known at each step, so x at a step is noise of the variance that was answered."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        raw = torch.full_like(x_t, -0.5)
        return torch.cat([torch.zeros_like(x_t), raw], 1)

    seen: dict[int, float] = {}
    ancestral(
        X0Estimator(LINEAR, denoise, Parameterization.of("x_0", LINEAR)),
        torch.zeros(1, 1, 4),
        (40, 20, 0),
        noise=lambda t: torch.ones(1, 1, 4),
        variance="learned_range",
        on_step=lambda t, x_t, x_0: seen.update({t: x_t[0, 0, 0].item()}),
    )
    a, a_s = (float(LINEAR.alpha_bar[t]) for t in (40, 20))
    beta = 1 - a / a_s
    small = beta * (1 - a_s) / (1 - a)
    assert seen[20] ** 2 == pytest.approx(beta**0.25 * small**0.75, rel=1e-5)  # eq. 15, v = 1/4


def test_a_variance_of_every_step_is_refused_for_some() -> None:
    with pytest.raises(ValueError, match=r"learned with 2 of 40 steps; .* train learned_range"):
        ancestral(
            X0Estimator(LINEAR, lambda x, t: x),
            torch.zeros(1, 1),
            (40, 20, 0),
            noise=lambda t: torch.zeros(1, 1),
            variance="learned",
        )


def test_a_learned_logarithm_is_taken_as_it_is() -> None:
    """In every step of the chain: exp(raw / 2) times the noise."""
    raw = torch.full((1, 1, 4), -3.0)
    assert torch.equal(learned_log_variance(raw, "learned", raw, raw), raw)
    seen: list[float] = []
    ancestral(
        X0Estimator(
            LINEAR,
            lambda x, t: torch.cat([0 * x, 0 * x - 3], 1),
            Parameterization.of("x_0", LINEAR),
        ),
        torch.zeros(1, 1, 4),
        uniform_steps(40, 40),
        noise=lambda t: torch.ones(1, 1, 4),
        variance="learned",
        on_step=lambda t, x_t, x_0: seen.append(x_t[0, 0, 0].item()),
    )
    assert seen[1] == pytest.approx(math.exp(-1.5))
