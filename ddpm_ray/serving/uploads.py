"""Uploaded images and masks, in the convention of OpenAI's image API.

Where alpha is 0 the image is to be painted: that of the mask, or of the image itself if there is no
mask. All other pixels are kept, on white where they are partly transparent. In this library a mask
is True where a pixel is known.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from ddpm_ray.data.packing.image_files import (
    FORMATS,
    ORIENTATION,
    BadImageError,
    decode_image,
    to_pixels,
)
from ddpm_ray.sampling.editing import Mask, outpainting_canvas
from ddpm_ray.serving.request_errors import RequestError


class Canvas(NamedTuple):
    """An image to edit."""

    pixels: npt.NDArray[np.uint8]  # [H, W, C]
    known: Mask | None  # [H, W], False where it is to be painted; None: nothing is marked


def read_canvas(
    image: bytes,
    mask: bytes | None,
    channels: int,
    max_pixels: int,
    size: tuple[int, int] | None = None,
) -> Canvas:
    """Read an uploaded image, with its mask, as a canvas of `size` (height, width).

    A canvas larger than the image has it in the middle, and its margins are to be painted; None: of
    the size of the image. Raises RequestError, which names the field.
    """
    pixels, painted = _read("image", image, channels, max_pixels)
    if mask is not None:
        drawn, painted = _read("mask", mask, 0, max_pixels)
        if drawn.shape[:2] != pixels.shape[:2]:
            found, wanted = (" x ".join(map(str, one.shape[1::-1])) for one in (drawn, pixels))
            raise RequestError(f"mask is {found} (width x height), and image {wanted}", "mask")
        if painted is None:
            raise RequestError(
                "mask has no transparent pixel: make alpha 0 where the image is to be painted",
                "mask",
            )
    known = None if painted is None else ~painted
    if size is not None and size[0] * size[1] > max_pixels:
        raise RequestError(
            f"size is {size[1]}x{size[0]}; an image has at most {max_pixels} pixels", "size"
        )
    if size is None or size == pixels.shape[:2]:
        return Canvas(pixels, known)
    if size[0] < pixels.shape[0] or size[1] < pixels.shape[1]:
        found = f"{pixels.shape[1]} x {pixels.shape[0]} (width x height)"
        raise RequestError(
            f"size is {size[1]}x{size[0]}, and image {found}: a canvas is at least as large as the "
            "image; make the image smaller",
            "size",
        )
    return _extended(pixels, known, size)


def _extended(pixels: npt.NDArray[np.uint8], known: Mask | None, size: tuple[int, int]) -> Canvas:
    """The image in the middle of a canvas of `size`."""
    down, right = size[0] - pixels.shape[0], size[1] - pixels.shape[1]
    margins = down // 2, down - down // 2, right // 2, right - right // 2
    larger, kept = outpainting_canvas(pixels[None], *margins)
    if known is not None:
        top, _, left, _ = margins
        kept[top : top + len(known), left : left + known.shape[1]] &= known
    return Canvas(larger[0], kept)


def _read(
    field: str, file: bytes, channels: int, max_pixels: int
) -> tuple[npt.NDArray[np.uint8], Mask | None]:
    """The pixels of a file, and where its alpha is 0; None if it is 0 nowhere."""
    try:
        image = decode_image(file, field, channels, max_pixels).image
        if channels:
            image = image.convert("L" if channels == 1 else "RGB")
        return to_pixels(image), _transparent(field, file)
    except BadImageError as error:
        raise RequestError(f"{field}: {error.args[1]}", field) from error


def _transparent(field: str, file: bytes) -> Mask | None:
    """Return where alpha is 0; None if it is 0 nowhere. The file has been decoded: it is sound."""
    with Image.open(io.BytesIO(file), formats=FORMATS) as image:
        if not image.has_transparency_data:
            return None
        found: Mask = np.asarray(image.convert("RGBA"))[..., 3] == 0
        if found.any() and image.getexif().get(ORIENTATION, 1) != 1:
            problem = "an image with transparent pixels and an orientation tag"
            raise BadImageError(field, problem, "save it upright")
    return found if found.any() else None
