"""The flow's likelihood against a Gaussian's density, and the same from any workers."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from ddpm_ray.diffusion import NoiseSchedule, Prediction, schedules
from ddpm_ray.generation.denoiser import Denoiser
from ddpm_ray.training.likelihoods import Likelihood, flow_likelihood
from ddpm_ray.training.workers import Workers
from tests.training.conftest import OnWorkers

SCHEDULE = NoiseSchedule(schedules.cosine(1000))
MEAN, DEVIATION = 0.1, 0.3
PIXELS = torch.randn(24, 4, 4, 3, generator=torch.Generator().manual_seed(4)) * DEVIATION + MEAN
IMAGES = ((PIXELS + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
V = Prediction.of("v", SCHEDULE)


def optimum(x_t: Tensor, t: Tensor, labels: None, condition: None) -> Tensor:
    """v of the regression of x_0 on x_t, for independent pixels of N(0.1, 0.3^2)."""
    a = SCHEDULE.at(t, x_t)
    gain = a.sqrt() * DEVIATION**2 / (a * DEVIATION**2 + 1 - a)
    return V.output(x_t, t, MEAN + gain.to(x_t) * (x_t - a.sqrt().to(x_t) * MEAN))


def found(workers: Workers, steps: int = 120, seed: int = 0) -> Likelihood:
    index = torch.arange(len(IMAGES))[workers.share(len(IMAGES))]
    batches = [(part, IMAGES[part], torch.full_like(part, -1)) for part in index.split(7)]
    denoiser = Denoiser(optimum, V)  # type: ignore[arg-type]
    return flow_likelihood(denoiser, batches, steps=steps, workers=workers, seed=seed)


def test_gaussian_pixels_cost_their_density() -> None:
    """Of a grey level's bin, 1 / 127.5 wide, in bits; the noise within it hardly matters."""
    x_0 = IMAGES.double() / 127.5 - 1
    bits = -Normal(MEAN, DEVIATION).log_prob(x_0) / math.log(2) + math.log2(127.5)
    metrics = found(Workers()).metrics
    assert metrics["eval/likelihood_bits_per_dim"] == pytest.approx(float(bits.mean()), abs=0.01)
    spread = bits.flatten(1).mean(1).std() / math.sqrt(len(IMAGES))
    half = metrics["eval/likelihood_bits_per_dim_high"] - metrics["eval/likelihood_bits_per_dim"]
    assert half == pytest.approx(1.96 * float(spread), rel=0.05)


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_workers_finds_what_one_finds(count: int, on_workers: OnWorkers) -> None:
    one = found(Workers(), 8)
    for other in on_workers(count, lambda workers: found(workers, 8)):
        assert other.certificate == one.certificate
        assert other.metrics == pytest.approx(one.metrics, rel=1e-6)
    assert found(Workers(), 8, seed=1).metrics != one.metrics


def test_a_single_image_has_no_interval() -> None:
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="there are 1 images; an interval needs at least 2"):
        flow_likelihood(
            Denoiser(optimum, V),  # type: ignore[arg-type]
            [(one, IMAGES[:1], one)], steps=4, workers=Workers(),
        )  # fmt: skip
