"""Perceptual distance: the difference of two images in the features of a fixed network.

(LPIPS, Zhang et al. 2018, arXiv:1801.03924, eq. 1, with all weights 1 instead of learned ones.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

FeatureMaps: TypeAlias = Callable[[Tensor], Sequence[Tensor]]
"""Images [B, C, H, W] in [-1, 1] -> feature maps [B, C_i, H_i, W_i] of one or more stages."""

# Added to squared lengths, so that features of 0 have a finite gradient.
LENGTH_EPS = 1e-8


@dataclass(frozen=True)
class PerceptualDistance:
    """The distance of images x and x_hat [B, C, H, W] in [-1, 1], as float32 [B].

    At each place of each stage, the features of all channels are scaled to a vector of length 1;
    the distance is the squared difference of these vectors, averaged over places and summed over
    stages: from 0 to 4 per stage, and 2 - 2 cos of their angle at each place.
    """

    feature_maps: FeatureMaps  # of a network without trainable parameters

    def __call__(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """The distance [B], with a gradient for x_hat."""
        with torch.no_grad():
            targets = self.feature_maps(x)
        stages = zip(targets, self.feature_maps(x_hat), strict=True)
        return torch.stack([_distance(target, found) for target, found in stages]).sum(0)


def _distance(target: Tensor, found: Tensor) -> Tensor:
    """Mean squared difference [B] of unit vectors of feature maps [B, C, H, W]."""
    difference = _unit(target.float()) - _unit(found.float())
    return difference.square().sum(1).flatten(1).mean(1)


def _unit(features: Tensor) -> Tensor:
    """[B, C, H, W], scaled along C to length 1, or less for lengths near 0."""
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + LENGTH_EPS)
