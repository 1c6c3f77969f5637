"""Exact integer sums of stored latents, and their mean and variance per channel.

The latents of a sample are normal distributions, one for each value: `mean` and `log_variance` in
float16. A float16 number is an integer multiple of 2^-24, so sums of means are integers in units of
2^-24, and sums of their squares in units of 2^-48. exp(log_variance) is not such a multiple: it is
rounded to the nearest multiple of 2^-48 here, in correctly rounded decimal arithmetic, so that it
is equal on every machine. Integer sums do not depend on the order of addition, so the statistics
are the same for any number of tasks.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float16s = npt.NDArray[np.float16]

LOG_VARIANCES = (-30.0, 20.0)  # as in models/autoencoder.py, which imports torch
MEAN_BITS = 24  # sums of means are in units of 2^-24
SQUARE_BITS = 2 * MEAN_BITS  # sums of squares and variances are in units of 2^-48
_DECIMAL = Context(prec=50)  # exp(20) 2^48 has 24 digits


class LatentSums(NamedTuple):
    """Sums over all samples, views, rows and columns, [c] each, in the units named above."""

    mean_sum: list[int]
    mean_sum_of_squares: list[int]
    variance_sum: list[int]


def latent_sums(mean: Float16s, log_variance: Float16s) -> LatentSums:
    """Return the sums of latents [n, views, c, h, w], which must be finite."""
    channels = range(mean.shape[2])
    means = [_counted(mean[:, :, c]) for c in channels]
    variances = [_counted(log_variance[:, :, c]) for c in channels]
    return LatentSums(
        [sum(n * _fixed_point(bits) for bits, n in one) for one in means],
        [sum(n * _fixed_point(bits) ** 2 for bits, n in one) for one in means],
        [sum(n * _fixed_point_exp(bits) for bits, n in one) for one in variances],
    )


def mean_and_variance(sums: LatentSums, count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and variance [c] of the latents from sums over `count` values per channel.

    The variance is that of draws from the posteriors: Var(mean) + E[exp(log_variance)]. Raises
    ValueError for impossible sums.
    """
    means, variances = [], []
    for total, squares, spread in zip(*sums, strict=True):
        variance = count * (squares + spread) - total**2  # in units of 2^-48 / count^2
        if spread <= 0 or count * squares < total**2:
            raise ValueError(f"sums of latents are {total}, {squares}, {spread} for {count} values")
        # Integers up to here: one rounding to float, equal on every machine.
        means.append(total / (count << MEAN_BITS))
        variances.append(variance / (count**2 << SQUARE_BITS))
    return tuple(means), tuple(variances)


def _counted(values: Float16s) -> list[tuple[int, int]]:
    """Return each bit pattern in `values` with the number of its occurrences."""
    counts = np.bincount(np.ascontiguousarray(values).view(np.uint16).reshape(-1))
    patterns = np.flatnonzero(counts)
    return list(zip(patterns.tolist(), counts[patterns].tolist(), strict=True))


@lru_cache(maxsize=2**16)
def _fixed_point(bits: int) -> int:
    """Return a float16 number, given as its bits, in units of 2^-24."""
    return int(math.ldexp(_number(bits), MEAN_BITS))


@lru_cache(maxsize=2**16)
def _fixed_point_exp(bits: int) -> int:
    """Return exp of a float16 number, given as its bits, in units of 2^-48, half to even."""
    power = _DECIMAL.exp(Decimal(_number(bits)))  # correctly rounded to 50 digits
    return int(_DECIMAL.multiply(power, Decimal(2**SQUARE_BITS)).to_integral_value())


def _number(bits: int) -> float:
    return float(np.uint16(bits).view(np.float16))
