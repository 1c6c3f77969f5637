"""Noise schedules: the signal left after each step.

Each function returns alpha_bar [T+1] in float64, the paper's cumulative product with alpha_bar[0] =
1 prepended, for `process.NoiseSchedule`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_ray.diffusion.process import NoiseSchedule


def linear(
    num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02, *, rescale: bool = False
) -> Tensor:
    """alpha_bar [T+1] of T = num_steps variances beta evenly spaced from beta_start to beta_end.

    The defaults are for T = 1000 (Ho et al. 2020, arXiv:2006.11239, section 4). With fewer
    steps x_T keeps part of the image, unless `rescale` multiplies each beta by 1000 / T.
    """
    scale = _scale(num_steps, beta_start, beta_end, rescale)
    return _alpha_bar(scale * torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64))


def scaled_linear(
    num_steps: int, beta_start: float = 0.00085, beta_end: float = 0.012, *, rescale: bool = False
) -> Tensor:
    """alpha_bar [T+1] of T = num_steps variances beta whose square roots are evenly spaced.

    Adds less noise than `linear` at first. The defaults are those of latent diffusion at T = 1000
    (Rombach et al. 2022, arXiv:2112.10752, their published configs). With `linear`'s ends it is the
    'quad' of Ho et al.'s published code. `rescale` is as in `linear`.
    """
    scale = _scale(num_steps, beta_start, beta_end, rescale)
    root = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64)
    return _alpha_bar(scale * root.square())


def constant(num_steps: int, beta: float) -> Tensor:
    """alpha_bar [T+1] of T = num_steps equal variances: (1 - beta)^t.

    (Ho et al. 2020, arXiv:2006.11239, 'const' of their published code, where beta is `linear`'s
    beta_end.) Raises ValueError unless beta is in (0, 1).
    """
    _require_steps(num_steps)
    _require_variance("beta", beta)
    return _alpha_bar(torch.full((num_steps,), beta, dtype=torch.float64))


def warmup(num_steps: int, beta_start: float, beta_end: float, share: float) -> Tensor:
    """alpha_bar [T+1] of variances that rise linearly for a share of the steps, then stay.

    The first int(share T) go from beta_start to beta_end: at share 1 it is `linear`, at 0
    `constant`. (Ho et al. 2020, arXiv:2006.11239, 'warmup10' and 'warmup50' of their published
    code.) Raises ValueError unless share is in [0, 1].
    """
    _scale(num_steps, beta_start, beta_end, rescale=False)
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share:g}; a share of the steps lies in [0, 1]")
    rising = int(share * num_steps)
    beta = torch.full((num_steps,), beta_end, dtype=torch.float64)
    beta[:rising] = torch.linspace(beta_start, beta_end, rising, dtype=torch.float64)
    return _alpha_bar(beta)


def one_over_t(num_steps: int) -> Tensor:
    """alpha_bar [T+1] = 1 - t/T, which ends at exactly 0: x_T is pure noise.

    Its beta_t is 1 / (T - t + 1) (Sohl-Dickstein et al. 2015, arXiv:1503.03585, section 2.4.1;
    'jsd' of Ho et al.'s published code).
    """
    _require_steps(num_steps)
    return torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps


def cosine(num_steps: int, offset: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """alpha_bar [T+1] proportional to cos^2(pi / 2 (t/T + offset) / (1 + offset)).

    The offset keeps the first betas from being too small. Betas are clipped to max_beta, which has
    an effect at t = T only (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17).
    """
    _require_steps(num_steps)
    if offset < 0:
        raise ValueError(f"offset is {offset:g}; it must be at least 0")
    _require_variance("max_beta", max_beta)
    share = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)  # t / T
    f = torch.cos((share + offset) / (1 + offset) * (math.pi / 2)).square()
    return _alpha_bar((1 - f[1:] / f[:-1]).clamp(max=max_beta))


def sigmoid(
    num_steps: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0, max_beta: float = 0.999
) -> Tensor:
    """alpha_bar [T+1] from a sigmoid on [start, end], rescaled to fall from 1 to 0.

    A larger `tau` makes it straighter. Betas are clipped to max_beta, which has an effect at t = T
    only (Jabri et al. 2022, arXiv:2212.11972, section 3 and its algorithm for gamma).
    """
    _require_steps(num_steps)
    if start >= end:
        raise ValueError(f"start is {start:g} and end {end:g}; start must lie below end")
    _require_above_0("tau", tau)
    _require_variance("max_beta", max_beta)
    at = torch.linspace(start, end, num_steps + 1, dtype=torch.float64) / tau
    # Differences of sigmoid(-at), since those of sigmoid(at) near 1 would lose digits.
    f = torch.sigmoid(-at) - torch.sigmoid(-at[-1])
    return _alpha_bar((1 - f[1:] / f[:-1]).clamp(max=max_beta))


def laplace(
    num_steps: int, mean: float = 0.0, scale: float = 0.5, max_beta: float = 0.999
) -> Tensor:
    """alpha_bar [T+1] whose log-SNRs have a Laplace distribution over the steps, centred on `mean`.

    A share t/T of the distribution lies above the log-SNR of step t, so a schedule of 2T steps
    contains the steps of one with T. The log-SNR is infinite at t = 0 and would be minus infinity
    at t = T, where beta is max_beta instead, as in `cosine`. (Hang et al. 2024, arXiv:2407.03297,
    table 1, mu and b; they take a scale of 0.75 at 512 x 512.)
    """
    _require_steps(num_steps)
    if not math.isfinite(mean):
        raise ValueError(f"mean is {mean:g}; a log-SNR to centre on is finite")
    _require_above_0("scale", scale)
    _require_variance("max_beta", max_beta)
    t = torch.arange(1, num_steps, dtype=torch.float64)
    tail = torch.minimum(t, num_steps - t) * (2 / num_steps)  # 1 at the median
    inner = torch.sigmoid(mean + scale * torch.sign(t - num_steps / 2) * tail.log())
    clean_to_last = torch.cat([t.new_ones(1), inner])
    return torch.cat([clean_to_last, clean_to_last[-1:] * (1 - max_beta)])


def edm(
    num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """alpha_bar [T+1] of noise levels sigma from sigma_min at t = 1 to sigma_max at t = T.

    sigma^(1/rho) is evenly spaced; a larger rho puts more steps at low noise (Karras et al. 2022,
    arXiv:2206.00364, eq. 5, where i = T - t). sigma is relative to the image, so alpha_bar is
    1 / (1 + sigma^2). With T = 1 the step has sigma_max.
    """
    _require_steps(num_steps)
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max), ("rho", rho)):
        _require_above_0(name, value)
    if sigma_min >= sigma_max:
        raise ValueError(
            f"sigma_min is {sigma_min:g} and sigma_max {sigma_max:g}; sigma_min must lie below"
        )
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigma = torch.linspace(*ends, num_steps, dtype=torch.float64).flip(0).pow(rho)
    return torch.cat([sigma.new_ones(1), 1 / (1 + sigma.square())])


def zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Rescale a schedule [T+1] to zero terminal SNR, alpha_bar_T = 0.

    sqrt(alpha_bar) is mapped linearly so that t = 1 is unchanged and t = T becomes 0 (Lin et al.
    2023, arXiv:2305.08891, algorithm 1). A network must then predict v or x_0. Raises ValueError
    for an invalid schedule and for T = 1.
    """
    if NoiseSchedule(alpha_bar).num_steps < 2:
        raise ValueError("alpha_bar has 1 step; the first is kept and the last is 0, so give 2")
    root = alpha_bar[1:].sqrt()
    line = (root - root[-1]) / (root[0] - root[-1])
    return torch.cat([alpha_bar[:1], alpha_bar[1] * line.square()])


def from_betas(betas: Sequence[float] | Tensor) -> Tensor:
    """alpha_bar [T+1] of the T variances given, beta_1 first.

    Raises ValueError unless each is in (0, 1); the last may be 1, which leaves pure noise.
    """
    beta = torch.as_tensor(betas, dtype=torch.float64)
    if beta.ndim != 1 or len(beta) == 0:
        raise ValueError(f"betas has shape {list(beta.shape)}; it must be [T] with T >= 1")
    sound = (beta > 0) & (beta < 1)
    sound[-1] |= beta[-1] == 1
    if not sound.all():
        i = int(sound.logical_not().nonzero()[0])
        raise ValueError(
            f"betas[{i}] is {beta[i].item():g}; a variance lies in (0, 1), the last may be 1"
        )
    return _alpha_bar(beta)


def _scale(num_steps: int, beta_start: float, beta_end: float, rescale: bool) -> float:
    """The factor of each beta; raises ValueError unless all results are in (0, 1)."""
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
    """Cumulative products of 1 - beta [T], with alpha_bar[0] = 1 prepended: [T+1] (eq. 4)."""
    return torch.cat([beta.new_ones(1), (1 - beta).cumprod(0)])


def _require_variance(name: str, beta: float) -> None:
    if not 0 < beta < 1:
        raise ValueError(f"{name} is {beta:g}; a variance lies in (0, 1)")


def _require_above_0(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value:g}; it must be above 0 and finite")


def _require_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a schedule has at least 1 step")
