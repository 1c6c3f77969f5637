"""Likelihoods by the probability flow against densities that are known; see tests/truth.py."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from ddpm_ray.diffusion import NoiseSchedule, Parameterization, schedules
from ddpm_ray.diffusion.process import Denoise
from ddpm_ray.evaluation.probability_flow_likelihood import (
    bits_per_dim,
)
from tests.truth import LINE, ONE, THREE, Mixture

# Evenly spaced angles, and nothing but noise at T: the flow's prior is then no approximation.
ANGLE = torch.linspace(0.05, math.pi / 2, 257, dtype=torch.float64)
ALPHA_BAR = torch.cat([torch.ones(1, dtype=torch.float64), ANGLE.cos().square()])
ALPHA_BAR[-1] = 0
TO_NOISE = NoiseSchedule(ALPHA_BAR)
V = Parameterization.of("v", TO_NOISE)
POINTS = torch.tensor([[-2.5], [-1.2], [0.1], [0.9], [1.6]], dtype=torch.float64)
FULL = range(1, 258)


def optimum(truth: Mixture) -> Denoise:
    """The expected image, as an answer of v."""
    return lambda x, t: V.output_from_x0(x, t, truth.expected_image(x, t, TO_NOISE))


def true_bits(truth: Mixture, x_1: Tensor) -> Tensor:
    density = truth.density(x_1, TO_NOISE.alpha_bar[1].view(1, 1, 1))
    return -density.log2() / x_1.shape[1]


def test_it_converges_to_the_mixtures_density_with_order_two() -> None:
    truth, errors = true_bits(LINE, POINTS), []
    for stride in (8, 4, 2, 1):
        steps = range(1, 258, stride)
        found, _ = bits_per_dim(TO_NOISE, optimum(LINE), POINTS, steps, parameterization=V)
        assert found.shape == (5,)
        errors.append(float((found - truth).abs().max()))
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders == pytest.approx([2, 2, 2], abs=0.2)
    assert errors[-1] < 1e-3


def test_a_gaussian_keeps_its_place_and_its_density() -> None:
    """Its flow only moves and scales: the latent is (x - mean) / deviation (Song et al. 2021)."""
    a = TO_NOISE.alpha_bar[1]
    latent = (POINTS - a.sqrt() * ONE.mean) / (a * ONE.variance + 1 - a).sqrt()
    found, x_T = bits_per_dim(TO_NOISE, optimum(ONE), POINTS, FULL, parameterization=V)
    torch.testing.assert_close(x_T, latent, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(found, true_bits(ONE, POINTS), rtol=2e-3, atol=2e-3)


def test_noise_that_leaves_a_little_signal_is_all_that_a_published_schedule_is_off_by() -> None:
    """Cosine of 1000 steps and a network that predicts the noise: another road there."""
    schedule = NoiseSchedule(schedules.cosine(1000))
    plane = torch.cat([POINTS, POINTS.flip(0)], 1) / 2
    for law, x_1 in ((LINE, POINTS / 2), (THREE, plane)):
        noise: Denoise = partial(law.expected_noise, schedule=schedule)
        found, _ = bits_per_dim(schedule, noise, x_1, range(1, 1001))
        truth = -law.density(x_1, schedule.alpha_bar[1].view(1, 1, 1)).log2() / x_1.shape[1]
        torch.testing.assert_close(found, truth, rtol=2e-3, atol=2e-3)


def test_the_density_of_any_network_has_mass_one() -> None:
    """A flow moves mass and makes none, also where the network knows nothing of the data."""
    x_1 = torch.linspace(-9, 9, 4001, dtype=torch.float64)[:, None]

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * torch.sin(2 * x) - t[:, None] / 500

    found, _ = bits_per_dim(TO_NOISE, denoise, x_1, FULL, parameterization=V)
    density = torch.exp2(-found)
    assert float(torch.trapezoid(density, x_1[:, 0])) == pytest.approx(1, abs=1e-4)
    assert density.max() > 1.2 * torch.distributions.Normal(0, 1).log_prob(torch.zeros(())).exp()


def test_probes_of_all_signs_average_to_the_exact_trace() -> None:
    """In two dimensions (1, 1) and (1, -1) are all: what they see off the diagonal cancels."""
    x_1 = torch.tensor([[-1.5, 0.3], [1.0, 1.0], [0.2, -1.1]], dtype=torch.float64)
    denoise = optimum(THREE)
    exact, x_T = bits_per_dim(TO_NOISE, denoise, x_1, FULL, parameterization=V)
    torch.testing.assert_close(exact, true_bits(THREE, x_1), rtol=1e-2, atol=1e-2)
    estimates = []
    for second in (1.0, -1.0):
        probe = torch.tensor([[1.0, second]], dtype=torch.float64).expand(3, 2)
        bits, same = bits_per_dim(TO_NOISE, denoise, x_1, FULL, parameterization=V, probe=probe)
        assert same.equal(x_T)
        estimates.append(bits)
    assert (estimates[0] - estimates[1]).abs().min() > 1e-3  # each alone is off
    torch.testing.assert_close((estimates[0] + estimates[1]) / 2, exact)


def test_the_network_is_asked_at_the_given_steps_alone_and_left_as_it_was() -> None:
    """In inference mode too, and for images of any shape and type."""
    network, asked = nn.Conv2d(1, 1, 3, padding=1), []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        asked.append(set(t.tolist()))
        model_output: Tensor = network(x)
        return model_output

    with torch.inference_mode():
        x_1 = torch.randn(2, 1, 3, 3)
        kept = x_1.clone()
        found, x_T = bits_per_dim(TO_NOISE, denoise, x_1, [1, 9, 100, 257], parameterization=V)
    assert asked == [{1}, {9}, {9}, {100}, {100}, {257}]
    assert x_1.equal(kept)
    assert (x_T.dtype, x_T.shape) == (torch.float32, x_1.shape)
    assert (found.dtype, found.shape) == (torch.float64, (2,))
    assert not x_T.requires_grad
    assert not found.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    "steps, reason",
    [
        ([257], "must rise from 1 to T = 257"),
        ([2, 257], "must rise from 1 to T = 257"),
        ([1, 256], "must rise from 1 to T = 257"),
        ([1, 9, 9, 257], "go from 9 to 9; they must rise strictly, up to T"),
    ],
)
def test_other_steps_are_refused(steps: list[int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        bits_per_dim(TO_NOISE, optimum(ONE), POINTS, steps, parameterization=V)
