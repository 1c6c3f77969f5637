"""Fit images and masks to the grid of latents; with factor 1, of pixels, nothing changes."""

import logging

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpm_ray.sampling.sampling import Images

log = logging.getLogger(__name__)


def padded(images: Images, factor: int) -> Images:
    """Repeat the last row and column of images [N, H, W, C] until `factor` divides both sides."""
    height, width = images.shape[1:3]
    bottom, right = -height % factor, -width % factor
    if not (bottom or right):
        return images
    log.info(
        "images of %d x %d are padded to %d x %d, as the autoencoder's factor is %d; the result is "
        "cut to their size",
        *(height, width, height + bottom, width + right, factor),
    )
    return np.pad(images, ((0, 0), (0, bottom), (0, right), (0, 0)), mode="edge")


def known_cells(keep: npt.NDArray[np.bool_], factor: int) -> Tensor:
    """Return the mask [N, 1, h, w] of latents whose pixels are all known, for `keep` [N, 1, H, W].

    Pixels beyond the edge, which `padded` adds, count as those that they repeat.
    """
    height, width = keep.shape[2:]
    margins = (0, 0), (0, 0), (0, -height % factor), (0, -width % factor)
    whole = np.pad(keep, margins, mode="edge")
    rows, columns = whole.shape[2] // factor, whole.shape[3] // factor
    cells = whole.reshape(len(whole), 1, rows, factor, columns, factor)
    return torch.from_numpy(cells.all(axis=(3, 5)))
