"""Codecs: from what a shard stores to the tensor that is diffused, and back to uint8 images.

This module alone knows the value range of that tensor and the order of its axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ddpm_ray.counter_rng import Step
from ddpm_ray.data.dataset import UInt8s
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.shard_index import CodecName
from ddpm_ray.diffusion.x0_estimator import Clip, clip_to_quantile, clip_to_range
from ddpm_ray.redaction import counted


class Codec(Protocol):
    """Conversions between stored samples, x_0 and images.

    PixelCodec, LatentCodec and EmbeddingCodec are codecs; embeddings have no images.
    """

    name: ClassVar[CodecName]
    rounding: ClassVar[str]  # of `decode`, for provenances

    @property
    def factor(self) -> int:
        """Pixels per value of x_0, along each side."""
        ...

    def shape(self, image_shape: ImageShape) -> tuple[int, int, int]:
        """Return the shape of x_0 for images of this shape. ValueError if there is none."""
        ...

    def encode(self, stored: Tensor, flip: Tensor | None = None) -> Tensor:
        """Convert stored samples to x_0, flipped where `flip` [B] is True; without randomness."""
        ...

    def draw(
        self, stored: Tensor, flip: Tensor | None, seed: int, step: Step, positions: Tensor
    ) -> Tensor:
        """Convert the samples at these positions of batch `step` to x_0, for training."""
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """Convert uint8 images [B, H, W, C] to x_0."""
        ...

    def decode(self, x_0: Tensor) -> UInt8s:
        """Convert x_0 to uint8 images [B, H, W, C]."""
        ...

    def show_noisy(self, x_t: Tensor) -> UInt8s:
        """Convert noisy x_t to uint8 images [B, H, W, C] for pictures."""
        ...

    def clip(self, quantile: float = 0.0) -> Clip | None:
        """Return the function that clips estimates of x_0 in place; None: x_0 has no range."""
        ...

    def variance(self, pixel_std: Sequence[float]) -> float:
        """Return the mean variance of x_0, from the standard deviation [C] of the pixels."""
        ...

    def mean_square(self, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> float:
        """Return E[x_0^2], from the mean and standard deviation [C] of the pixels."""
        ...


@dataclass(frozen=True)
class PixelCodec:
    """Pixels, uint8 [B, H, W, C] <-> float32 [B, C, H, W] in [-1, 1]."""

    name: ClassVar[CodecName] = "pixels"
    factor: ClassVar[int] = 1
    levels_per_unit: ClassVar[float] = 127.5  # grey levels per unit of the diffused tensor
    rounding: ClassVar[str] = "uint8, (x + 1) * 127.5 half up"  # of `decode`, for provenances

    def shape(self, image_shape: ImageShape) -> tuple[int, int, int]:
        """Return the shape (C, H, W) in which images of this shape are diffused."""
        return image_shape.channels, image_shape.height, image_shape.width

    def encode(self, images: Tensor, flip: Tensor | None = None) -> Tensor:
        """Convert uint8 images [B, H, W, C] to x_0, float32 [B, C, H, W], on the same device.

        Images with `flip` [B] bool are mirrored left to right.
        """
        x_0 = channels_first(images).to(torch.float32, memory_format=torch.contiguous_format)
        x_0 = x_0.div_(self.levels_per_unit).sub_(1)
        return x_0 if flip is None else torch.where(flip.view(-1, 1, 1, 1), x_0.flip(-1), x_0)

    def draw(
        self, stored: Tensor, flip: Tensor | None, seed: int, step: Step, positions: Tensor
    ) -> Tensor:
        """Return `encode(stored, flip)`: pixels have no randomness of their own."""
        return self.encode(stored, flip)

    def encode_images(self, images: Tensor) -> Tensor:
        """Return `encode(images)`: shards of pixels store images."""
        return self.encode(images)

    def dequantize(self, images: Tensor, noise: Tensor) -> Tensor:
        """Convert uint8 images [B, H, W, C] to x_0 [B, C, H, W], spread over their grey levels.

        `noise` [B, C, H, W] is uniform in [0, 1). The mean of -log2 density(x_0) per dimension plus
        log2(levels_per_unit) bounds the code length of the images (Theis et al. 2016,
        arXiv:1511.01844, eq. 3).
        """
        levels = channels_first(images).to(noise)
        return (levels + (noise - 0.5)) / self.levels_per_unit - 1

    def decode(self, x_0: Tensor) -> UInt8s:
        """Convert x_0 [B, C, H, W] to uint8 images [B, H, W, C]: clamped, rounded half up.

        Raises ValueError if a value is not finite, as uint8 cannot represent it.
        """
        require_finite(x_0)
        levels = x_0.float().add(1).mul_(self.levels_per_unit).add_(0.5).clamp_(0, 255)
        images: UInt8s = channels_last(levels.to(torch.uint8)).contiguous().cpu().numpy()
        return images

    def show_noisy(self, x_t: Tensor) -> UInt8s:
        """Return `decode(x_t)`."""
        return self.decode(x_t)

    def clip(self, quantile: float = 0.0) -> Clip:
        """Return the function that clips estimates of x_0 in place, to [-1, 1].

        With a `quantile` it scales by that quantile first: dynamic thresholding.
        """
        return clip_to_quantile(quantile) if quantile else clip_to_range

    def variance(self, pixel_std: Sequence[float]) -> float:
        """Return the mean variance of x_0, from the standard deviation [C] of the pixels."""
        return sum((std / self.levels_per_unit) ** 2 for std in pixel_std) / len(pixel_std)

    def mean_square(self, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> float:
        """Return E[x_0^2], from the mean and standard deviation [C] of the pixels."""
        squares = [(mean / self.levels_per_unit - 1) ** 2 for mean in pixel_mean]
        return sum(squares) / len(squares) + self.variance(pixel_std)


def constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `values` [n] as a tensor on `device`, copied there once.

    A copy from the host in each training step would wait for the device. What is compiled holds
    them as constants.
    """
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=device)
    return _kept_constants(values, dtype, device)


