"""Estimate x_0 from the model output, as every sampler does at each step.

An `X0Estimator` is the first argument of each sampler. It holds what they share: the schedule, the
denoiser, the parameterization of its output and the clip.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import Denoise, NoiseSchedule

Clip: TypeAlias = Callable[[Tensor], object]
"""Clips an estimate of x_0 [B, ...] in place."""


def clip_to_range(x_0: Tensor) -> None:
    """Clip to [-1, 1], the range of images."""
    x_0.clamp_(-1, 1)


def clip_to_quantile(share: float) -> Clip:
    """Dynamic thresholding: clip each image to [-s, s] and divide it by s.

    s is the `share` quantile of the image's |x_0|, at least 1. Strong guidance moves pixels out of
    range, where a fixed clip would saturate them (Saharia et al. 2022, arXiv:2205.11487, section
    2.3). Raises ValueError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share:g}; a quantile lies above 0 and at most at 1")

    def clip(x_0: Tensor) -> None:
        """Clip and scale x_0 [B, ...] in place."""
        size = x_0.flatten(1).abs()
        # topk, since quantile() sorts all pixels and kthvalue is not deterministic on CUDA.
        rank = max(1, round(share * size.shape[1]))
        largest = size.topk(size.shape[1] - rank + 1, dim=1).values
        s = largest[:, -1].clamp(min=1).view(-1, *[1] * (x_0.ndim - 1))
        torch.clamp(x_0, -s, s, out=x_0).div_(s)

    return clip


def self_conditioning_estimate(
    parameterization: Parameterization,
    x_t: Tensor,
    t: Tensor,
    model_output: Tensor,
    clip: Clip | None,
) -> Tensor:
    """The network's next self-conditioning input: a clipped estimate of x_0, without gradient.

    (Chen et al. 2022, arXiv:2208.04202, section 3.2.) Both training and sampling use it. Channels
    of a learned variance, after those of x_t, are ignored.
    """
    mean = model_output[:, : x_t.shape[1]]
    estimate = parameterization.x_0(x_t, t, mean).detach()
    if clip is not None:
        clip(estimate)
    return estimate


class X0Estimator:
    """Calls `denoise` and converts its output to an estimate of x_0, to which it applies `clip`.

    `parameterization` defines the output of `denoise`; None: it is the noise. Samplers recompute
    the noise from the clipped estimate; `clip` None: no clipping.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        denoise: Denoise,
        parameterization: Parameterization | None = None,
        clip: Clip | None = clip_to_range,
    ) -> None:
        parameterization = parameterization or Parameterization.of("epsilon", schedule)
        self.schedule = schedule
        self._denoise, self._clip = denoise, clip
        self._of_x_t, self._of_output = (c.tolist() for c in parameterization.to_x_0())

    def model_output(self, x_t: Tensor, t: int) -> Tensor:
        """The model output for x_t [B, ...], all at step t."""
        with torch.inference_mode(False):  # an ordinary tensor: `denoise` may take gradients
            steps = x_t.new_full((len(x_t),), t, dtype=torch.int64)
        return self._denoise(x_t, steps)

    def x_0(self, x_t: Tensor, t: int, model_output: Tensor, out: Tensor) -> Tensor:
        """Write the clipped estimate of x_0 to `out`, which must not be x_t."""
        torch.mul(x_t, self._of_x_t[t], out=out).add_(model_output, alpha=self._of_output[t])
        if self._clip is not None:
            self._clip(out)
        return out

    def __call__(self, x_t: Tensor, t: int, out: Tensor) -> Tensor:
        """Call the network and write the clipped estimate of x_0 to `out`."""
        return self.x_0(x_t, t, self.model_output(x_t, t), out)
