"""A linear autoencoder of Gaussian data reaches Shannon's rate-distortion function.

For data of variance lambda_i along orthogonal axes and the loss |x - x_hat|^2 + 2 tau KL, summed
over values, the best autoencoder is the test channel of reverse water-filling (Cover and Thomas,
Elements of Information Theory, section 10.3.3): along axis i its distortion is min(lambda_i, tau)
and its rate 1/2 ln(lambda_i / tau) nats, or 0 for lambda_i < tau.

Nothing is drawn: data and noise are the points of designs with a Gaussian's first two moments,
which is all that the loss depends on. So the numbers are exact.
"""

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ddpm_ray.diffusion import NoiseSchedule, samplers, schedules
from ddpm_ray.diffusion.x0_estimator import X0Estimator
from ddpm_ray.evaluation.frechet import frechet_distance
from ddpm_ray.models.autoencoder import Autoencoder, AutoencoderSpec, Posterior

VARIANCES = torch.tensor([4.0, 1.0, 0.3, 0.05], dtype=torch.float64)  # lambda
TAU = 0.2
D = len(VARIANCES)
ACTIVE = VARIANCES > TAU


def design(variances: Tensor) -> Tensor:
    """2D points [2D, D, 1, 1] of mean 0 and covariance diag(variances)."""
    half = torch.diag((len(variances) * variances).sqrt())
    return torch.cat([half, -half])[:, :, None, None]


def axes() -> Tensor:
    """The orthogonal axes of the data, as columns [D, D]; none is an axis of the pixels."""
    generator = torch.Generator().manual_seed(1)
    orthogonal: Tensor = torch.linalg.qr(
        torch.randn(D, D, dtype=torch.float64, generator=generator)
    ).Q
    return orthogonal


class Trained(NamedTuple):
    """The best linear autoencoder, and what it makes of every pair of a datum and a noise."""

    model: Autoencoder
    x: Tensor  # [pairs, D, 1, 1]
    x_hat: Tensor  # [pairs, D, 1, 1]
    posterior: Posterior


@cache
def trained() -> Trained:
    """Train Autoencoder with a linear encoder and decoder; its noise is Posterior.sample's."""
    torch.manual_seed(0)
    spec = AutoencoderSpec(D, D, 1, (1,), 1, 1, middle_attention=False, latent_convs=False)
    model = Autoencoder(spec)
    model.encoder = nn.Conv2d(D, 2 * D, 1)  # type: ignore[assignment]
    model.decoder = nn.Conv2d(D, D, 1)  # type: ignore[assignment]
    model.double()
    data = torch.einsum("ij,bjhw->bihw", axes(), design(VARIANCES))
    noises = design(torch.ones(D, dtype=torch.float64))
    x = data.repeat_interleave(len(noises), dim=0)
    noise = noises.repeat(len(data), 1, 1, 1)
    parameters = [*model.encoder.parameters(), *model.decoder.parameters()]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=200, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        x_hat, posterior = model(x, noise)
        value = (x_hat - x).square().flatten(1).sum(1) + 2 * TAU * posterior.kl()
        value.mean().backward()
        result: Tensor = value.mean()
        return result

    optimizer.step(loss)
    with torch.no_grad():
        x_hat, posterior = model(x, noise)
    return Trained(model, x, x_hat, posterior)


def covariance(points: Tensor) -> Tensor:
    """That of points [N, D, 1, 1] around 0, [D, D]."""
    rows = points.flatten(1)
    return rows.T @ rows / len(rows)


def along_axes(points: Tensor) -> Tensor:
    """Mean square [D] of points [N, D, 1, 1] along the axes of the data."""
    return (axes().T @ covariance(points) @ axes()).diagonal()


def rates(posterior: Posterior) -> Tensor:
    """KL [D] of each latent channel in nats, by the method that training minimises."""
    return torch.stack(
        [
            Posterior(mean[:, None], log_variance[:, None]).kl().mean()
            for mean, log_variance in zip(
                posterior.mean.unbind(1), posterior.log_variance.unbind(1), strict=True
            )
        ]
    )


def sorted_down(values: Tensor) -> Tensor:
    return values.sort(descending=True).values