@lru_cache(maxsize=64)
def _kept_constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is made in that mode cannot take part in training
        return torch.tensor(values, dtype=dtype, device=device)


def require_finite(x_0: Tensor) -> None:
    """Raise ValueError if x_0 [B, ...] has values that are not finite, with their images' count."""
    if not torch.isfinite(x_0).all():
        bad = int((~torch.isfinite(x_0)).flatten(1).any(1).sum())
        raise ValueError(
            f"{bad} of {counted(len(x_0), 'image')}: values that are not finite; the network's "
            "weights or its precision are broken: sample from an earlier checkpoint or in float32"
        )


PIXELS = PixelCodec()


def require_pixels(codec: Codec, what: str) -> PixelCodec:
    """Return `codec` if it is that of pixels. Raises ValueError that names the score `what`."""
    if isinstance(codec, PixelCodec):
        return codec
    raise ValueError(
        f"{what} is defined for 8-bit pixels, but this model diffuses {codec.name}: set it to 0, "
        "or take a model of pixels"
    )


def diffused_shape(codec: Codec, image_shape: ImageShape) -> ImageShape:
    """Return the shape (h, w, c) of x_0 for images of this shape, which the network is built for.

    Raises ValueError for images that the codec cannot encode.
    """
    channels, height, width = codec.shape(image_shape)
    return ImageShape(height, width, channels)


def channels_first(images: Tensor) -> Tensor:
    """View images [B, H, W, C] as [B, C, H, W]."""
    return images.permute(0, 3, 1, 2)


def channels_last(images: Tensor) -> Tensor:
    """View images [B, C, H, W] as [B, H, W, C]."""
    return images.permute(0, 2, 3, 1)
