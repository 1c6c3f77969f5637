"""Diagnose a noise schedule before training: its prior KL and its wasted steps.

Steps are the paper's, t = 1..T, as in process.py.
"""

import math
from dataclasses import dataclass

import torch

from ddpm_ray.diffusion.process import NoiseSchedule

# Noise with a standard deviation of half a grey level, 1/255 in [-1, 1]: as much as rounding adds.
CLEAN_LOG_SNR = 2 * math.log(255)
# The sum over all pixels averages independent noise best. At this signal-to-noise ratio of the sum,
# a step carries no usable information even about the mean colour.
LEAST_SNR_OF_SUM = 0.01


@dataclass(frozen=True)
class ScheduleDiagnostics:
    """Measures of a noise schedule for images of one size and mean square."""

    alpha_bar_T: float  # noqa: N815 - the paper's symbol
    prior_bits_per_dim: float  # L_T, the prior KL: information about x_0 that remains in x_T
    wasted_step_fraction: float  # steps with too little or too much noise to learn from

    def stored(self) -> dict[str, float]:
        """The measures under their names in trial files."""
        return {
            "alpha_bar_T": self.alpha_bar_T,
            "prior_bits_per_dim": self.prior_bits_per_dim,
            "useless_share": self.wasted_step_fraction,
        }


def diagnose_schedule(
    schedule: NoiseSchedule, mean_square: float, num_pixels: int
) -> ScheduleDiagnostics:
    """Diagnose a schedule for images in [-1, 1] of num_pixels = H W pixels and mean square E[x^2].

    L_T is KL(q(x_T | x_0) || N(0, I)) averaged over the data, in bits per dimension; about 1e-5 for
    the published linear schedule (Ho et al. 2020, arXiv:2006.11239, eq. 5 and section 4). With a
    large L_T, samples start from noise unlike any that the network was trained on.
    """
    a = float(schedule.alpha_bar[-1])
    nats = 0.5 * (a * (mean_square - 1) - math.log1p(-a))
    log_snr = schedule.log_snr(torch.arange(1, schedule.num_steps + 1))
    noisiest = math.log(LEAST_SNR_OF_SUM / (num_pixels * mean_square))
    wasted = (log_snr < noisiest) | (log_snr > CLEAN_LOG_SNR)
    return ScheduleDiagnostics(a, nats / math.log(2), float(wasted.double().mean()))
