"""From what a network predicts to the estimate of x_0 that every sampler steps with."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import Denoise

Clip: TypeAlias = Callable[[Tensor], object]
"""Changes an estimate of x_0 [B, ...] in place."""


def clip_to_range(x_0: Tensor) -> None:
    """Into [-1, 1], where images are."""
    x_0.clamp_(-1, 1)


def clip_to_quantile(share: float) -> Clip:
    """Dynamic thresholding: each image by the `share` quantile s of its own |x_0|, where s > 1.

    Into [-s, s], then divided by s: strong guidance pushes pixels out of the range, and a plain
    clip would saturate them (Saharia et al. 2022, arXiv:2205.11487, section 2.3). Raises ValueError
    for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share:g}; a quantile lies above 0 and at most at 1")

    def clip(x_0: Tensor) -> None:
        """Cuts and scales x_0 [B, ...] in place."""
        size = x_0.flatten(1).abs()
        rank = max(1, round(share * size.shape[1]))  # a pixel's own value: quantile() would sort
        # Not kthvalue, which is not deterministic on CUDA.
        largest = size.topk(size.shape[1] - rank + 1, dim=1).values
        s = largest[:, -1].clamp(min=1).view(-1, *[1] * (x_0.ndim - 1))
        torch.clamp(x_0, -s, s, out=x_0).div_(s)

    return clip


class X0Estimator:
    """Calls the network and turns its answer into x_0, in buffers that are made once."""

    def __init__(
        self, denoise: Denoise, prediction: Parameterization, x_T: Tensor, clip: Clip | None
    ) -> None:
        self._denoise, self._clip = denoise, clip
        self._of_x_t, self._of_output = (c.tolist() for c in prediction.to_x_0())
        self._t = torch.empty(len(x_T), dtype=torch.int64, device=x_T.device)

    def model_output(self, x_t: Tensor, t: int) -> Tensor:
        """What the network predicts, all images at step t."""
        return self._denoise(x_t, self._t.fill_(t))

    def x_0(self, x_t: Tensor, t: int, model_output: Tensor, out: Tensor) -> Tensor:
        """The clipped estimate of the images behind `model_output`, in `out`, which is not x_t."""
        torch.mul(x_t, self._of_x_t[t], out=out).add_(model_output, alpha=self._of_output[t])
        if self._clip is not None:
            self._clip(out)
        return out

    def __call__(self, x_t: Tensor, t: int, out: Tensor) -> Tensor:
        """`x_0` of `model_output`."""
        return self.x_0(x_t, t, self.model_output(x_t, t), out)
