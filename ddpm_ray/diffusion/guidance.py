"""Guidance: what draws samples towards a label, as a `denoise` made of others.

At a fixed x_t every kind of answer is affine in x_0. Answers mixed with weights that sum to 1
therefore stand for the images mixed so, whatever the network predicts. Where a network answers
[B, 2C, ...], the first half is guided and the second, its variance, stays the stronger answer's.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ddpm_ray.counter_rng import Purpose, uniform_int
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import Denoise
from ddpm_ray.diffusion.timestep_spacing import require_falling
from ddpm_ray.redaction import counted

Conditional: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t [B, ...], t [B], labels [B] int64 in 0..K, where K is no label) -> the answer [B, ...]."""


def classifier_free(
    network: Conditional,
    labels: Tensor,
    null: int,
    scale: float,
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    parameterization: Parameterization | None = None,
) -> Denoise:
    """unconditional + scale (conditional - unconditional), for a batch with these `labels` [B].

    (Ho and Salimans 2022, arXiv:2207.12598, eq. 6 with w = scale - 1.) `null` is the label for
    none. Scale 1 is the conditional answer and 0 the other, each one call of B images; any other
    is one of 2 B, in buffers that are reused, so autograd refuses to go through it.

    `rescale` in [0, 1] leads each guided answer back to the conditional one's standard deviation,
    against over-exposure (phi of Lin et al. 2023, arXiv:2305.08891, section 3.4). `interval` (low,
    high) guides where low < sigma <= high only, sigma = sqrt((1 - a) / a) in the schedule of
    `parameterization`, and leaves the conditional answer elsewhere (Kynkaanniemi et al. 2024,
    arXiv:2404.07724); the host then waits for t, once a call. Raises ValueError for other values,
    and the denoiser does for another number of images than labels.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale is {rescale:g}; it lies from 0 (off) to 1 (all the way)")
    by_step = None if interval is None else _scale_by_step(scale, interval, parameterization)
    none = torch.full_like(labels, null)
    twice, again, both = _Twice(), _Twice(), torch.cat([labels, none])

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        """The guided answer; ValueError for another number of images than labels."""
        if len(x_t) != len(labels):
            raise ValueError(
                f"labels are {len(labels)} and images {len(x_t)}; give each image its label, and "
                "where a canvas is seen in windows, repeat the labels once for each window"
            )
        each = [scale] if by_step is None else [by_step[step] for step in t.tolist()]
        scales = each[:1] if len(set(each)) == 1 else each
        if scales == [1]:
            return network(x_t, t, labels)
        if scales == [0]:
            return network(x_t, t, none)
        strong, weak = network(twice(x_t), again(t), both).chunk(2)
        return _mixed(weak, strong, scales, rescale, channels=x_t.shape[1])

    return denoise


def autoguided(network: Denoise, weak: Denoise, scale: float) -> Denoise:
    """weak + scale (network - weak): away from the errors of a smaller or less trained network.

    (Karras et al. 2024, arXiv:2406.02507, section 3.) Both predict the same kind; where they need
    labels, make each a denoiser by `classifier_free` at scale 1.
    """
    return lambda x_t, t: _mixed(weak(x_t, t), network(x_t, t), [scale], 0.0, x_t.shape[1])


def classifier_guided(
    denoise: Denoise,
    log_probability: Callable[[Tensor, Tensor], Tensor],
    parameterization: Parameterization,
    scale: float,
    *,
    steps: Sequence[int] | None = None,
    variance: Literal["fixed_small", "fixed_large"] = "fixed_large",
) -> Denoise:
    """Draws towards large log p(y | x_t) = log_probability(x_t, t) [B], by its slope in x_t.

    (Dhariwal and Nichol 2021, arXiv:2105.05233.) Without `steps` it is their algorithm 2, for any
    sampler: epsilon - sqrt(1 - a) scale slope, which moves the estimate of x_0 by (1 - a) / sqrt(a)
    scale slope; not at all at a step without signal, a = 0, where x_t says nothing of y.

    With the `steps` and `variance` of `ancestral` it is algorithm 1, which shifts the mean of each
    transition by Sigma scale slope. From t to s that mean is c x_0 + ..., c = sqrt(a_s) beta /
    (1 - a): the estimate moves by Sigma / c, (1 - a_s) / sqrt(a_s) where Sigma is `fixed_small` and
    (1 - a) / sqrt(a_s) where `fixed_large`, and the sampler's clip bounds it; NaN at other steps.

    Raises ValueError for steps that do not fall, and the denoiser unless log p is [B].
    """
    a = parameterization.schedule.alpha_bar
    if steps is None:
        move = torch.where(a > 0, (1 - a) / a.sqrt(), 0)
    else:
        require_falling(steps, parameterization.schedule.num_steps)
        move = torch.full_like(a, torch.nan)
        for t, s in pairwise(steps):
            move[t] = (1 - a[s if variance == "fixed_small" else t]) / a[s].sqrt()
    column = scale * move / parameterization.to_x_0()[1]  # the answer's move, for that of x_0

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        """`denoise`'s answer, moved along the slope; ValueError unless log p is [B]."""
        model_output = denoise(x_t, t)
        with torch.inference_mode(False), torch.enable_grad():
            x = x_t.detach().clone().requires_grad_()
            log_p = log_probability(x, t.clone())  # autograd keeps no inference tensor
            if log_p.shape != t.shape:
                raise ValueError(
                    f"log p is {list(log_p.shape)} for {counted(len(t), 'image')}; it must be "
                    "one number an image: that of the class you want"
                )
            (slope,) = torch.autograd.grad(log_p.sum(), x)
        along = column[t].view(-1, *[1] * (x_t.ndim - 1)).to(x_t)
        return _with_variance_of(model_output, model_output[:, : x_t.shape[1]] + along * slope)

    return guided


