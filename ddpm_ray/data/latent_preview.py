"""A fast preview of latents: the linear map to colours with the least squared error.

Each latent is paired with the mean colour of the factor x factor pixels that it covers. Sums of
products are integers, so the map does not depend on how many tasks encoded the images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpm_ray.data.dataset import UInt8s
from ddpm_ray.data.latent_sums import Float16s
from ddpm_ray.data.manifest import Manifest

Gram: TypeAlias = list[list[int]]
"""Sums of products of the columns 1, z_1..z_c, y_1..y_C over all latents.

z: posterior means of the plain view in units of 2^-10, clipped to +-2048; y: sums of the pixels
that a latent covers.
"""

STEPS_PER_UNIT = 2**10  # integer steps of z per unit
LARGEST = 2048  # |z|, in units
# Rows summed in int64 at a time: |z| <= 2^21, and y <= 2^24 up to a downsampling factor of 256.
_ROWS = 2**12
_DEGENERATE = 1e-9  # relative eigenvalue below which a direction of the latents is ignored


@dataclass(frozen=True)
class PreviewMatrix:
    """The map of each standardised latent to RGB or grey levels in 0..255: matrix x_0 + bias."""

    matrix: tuple[tuple[float, ...], ...]  # [C][c]
    bias: tuple[float, ...]  # [C]
    r_squared: float  # share of the variance of the mean colours that the map explains

    @classmethod
    def of_json(cls, held: Mapping[str, Any], channels: int | None) -> PreviewMatrix:
        """Return the map in `held`, as `asdict` wrote it, of latents of `channels` (None: any).

        Raises ValueError, KeyError or TypeError for anything else.
        """
        matrix = tuple(tuple(map(float, row)) for row in held["matrix"])
        bias = tuple(map(float, held["bias"]))
        if (channels and {len(row) for row in matrix} != {channels}) or len(matrix) != len(bias):
            raise ValueError("the preview has another shape")
        return cls(matrix, bias, float(held["r_squared"]))

    def images(self, x_0: Tensor) -> UInt8s:
        """Preview x_0 [B, c, h, w] as uint8 images [B, h, w, C]."""
        matrix = torch.tensor(self.matrix, device=x_0.device)
        bias = torch.tensor(self.bias, device=x_0.device)
        levels = torch.einsum("bchw,dc->bhwd", x_0.float(), matrix) + bias
        images: UInt8s = levels.add_(0.5).clamp_(0, 255).to(torch.uint8).cpu().numpy()
        return images


def gram_of(mean: Float16s, images: UInt8s) -> Gram:
    """Return the sums of products over latents [n, c, h, w] and their images [n, H, W, C]."""
    count, channels, height, width = mean.shape
    factor, colours = images.shape[1] // height, images.shape[3]
    steps, most = mean.astype(np.float64) * STEPS_PER_UNIT, LARGEST * STEPS_PER_UNIT
    z = np.clip(np.rint(steps), -most, most).astype(np.int64)
    z = np.moveaxis(z, 1, -1).reshape(-1, channels)
    blocks = images.reshape(count, height, factor, width, factor, colours)
    y = blocks.sum(axis=(2, 4), dtype=np.int64).reshape(-1, colours)
    columns = np.concatenate([np.ones((len(z), 1), np.int64), z, y], axis=1)
    parts = (columns[at : at + _ROWS] for at in range(0, len(columns), _ROWS))
    return add_grams((part.T @ part).tolist() for part in parts)


def add_grams(grams: Iterable[Gram]) -> Gram:
    """Return the sum of one or more matrices; exact, so their order does not matter."""
    total: Gram = np.array(list(grams), dtype=object).sum(axis=0).tolist()
    return total


def fit_preview(gram: Gram, manifest: Manifest) -> PreviewMatrix:
    """Return the least-squares map of a set of latents; directions without variance get 0."""
    shape = manifest.latent_shape
    assert shape is not None
    factor, c = manifest.image_shape.height // shape.height, shape.channels
    exact = np.array(gram, dtype=object)
    count, sums = int(exact[0, 0]), exact[0, 1:]
    covariance = (count * exact[1:, 1:] - np.outer(sums, sums)) / count**2  # exact up to here
    covariance, means = covariance.astype(np.float64), (sums / count).astype(np.float64)
    slopes = _slopes(covariance[:c, :c], covariance[:c, c:])  # [c, C], of y by z
    total = float(np.trace(covariance[c:, c:]))
    explained = float((slopes * covariance[:c, c:]).sum())
    area, mean, std = factor**2, np.array(manifest.latent_mean), np.array(manifest.latent_std)
    matrix = slopes * (std * STEPS_PER_UNIT)[:, None] / area
    bias = (means[c:] + (mean * STEPS_PER_UNIT - means[:c]) @ slopes) / area
    return PreviewMatrix(
        tuple(map(tuple, matrix.T.round(6).tolist())),
        tuple(bias.round(6).tolist()),
        round(explained / total, 6) if total else 1.0,
    )


def _slopes(
    covariance: npt.NDArray[np.float64], cross: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Solve covariance @ slopes = cross on scaled channels; constant channels get 0."""
    scale = np.sqrt(np.diag(covariance))
    scale[scale == 0] = 1
    inverse = np.linalg.pinv(covariance / np.outer(scale, scale), _DEGENERATE, hermitian=True)
    slopes: npt.NDArray[np.float64] = (inverse @ (cross / scale[:, None])) / scale[:, None]
    return slopes