def test_distortions_are_those_of_reverse_water_filling() -> None:
    at = trained()
    expected = torch.tensor([0.2, 0.2, 0.2, 0.05], dtype=torch.float64)
    torch.testing.assert_close(along_axes(at.x_hat - at.x), expected, atol=1e-4, rtol=0)


def test_rates_are_shannons() -> None:
    """1/2 ln 20, 1/2 ln 5, 1/2 ln 1.5 nats and none; their sum is the mean KL of an image."""
    posterior = trained().posterior
    expected = torch.tensor([1.497866, 0.804719, 0.202733, 0.0], dtype=torch.float64)
    torch.testing.assert_close(sorted_down(rates(posterior)), expected, atol=1e-4, rtol=0)
    assert posterior.kl().mean().item() == pytest.approx(2.505318, abs=1e-4)


def test_posterior_variances_are_tau_over_lambda_and_one_where_nothing_is_sent() -> None:
    variances = trained().posterior.log_variance.exp()
    expected = torch.tensor([1.0, 0.2 / 0.3, 0.2, 0.05], dtype=torch.float64)
    torch.testing.assert_close(
        sorted_down(variances.mean(0).flatten()), expected, atol=1e-4, rtol=0
    )
    assert variances.std(0).max() < 1e-4  # the same for every image


def test_reconstructions_have_the_variance_that_the_code_keeps() -> None:
    """lambda - tau along each active axis."""
    expected = torch.tensor([3.8, 0.8, 0.1, 0.0], dtype=torch.float64)
    torch.testing.assert_close(along_axes(trained().x_hat), expected, atol=1e-4, rtol=0)


def test_the_aggregate_of_the_latents_is_the_prior() -> None:
    """Var(mean) + E exp(log variance) = 1 per channel: here no latent needs standardising."""
    posterior = trained().posterior
    total = posterior.mean.square().mean(0) + posterior.log_variance.exp().mean(0)
    torch.testing.assert_close(
        total.flatten(), torch.ones(D, dtype=torch.float64), atol=1e-4, rtol=0
    )


def test_the_ceiling_is_the_frechet_distance_of_the_reconstructions() -> None:
    """(2 - sqrt 3.8)^2 + (1 - sqrt 0.8)^2 + (sqrt 0.3 - sqrt 0.1)^2 + 0.05."""
    at, zero = trained(), torch.zeros(D, dtype=torch.float64)
    found = frechet_distance(zero, covariance(at.x), zero, covariance(at.x_hat))
    assert found == pytest.approx(0.117300, abs=1e-4)


@pytest.mark.parametrize("count", [5, 50])
def test_diffusion_in_the_latents_adds_the_error_of_its_steps(count: int) -> None:
    """With the exact denoiser of N(0, 1), a DDIM step multiplies x_t by cos(theta_t - theta_s).

    cos theta is sqrt(alpha_bar). The decoded images miss the data by what the code drops and by the
    product of these factors, which goes to 1 with more steps: then only the ceiling is left.
    """
    schedule = NoiseSchedule(schedules.cosine(1000))
    steps = torch.linspace(1000, 0, count + 1).round().long()

    def exact(x_t: Tensor, t: Tensor) -> Tensor:
        """E[epsilon | x_t] for x_0 from N(0, 1)."""
        return (1 - schedule.at(t, x_t)).sqrt() * x_t

    x_T = design(torch.ones(D, dtype=torch.float64))
    z = samplers.ddim(X0Estimator(schedule, exact, clip=None), x_T, steps.tolist())
    with torch.no_grad():
        images = trained().model.decode(z)
    gain = schedule.alpha_bar[steps].sqrt().acos().diff().cos().prod()
    kept = ((VARIANCES - TAU).clamp(min=0)).sqrt()
    expected = (VARIANCES.sqrt() - gain * kept).square().sum().item()
    zero = torch.zeros(D, dtype=torch.float64)
    found = frechet_distance(zero, covariance(trained().x), zero, covariance(images))
    assert found == pytest.approx(expected, abs=1e-4)
    assert (found < 0.15) == (count == 50)  # the ceiling is 0.117