def or_null(labels: Tensor, null: int) -> Tensor:
    """`labels` [B], `null` in place of -1: an image without a label has the label for none."""
    return torch.where(labels < 0, null, labels)


def dropped(
    labels: Tensor, null: int, share: float, seed: int, step: int, positions: Tensor
) -> Tensor:
    """`labels` [B], about `share` of them set to `null`: a function of (seed, step, position).

    (Ho and Salimans 2022, algorithm 1.) Raises ValueError for a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share:g}; the share of labels to drop lies from 0 to 1")
    draw = uniform_int(seed, Purpose.LABEL_DROP, step, positions, 2**31)
    return torch.where(draw < share * 2**31, null, labels)


def _scale_by_step(
    scale: float, interval: tuple[float, float], parameterization: Parameterization | None
) -> list[float]:
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
    """weak + scale (strong - weak) in the first `channels`; one scale for all images, or each's."""
    towards = strong[:, :channels]
    one = scales[0] if len(scales) == 1 else None  # as a tensor it would have to reach the device
    each = one or towards.new_tensor(scales).view(-1, *[1] * (towards.ndim - 1))
    mixed = torch.lerp(weak[:, :channels], towards, each)
    if rescale > 0:
        pixels = tuple(range(1, towards.ndim))
        wanted, found = (
            model_output.std(pixels, keepdim=True) for model_output in (towards, mixed)
        )
        back = torch.where(found > 0, wanted / found, 1)  # eq. 15; without contrast there is none
        mixed *= rescale * back + 1 - rescale  # eq. 16
    return _with_variance_of(strong, mixed)


def _with_variance_of(model_output: Tensor, guided: Tensor) -> Tensor:
    variance = model_output[:, guided.shape[1] :]
    return torch.cat([guided, variance], 1) if variance.shape[1] else guided


class _Twice:
    """A batch followed by itself, in a buffer made once."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        made, shape = self._buffer, (2 * len(x), *x.shape[1:])
        if (made.shape, made.dtype, made.device) != (shape, x.dtype, x.device):
            with torch.inference_mode(False):  # else only that mode could write to it
                self._buffer = torch.cat([x.detach()] * 2)  # in x's memory format
        return torch.cat([x, x], out=self._buffer)
