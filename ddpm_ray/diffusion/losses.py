"""Training losses per image; the caller averages and weights them.

With a learned variance of the reverse steps the model output for x_t [B, C, ...] is [B, 2C, ...]:
first the target of the `Parameterization`, then the input of `samplers.learned_log_variance`.
"""

from torch import Tensor

from ddpm_ray.choices import LearnedVariance
from ddpm_ray.diffusion import vlb
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import Denoise, NoiseSchedule, add_noise


def simple_loss(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    parameterization: Parameterization | None = None,
) -> Tensor:
    """L_simple: mean squared error [B] of the model output at steps t [B] in 1..T.

    L_simple of Ho et al. 2020 (arXiv:2006.11239, eq. 14), a mean over all but the first dimension:
    1 for a guess of 0. `parameterization`, of the same `schedule`, defines another target. The loss
    has the dtype of `noise`, float32 in training, even if autocast makes the model output bfloat16.
    """
    target = noise if parameterization is None else parameterization.target(x_0, t, noise)
    return _mean_square(target - denoise(add_noise(schedule, x_0, t, noise), t))


def vlb_loss(
    denoise: Denoise,
    parameterization: Parameterization,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    variance: LearnedVariance,
) -> Tensor:
    """L_vlb: T times the VLB term at t, [B] in bits per dimension; trains mean and variance.

    Its mean over t uniform in 1..T is L_vlb without the constant L_T (Nichol and
    Dhariwal 2021, arXiv:2102.09672, eq. 4 to 7). Raises ValueError unless the output has twice the
    channels of x_0.
    """
    return _learned(denoise, parameterization, x_0, t, noise, variance, mean_too=True)[1]


def hybrid_loss(
    denoise: Denoise,
    parameterization: Parameterization,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    variance: LearnedVariance,
    vlb_weight: float = 0.001,
) -> Tensor:
    """L_simple + vlb_weight L_vlb, [B]: the first trains the mean, the second the variance alone.

    (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 16 and section 3.1.) L_simple is a mean over
    dimensions; L_vlb is `vlb_loss`, T times one term in bits per dimension (nats, summed over D
    dimensions, over D log 2). In these units the weight of the authors' code is 0.001, where the
    term is multiplied by T / 1000. Raises ValueError as `vlb_loss` does.
    """
    model_output, l_vlb = _learned(
        denoise, parameterization, x_0, t, noise, variance, mean_too=False
    )
    return _mean_square(parameterization.target(x_0, t, noise) - model_output) + vlb_weight * l_vlb


def _learned(
    denoise: Denoise,
    parameterization: Parameterization,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    variance: LearnedVariance,
    *,
    mean_too: bool,
) -> tuple[Tensor, Tensor]:
    """The model output [B, C, ...] without the variance, and L_vlb [B] as in `vlb_loss`."""
    schedule = parameterization.schedule
    x_t = add_noise(schedule, x_0, t, noise)
    both = denoise(x_t, t).to(x_t)  # bfloat16 gives a log-variance only 2 digits
    if both.shape[1] != 2 * x_0.shape[1]:
        raise ValueError(
            f"the model output has {both.shape[1]} channels for {x_0.shape[1]} of x_t; with a "
            f"learned variance it has {2 * x_0.shape[1]}: widen it or use simple_loss"
        )
    model_output, raw = both.chunk(2, dim=1)
    log_variance = vlb.reverse_log_variance(schedule, t, variance, x_0, raw)
    mean = model_output if mean_too else model_output.detach()
    return model_output, schedule.num_steps * vlb.term(
        parameterization, x_0, x_t, t, mean, log_variance
    )


def _mean_square(error: Tensor) -> Tensor:
    return error.square().flatten(1).mean(1)
