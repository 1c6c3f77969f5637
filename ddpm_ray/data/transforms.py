"""uint8 pixels to the range of the network, [-1, 1], and images at a lower resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def to_model_range(images: Tensor, flip: Tensor | None = None) -> Tensor:
    """float32 [B, C, H, W] in [-1, 1] from uint8 [B, H, W, C], on the same device.

    `flip` [B] bool mirrors those images left to right.
    """
    x = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    x = x.div_(127.5).sub_(1)
    return x if flip is None else torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)


def downscaled(x_0: Tensor, pixels: int) -> Tensor:
    """Downsample images [B, C, H, W] by averaging, and upsample them to full size.

    The size between is `low_resolution_size`.
    """
    height, width = x_0.shape[2:]
    small = F.adaptive_avg_pool2d(x_0, low_resolution_size(height, width, pixels))
    return enlarged(small, (height, width))


def low_resolution_size(height: int, width: int, pixels: int) -> tuple[int, int]:
    """(h, w) of height x width reduced to a shorter side of `pixels`, in about its proportions."""
    shorter = min(height, width)
    return round(height * pixels / shorter), round(width * pixels / shorter)


def enlarged(images: Tensor, size: Sequence[int]) -> Tensor:
    """Upsample images [B, C, h, w] to `size` (H, W) bilinearly."""
    return F.interpolate(images, size=tuple(size), mode="bilinear")


def mean_square(pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> float:
    """E[x^2] per pixel in [-1, 1], from mean and standard deviation [C] of pixels in 0..255."""
    squares = [(mean / 127.5 - 1) ** 2 for mean in pixel_mean]
    return sum(squares) / len(squares) + pixel_variance(pixel_std)


def pixel_variance(pixel_std: Sequence[float]) -> float:
    """Variance per pixel in [-1, 1], from the standard deviation [C] of pixels in 0..255."""
    return sum((std / 127.5) ** 2 for std in pixel_std) / len(pixel_std)
