"""Images at a lower resolution."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


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
