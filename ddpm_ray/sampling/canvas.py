"""Fit images and masks to the grid of latents; a factor of 1, that of pixels, changes nothing."""

import logging

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpm_ray.redaction import counted
from ddpm_ray.sampling.sampling import Images

log = logging.getLogger(__name__)


def padded(images: Images, factor: int) -> Images:
    """Repeat the last row and column of images [N, H, W, C] until `factor` divides both sides."""
    height, width = images.shape[1:3]
    bottom, right = -height % factor, -width % factor
    if not (bottom or right):
        return images
    log.info(
        "images of %d x %d (height x width) are padded to %d x %d, as the autoencoder's factor is "
        "%d; the result is cut to their size",
        *(height, width, height + bottom, width + right, factor),
    )
    return np.pad(images, ((0, 0), (0, bottom), (0, right), (0, 0)), mode="edge")


def filled(images: Images, keep: npt.NDArray[np.bool_]) -> Images:
    """Replace unknown pixels of images [N, H, W, C] by the nearest known one in row or column.

    `keep` [N or 1, 1, H, W] is True for known pixels. Where row and column have no known pixel, the
    nearest filled one is taken; an image without known pixels becomes 0. An encoder also sees
    pixels next to a known latent: in a filled image, it sees neither the former content of the
    unknown part nor an edge where the known part ends.
    """
    result = np.empty_like(images)
    for image, mask, out in zip(images, _for_each(keep, len(images)), result, strict=True):
        out[:], known = np.where(mask[..., None], image, 0), mask
        for _ in range(2):  # the first pass fills all rows and columns that have a known pixel
            out[:], known = _filled_along_axes(out, known)
    return result


def _for_each(keep: npt.NDArray[np.bool_], count: int) -> npt.NDArray[np.bool_]:
    """The masks [count, H, W] of `count` images; `keep` is [count or 1, 1, H, W]."""
    return np.broadcast_to(keep[:, 0], (count, *keep.shape[2:]))


def _filled_along_axes(
    image: npt.NDArray[np.uint8], known: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Fill an image [H, W, C] once; return it and the mask [H, W] of pixels that are known now."""
    here, far = np.arange(known.size).reshape(known.shape), known.size
    source, nearest = here, np.where(known, 0, far)
    for axis, stride in ((0, known.shape[1]), (1, 1)):
        before = np.maximum.accumulate(np.where(known, here, -1), axis)
        from_end = np.minimum.accumulate(np.flip(np.where(known, here, far), axis), axis)
        for place in (before, np.flip(from_end, axis)):
            exists = (place >= 0) & (place < far)
            distance = np.where(exists, np.abs(place - here) // stride, far)
            source = np.where(distance < nearest, place, source)
            nearest = np.minimum(distance, nearest)
    return image.reshape(-1, image.shape[2])[source], nearest < far


def known_cells(keep: npt.NDArray[np.bool_], factor: int) -> Tensor:
    """Return the mask [N, 1, h, w] of latents whose pixels are all known, for `keep` [N, 1, H, W].

    Pixels that `padded` adds count as the pixels that they repeat.
    """
    height, width = keep.shape[2:]
    margins = (0, 0), (0, 0), (0, -height % factor), (0, -width % factor)
    whole = np.pad(keep, margins, mode="edge")
    rows, columns = whole.shape[2] // factor, whole.shape[3] // factor
    pixels = torch.from_numpy(whole).view(len(whole), 1, rows, factor, columns, factor)
    cells = pixels.all(5).all(3)
    if lost := int((pixels.flatten(1).any(1) & ~cells.flatten(1).any(1)).sum()):
        log.warning(
            "in %d of %s no latent is known, as none has all its %d x %d pixels known: the "
            "known pixels have no effect on the painted ones",
            *(lost, counted(len(cells), "image"), factor, factor),
        )
    return cells
