"""Loss weights [T+1] float64 of the squared error of the model output at each step.

Papers state their weight for the error of x_0 or of epsilon. Since

    x_0 - estimate of x_0 = sqrt(1 - a) / D (target - model_output)

with a = alpha_bar at t and D = `Parameterization.determinant()`, each is carried over to the answer
at hand: one rule is one loss, whatever is predicted. A step without any signal, alpha_bar = 0, is
not learned under min_snr, soft_min_snr and p2. All weights are 0 at t = 0. SNR is
a / (1 - a), as for data of unit variance. Tables lie where the prediction's do.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_ray.diffusion.parameterization import Parameterization


def min_snr(parameterization: Parameterization, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) on the error of x_0: limits the weight of steps with little noise.

    (Hang et al. 2023, arXiv:2303.09556, section 3.4.) Raises ValueError unless gamma is above 0.
    """
    _require_positive("gamma", gamma)
    return _on_x_0(parameterization, lambda snr: snr.clamp(max=gamma))


def soft_min_snr(parameterization: Parameterization, gamma: float = 5.0) -> Tensor:
    """1 / (1 / SNR + 1 / gamma) on the error of x_0: a smooth `min_snr`.

    (Crowson et al. 2024, arXiv:2401.11605: 1 / (sigma^2 + 1 / gamma) with gamma = 4.) Raises
    ValueError unless gamma is above 0.
    """
    _require_positive("gamma", gamma)
    return _on_x_0(parameterization, lambda snr: snr * gamma / (snr + gamma))


def p2(parameterization: Parameterization, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """1 / (k + SNR)^gamma on the error of epsilon: lower weight for imperceptible detail.

    (Choi et al. 2022, arXiv:2204.00227, section 3.) gamma = 0 is L_simple of epsilon. Raises
    ValueError unless k is above 0.
    """
    _require_positive("k", k)
    return _on_x_0(parameterization, lambda snr: snr / (k + snr) ** gamma)


def edm_weight(parameterization: Parameterization, sigma_data: float = 0.5) -> Tensor:
    """1 / sigma^2 + 1 / sigma_data^2 on the error of x_0, a weight of 1 for the edm output.

    (lambda of Karras et al. 2022, arXiv:2206.00364, table 1, with 1 / sigma^2 = SNR.) Raises
    ValueError unless sigma_data is above 0.
    """
    _require_positive("sigma_data", sigma_data)
    return _on_x_0(parameterization, lambda snr: snr + sigma_data**-2)


def uncertain(loss: Tensor, log_variance: Tensor) -> Tensor:
    """loss / exp(u) + u, [B]: minimal where u is the log of the expected loss at its t.

    The gradients of all steps then have the same size. `log_variance` [B] is u, trained with the
    network and discarded afterwards (Karras et al. 2024, arXiv:2312.02696, eq. 14 and 15; Kendall
    et al. 2018, arXiv:1705.07115).
    """
    return loss * (-log_variance).exp() + log_variance


def _on_x_0(parameterization: Parameterization, rule: Callable[[Tensor], Tensor]) -> Tensor:
    """Weights [T+1] of the model output from a weight of the error of x_0, `rule(SNR)`."""
    a, d = parameterization.schedule.alpha_bar[1:], parameterization.determinant()[1:]
    weight = torch.zeros_like(parameterization.schedule.alpha_bar)
    weight[1:] = rule(a / (1 - a)) * (1 - a) / d.square()
    return weight


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value:g}; it must be above 0")
