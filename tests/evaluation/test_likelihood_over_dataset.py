"""The flow's likelihood against a Gaussian's density, of any denoiser, from any workers."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Normal

from ddpm_ray import counter_rng
from ddpm_ray.choices import Prediction
from ddpm_ray.collectives import Workers
from ddpm_ray.counter_rng import Purpose
from ddpm_ray.diffusion import NoiseSchedule, Parameterization, schedules
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.diffusion.process import Denoise
from ddpm_ray.evaluation import probability_flow_likelihood
from ddpm_ray.evaluation.likelihood_over_dataset import Likelihood, flow_likelihood
from ddpm_ray.evaluation.vlb_over_dataset import vlb_bits_per_dim
from ddpm_ray.sampling import guidance_models
from ddpm_ray.sampling.conditioning import ConditioningSpec
from ddpm_ray.sampling.denoiser import Denoiser
from tests.diffusion.test_parameterization import KINDS
from tests.fixtures.threaded_workers import OnWorkers

SCHEDULE = NoiseSchedule(schedules.cosine(1000))
MEAN, DEVIATION = 0.1, 0.3
PIXELS = torch.randn(24, 4, 4, 3, generator=torch.Generator().manual_seed(4)) * DEVIATION + MEAN
IMAGES = ((PIXELS + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
V = Parameterization.of("v", SCHEDULE)


def optimum(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """v of the regression of x_0 on x_t, for independent pixels of N(0.1, 0.3^2)."""
    a = SCHEDULE.at(t, x_t)
    gain = a.sqrt() * DEVIATION**2 / (a * DEVIATION**2 + 1 - a)
    return V.output_from_x0(x_t, t, MEAN + gain.to(x_t) * (x_t - a.sqrt().to(x_t) * MEAN))


def found(workers: Workers, steps: int = 120, seed: int = 0) -> Likelihood:
    index = torch.arange(len(IMAGES))[workers.share(len(IMAGES))]
    batches = [(part, IMAGES[part], torch.full_like(part, -1)) for part in index.split(7)]
    denoiser = Denoiser(optimum, V)
    return flow_likelihood(denoiser, batches, steps=steps, workers=workers, seed=seed)


def test_gaussian_pixels_cost_their_density() -> None:
    """Of a grey level's bin, 1 / 127.5 wide, in bits; the noise within it hardly matters."""
    x_0 = IMAGES.double() / 127.5 - 1
    bits = -Normal(MEAN, DEVIATION).log_prob(x_0) / math.log(2) + math.log2(127.5)
    metrics = found(Workers()).metrics
    assert metrics["eval/likelihood_bits_per_dim"] == pytest.approx(float(bits.mean()), abs=0.01)
    of_image = bits.flatten(1).mean(1)
    low, high = stats.t.interval(0.95, len(IMAGES) - 1, 0, stats.sem(of_image))
    half = metrics["eval/likelihood_bits_per_dim_high"] - metrics["eval/likelihood_bits_per_dim"]
    assert half == pytest.approx((high - low) / 2, rel=0.05)


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_workers_finds_what_one_finds(count: int, on_workers: OnWorkers) -> None:
    one = found(Workers(), 8)
    for other in on_workers(count, lambda workers: found(workers, 8)):
        assert other.provenance == one.provenance
        assert other.metrics == pytest.approx(one.metrics, rel=1e-6)
    assert found(Workers(), 8, seed=1).metrics != one.metrics


def test_a_single_image_has_no_interval() -> None:
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="1 image; an interval needs at least 2"):
        flow_likelihood(
            Denoiser(optimum, V),
            [(one, IMAGES[:1], one)],
            steps=4,
            workers=Workers(),
        )


LEVEL = torch.zeros(2, 1, 1, 1, dtype=torch.uint8)
GRID = torch.linspace(-7, 7, 701, dtype=torch.float64).view(-1, 1, 1, 1)
SHORT = NoiseSchedule(schedules.linear(200, 1e-3, 0.1))


