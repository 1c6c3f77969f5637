"""Guidance: combine calls of denoisers into a guided `denoise`.

At a fixed x_t the model output is affine in x_0 for every parameterization. A combination of
outputs with weights that sum to 1 is therefore the same combination of estimates of x_0. If the
output is [B, 2C, ...], only its first half is guided; the variance stays that of the stronger
denoiser.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ddpm_ray.choices import FixedVariance
from ddpm_ray.diffusion.conditioning import Conditioning, Network
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import Denoise
from ddpm_ray.diffusion.timestep_spacing import require_falling
from ddpm_ray.redaction import counted


def classifier_free(
    network: Network,
    conditioning: Conditioning,
    scale: float,
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    parameterization: Parameterization | None = None,
    null: Conditioning | None = None,
) -> Denoise:
    """Classifier-free guidance: unconditional + scale (conditional - unconditional).

    (Ho and Salimans 2022, arXiv:2207.12598, eq. 6 with w = scale - 1.) The result denoises a batch
    with `conditioning`; unconditional is `null`, by default conditioning.null(). Scale 1
    (conditional) and 0 (unconditional) take one call of B images; other scales one call of 2 B
    images, in reused buffers, so the result does not support autograd.

    `rescale` in [0, 1] restores the standard deviation of the conditional output, against
    over-exposure (phi of Lin et al. 2023, arXiv:2305.08891, section 3.4). `interval` (low, high)
    applies guidance only where low < sigma <= high, with sigma = sqrt((1 - a) / a) in the schedule
    of `parameterization` (Kynkaanniemi et al. 2024, arXiv:2404.07724); it synchronises with the
    device once per call, except at scale 1. Raises ValueError for invalid values; the result raises
    ValueError for another number of images than `conditioning` has.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale is {rescale:g}; it lies from 0 (off) to 1 (all the way)")
    by_step = None if interval is None else scale_by_step(scale, interval, parameterization)
    null, both = conditioning.null() if null is None else null, conditioning
    if scale == 1:  # the same inside the interval as outside it
        by_step = None
    else:
        both = conditioning.concat(null)
    twice, again = _Twice(), _Twice()

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        """The guided output. Raises ValueError for another number of images."""
        if conditioning.batch_size not in (None, len(x_t)):
            raise ValueError(
                f"the conditioning is for {counted(conditioning.batch_size or 0, 'image')} and x_t "
                f"has {len(x_t)}; give each image its own, and with a windowed denoiser use "
                "conditioning.repeat(windows)"
            )
        each = [scale] if by_step is None else [by_step[step] for step in t.tolist()]
        scales = each[:1] if len(set(each)) == 1 else each
        if scales == [1]:
            return network(x_t, t, conditioning)
        if scales == [0]:
            return network(x_t, t, null)
        strong, weak = network(twice(x_t), again(t), both).chunk(2)
        return _mixed(weak, strong, scales, rescale, channels=x_t.shape[1])

    return denoise


def autoguided(network: Denoise, weak: Denoise, scale: float) -> Denoise:
    """Autoguidance: weak + scale (network - weak), with a smaller or less trained `weak`.

    (Karras et al. 2024, arXiv:2406.02507, section 3.) Both need the same parameterization.
    Bind conditioning with `classifier_free` at scale 1.
    """
    return lambda x_t, t: _mixed(weak(x_t, t), network(x_t, t), [scale], 0.0, x_t.shape[1])


