"""The likelihood of images under the probability flow, which turns each into one latent and back.

(Song et al. 2021, arXiv:2011.13456, section 4.3 and appendix D.2.) With sqrt(alpha_bar) the cosine
of an angle and sqrt(1 - alpha_bar) its sine, the flow is dx / d angle = v, the velocity of Salimans
and Ho 2022 (arXiv:2202.00512, appendix D): smooth up to a right angle, where no signal is left.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import Denoise, NoiseSchedule


def bits_per_dim(
    schedule: NoiseSchedule,
    denoise: Denoise,
    x_1: Tensor,
    steps: Sequence[int],
    *,
    parameterization: Parameterization | None = None,
    probe: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-log2 of the density at x_1 [B, ...] over its dimensions, [B] float64, and the latent x_T.

    The flow is integrated along `steps`, which rise from 1 to T, by Heun's method, of second order:
    two network calls per transition, at these steps only. The density at T is that of N(0, I). The
    trace of the Jacobian is exact, at one backward pass per dimension, or with `probe`, signs -1 or
    1 of x_1's shape, Hutchinson's unbiased estimate at one pass.

    The density is that of x_1, images with noise of variance 1 - alpha_bar_1. For the density of
    clean images pass sqrt(alpha_bar_1) x_0, as Song et al. do; in the units of x_0 the result is
    then larger by -log2(alpha_bar_1) / 2. Raises ValueError for other `steps`.
    """
    if len(steps) < 2 or steps[0] != 1 or steps[-1] != schedule.num_steps:
        raise ValueError(
            f"steps are {list(steps)}; they must rise from 1 to T = {schedule.num_steps}"
        )
    parameterization = parameterization or Parameterization.of("epsilon", schedule)
    a = schedule.alpha_bar
    of_x_t, of_output = parameterization.to_x_0()
    # v = (cos x_t - x_0) / sin; at t = 0, which is not used, it divides by 0
    columns = torch.stack([(a.sqrt() - of_x_t), -of_output]) / (1 - a).sqrt()
    angle: list[float] = torch.atan2((1 - a).sqrt(), a.sqrt()).tolist()

    def flow(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """v [B, ...] and its divergence [B] at step t."""
        of_x, of_output = columns[:, t].tolist()
        x = x.detach().requires_grad_()
        model_output = denoise(x, torch.full((len(x),), t, device=x.device))
        divergence = of_x * x[0].numel() + of_output * _trace(model_output, x, probe)
        return (of_x * x + of_output * model_output).detach(), divergence

    with torch.inference_mode(False), torch.enable_grad():
        x, expansion = x_1.clone(), torch.zeros(len(x_1), dtype=torch.float64, device=x_1.device)
        for t, s in pairwise(steps):
            if s <= t:
                raise ValueError(f"steps go from {t} to {s}; they must rise strictly, up to T")
            span = angle[s] - angle[t]
            start, start_divergence = flow(x, t)
            end, end_divergence = flow(x + span * start, s)
            x = x + span / 2 * (start + end)
            expansion += span / 2 * (start_divergence + end_divergence)
    log_prior = -(x.double().square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2
    return (log_prior + expansion) / (-math.log(2) * x[0].numel()), x


def _trace(model_output: Tensor, x: Tensor, probe: Tensor | None) -> Tensor:
    """Trace [B] float64 of each image's Jacobian d model_output / d x: exact, or by `probe`."""
    if probe is not None:
        (product,) = torch.autograd.grad(model_output, x, probe)
        return (product * probe).flatten(1).double().sum(1)
    trace = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for i, row in enumerate(model_output.flatten(1).unbind(1)):
        (slope,) = torch.autograd.grad(row.sum(), x, retain_graph=True)
        trace += slope.flatten(1)[:, i]
    return trace
