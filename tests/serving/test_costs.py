"""The counted cost of a job is the number of rows that its network computes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion import schedules
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import NoiseSchedule
from ddpm_ray.sampling import editing
from ddpm_ray.sampling.conditioning import ConditioningSpec
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.editing import Painting
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.sampling.sampling import sampling_plan
from ddpm_ray.serving.costs import called_steps, network_rows

KNOWN = np.zeros((2, 12, 11, 1), np.uint8)
MASK = np.arange(12 * 11).reshape(12, 11) % 3 > 0
SAMPLERS = (
    "ddim",
    "ancestral",
    "dpm_solver_pp",
    "dpm_solver_pp_sde",
    "unipc",
    "heun",
    "plms",
)
GUIDANCE: tuple[dict[str, float], ...] = (
    {},
    {"guidance_scale": 0.0},
    {"guidance_scale": 3.0},
    {"guidance_scale": 3.0, "guidance_above_sigma": 0.3, "guidance_below_sigma": 5.0},
)


@dataclass
class Counting:
    """A network of zeros that counts its rows."""

    rows: int = 0

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.rows += len(x_t)
        return torch.zeros_like(x_t)


@pytest.fixture
def network() -> Counting:
    return Counting()


@pytest.fixture
def model(network: Counting) -> TrainedModel:
    denoiser = Denoiser(
        network,
        Parameterization.of("epsilon", NoiseSchedule(schedules.cosine(20))),
        takes=ConditioningSpec(num_classes=3),
    )
    return TrainedModel(denoiser, ImageShape(8, 8, 1), provenance={})


def counted(model: TrainedModel, settings: dict[str, Any], images: int, **how: Any) -> int:
    chosen = model.with_settings(**settings).settings
    plan = sampling_plan(chosen, model.denoiser.schedule)
    called = called_steps(model.denoiser, plan, **how)
    return network_rows(model.denoiser, plan, called, images)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_of_samples(
    sampler: str, guidance: dict[str, float], model: TrainedModel, network: Counting
) -> None:
    settings: dict[str, Any] = {"sampler": sampler, "steps": 7, **guidance}
    model.sample(3, **settings)
    assert network.rows == counted(model, settings, 3) > 0


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_of_image_to_image(
    sampler: str, strength: float, model: TrainedModel, network: Counting
) -> None:
    settings: dict[str, Any] = {"sampler": sampler, "steps": 9, "guidance_scale": 2.0}
    model.image_to_image(KNOWN, strength, **settings)
    windows = editing.windows(12, 11, (8, 8))
    assert windows == 4
    assert network.rows == counted(model, settings, 2 * windows, strength=strength)


@pytest.mark.parametrize("method", ["repaint", "replacement"])
def test_of_inpaintings(method: Any, model: TrainedModel, network: Counting) -> None:
    settings: dict[str, Any] = {"sampler": "ancestral", "variance": "fixed_small", "steps": 8}
    how: dict[str, Any] = {"method": method, "resamples": 3, "jump_length": 2}
    model.inpaint(KNOWN, MASK, **how, **settings)
    painting = Painting(**how)
    assert network.rows == counted(model, settings, 2 * 4, painting=painting)
