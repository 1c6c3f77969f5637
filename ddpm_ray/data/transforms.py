"""Images from files to the network's range: resize recipes for packing, [-1, 1] for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, assert_never

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from PIL import Image

Resize = Literal["none", "centre-crop-box-bicubic"]


def resized(image: Image.Image, recipe: Resize, image_size: int) -> Image.Image:
    """The image as the recipe makes it; all but `none` give image_size x image_size pixels."""
    match recipe:
        case "none":
            return image
        case "centre-crop-box-bicubic":
            return _centre_crop_box_bicubic(image, image_size)
        case _:
            assert_never(recipe)


def to_model_range(images: Tensor, flip: Tensor | None = None) -> Tensor:
    """float32 [B, C, H, W] in [-1, 1] from uint8 [B, H, W, C], on the same device.

    `flip` [B] bool mirrors those images left to right.
    """
    x = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    x = x.div_(127.5).sub_(1)
    return x if flip is None else torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)


def lowered(x_0: Tensor, pixels: int) -> Tensor:
    """Images [B, C, H, W] that show no more than pixels x pixels: averaged, and blown up again."""
    return enlarged(F.adaptive_avg_pool2d(x_0, pixels), x_0.shape[2:])


def enlarged(images: Tensor, size: Sequence[int]) -> Tensor:
    """Images [B, C, h, w] blown up to `size` (H, W), bilinearly: no detail is added."""
    return F.interpolate(images, size=tuple(size), mode="bilinear")


def mean_square(pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> float:
    """E[x^2] per pixel in [-1, 1], from mean and standard deviation [C] of pixels in 0..255."""
    squares = [(mean / 127.5 - 1) ** 2 for mean in pixel_mean]
    return sum(squares) / len(squares) + pixel_variance(pixel_std)


def pixel_variance(pixel_std: Sequence[float]) -> float:
    """Variance per pixel in [-1, 1], from the standard deviation [C] of pixels in 0..255."""
    return sum((std / 127.5) ** 2 for std in pixel_std) / len(pixel_std)


def _centre_crop_box_bicubic(image: Image.Image, size: int) -> Image.Image:
    """Halve by box filter while the short side stays >= `size`, bicubic to it, crop the centre.

    The recipe of guided-diffusion (Dhariwal and Nichol 2021, arXiv:2105.05233), whose ImageNet and
    LSUN numbers rest on it.
    """
    from PIL import Image  # for packing alone: training reads pixels

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    fitted = (round(image.width * scale), round(image.height * scale))
    image = image.resize(fitted, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
