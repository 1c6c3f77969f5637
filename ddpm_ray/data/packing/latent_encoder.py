"""Encode images to latents by an autoencoder: mean and log variance of each, in float16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from ddpm_ray.config.jobs.encode import EncodeConfig
from ddpm_ray.data.dataset import Dataset, DatasetError, UInt8s
from ddpm_ray.data.image_shape import ImageShape, LatentShape
from ddpm_ray.data.latent_preview import gram_of
from ddpm_ray.data.latent_sums import LOG_VARIANCES, latent_sums
from ddpm_ray.data.packing.set_encoder import (
    EncodedBatch,
    EncodedImages,
    EncodingNetwork,
    UnencodableError,
    require_images,
)
from ddpm_ray.data.shard_index import CodecName
from ddpm_ray.data.shards import Latents
from ddpm_ray.models.autoencoder import Posterior


class EncodingAutoencoder(EncodingNetwork, Protocol):
    """An autoencoder; TrainedAutoencoder (sampling/autoencoder.py) is one."""

    def latent_shape(self, image_shape: ImageShape) -> tuple[int, int, int]:
        """Return (c, h, w) of the latents of such images; raises ValueError if it takes none."""
        ...

    def encode_uint8(self, images: UInt8s) -> Posterior:
        """Encode uint8 images [B, H, W, C] to posteriors [B, c, h, w]."""
        ...


@dataclass(frozen=True)
class LatentEncoder:
    """An autoencoder as the SetEncoder of sets of latents."""

    network: EncodingAutoencoder

    codec: ClassVar[CodecName] = "latents"

    def recipe_fields(self, source: Dataset, options: EncodeConfig) -> dict[str, Any]:
        """Return shape and views of the latents. Raises DatasetError for unfit images."""
        return {
            "latent_shape": encoded_shape(source, self.network),
            "views": ("plain", "flipped") if options.flipped else ("plain",),
            "autoencoder_sha256": self.network.sha256,
        }

    def encode(self, images: UInt8s) -> EncodedBatch:
        """Return mean and log variance, [B, c, h, w] each, of images [B, H, W, C].

        Raises UnencodableError for the first image whose latents float16 cannot hold.
        """
        posterior = self.network.encode_uint8(images)
        halves = (half.float().cpu().numpy() for half in posterior)
        with np.errstate(over="ignore"):  # an overflow gives infinity, which is refused below
            mean, log_variance = (half.astype(np.float16) for half in halves)
        low, high = LOG_VARIANCES
        good = np.isfinite(mean) & (log_variance >= low) & (log_variance <= high)
        if not good.all():
            row = int(np.flatnonzero(~good.reshape(len(images), -1).all(1))[0])
            largest = float(posterior.mean[row].abs().max())
            raise UnencodableError(
                row,
                f"its latents exceed the range of float16 (largest mean {largest:g}, limit 65504)",
                "train the autoencoder with a larger autoencoder.kl_weight, or pack the images "
                "without this one",
            )
        return mean, log_variance

    def join(self, views: Sequence[EncodedBatch], images: UInt8s) -> EncodedImages:
        """Return the latents of all views, with the sums of their preview."""
        means, log_variances = zip(*views, strict=True)
        latents = Latents(np.stack(means, axis=1), np.stack(log_variances, axis=1))
        gram = gram_of(latents.mean[:, 0], images)
        return EncodedImages(latents, latent_sums(*latents)._asdict(), gram)


def encoded_shape(source: Dataset, autoencoder: EncodingAutoencoder) -> LatentShape:
    """The shape of an image's latents. Raises DatasetError if the images cannot be encoded."""
    require_images(source)
    try:
        return LatentShape(*autoencoder.latent_shape(source.manifest.image_shape))
    except ValueError as error:
        remedy = "pack the images again, with image_size or channels that the autoencoder takes"
        raise DatasetError(source.url, str(error), remedy) from None
