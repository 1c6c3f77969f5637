"""The paper, and nothing else: pure functions over tensors, with torch and the standard library.

Steps are the paper's, t = 1..T; step 0 is the clean image. Start with `process.py`.
"""

from ddpm_ray.diffusion import frechet, samplers, schedules, seeding
from ddpm_ray.diffusion.losses import simple_loss
from ddpm_ray.diffusion.process import (
    Denoise,
    NoiseSchedule,
    add_noise,
    posterior,
    predict_noise,
    predict_x_0,
)

__all__ = [
    "Denoise",
    "NoiseSchedule",
    "add_noise",
    "frechet",
    "posterior",
    "predict_noise",
    "predict_x_0",
    "samplers",
    "schedules",
    "seeding",
    "simple_loss",
]
