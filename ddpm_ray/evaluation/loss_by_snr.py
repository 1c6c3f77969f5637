"""The loss by log-SNR: one axis on which models of any schedule and any T can be compared.

What noise a step t stands for differs from schedule to schedule; at one log-SNR all denoisers face
the same task. K: levels of log-SNR, float64; a = sigmoid(log-SNR) is alpha_bar there.
"""

import torch
from torch import Tensor

from ddpm_ray.diffusion.losses import simple_loss
from ddpm_ray.diffusion.process import Denoise, NoiseSchedule
from ddpm_ray.redaction import counted


def loss_by_log_snr(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_0: Tensor,
    noise: Tensor,
    log_snr: Tensor,
    variance: float,
) -> Tensor:
    """Mean squared error [K] float64 of the predicted noise at the levels log_snr [K].

    Image i of x_0 [N, ...] is seen at level i % K with noise[i], at the two steps whose log-SNRs
    enclose the level; between their losses lies a straight line. A level that the schedule does not
    reach was never trained and is charged `linear_guess` with the data's `variance`. Raises
    ValueError unless K divides N.
    """
    levels = len(log_snr)
    if not len(x_0) or len(x_0) % levels:
        raise ValueError(
            f"{counted(len(x_0), 'image')} for {counted(levels, 'level')}; give each "
            "level the same number of them"
        )
    cleaner, noisier, share, reached = steps_at(schedule, log_snr)
    copies = len(x_0) // levels
    with torch.inference_mode():
        t = torch.cat([cleaner.repeat(copies), noisier.repeat(copies)])
        losses = simple_loss(denoise, schedule, torch.cat([x_0, x_0]), t, torch.cat([noise, noise]))
    at_cleaner, at_noisier = losses.double().view(2, copies, levels).mean(1)
    between = share * at_cleaner + (1 - share) * at_noisier
    return torch.where(reached, between, linear_guess(log_snr, variance))


def steps_at(schedule: NoiseSchedule, log_snr: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The steps around each level: cleaner t [K], noisier t [K], the cleaner's share, if reached.

    The share [K] float64 in 0..1 interpolates in log-SNR. A level beyond the schedule's ends is not
    reached, and has the step at that end for both.
    """
    steps = torch.arange(1, schedule.num_steps + 1, device=log_snr.device)
    table = schedule.log_snr(steps)  # falls
    table = table[table.isfinite()]  # up to a step without signal there is nothing in between
    after = torch.searchsorted(-table, -log_snr)  # the first step at least as noisy
    noisier = (after + 1).clamp(1, len(table))
    cleaner = torch.where(table[noisier - 1] == log_snr, noisier, after.clamp(min=1))
    reached = (log_snr <= table[0]) & (log_snr >= table[-1])
    high, low = table[cleaner - 1], table[noisier - 1]
    share = torch.where(high > low, (log_snr - low) / (high - low), 1.0)
    return cleaner, noisier, share.clamp(0, 1), reached


def linear_guess(log_snr: Tensor, variance: float) -> Tensor:
    """The loss [K] of the best linear denoiser of pixels of that variance, each by itself.

    Var(epsilon | x_t) = a v / (a v + 1 - a), for Gaussian pixels the best of all: near 0 in strong
    noise, which is then all that is seen, and near 1 where there is hardly any.
    """
    a = torch.sigmoid(log_snr)
    return a * variance / (a * variance + 1 - a)


def validation_loss(spectrum: Tensor, log_snr: Tensor) -> float:
    """One number for a spectrum [K], its mean with the weight sigmoid(2 - log_snr).

    Evenly spread over log-SNR, the squared error of the noise is the variational bound (Kingma et
    al. 2021, arXiv:2107.00630, section 5). The weight, which falls as the noise fades, takes from
    it the finest details that nobody sees: a bound on slightly noised images (Kingma and Gao 2023,
    arXiv:2303.00848; a sigmoid of this kind: Hoogeboom et al. 2024, arXiv:2410.19324).
    """
    weight = torch.sigmoid(2 - log_snr)
    return float((weight * spectrum).sum() / weight.sum())
