"""Resize recipes for packing; the manifest stores the name of the recipe. Needs no torch."""

from __future__ import annotations

from typing import assert_never

from PIL import Image

from ddpm_ray.config.jobs.pack import Resize


def resize(image: Image.Image, recipe: Resize, size: int, width: int = 0) -> Image.Image:
    """Resize an image by a recipe.

    `none` returns the image, `centre-crop-box-bicubic` one of `size` x `width` pixels (H x W; width
    0: square), `shorter-side-box-bicubic` one whose shorter side is `size`, uncropped.
    """
    match recipe:
        case "none":
            return image
        case "centre-crop-box-bicubic":
            return _centre_crop(image, size, width or size)
        case "shorter-side-box-bicubic":
            return _box_bicubic(image, size, size)
        case _:
            assert_never(recipe)


def _centre_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize the image to cover height x width, and crop its centre.

    The recipe of guided-diffusion for ImageNet and LSUN (Dhariwal and Nichol 2021,
    arXiv:2105.05233), whose crops are square.
    """
    image = _box_bicubic(image, height, width)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _box_bicubic(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize the image, keeping its aspect ratio, to the smallest that covers height x width.

    It is halved by a box filter while it is at least twice as large, then resized bicubically.
    """
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    covering = (round(image.width * scale), round(image.height * scale))
    return image.resize(covering, Image.Resampling.BICUBIC)
