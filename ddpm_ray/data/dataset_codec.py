"""The codec of a data set."""

from __future__ import annotations

from typing import assert_never

from ddpm_ray.data.codec import PIXELS, Codec
from ddpm_ray.data.embedding_codec import EmbeddingCodec
from ddpm_ray.data.latent_codec import LatentCodec
from ddpm_ray.data.manifest import Manifest


def codec_of(manifest: Manifest) -> Codec:
    """Return the codec of a data set; a codec of latents is not bound to an autoencoder yet."""
    match manifest.codec:
        case "pixels":
            return PIXELS
        case "latents":
            return LatentCodec.of(manifest)
        case "embeddings":
            return EmbeddingCodec.of(manifest)
        case _:
            assert_never(manifest.codec)
