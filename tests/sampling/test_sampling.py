"""An image is a function of (seed, index): batches, order and other images do not touch it."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion import schedules
from ddpm_ray.diffusion.process import NoiseSchedule
from ddpm_ray.diffusion.timestep_spacing import uniform_steps
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.sampling import SamplingPlan, draw

T = 20
SCHEDULE = NoiseSchedule(schedules.cosine(T))
SHAPE = ImageShape(8, 8, 1)
PLANS = {
    "ddim": SamplingPlan(uniform_steps(T, 5)),
    "ddim with noise": SamplingPlan(uniform_steps(T, 5), SamplingSettings(eta=0.7, seed=3)),
    "ancestral": SamplingPlan(
        uniform_steps(T, 5), SamplingSettings(sampler="ancestral", clip=False, seed=2**63)
    ),
}


def pointwise(x_t: Tensor, t: Tensor) -> Tensor:
    """A denoiser whose every output element depends on one input element: no sums to reorder."""
    return x_t * 0.5 + t.view(-1, 1, 1, 1) / T


def drawn(plan: SamplingPlan, index: list[int]) -> Tensor:
    return draw(Denoiser.of_noise(pointwise, SCHEDULE), plan, torch.tensor(index), SHAPE, "cpu")


@given(st.sampled_from(sorted(PLANS)), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9))
def test_an_image_does_not_depend_on_its_batch(name: str, index: list[int]) -> None:
    together = drawn(PLANS[name], index)
    for row, i in zip(together, index, strict=True):
        assert torch.equal(row, drawn(PLANS[name], [i])[0])


@pytest.mark.parametrize("name", PLANS)
def test_other_indices_and_other_seeds_are_other_images(name: str) -> None:
    plan = PLANS[name]
    one, other = drawn(plan, [7, 8])
    seed = plan.settings.seed + 1
    reseeded = drawn(SamplingPlan(plan.steps, replace(plan.settings, seed=seed)), [7])
    assert (one != other).float().mean() > 0.5
    assert (one != reseeded[0]).float().mean() > 0.5


def test_noise_of_one_image_at_two_steps_is_not_correlated() -> None:
    """A denoiser that sees x_0 = 0 leaves nothing but the noise; reuse would show at once."""
    states: list[Tensor] = []

    def keep(t: int, x_t: Tensor, x_0: Tensor) -> None:
        states.append(x_t.clone())

    def blind(x_t: Tensor, t: Tensor) -> Tensor:
        return x_t / (1 - SCHEDULE.alpha_bar[t]).sqrt().float().view(-1, 1, 1, 1)

    plan = SamplingPlan(uniform_steps(T, T), SamplingSettings(eta=1.0))
    draw(
        Denoiser.of_noise(blind, SCHEDULE),
        plan,
        torch.arange(16),
        ImageShape(32, 32, 1),
        "cpu",
        on_step=keep,
    )
    alpha_bar = SCHEDULE.alpha_bar
    fresh = []
    for step, (x, x_next) in enumerate(pairwise(states)):
        t = T - step
        a, a_next = alpha_bar[t], alpha_bar[t - 1]
        mean = (a / a_next).sqrt() * (1 - a_next) / (1 - a) * x  # eq. 7 of Ho et al. at x_0 = 0
        fresh.append((x_next - mean).flatten())
    correlation = torch.corrcoef(torch.stack([states[0].flatten(), *fresh]))
    off_diagonal = correlation - torch.eye(len(correlation))
    assert off_diagonal.abs().max() < 5 / 16384**0.5  # five standard errors