def classifier_guided(
    denoise: Denoise,
    log_probability: Callable[[Tensor, Tensor], Tensor],
    parameterization: Parameterization,
    scale: float,
    *,
    steps: Sequence[int] | None = None,
    variance: FixedVariance = "fixed_large",
) -> Denoise:
    """Classifier guidance by the gradient of log p(y | x_t) = log_probability(x_t, t) [B].

    (Dhariwal and Nichol 2021, arXiv:2105.05233.) Without `steps` it is their algorithm 2, for any
    sampler: epsilon - sqrt(1 - a) scale g with the gradient g, which changes the estimate of x_0 by
    (1 - a) / sqrt(a) scale g; no change at a step with a = 0, where x_t is independent of y.

    With the `steps` and `variance` of `ancestral` it is algorithm 1, which shifts the mean of each
    transition by Sigma scale g. From t to s that mean is c x_0 + ..., c = sqrt(a_s) beta / (1 - a),
    so the estimate of x_0 changes by Sigma / c scale g: Sigma / c is (1 - a_s) / sqrt(a_s) for
    `fixed_small` and (1 - a) / sqrt(a_s) for `fixed_large`. The sampler's clip applies after it.
    The output is NaN at steps that are not in `steps`.

    Raises ValueError unless `steps` decrease; the result raises ValueError unless log p is [B].
    """
    a = parameterization.schedule.alpha_bar
    if steps is None:
        move = torch.where(a > 0, (1 - a) / a.sqrt(), 0)
    else:
        require_falling(steps, parameterization.schedule.num_steps)
        move = torch.full_like(a, torch.nan)
        for t, s in pairwise(steps):
            move[t] = (1 - a[s if variance == "fixed_small" else t]) / a[s].sqrt()
    column = scale * move / parameterization.to_x_0()[1]  # converted to the model output

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        """The shifted output of `denoise`. Raises ValueError unless log p is [B]."""
        model_output = denoise(x_t, t)
        with torch.inference_mode(False), torch.enable_grad():
            x = x_t.detach().clone().requires_grad_()
            log_p = log_probability(x, t.clone())  # autograd cannot save inference tensors
            if log_p.shape != t.shape:
                raise ValueError(
                    f"log p is {list(log_p.shape)} for {counted(len(t), 'image')}; it must be "
                    "one number per image: that of its label"
                )
            (slope,) = torch.autograd.grad(log_p.sum(), x)
        along = column[t].view(-1, *[1] * (x_t.ndim - 1)).to(x_t)
        return _with_variance_of(model_output, model_output[:, : x_t.shape[1]] + along * slope)

    return guided


def scale_by_step(
    scale: float, interval: tuple[float, float], parameterization: Parameterization | None
) -> list[float]:
    """The guidance scale at each step 0..T: `scale` where sigma lies in `interval`, else 1.

    Raises ValueError for an invalid interval, and without a parameterization.
    """
    low, high = interval
    if not 0 <= low < high or parameterization is None:
        raise ValueError(
            f"interval is {interval} and parameterization "
            f"{parameterization}; give two sigmas, 0 <= low < high, "
            "and the parameterization, whose schedule maps t to sigma"
        )
    a = parameterization.schedule.alpha_bar
    sigma: list[float] = ((1 - a) / a).sqrt().tolist()
    return [scale if low < s <= high else 1.0 for s in sigma]


def _mixed(
    weak: Tensor, strong: Tensor, scales: list[float], rescale: float, channels: int
) -> Tensor:
    """weak + scale (strong - weak) in the first `channels`; one scale, or one per image."""
    towards = strong[:, :channels]
    one = scales[0] if len(scales) == 1 else None  # a tensor would be copied to the device
    each = one or towards.new_tensor(scales).view(-1, *[1] * (towards.ndim - 1))
    mixed = torch.lerp(weak[:, :channels], towards, each)
    if rescale > 0:
        pixels = tuple(range(1, towards.ndim))
        wanted, found = (
            model_output.std(pixels, keepdim=True) for model_output in (towards, mixed)
        )
        back = torch.where(found > 0, wanted / found, 1)  # eq. 15; 1 for a constant output
        mixed *= rescale * back + 1 - rescale  # eq. 16
    return _with_variance_of(strong, mixed)


def _with_variance_of(model_output: Tensor, guided: Tensor) -> Tensor:
    variance = model_output[:, guided.shape[1] :]
    return torch.cat([guided, variance], 1) if variance.shape[1] else guided


class _Twice:
    """Concatenates a batch with itself, in a reused buffer."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        made, shape = self._buffer, (2 * len(x), *x.shape[1:])
        if (made.shape, made.dtype, made.device) != (shape, x.dtype, x.device):
            with torch.inference_mode(False):  # else it could be written in inference mode only
                self._buffer = torch.cat([x.detach()] * 2)  # in x's memory format
        return torch.cat([x, x], out=self._buffer)