def every(kind: Prediction, learned: bool = False, **traits: Any) -> Denoiser:
    """Uses all that it is told: x_t, t, the label, its own last estimate."""
    parameterization = Parameterization.of(kind, SHORT)

    def network(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        labels, images = conditioning.labels, conditioning.images
        a, x_t = SHORT.at(t, x_t), x_t / parameterization.scaled(torch.ones_like(x_t), t)
        image = a.sqrt() * 0.3 * x_t / (a * 0.3 + 1 - a) + 0.1 * torch.sin(2 * x_t)
        image = image if labels is None else image + 0.2 * (labels.view(-1, 1, 1, 1) - 1)
        image = image + 0.3 * images[0] if images else image
        model_output = parameterization.output_from_x0(x_t, t, image)
        return torch.cat([model_output, torch.tanh(x_t)], 1) if learned else model_output

    return Denoiser(network, parameterization, **traits)


def logits(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.cat([-(x_t.flatten(1) - 1).square(), -(x_t.flatten(1) + 1).square()], 1)


PLAIN, LABELLED = every("v"), every("v", takes=ConditioningSpec(3))
DENOISERS = {kind: every(kind) for kind in KINDS} | {
    "learned variance": every("epsilon", learned=True, variance="learned_range"),
    "labels": LABELLED,
    "self-conditioned": every("epsilon", takes=ConditioningSpec(self_conditioning=True)),
    "self-conditioned, labels": every("v", takes=ConditioningSpec(3, self_conditioning=True)),
    "autoguided": replace(
        PLAIN,
        guidance_model=guidance_models.autoguidance(
            PLAIN, every("v", takes=ConditioningSpec(3)), 2.5
        ),
    ),
    "guided by a classifier": replace(
        PLAIN, guidance_model=guidance_models.classifier_guidance(logits, PLAIN, 3.0)
    ),
    "labels, guided by a classifier": replace(
        LABELLED, guidance_model=guidance_models.classifier_guidance(logits, LABELLED, 3.0)
    ),
}


@pytest.mark.parametrize("name", DENOISERS)
def test_the_density_of_every_kind_of_denoiser_has_mass_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the very flow that the likelihood follows, at each point of a line."""
    flows: list[tuple[Denoise, dict[str, Any]]] = []

    def seen(schedule: NoiseSchedule, denoise: Denoise, x: Tensor, way: Any, **more: Any) -> Any:
        flows.append((denoise, {"parameterization": more["parameterization"]}))
        return torch.ones(len(x), dtype=torch.float64), x

    true_bits = probability_flow_likelihood.bits_per_dim
    monkeypatch.setattr(probability_flow_likelihood, "bits_per_dim", seen)
    labels = torch.full((len(GRID),), 1)
    batch = torch.arange(len(GRID)), LEVEL[:1].expand(len(GRID), 1, 1, 1), labels
    flow_likelihood(DENOISERS[name], [batch], steps=100, workers=Workers())
    (denoise, reported), *_ = flows
    bits, _ = true_bits(SHORT, denoise, GRID, range(1, 201), **reported)
    assert float(torch.trapezoid(torch.exp2(-bits), GRID.flatten())) == pytest.approx(1, abs=2e-3)


def test_what_leads_samples_changes_neither_the_likelihood_nor_its_provenance() -> None:
    batch = torch.arange(2), LEVEL + 100, torch.tensor([0, 1])
    one, guided = (
        flow_likelihood(DENOISERS[name], [batch], steps=5, workers=Workers())
        for name in ("labels", "labels, guided by a classifier")
    )
    assert (one.metrics, one.provenance) == (guided.metrics, guided.provenance)
    assert one.provenance["guidance"] == "none"


def test_images_of_any_index_have_noise_of_their_own() -> None:
    """Keys were index x pixels + pixel, modulo 2^32: these two images had the same."""
    batch = IMAGES[:1].expand(2, -1, -1, -1)
    labels = torch.zeros(2, dtype=torch.int64)

    def bits(first: int, second: int) -> float:
        index = torch.tensor([first, second])
        found = flow_likelihood(
            Denoiser(optimum, V), [(index, batch, labels)], steps=4, workers=Workers()
        ).metrics
        return found["eval/likelihood_bits_per_dim_high"] - found["eval/likelihood_bits_per_dim"]

    assert bits(7, 7 + 2**28) > 0  # 2^28 images of 48 numbers: 3 x 2^32
    assert bits(7, 7) == pytest.approx(0, abs=1e-6)


def test_the_bound_and_the_likelihood_of_an_image_share_no_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Purpose] = []
    words = counter_rng._words

    def noted(seed: int, purpose: Purpose, *more: Any) -> Any:
        drawn.append(purpose)
        return words(seed, purpose, *more)

    monkeypatch.setattr(counter_rng, "_words", noted)
    batch = torch.arange(2), IMAGES[:2], torch.zeros(2, dtype=torch.int64)
    denoiser = Denoiser(optimum, V)
    flow_likelihood(denoiser, [batch], steps=2, workers=Workers())
    of_likelihood = {*drawn}
    drawn.clear()
    vlb_bits_per_dim(denoiser, [batch], variance="fixed_small", workers=Workers(), terms=2)
    assert of_likelihood
    assert drawn
    assert of_likelihood.isdisjoint(drawn)


def test_the_interval_of_two_images_holds_the_mean_as_often_as_it_says() -> None:
    """400 pairs of images of nine Gaussian pixels; 1.96 errors hold it in about 70 %."""
    generator, steps = torch.Generator().manual_seed(1), 3
    pixels = torch.randn(800, 3, 3, 1, generator=generator) * DEVIATION + MEAN
    images = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    index, labels = torch.arange(800), torch.full((800,), -1)
    denoiser = Denoiser(optimum, V)
    name = "eval/likelihood_bits_per_dim"

    def of(part: slice) -> dict[str, float]:
        batch = index[part], images[part], labels[part]
        return flow_likelihood(denoiser, [batch], steps=steps, workers=Workers()).metrics

    truth = of(slice(None))[name]
    pairs = [of(slice(start, start + 2)) for start in range(0, 800, 2)]
    held = sum(pair[f"{name}_low"] <= truth <= pair[f"{name}_high"] for pair in pairs) / 400
    assert 0.92 <= held <= 0.98
