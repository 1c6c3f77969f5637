"""Loss by log-SNR, which compares models of any schedule and any T.

The noise level of a step t depends on the schedule; at a fixed log-SNR the denoising task is the
same. K: number of log-SNR levels, float64; a = sigmoid(log-SNR) is alpha_bar at a level.
"""

import torch
from torch import Tensor

from ddpm_ray.diffusion.losses import simple_loss
from ddpm_ray.diffusion.process import Denoise, NoiseSchedule
from ddpm_ray.redaction import counted


def loss_at_log_snr(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_0: Tensor,
    noise: Tensor,
    log_snr: Tensor,
    variance: float,
) -> Tensor:
    """Mean squared error [K] float64 of the predicted noise at the levels log_snr [K].

    Image i of x_0 [N, ...] is used at level i % K with noise[i], at the two steps whose log-SNRs
    enclose the level; their losses are interpolated linearly. A level outside the schedule's range
    is not trained and gets the loss `linear_guess` of the data's `variance`. Raises ValueError
    unless K divides N.
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
    """Find the steps that enclose each level: cleaner t [K], noisier t [K], share [K], reached [K].

    `share` float64 in 0..1 is the cleaner step's weight in the interpolation over log-SNR.
    `reached` is False for levels outside the schedule's range, which get that end's step twice.
    """
    steps = torch.arange(1, schedule.num_steps + 1, device=log_snr.device)
    table = schedule.log_snr(steps)  # falls
    table = table[table.isfinite()]  # no interpolation to a step without signal
    after = torch.searchsorted(-table, -log_snr)  # the first step at least as noisy
    noisier = (after + 1).clamp(1, len(table))
    cleaner = torch.where(table[noisier - 1] == log_snr, noisier, after.clamp(min=1))
    reached = (log_snr <= table[0]) & (log_snr >= table[-1])
    high, low = table[cleaner - 1], table[noisier - 1]
    share = torch.where(high > low, (log_snr - low) / (high - low), 1.0)
    return cleaner, noisier, share.clamp(0, 1), reached


def linear_guess(log_snr: Tensor, variance: float) -> Tensor:
    """Loss [K] of the best linear denoiser of independent pixels of that variance v.

    Var(epsilon | x_t) = a v / (a v + 1 - a), optimal for Gaussian pixels: near 0 at high noise and
    near 1 at low noise.
    """
    a = torch.sigmoid(log_snr)
    return a * variance / (a * variance + 1 - a)


def validation_loss(losses: Tensor, log_snr: Tensor) -> float:
    """Weighted mean of the losses [K] with weights sigmoid(2 - log_snr).

    Uniform in log-SNR, the squared error of the noise is the variational bound (Kingma et al. 2021,
    arXiv:2107.00630, section 5). The weight falls with log-SNR and so reduces the influence of
    imperceptible detail: a bound on slightly noised images (Kingma and Gao 2023, arXiv:2303.00848;
    a similar sigmoid: Hoogeboom et al. 2024, arXiv:2410.19324).
    """
    weight = torch.sigmoid(2 - log_snr)
    return float((weight * losses).sum() / weight.sum())
