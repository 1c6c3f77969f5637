"""Loss and samplers against data whose optimal denoiser is known; see tests/truth.py.

Statistical bounds are 4 standard errors at a fixed seed.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import scipy.stats
import torch
from torch import Tensor

from ddpm_ray.choices import ReverseVariance
from ddpm_ray.diffusion import simple_loss
from ddpm_ray.diffusion.samplers import ancestral, ddim
from ddpm_ray.diffusion.timestep_spacing import uniform_steps
from ddpm_ray.diffusion.x0_estimator import X0Estimator
from tests.truth import CLEAN, LINE, ONE, SCHEDULE, THREE, standard

PERTURBATIONS: list[Callable[[Tensor], Tensor]] = [
    lambda x: 0.1 + 0 * x,
    lambda x: 0.05 * x,
    lambda x: 0.1 * x.sin(),
]


@pytest.mark.parametrize("t", [50, 300, 600, 950])
def test_loss_at_the_optimum_is_what_no_denoiser_can_remove(t: int) -> None:
    """1 - E[E[epsilon | x_t]^2], integrated over x_t on a fine line; whatever is added costs more.

    It costs its own mean square, since the optimum's residual is orthogonal to functions of x_t.
    """
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
    density = LINE.density(x, SCHEDULE.alpha_bar[t].view(1, 1, 1))

    def mean_square(values: Tensor) -> float:
        return float(torch.trapezoid(density * values.flatten().square(), x.flatten()))

    assert mean_square(torch.ones_like(x)) == pytest.approx(1, abs=1e-9)
    optimum = 1 - mean_square(LINE.expected_noise(x, torch.full((len(x),), t)))

    generator, count = torch.Generator().manual_seed(t), 100_000
    x_0, steps = LINE.sample(count, generator), torch.full((count,), t)
    noise = standard(count, generator, LINE)
    best = simple_loss(LINE.expected_noise, SCHEDULE, x_0, steps, noise)
    assert best.shape == (count,)
    assert abs(best.mean() - optimum) < 4 * best.std() / math.sqrt(count)

    for added in PERTURBATIONS:
        off = partial(off_optimum, added)
        excess = simple_loss(off, SCHEDULE, x_0, steps, noise) - best
        error = excess.std() / math.sqrt(count)
        assert abs(excess.mean() - mean_square(added(x))) < 4 * error
        assert excess.mean() > 4 * error


def off_optimum(added: Callable[[Tensor], Tensor], x_t: Tensor, t: Tensor) -> Tensor:
    return LINE.expected_noise(x_t, t) + added(x_t)


def assert_drawn_from_the_mixture(samples: Tensor) -> None:
    """Mean and covariance, share of each component, and each axis's whole law."""
    count, truth = len(samples), THREE
    mean = truth.weight @ truth.mean
    offset = truth.mean - mean
    covariance = (truth.weight * offset.T) @ offset + (truth.weight @ truth.variance).diag()
    centred = samples - mean
    error = samples.std(0) / math.sqrt(count)
    assert (centred.mean(0).abs() < 4 * error).all()
    products = centred[:, :, None] * centred[:, None, :]
    assert ((products.mean(0) - covariance).abs() < 4 * products.std(0) / math.sqrt(count)).all()

    shares = torch.bincount(
        truth.component(samples, CLEAN).argmax(1), minlength=3
    )  # far apart: no doubt
    assert scipy.stats.chisquare(shares.numpy(), (truth.weight * count).numpy()).pvalue > 1e-3
    for axis in range(2):
        m, s = truth.mean[:, axis], truth.variance[:, axis].sqrt()
        law = partial(cumulative, truth.weight, m, s)
        assert scipy.stats.kstest(samples[:, axis].numpy(), law).pvalue > 1e-3


def cumulative(weight: Tensor, mean: Tensor, deviation: Tensor, x: object) -> object:
    z = (torch.as_tensor(x)[:, None] - mean) / deviation
    return (torch.special.ndtr(z) @ weight).numpy()


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_sampling_draws_from_the_data(variance: ReverseVariance) -> None:
    generator = torch.Generator().manual_seed(1)
    x_T = standard(10_000, generator, THREE)
    samples = ancestral(
        X0Estimator(SCHEDULE, THREE.expected_noise, clip=None),
        x_T,
        uniform_steps(1000, 1000),
        noise=lambda t: standard(10_000, generator, THREE),
        variance=variance,
    )
    assert_drawn_from_the_mixture(samples)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_draws_from_the_data(eta: float) -> None:
    generator = torch.Generator().manual_seed(2)
    x_T = standard(10_000, generator, THREE)
    samples = ddim(
        X0Estimator(SCHEDULE, THREE.expected_noise, clip=None),
        x_T,
        uniform_steps(1000, 500),
        eta=eta,
        noise=lambda t: standard(10_000, generator, THREE),
    )
    assert_drawn_from_the_mixture(samples)


def test_ddim_converges_to_the_flow_with_order_one() -> None:
    """For one Gaussian the probability flow only moves and scales: it keeps (x - mean) / deviation.

    (Song et al. 2021, section 4.3: DDIM at eta = 0 is Euler's method for it, so of order 1.)
    """
    x_T = torch.tensor([[-1.5], [0.3], [2.0]], dtype=torch.float64)
    a = SCHEDULE.alpha_bar[-1]
    kept = (x_T - a.sqrt() * ONE.mean) / (a * ONE.variance + 1 - a).sqrt()
    truth = ONE.mean + ONE.variance.sqrt() * kept
    errors = []
    for count in (32, 64, 128, 256):
        end = ddim(
            X0Estimator(SCHEDULE, ONE.expected_noise, clip=None), x_T, uniform_steps(1000, count)
        )
        errors.append(float((end - truth).abs().max()))
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders == pytest.approx([1, 1, 1], abs=0.05)
    assert errors[-1] < 0.01
