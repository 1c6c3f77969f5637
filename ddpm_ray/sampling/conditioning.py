"""Build the conditioning of a network, for training, sampling and evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpm_ray.data.low_resolution import downscaled
from ddpm_ray.diffusion.conditioning import Conditioning


@dataclass(frozen=True)
class ConditioningSpec:
    """The conditioning that a network takes."""

    num_classes: int = 0  # 0: no labels
    self_conditioning: bool = False  # its own estimate of x_0
    low_resolution_pixels: int = 0  # side of the low-resolution image; 0: no super-resolution
    known_pixels: bool = False  # the known part of the image, for inpainting

    def of_data(self, x_0: Tensor, labels: Tensor) -> Conditioning:
        """The conditioning of images x_0 [B, C, H, W] of a data set and their labels [B].

        It has no estimate of x_0, which takes a call of the network, and no known part.
        """
        pixels = self.low_resolution_pixels
        return Conditioning(
            labels=labels if self.num_classes else None,
            low_resolution=downscaled(x_0, pixels) if pixels else None,
        )

    def of_samples(
        self, index: Tensor, labels: Sequence[int] = (), low_resolution: Tensor | None = None
    ) -> Conditioning:
        """The conditioning of the samples `index` [B], each a function of its index alone.

        Sample i has labels[i % len], without `labels` the class i % num_classes, and image i % M of
        `low_resolution` [M, C, H, W].
        """
        known: Tensor | None = None
        if labels:
            known = torch.tensor(labels, device=index.device)[index % len(labels)]
        elif self.num_classes:
            known = index % self.num_classes
        if low_resolution is not None:
            low_resolution = low_resolution[index.to(low_resolution.device) % len(low_resolution)]
        return Conditioning(labels=known, low_resolution=low_resolution)

    def taken(self, conditioning: Conditioning) -> Conditioning:
        """The part of `conditioning` that the network takes."""
        return Conditioning(
            labels=conditioning.labels if self.num_classes else None,
            low_resolution=conditioning.low_resolution if self.low_resolution_pixels else None,
            known=conditioning.known if self.known_pixels else None,
        )

    def completed(self, conditioning: Conditioning, x_t: Tensor) -> Conditioning:
        """`conditioning` for x_t [B, C, H, W]; a missing known part becomes 0: nothing is known."""
        if not self.known_pixels or conditioning.known is not None:
            return conditioning
        count, channels, *size = x_t.shape
        return replace(conditioning, known=x_t.new_zeros(count, channels + 1, *size))


NO_CONDITIONING = ConditioningSpec()
