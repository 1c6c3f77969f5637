"""Training losses per image; the caller averages, weights or bands them."""

from torch import Tensor

from ddpm_ray.diffusion.process import Denoise, NoiseSchedule, add_noise


def simple_loss(
    denoise: Denoise, schedule: NoiseSchedule, x_0: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """Mean squared error [B] of the predicted noise at steps t [B] in 1..T; 1 for a guess of 0.

    L_simple of Ho et al. 2020 (arXiv:2006.11239, eq. 14), a mean over all but the first dimension.
    It has the type of `noise`, float32 in training, even where autocast makes `denoise` answer in
    bfloat16.
    """
    error = noise - denoise(add_noise(schedule, x_0, t, noise), t)
    return error.square().flatten(1).mean(1)
