"""The likelihood of a data set under a model's probability flow, by all workers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_ray import counter_rng
from ddpm_ray.collectives import Workers
from ddpm_ray.counter_rng import Purpose
from ddpm_ray.data.codec import require_pixels
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.diffusion.timestep_spacing import log_snr_steps
from ddpm_ray.evaluation import probability_flow_likelihood
from ddpm_ray.evaluation.confidence_interval import interval_of_mean
from ddpm_ray.sampling.denoiser import Denoiser


@dataclass(frozen=True)
class Likelihood:
    """Bits per dimension of 8-bit images; equal on every worker."""

    metrics: dict[str, float]  # eval/likelihood_bits_per_dim, its _low and _high
    provenance: dict[str, Any]  # plain JSON: what the metrics depend on

    def to_json(self) -> dict[str, Any]:
        """Return the stored form; the key of the provenance is "certificate" there."""
        return {"metrics": self.metrics, "certificate": self.provenance}


def flow_likelihood(
    denoiser: Denoiser,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    steps: int,
    workers: Workers,
    seed: int = 0,
) -> Likelihood:
    """-log2 p per dimension of the images of all workers' `batches`, which all workers must call.

    A batch is as in `vlb_over_dataset.vlb_bits_per_dim`. Each image gets one draw of uniform noise
    within its grey levels, which makes the result a bound in expectation, and one random probe of
    the flow's divergence. The flow is integrated by `steps` steps of Heun's method from t = 1 to T
    (Song et al. 2021, arXiv:2011.13456, section 4.3). It is that of the network itself, without
    guidance (`Denoiser.unguided`). The 95 % interval is Student's over images. Raises ValueError
    for a model of latents and for fewer than 2 images.
    """
    schedule, device = denoiser.schedule, workers.device
    codec = require_pixels(denoiser.codec, "likelihood")
    # Evenly in t the first of 40 steps is from 1 to 25: 28 bits on MNIST instead of 1.5.
    way = log_snr_steps(schedule, steps)[-2::-1]
    a_1 = float(schedule.alpha_bar[1])
    totals = torch.zeros(3, dtype=torch.float64)
    for index, images, labels in batches:
        index, shape = index.to(device), codec.shape(ImageShape(*images.shape[1:]))
        within, side = (
            counter_rng.uniform_float(seed, Purpose.LIKELIHOOD, use, index, shape) for use in (0, 1)
        )
        x_0 = codec.dequantize(images.to(device), within)
        signs = torch.where(side < 0.5, -1.0, 1.0)
        denoise = denoiser.without_variance(denoiser.unguided(Conditioning(labels.to(device))))
        bits, _ = probability_flow_likelihood.bits_per_dim(
            schedule,
            denoise,
            math.sqrt(a_1) * x_0,
            way,
            parameterization=denoiser.parameterization,
            probe=signs,
        )
        bits = (bits - math.log2(a_1) / 2 + math.log2(codec.levels_per_unit)).cpu()
        totals += torch.stack([torch.ones_like(bits), bits, bits.square()]).sum(1)
    count, total, squares = workers.sum_(totals).tolist()
    mean, low, high = interval_of_mean(count, total, squares)
    name = "eval/likelihood_bits_per_dim"
    return Likelihood(
        {name: mean, f"{name}_low": low, f"{name}_high": high},
        {
            "images": int(count),
            "steps": len(way) - 1,
            "num_steps": schedule.num_steps,
            "spacing": "log_snr",
            "seed": seed,
            "probes": 1,
            "dequantisation": "uniform within a grey level",
            "guidance": "none",
            "interval": "95 %, Student's t over images",
        },
    )
