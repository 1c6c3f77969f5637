"""Encode images to embeddings by the image encoder of a contrastive model, in float16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor

from ddpm_ray.config.jobs.encode import EncodeConfig
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.data.dataset import Dataset, DatasetError, UInt8s
from ddpm_ray.data.embedding_sums import embedding_sums
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.packing.set_encoder import (
    EncodedBatch,
    EncodedImages,
    EncodingNetwork,
    UnencodableError,
    require_images,
)
from ddpm_ray.data.shard_index import CodecName


class EmbeddingNetwork(EncodingNetwork, Protocol):
    """An image encoder; TrainedEncoders (sampling/image_text.py) has one."""

    @property
    def width(self) -> int:
        """E, the width of the embeddings."""
        ...

    def require_fitting(self, image_shape: ImageShape) -> None:
        """Raise ValueError for images that it does not take."""
        ...

    def image_embeddings(self, images: UInt8s, *, batch_size: int) -> Tensor:
        """Embeddings float32 [B, E] of uint8 images [B, H, W, C]."""
        ...


@dataclass(frozen=True)
class EmbeddingEncoder:
    """An image encoder as the SetEncoder of sets of embeddings."""

    network: EmbeddingNetwork

    codec: ClassVar[CodecName] = "embeddings"

    def recipe_fields(self, source: Dataset, options: EncodeConfig) -> dict[str, Any]:
        """Return the width of the embeddings. Raises DatasetError, and ConfigError for flips."""
        require_images(source)
        if options.flipped:
            raise ConfigError(
                "flipped is true, but sets of embeddings have no flipped views: leave it out"
            )
        try:
            self.network.require_fitting(source.manifest.image_shape)
        except ValueError as error:
            remedy = "pack the images again, with image_size or channels that the encoder takes"
            raise DatasetError(source.url, str(error), remedy) from None
        return {"embedding_width": self.network.width, "encoder_sha256": self.network.sha256}

    def encode(self, images: UInt8s) -> EncodedBatch:
        """Return embeddings [B, E] of images [B, H, W, C].

        Raises UnencodableError for the first image whose embedding is not finite: of length 1, all
        others fit float16.
        """
        found = self.network.image_embeddings(images, batch_size=len(images))
        embeddings = found.cpu().numpy().astype(np.float16)
        if not (good := np.isfinite(embeddings).all(1)).all():
            problem = "its embedding has values that are not finite"
            remedy = "the encoder's weights are broken: name an earlier checkpoint"
            raise UnencodableError(int(np.flatnonzero(~good)[0]), problem, remedy)
        return (embeddings,)

    def join(self, views: Sequence[EncodedBatch], images: UInt8s) -> EncodedImages:
        """Return the embeddings of the one view."""
        ((embeddings,),) = views
        return EncodedImages(embeddings, embedding_sums(embeddings)._asdict())
