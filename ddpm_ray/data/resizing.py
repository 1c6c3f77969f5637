"""Resize recipes for packing, named in the manifest; torch is not needed for them."""

from __future__ import annotations

from typing import assert_never

from PIL import Image

from ddpm_ray.config.pack import Resize


def resized(image: Image.Image, recipe: Resize, image_size: int) -> Image.Image:
    """The image as the recipe makes it; all but `none` give image_size x image_size pixels."""
    match recipe:
        case "none":
            return image
        case "centre-crop-box-bicubic":
            return _centre_crop_box_bicubic(image, image_size)
        case _:
            assert_never(recipe)


def _centre_crop_box_bicubic(image: Image.Image, size: int) -> Image.Image:
    """Halve by box filter while the short side stays >= `size`, bicubic to it, crop the centre.

    The recipe of guided-diffusion (Dhariwal and Nichol 2021, arXiv:2105.05233), whose ImageNet and
    LSUN numbers rest on it.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    fitted = (round(image.width * scale), round(image.height * scale))
    image = image.resize(fitted, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
