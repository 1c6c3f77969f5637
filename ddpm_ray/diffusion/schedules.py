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
    scale = _scale(num_steps, beta_start, beta_end, rescale)
    return _alpha_bar(scale * torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64))


def scaled_linear(
    num_steps: int, beta_start: float = 0.00085, beta_end: float = 0.012, *, rescale: bool = False
) -> Tensor:
    """alpha_bar [T+1] of T = num_steps variances beta whose roots are evenly spaced.

    Slower than `linear` at first. The defaults are those of latent diffusion at T = 1000 (Rombach
    et al. 2022, arXiv:2112.10752, their published configs); `rescale` is as in `linear`.
    """
    scale = _scale(num_steps, beta_start, beta_end, rescale)
    root = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64)
    return _alpha_bar(scale * root.square())


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


def sigmoid(
    num_steps: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0, max_beta: float = 0.999
) -> Tensor:
    """alpha_bar [T+1] that falls as a sigmoid seen from `start` to `end`, stretched to 1..0.

    A larger `tau` makes it straighter. No beta exceeds max_beta, which binds at t = T only (Jabri
    et al. 2022, arXiv:2212.11972, section 3 and its algorithm for gamma).
    """
    _require_steps(num_steps)
    if start >= end:
        raise ValueError(f"start is {start:g} and end {end:g}; start must lie below end")
    if tau <= 0:
        raise ValueError(f"tau is {tau:g}; it must be above 0")
    if not 0 < max_beta < 1:
        raise ValueError(f"max_beta is {max_beta:g}; a variance lies in (0, 1)")
    at = torch.linspace(start, end, num_steps + 1, dtype=torch.float64) / tau
    # Differences of sigmoid(-at), which falls: near 1 those of sigmoid(at) would lose their digits.
    f = torch.sigmoid(-at) - torch.sigmoid(-at[-1])
    return _alpha_bar((1 - f[1:] / f[:-1]).clamp(max=max_beta))


def _scale(num_steps: int, beta_start: float, beta_end: float, rescale: bool) -> float:
    """What each beta is multiplied by; raises ValueError where one would not be a variance."""
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
    return scale


def _alpha_bar(beta: Tensor) -> Tensor:
    """The products of 1 - beta [T] up to each step, as [T+1] from alpha_bar[0] = 1 (eq. 4)."""
    return torch.cat([beta.new_ones(1), (1 - beta).cumprod(0)])


def _require_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a schedule has at least 1 step")
