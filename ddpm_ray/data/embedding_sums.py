"""Exact integer sums of stored embeddings, and their mean and variance per dimension.

As those of latents (latent_sums.py): a float16 number is an integer multiple of 2^-24, so sums are
integers in units of 2^-24, and sums of squares in units of 2^-48.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ddpm_ray.data.latent_sums import MEAN_BITS, SQUARE_BITS, Float16s

_LOW_BITS = 20  # a number is high * 2^20 + low, with |high| <= 2^20 and 0 <= low < 2^20
_ROWS = 2**16  # summed in int64 at a time: products are at most 2^40


class EmbeddingSums(NamedTuple):
    """Sums over all samples, [E] each, in the units named above."""

    embedding_sum: list[int]
    embedding_sum_of_squares: list[int]


def embedding_sums(embeddings: Float16s) -> EmbeddingSums:
    """Return the sums of embeddings [n, E], which must be finite."""
    width = embeddings.shape[1]
    sums, squares = [0] * width, [0] * width
    for start in range(0, len(embeddings), _ROWS):
        rows = embeddings[start : start + _ROWS].astype(np.float64)
        units = np.ldexp(rows, MEAN_BITS).astype(np.int64)  # exact: at most 65504 * 2^24 < 2^40
        high, low = units >> _LOW_BITS, units & (2**_LOW_BITS - 1)
        parts = (
            (part * other).sum(axis=0).tolist()
            for part, other in ((high, high), (high, low), (low, low))
        )
        sums = [total + more for total, more in zip(sums, units.sum(axis=0).tolist(), strict=True)]
        squares = [
            total + (two << 2 * _LOW_BITS) + (one << _LOW_BITS + 1) + zero
            for total, two, one, zero in zip(squares, *parts, strict=True)
        ]
    return EmbeddingSums(sums, squares)


def embedding_mean_and_variance(
    sums: EmbeddingSums, count: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and variance [E] of `count` embeddings. Raises ValueError for impossible sums."""
    means, variances = [], []
    for total, squares in zip(*sums, strict=True):
        variance = count * squares - total**2  # in units of 2^-48 / count^2
        if variance < 0:
            raise ValueError(f"sums of embeddings are {total}, {squares} for {count} values")
        # Integers up to here: one rounding to float, equal on every machine.
        means.append(total / (count << MEAN_BITS))
        variances.append(variance / (count**2 << SQUARE_BITS))
    return tuple(means), tuple(variances)
