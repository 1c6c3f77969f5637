"""The codec of latents: from stored posteriors to the tensor that is diffused, and back to images.

A set of latents stores the encoder's normal distribution of each image, not a draw from it: each
training step draws a new sample. Each channel is standardised by its mean and standard deviation
over the whole set, so x_0 has mean 0 and variance 1 per channel. (Rombach et al. 2022,
arXiv:2112.10752, section D.1, divide all channels by one number, estimated from the first batch.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ddpm_ray import counter_rng
from ddpm_ray.counter_rng import Purpose, Step
from ddpm_ray.data.codec import constants, require_finite
from ddpm_ray.data.dataset import UInt8s
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.latent_preview import PreviewMatrix
from ddpm_ray.data.manifest import Manifest
from ddpm_ray.data.shard_index import CodecName
from ddpm_ray.models.autoencoder import Posterior


class LatentAutoencoder(Protocol):
    """The encoder and decoder of images; TrainedAutoencoder (sampling/autoencoder.py) is one."""

    @property
    def url(self) -> str:
        """URL of its checkpoint or folder."""
        ...

    @property
    def sha256(self) -> str:
        """sha256 of its weights."""
        ...

    def encode_uint8(self, images: Tensor) -> Posterior:
        """Encode uint8 images [B, H, W, C] to posteriors [B, c, h, w]."""
        ...

    def decode_uint8(self, z: Tensor) -> UInt8s:
        """Decode latents [B, c, h, w] to uint8 images [B, H, W, C]."""
        ...


@dataclass(frozen=True)
class LatentCodec:
    """Latents, float16 [B, 2, views, c, h, w] <-> float32 [B, c, h, w], standardised per channel.

    The first half of a stored sample is the mean, the second the log variance.
    """

    channels: int  # c
    factor: int  # pixels per latent, along each side
    views: tuple[str, ...]  # plain, or plain and flipped
    mean: tuple[float, ...]  # [c]
    std: tuple[float, ...]  # [c], of draws
    autoencoder: LatentAutoencoder | None = None
    autoencoder_sha256: str = ""  # of the weights that encoded the latents
    preview: PreviewMatrix | None = None  # from x_0 to colours; None: unknown

    name: ClassVar[CodecName] = "latents"
    rounding: ClassVar[str] = "the autoencoder's decoding to uint8"  # for provenances

    @classmethod
    def of(cls, manifest: Manifest) -> LatentCodec:
        """Return the codec of a set of latents, which decodes once `bound` to an autoencoder."""
        shape = manifest.latent_shape
        if shape is None:
            raise ValueError(f"the data set holds {manifest.codec}, not latents")
        factor = manifest.image_shape.height // shape.height
        return cls(
            shape.channels,
            factor,
            manifest.views,
            manifest.latent_mean,
            manifest.latent_std,
            autoencoder_sha256=manifest.autoencoder_sha256,
        )

    def bound(self, autoencoder: LatentAutoencoder) -> LatentCodec:
        """Return this codec, which encodes and decodes images by `autoencoder`."""
        return replace(self, autoencoder=autoencoder)

    def shape(self, image_shape: ImageShape) -> tuple[int, int, int]:
        """Return the shape (c, h, w) of x_0 for images of this shape. Raises ValueError."""
        height, width = image_shape.height, image_shape.width
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"images are {height} x {width} pixels; both sides must be multiples of the "
                f"autoencoder's factor {self.factor}"
            )
        return self.channels, height // self.factor, width // self.factor

    def encode(
        self, stored: Tensor, flip: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Draw x_0, float32 [B, c, h, w], from stored latents [B, 2, views, c, h, w].

        `noise` [B, c, h, w] is standard normal (`posterior_noise`); without it x_0 is the mean.
        Images with `flip` [B] bool take the flipped view; raises ValueError if none is stored.
        """
        latents = stored[:, :, 0]  # [B, 2, c, h, w]
        if flip is not None:
            self.require_flipped()
            latents = torch.where(flip.view(-1, 1, 1, 1, 1), stored[:, :, 1], latents)
        posterior = Posterior(*latents.float().unbind(1))
        return self._standardised(posterior.mean if noise is None else posterior.sample(noise))

    def draw(
        self, stored: Tensor, flip: Tensor | None, seed: int, step: Step, positions: Tensor
    ) -> Tensor:
        """Draw x_0 from the stored posteriors, anew for each (seed, step, position)."""
        shape = tuple(stored.shape[-3:])
        noise = posterior_noise(seed, step, positions.to(stored.device), shape)
        return self.encode(stored, flip, noise)

    def encode_images(self, images: Tensor) -> Tensor:
        """Encode uint8 images [B, H, W, C] to x_0: the posterior's mean, standardised.

        Raises ValueError for sides that the factor does not divide, or without an autoencoder.
        """
        return self._standardised(self._bound().encode_uint8(images).mean)

    def require_flipped(self) -> None:
        """Raise ValueError if the set has no flipped views."""
        if "flipped" not in self.views:
            raise ValueError(
                f"data.flip is true, but the latents hold only the views {', '.join(self.views)}; "
                "set it to false, or encode the images again with flipped=true"
            )

    def decode(self, x_0: Tensor) -> UInt8s:
        """Convert x_0 [B, c, h, w] to uint8 images [B, H, W, C].

        Raises ValueError if a value is not finite or no autoencoder is bound.
        """
        require_finite(x_0)
        return self._bound().decode_uint8(self.latents(x_0))

    def show_noisy(self, x_t: Tensor) -> UInt8s:
        """Show x_t [B, c, h, w] by the linear preview, each latent as factor x factor pixels.

        The decoder was never trained on noise and turns it into texture. A linear map shows how
        much of the image is left, as noisy pixels do. Without a preview, x_t is decoded.
        """
        if self.preview is None:
            return self.decode(x_t)
        require_finite(x_t)
        return self.preview.images(x_t).repeat(self.factor, axis=1).repeat(self.factor, axis=2)

    def latents(self, x_0: Tensor) -> Tensor:
        """Undo the standardisation: latents z [B, c, h, w] of the autoencoder, float32."""
        x_0 = x_0.float()
        return x_0 * self._column(self.std, x_0) + self._column(self.mean, x_0)

    def clip(self, quantile: float = 0.0) -> None:
        """Return None: latents have no range. Raises ValueError for dynamic thresholding."""
        if quantile:
            raise ValueError(
                f"sampling.dynamic_quantile is {quantile:g}, but latents have no range to clip to; "
                "set it to 0"
            )

    def variance(self, pixel_std: Sequence[float]) -> float:
        """Return 1, the variance of x_0 in each channel, whatever that of the pixels."""
        return 1.0

    def mean_square(self, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> float:
        """Return E[x_0^2], which is 1."""
        return 1.0

    def _standardised(self, z: Tensor) -> Tensor:
        """Return x_0 of latents z [B, c, h, w] of the autoencoder."""
        return (z - self._column(self.mean, z)) / self._column(self.std, z)

    def _bound(self) -> LatentAutoencoder:
        if self.autoencoder is None:
            raise ValueError(
                "no autoencoder is bound to these latents, so they cannot be decoded: name its URL"
            )
        return self.autoencoder

    def _column(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        """Return values [c] as [c, 1, 1] on the device of `like`."""
        return constants(values, like.dtype, like.device).view(-1, 1, 1)


def posterior_noise(seed: int, step: Step, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normals float32 [B, *shape] of the samples at these positions of a global batch."""
    return counter_rng.normal(seed, Purpose.POSTERIOR, step, positions, shape)
