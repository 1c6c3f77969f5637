"""What a schedule is worth before anything is trained: how it begins, how it ends, what it wastes.

Steps are the paper's, t = 1..T, as in process.py.
"""

import math
from dataclasses import dataclass

import torch

from ddpm_ray.diffusion.process import NoiseSchedule

# Noise of half a grey level of an 8-bit image, 1/255 of [-1, 1]'s half: what rounding adds anyway.
CLEAN_LOG_SNR = 2 * math.log(255)
# Even the sum over all pixels, to which independent noise matters least, then tells an image of one
# colour from none with a signal-to-noise ratio of 1 %.
LEAST_SNR_OF_SUM = 0.01


@dataclass(frozen=True)
class Appraisal:
    """A schedule's worth for images of one kind."""

    alpha_bar_T: float  # noqa: N815 - the paper's symbol
    prior_bits_per_dim: float  # L_T: what x_T still says of the image, and samples begin without
    useless_share: float  # of the steps: noise so weak or so strong that nothing is left to learn


def appraise(schedule: NoiseSchedule, mean_square: float, num_pixels: int) -> Appraisal:
    """The worth of a schedule for images in [-1, 1] of H W = num_pixels pixels with E[x^2] each.

    L_T is KL(q(x_T | x_0) || N(0, I)) averaged over the data, in bits per dimension; the published
    linear schedule has about 1e-5 (Ho et al. 2020, arXiv:2006.11239, eq. 5 and section 4). With a
    large one samples start from noise that the network never saw.
    """
    a = float(schedule.alpha_bar[-1])
    nats = 0.5 * (a * (mean_square - 1) - math.log1p(-a))
    log_snr = schedule.log_snr(torch.arange(1, schedule.num_steps + 1))
    noisiest = math.log(LEAST_SNR_OF_SUM / (num_pixels * mean_square))
    useless = (log_snr < noisiest) | (log_snr > CLEAN_LOG_SNR)
    return Appraisal(a, nats / math.log(2), float(useless.double().mean()))
