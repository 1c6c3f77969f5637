"""The variational bound on the negative log-likelihood, term by term, in bits per dimension.

    -log p(x_0) <= L_T + sum over t = 2..T of L_{t-1} + L_0

(Ho et al. 2020, arXiv:2006.11239, eq. 5.) L_T compares x_T with the prior, L_{t-1} the posterior of
x_{t-1} with the learned reverse step from t, and L_0 decodes the 256 grey levels from x_1.
"""

import math
from typing import assert_never

import torch
from torch import Tensor

from ddpm_ray.choices import ReverseVariance
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import NoiseSchedule, posterior
from ddpm_ray.diffusion.samplers import learned_log_variance
from ddpm_ray.diffusion.x0_estimator import Clip

HALF_BIN = 1 / 255  # half the width of an 8-bit grey level in [-1, 1]
_RULE = (  # Gauss-Legendre, 6 points: (node, weight) of each mirrored pair, weights sum to 1
    (0.2386191860831969, 0.4679139345726910),
    (0.6612093864662645, 0.3607615730481386),
    (0.9324695142031521, 0.1713244923791704),
)


def reverse_log_variance(
    schedule: NoiseSchedule,
    t: Tensor,
    variance: ReverseVariance,
    like: Tensor,
    raw: Tensor | None = None,
) -> Tensor:
    """log of the reverse step's variance at t [B] in 1..T, to broadcast over `like` [B, ...].

    `fixed_small` is the posterior's (Ho et al. 2020, eq. 7), `fixed_large` beta. At t = 1, where
    the posterior variance is 0, both are that of t = 2, as in the authors' code (beta if T = 1). A
    learned variance is computed from `raw`, shaped like `like`, by `samplers.learned_log_variance`.
    Raises ValueError if `raw` is missing.
    """
    a = schedule.alpha_bar
    beta = 1 - a[1:] / a[:-1]
    small = beta * (1 - a[:-1]) / (1 - a[1:])
    small[0] = small[1] if len(small) > 1 else beta[0]
    large = beta if variance == "learned_range" else torch.cat([small[:1], beta[1:]])
    small, large = (c[t - 1].view(-1, *[1] * (like.ndim - 1)) for c in (small, large))
    match variance:
        case "fixed_small":
            return small.log().to(like)
        case "fixed_large":
            return large.log().to(like)
        case "learned" | "learned_range":
            if raw is None:
                raise ValueError(f"variance is {variance}; pass raw=, the model output for it")
            return learned_log_variance(raw, variance, small, large)
        case _:
            assert_never(variance)


def term(
    parameterization: Parameterization,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    model_output: Tensor,
    log_variance: Tensor,
    *,
    clip: Clip | None = None,
) -> Tensor:
    """L_{t-1} [B] in bits per dimension at steps t [B] in 1..T, a mean over all other dimensions.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 1 and L_0 = -log p(x_0 | x_1) of 8-bit
    images for t = 1 (Ho et al. 2020, eq. 5 and 13). `model_output` [B, ...] is without the
    variance, `log_variance` is that of `reverse_log_variance`, and `clip` applies to the estimate
    of x_0. Finite, with finite gradients, if the squared error over the variance is finite.
    """
    estimate = parameterization.x_0(x_t, t, model_output)
    if clip is not None:
        clip(estimate)
    first = (t == 1).view(-1, *[1] * (x_0.ndim - 1))
    # x_t cancels in the difference of the means; only the difference of x_0 remains.
    offset, _ = posterior(parameterization.schedule, x_0 - estimate, torch.zeros_like(x_t), t)
    ratio = reverse_log_variance(parameterization.schedule, t, "fixed_small", x_0) - log_variance
    # expm1, since ratio is near 0 at most steps, where small and large variance hardly differ
    nats = (torch.expm1(ratio) - ratio + offset.square() * (-log_variance).exp()) / 2
    decoded = decoder_log_probability(x_0, estimate, log_variance)
    return torch.where(first, -decoded, nats).flatten(1).mean(1) / math.log(2)


def decoder_log_probability(x_0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log of the probability [B, ...] of the grey level x_0 under a Gaussian, in nats.

    Levels are -1 + 2 k / 255, k = 0..255, with bins of 1/255 to either side; the first and the last
    bin are unbounded (Ho et al. 2020, eq. 13). Accurate to rounding, in the tails as well.
    """
    inverse = (-log_variance / 2).exp()
    centre, half = (x_0 - mean) * inverse, HALF_BIN * inverse
    inner = _log_mass(centre.abs(), half.expand_as(centre))
    lowest, highest = x_0 < -1 + HALF_BIN, x_0 > 1 - HALF_BIN
    below_or_above = torch.where(highest, half - centre, centre + half)
    return torch.where(lowest | highest, _log_ndtr(below_or_above), inner)


def prior_term(schedule: NoiseSchedule, x_0: Tensor) -> Tensor:
    """L_T [B], KL(q(x_T | x_0) || N(0, I)) in bits per dimension; independent of the network.

    (Ho et al. 2020, eq. 5.) `schedule_diagnostics` has its mean over a data set.
    """
    a = float(schedule.alpha_bar[-1])
    return (a * x_0.square().flatten(1).mean(1) - (a + math.log1p(-a))) / (2 * math.log(2))


def _log_mass(centre: Tensor, half: Tensor) -> Tensor:
    """log(Phi(centre + half) - Phi(centre - half)) for centre >= 0, without cancellation.

    Where the density hardly changes over the bin, the difference would cancel: there it is computed
    by quadrature over the bin, exact to 1e-15. Elsewhere it is the difference of two
    log-probabilities in the lower tail, where both are small.
    """
    slope = centre * half
    near = (half < 0.25) & (slope < 0.5)
    # Each branch gets harmless values where the other is used, so that no gradient is NaN.
    s, h = torch.where(near, slope, 0), torch.where(near, half, 0.25)
    parts = [g * torch.cosh(s * x) * torch.exp(-(h * x).square() / 2) for x, g in _RULE]
    c = torch.where(near, centre, 0)
    within = torch.log(h * sum(parts[1:], parts[0])) - c.square() / 2 + math.log(2 / math.pi) / 2

    c, h = torch.where(near, 0, centre), torch.where(near, 0.25, half)
    upper, lower = _log_ndtr(h - c), _log_ndtr(-h - c)
    # The slope of log Phi is above -z, so the gap is at least this; far out it equals this.
    gap = torch.maximum(upper - lower, 2 * h * (c - h))
    return torch.where(near, within, upper + torch.log(-torch.expm1(-gap)))


def _log_ndtr(z: Tensor) -> Tensor:
    """log Phi(z). torch.special.log_ndtr has a wrong or zero gradient far below 0."""
    below = torch.where(z < 0, -z, 0) / math.sqrt(2)
    above = torch.where(z < 0, 0, z) / math.sqrt(2)
    tail = torch.log(torch.special.erfcx(below) / 2) - below.square()
    return torch.where(z < 0, tail, torch.log1p(-torch.special.erfc(above) / 2))
