"""Resize recipes for packing; the manifest stores the name of the recipe. Needs no torch."""

from __future__ import annotations

from typing import assert_never

from PIL import Image

from ddpm_ray.config.pack import Resize


def resize(image: Image.Image, recipe: Resize, image_size: int) -> Image.Image:
    """Resize an image; all recipes but `none` return image_size x image_size pixels."""
    match recipe:
        case "none":
            return image
        case "centre-crop-box-bicubic":
            return _centre_crop_box_bicubic(image, image_size)
        case _:
            assert_never(recipe)


def _centre_crop_box_bicubic(image: Image.Image, size: int) -> Image.Image:
    """Halve with a box filter while the short side is >= 2 `size`, resize it bicubically, crop.

    The recipe of guided-diffusion for ImageNet and LSUN (Dhariwal and Nichol 2021,
    arXiv:2105.05233).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    fitted = (round(image.width * scale), round(image.height * scale))
    image = image.resize(fitted, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
