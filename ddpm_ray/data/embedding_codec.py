"""The codec of image embeddings: from stored vectors to the tensor that is diffused, and back.

The prior of DALL-E 2 (Ramesh et al. 2022, arXiv:2204.06125) is a diffusion model of such vectors.
Each dimension is standardised by its mean and standard deviation over the whole set. A dimension
that is constant in the set has standard deviation 0: its x_0 is 0, and `embeddings` returns its
constant whatever x_0 is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ddpm_ray.counter_rng import Step
from ddpm_ray.data.codec import constants
from ddpm_ray.data.dataset import UInt8s
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.manifest import Manifest
from ddpm_ray.data.shard_index import CodecName


@dataclass(frozen=True)
class EmbeddingCodec:
    """Embeddings, float16 [B, E] <-> float32 [B, E, 1, 1], standardised per dimension."""

    width: int  # E
    mean: tuple[float, ...]  # [E]
    std: tuple[float, ...]  # [E]; 0: the dimension is constant
    encoder_sha256: str = ""  # of the weights that embedded the images
    encoder_url: str = ""  # of these weights; empty: unknown

    name: ClassVar[CodecName] = "embeddings"
    factor: ClassVar[int] = 1
    rounding: ClassVar[str] = "none: embeddings are no images"  # for provenances

    @classmethod
    def of(cls, manifest: Manifest) -> EmbeddingCodec:
        """Return the codec of a set of embeddings. Raises ValueError for another set."""
        if manifest.codec != "embeddings":
            raise ValueError(f"the data set holds {manifest.codec}, not embeddings")
        statistics = manifest.embedding_mean, manifest.embedding_std
        return cls(manifest.embedding_width, *statistics, manifest.encoder_sha256)

    def shape(self, image_shape: ImageShape) -> tuple[int, int, int]:
        """Return the shape (E, 1, 1) of x_0, for images of any shape."""
        return self.width, 1, 1

    def encode(self, stored: Tensor, flip: Tensor | None = None) -> Tensor:
        """Convert stored embeddings [B, E] to x_0, float32 [B, E, 1, 1].

        Raises ValueError for flips: an encoder does not map a mirrored image to a known vector.
        """
        if flip is not None:
            self.require_flipped()
        mean, std = self._statistics(stored)
        # In float64: rounding the mean to float32 would shift a dimension that hardly varies.
        x_0 = (stored.double() - mean) / torch.where(std == 0, 1.0, std)
        return x_0.float()[:, :, None, None]

    def draw(
        self, stored: Tensor, flip: Tensor | None, seed: int, step: Step, positions: Tensor
    ) -> Tensor:
        """Return `encode(stored, flip)`: embeddings have no randomness of their own."""
        return self.encode(stored, flip)

    def embeddings(self, x_0: Tensor) -> Tensor:
        """Undo the standardisation: embeddings float32 [B, E] from x_0 [B, E, 1, 1]."""
        mean, std = self._statistics(x_0)
        return (x_0.flatten(1).double() * std + mean).float()

    def require_flipped(self) -> None:
        """Raise ValueError: embeddings hold no flipped views."""
        raise ValueError(
            "data.flip is true, but embeddings are those of images as they are stored: set it to "
            "false"
        )

    def encode_images(self, images: Tensor) -> Tensor:
        """Raise ValueError: an image and text encoder makes embeddings."""
        raise ValueError("this codec encodes no images: embed them with ddpm_ray.load_encoders")

    def decode(self, x_0: Tensor) -> UInt8s:
        """Raise ValueError: embeddings are no images."""
        raise ValueError("embeddings are no images, and no decoder makes images of them here")

    def show_noisy(self, x_t: Tensor) -> UInt8s:
        """Raise ValueError: embeddings are no images."""
        return self.decode(x_t)

    def clip(self, quantile: float = 0.0) -> None:
        """Return None: embeddings have no range. Raises ValueError for dynamic thresholding."""
        if quantile:
            raise ValueError(
                f"sampling.dynamic_quantile is {quantile:g}, but embeddings have no range to clip "
                "to; set it to 0"
            )

    def variance(self, pixel_std: Sequence[float]) -> float:
        """Return 1, the variance of x_0 in each dimension that is not constant."""
        return 1.0

    def mean_square(self, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> float:
        """Return E[x_0^2], which is 1 in each dimension that is not constant."""
        return 1.0

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, float64 [E] each, on the device of `like`."""
        mean, std = (constants(each, torch.float64, like.device) for each in (self.mean, self.std))
        return mean, std
