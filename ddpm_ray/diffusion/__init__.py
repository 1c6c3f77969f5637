"""The mathematics of diffusion models: pure functions over tensors, with torch only.

Steps are the paper's, t = 1..T; step 0 is the clean image. Start with `process.py`.
"""

from ddpm_ray.diffusion import samplers, schedules, timestep_spacing
from ddpm_ray.diffusion.losses import simple_loss
from ddpm_ray.diffusion.parameterization import Parameterization, score
from ddpm_ray.diffusion.process import (
    Denoise,
    NoiseSchedule,
    add_noise,
    posterior,
)

__all__ = [
    "Denoise",
    "NoiseSchedule",
    "Parameterization",
    "add_noise",
    "posterior",
    "samplers",
    "schedules",
    "score",
    "simple_loss",
    "timestep_spacing",
]
