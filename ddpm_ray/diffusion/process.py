"""The forward process and its posterior (Ho et al. 2020, arXiv:2006.11239).

Steps are the paper's, t = 1..T. alpha_bar has T+1 entries and alpha_bar[0] = 1, so t - 1 is always
an index and the last denoising step is no special case. B: batch; `...`: image, latent or clip.

Coefficients are computed in float64 and rounded once, to the dtype of the images: in float32 the
first beta, 1 - alpha_bar[1] = 1e-4, would be wrong in its fourth digit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Denoise: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, ...], t [B] int64 in 1..T) -> model output [B, ...].

By default epsilon_theta of eq. 11, the noise in x_t; a `Parameterization` defines other targets.
"""


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A noise schedule, indexed by step. Raises ValueError for an invalid table."""

    alpha_bar: Tensor  # [T+1] float64, strictly decreasing from 1; only alpha_bar[T] may be 0

    def __post_init__(self) -> None:
        a = self.alpha_bar
        if a.dtype != torch.float64 or a.ndim != 1 or len(a) < 2:
            found = f"{a.dtype} of shape {list(a.shape)}"
            raise ValueError(f"alpha_bar is {found}; it must be float64 [T+1] with T >= 1")
        if a[0] != 1:
            raise ValueError(f"alpha_bar[0] is {a[0].item():g}; step 0 is the clean image, so 1")
        sound = (a[1:] < a[:-1]) & (a[1:] >= 0)
        if not sound.all():
            t = 1 + int(sound.logical_not().nonzero()[0])
            raise ValueError(
                f"alpha_bar[{t}] is {a[t].item():g} after {a[t - 1].item():g}; "
                "it must fall at every step, to no less than 0"
            )

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.alpha_bar) - 1

    def at(self, t: Tensor, like: Tensor) -> Tensor:
        """alpha_bar at steps t [B], float64, as [B, 1, ...] to broadcast over `like` [B, ...]."""
        return self.alpha_bar[t].view(-1, *[1] * (like.ndim - 1))

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha_bar / (1 - alpha_bar)) at steps t, float64, shaped like t; infinite at t = 0.

        (The logarithm of Kingma et al. 2021, arXiv:2107.00630, eq. 4.)
        """
        return torch.logit(self.alpha_bar[t])

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """Copy the schedule to `device`; steps t must be on the same device."""
        return NoiseSchedule(self.alpha_bar.to(device))


def add_noise(schedule: NoiseSchedule, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Draw x_t [B, ...] from q(x_t | x_0) (eq. 4); t [B] is in 0..T, and t = 0 returns x_0."""
    a = schedule.at(t, x_0)
    return a.sqrt().to(x_0) * x_0 + (1 - a).sqrt().to(x_0) * noise


def posterior(
    schedule: NoiseSchedule, x_0: Tensor, x_t: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean [B, ...] and variance [B, 1, ...], 0 at t = 1, of q(x_{t-1} | x_t, x_0) (eq. 6, 7)."""
    a, a_prev = schedule.at(t, x_t), schedule.at(t - 1, x_t)
    beta = 1 - a / a_prev
    toward_x_0 = a_prev.sqrt() * beta / (1 - a)
    keep_x_t = (1 - beta).sqrt() * (1 - a_prev) / (1 - a)
    variance = beta * (1 - a_prev) / (1 - a)
    return toward_x_0.to(x_t) * x_0 + keep_x_t.to(x_t) * x_t, variance.to(x_t)
