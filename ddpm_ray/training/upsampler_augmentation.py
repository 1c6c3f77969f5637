"""Augmentation of an upsampler's training images: random crops, blur of the low-resolution image.

(Ramesh et al. 2022, "DALL-E 2", arXiv:2204.06125, section 2.1: crops of a quarter of the target's
pixels, blur and noise.) B: batch.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_ray.counter_rng import Purpose, Step, uniform_float, uniform_int


def cropped(
    x_0: Tensor, low: Tensor, side: int, seed: int, step: Step, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Cut the same random square of `side` pixels from each image and its low-resolution version.

    Both are [B, C, H, W]; returns two [B, C, side, side]. All places within the image are equally
    likely; that of an image depends on seed, step and its position in the global batch.
    """
    height, width = x_0.shape[2:]
    top = uniform_int(seed, Purpose.CROP_ROW, step, positions, height - side + 1)
    left = uniform_int(seed, Purpose.CROP_COLUMN, step, positions, width - side + 1)
    within = torch.arange(side, device=x_0.device)
    rows = (top[:, None] + within)[:, None, :, None]
    columns = (left[:, None] + within)[:, None, None, :]
    image = torch.arange(len(x_0), device=x_0.device)[:, None, None, None]
    channel = torch.arange(x_0.shape[1], device=x_0.device)[None, :, None, None]
    return x_0[image, channel, rows, columns], low[image, channel, rows, columns]


def blurred(
    low: Tensor, most: float, pixels: int, seed: int, step: Step, positions: Tensor
) -> Tensor:
    """Blur enlarged low-resolution images [B, C, H, W] by Gaussians, edges repeated.

    The standard deviation of each is uniform in 0..`most` pixels of the low-resolution image, whose
    shorter side has `pixels`; it depends on seed, step and position in the global batch.
    """
    count, channels, height, width = low.shape
    scale = min(height, width) / pixels  # pixels of `low` for each of the low-resolution image
    sigma = uniform_float(seed, Purpose.BLUR, step, positions, (1,)) * most * scale
    radius = max(1, math.ceil(3 * most * scale))
    places = torch.arange(-radius, radius + 1, device=low.device)
    kernel = torch.exp(-0.5 * (places / sigma.clamp(min=1e-3)).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(low.dtype).repeat_interleave(channels, 0)
    x = low.reshape(1, count * channels, height, width)
    groups = count * channels
    x = F.conv2d(
        F.pad(x, (0, 0, radius, radius), mode="replicate"), kernel[:, None, :, None], groups=groups
    )
    x = F.conv2d(
        F.pad(x, (radius, radius, 0, 0), mode="replicate"), kernel[:, None, None, :], groups=groups
    )
    return x.reshape(low.shape)
