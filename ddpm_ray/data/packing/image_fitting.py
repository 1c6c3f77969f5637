"""Decode the images of a source and bring them to the channels and size of the data set."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.data.dataset import DatasetError, UInt8s
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.packing.image_files import (
    BadImageError,
    decode_image,
    from_pixels,
    to_pixels,
)
from ddpm_ray.data.resizing import resize
from ddpm_ray.data.samples import Sample, Source
from ddpm_ray.redaction import redacted


def first_image(name: str, source: Source, options: PackConfig) -> UInt8s:
    """Return the first good image; it sets the channels and, without a resize, the size.

    Raises BadImageError (on_bad_image "stop"), and DatasetError if no image is good.
    """
    for sample in source.read(range(len(source))):
        try:
            return fit_image(sample, options, None)[0]
        except BadImageError as error:
            if options.on_bad_image == "stop":
                raise suggest_skip(error) from error
    problem = "none of its images can be packed"
    raise DatasetError(redacted(name), problem, "give a source with readable images")


def fit_image(
    sample: Sample, options: PackConfig, image_shape: ImageShape | None
) -> tuple[UInt8s, tuple[str, ...]]:
    """Decode, convert and resize one image; return it with the list of changes made to it.

    The result is uint8 [H, W, C] of shape `image_shape`, or of any shape if that is None. Raises
    BadImageError, and DatasetError for a colour image in a data set whose first image is grey.
    """
    if sample.image is None:
        problem = f"a file of more than {options.max_file_bytes} bytes (max_file_bytes)"
        remedy = "make it smaller, or raise max_file_bytes if you trust it"
        raise BadImageError(sample.location, problem, remedy)
    changes: tuple[str, ...] = ()
    channels = options.channels
    if isinstance(sample.image, bytes):
        image, changes = decode_image(sample.image, sample.location, channels, options.max_pixels)
    else:
        image = from_pixels(sample.image, channels)
    if image_shape and len(image.getbands()) != image_shape.channels:
        if image.mode == "RGB" and _has_colour(image):
            problem = "a colour image, and the first image is grey"
            remedy = "give channels=3 to keep the colours, or channels=1 to make all images grey"
            raise DatasetError(sample.location, problem, remedy)
        image = image.convert("RGB" if image_shape.channels == 3 else "L")  # no value is lost
    fitted = to_pixels(resize(image, options.resize, options.image_size, options.image_width))
    if image_shape and fitted.shape != image_shape:
        height, width, _ = fitted.shape
        problem = f"{width} x {height} pixels, and the first image has {image_shape.width} x "
        remedy = "give resize=centre-crop-box-bicubic and an image_size, which fits every image"
        raise BadImageError(sample.location, f"{problem}{image_shape.height}", remedy)
    return fitted, changes


def suggest_skip(error: BadImageError) -> BadImageError:
    """Return `error` with on_bad_image=skip added to its remedy."""
    file, problem, remedy = error.args
    return BadImageError(file, problem, f"{remedy}, or use on_bad_image=skip")


def _has_colour(image: Image.Image) -> bool:
    red, green, blue = np.moveaxis(to_pixels(image), -1, 0)
    return bool((red != green).any() or (red != blue).any())
