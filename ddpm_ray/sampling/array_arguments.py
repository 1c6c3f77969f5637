"""Convert the images and masks of a notebook call to arrays, and check its texts; ValueError."""

import os
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpm_ray.config.caption_rule import CaptionError, cleaned
from ddpm_ray.config.option_fields import shown
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.low_resolution import low_resolution_size
from ddpm_ray.sampling.sampling import Images


def as_images(images: Any, channels: int) -> Images:
    """Return uint8 [N, H, W, channels] from an array, a tensor or a list of images.

    Accepts PIL images of mode L or RGB, also in a list. Raises ValueError for anything else.
    """
    if isinstance(images, str | os.PathLike):
        raise ValueError(
            f"images is {shown(images)}; give pixels: open the file with PIL.Image.open and "
            f"convert it to 'RGB', or to 'L' for a model of grey images"
        )
    if _is_picture(images):
        images = [images]
    if isinstance(images, list | tuple):
        listed = [_pixels(one) for one in images]
        for one, array in zip(images, listed, strict=True):
            _require_numbers("images", one, array)
        if len(sizes := {image.shape for image in listed}) > 1:
            raise ValueError(
                f"images are of several sizes ({', '.join(map(str, sorted(sizes)))}); give images "
                f"of one size in each call"
            )
        images = np.stack(listed) if listed else np.zeros(0, np.uint8)
    found = _numbers("images", images)
    sound = found.dtype == np.uint8 and found.ndim == 4 and len(found)
    if not sound or found.shape[3] != channels:
        raise ValueError(
            f"images are {found.dtype} {list(found.shape)}; give uint8 [N, H, W, {channels}], "
            "one image as image[None]"
        )
    return np.require(found, requirements=["C", "W"])


def as_low_resolution(images: Any, image_shape: ImageShape, pixels: int) -> Images:
    """Return uint8 [N, h, w, C] of the size that a model of `image_shape` enlarges.

    `pixels` is its objective.low_resolution_pixels. Raises ValueError as `as_images`, for images of
    another size, and for a model that does not enlarge images.
    """
    found = as_images(images, image_shape.channels)
    if not pixels:
        raise ValueError(
            "this model does not enlarge images; train one with objective.low_resolution_pixels"
        )
    height, width = low_resolution_size(*image_shape[:2], pixels)
    if found.shape[1:3] != (height, width):
        raise ValueError(
            f"images are {found.shape[1]} x {found.shape[2]}; this model enlarges those of "
            f"{height} x {width}"
        )
    return found


def as_mask(mask: Any, images: Images) -> npt.NDArray[np.bool_]:
    """Return the mask as bool [N or 1, 1, H, W], True where a pixel of `images` is known."""
    whole = _numbers("mask", mask)
    if whole.shape not in (images.shape[1:3], images.shape[:3]):
        sizes = whole.shape or ("one number",), images.shape[1:3]
        found, wanted = (" x ".join(map(str, size)) for size in sizes)
        raise ValueError(
            f"mask is {found} and the images {wanted}; give one mask of their height and width, "
            "or one for each"
        )
    keep = whole.astype(bool)
    if not (keep == whole).all():
        raise ValueError(
            f"mask holds {whole[keep != whole][0]}; it is True or 1 where a pixel is known and "
            "False or 0 where one is painted: compare it, as in mask < 128"
        )
    if keep.all() or not keep.any():
        value, effect = ("True", "nothing is") if keep.all() else ("False", "all of it is")
        raise ValueError(
            f"mask is {value} everywhere, so {effect} to be painted; it is True where a pixel is "
            "known: to draw whole images use sample"
        )
    return keep.reshape(-1, 1, *keep.shape[-2:])


def require_text(name: str, text: str) -> None:
    """Raise ValueError, which names the argument, unless `text` is a text that a caption may be."""
    try:
        cleaned(text, "the text")
    except CaptionError as error:
        raise ValueError(f"{name} cannot be used: {error}") from None


def _pixels(image: Any) -> npt.NDArray[Any]:
    """Return [H, W, C] for a PIL image, and the array for anything else."""
    if not _is_picture(image):
        return _array(image)
    if image.mode not in ("L", "RGB"):
        raise ValueError(
            f"images hold a picture of mode {image.mode}; convert it first: "
            f"image.convert('RGB'), or 'L' for a model of grey images"
        )
    found = np.asarray(image)
    return found[..., None] if found.ndim == 2 else found


def _is_picture(value: Any) -> bool:
    """Whether `value` is a PIL image. Does not import PIL: a caller that has one did already."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


def _numbers(name: str, value: Any) -> npt.NDArray[Any]:
    found = _array(value)
    _require_numbers(name, value, found)
    return found


def _require_numbers(name: str, value: Any, found: npt.NDArray[Any]) -> None:
    if found.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds {shown(value)}; give an array of numbers")


def _array(value: Any) -> npt.NDArray[Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype is torch.bfloat16 else value).numpy()
    try:
        return np.asarray(value)
    except ValueError:  # of lists of several lengths
        return np.asarray(value, dtype=object)
