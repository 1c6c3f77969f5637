"""Noise schedules: how much of the image is left after each step.

Each returns alpha_bar [T+1] in float64, the paper's cumulative product with alpha_bar[0] = 1 put in
front, ready for `process.NoiseSchedule`.
"""

import math

import torch
from torch import Tensor


def linear(
    num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02, *, rescale: bool = False
) -> Tensor:
    """alpha_bar [T+1] of T = num_steps variances beta evenly spaced from beta_start to beta_end.

    The defaults are made for T = 1000 (Ho et al. 2020, arXiv:2006.11239, section 4). With fewer
    steps x_T keeps part of the image, unless `rescale` multiplies each beta by 1000 / T.
    """
    _require_steps(num_steps)
    scale = 1000 / num_steps if rescale else 1.0
    for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not 0 < beta * scale < 1:
            rescaled = f" and {beta * scale:g} after the rescaling by 1000/{num_steps}"
            raise ValueError(
                f"{name} is {beta:g}{rescaled if rescale else ''}; a variance lies in (0, 1)"
            )
    if beta_start > beta_end:
        raise ValueError(f"beta_start is {beta_start:g}, above beta_end, {beta_end:g}; swap them")
    return _alpha_bar(scale * torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64))


def cosine(num_steps: int, offset: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """alpha_bar [T+1] that falls as cos^2 of (t/T + offset) / (1 + offset) of a right angle.

    The offset keeps the first steps from being too small to matter; no beta exceeds max_beta, which
    binds at t = T only (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17).
    """
    _require_steps(num_steps)
    if offset < 0:
        raise ValueError(f"offset is {offset:g}; it must be at least 0")
    if not 0 < max_beta < 1:
        raise ValueError(f"max_beta is {max_beta:g}; a variance lies in (0, 1)")
    share = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)  # t / T
    f = torch.cos((share + offset) / (1 + offset) * (math.pi / 2)).square()
    return _alpha_bar((1 - f[1:] / f[:-1]).clamp(max=max_beta))


def _alpha_bar(beta: Tensor) -> Tensor:
    """The products of 1 - beta [T] up to each step, as [T+1] from alpha_bar[0] = 1 (eq. 4)."""
    return torch.cat([beta.new_ones(1), (1 - beta).cumprod(0)])


def _require_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a schedule has at least 1 step")
