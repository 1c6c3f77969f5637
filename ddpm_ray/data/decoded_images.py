"""Read the images of a data set; latents are decoded."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ddpm_ray.data.codec import PIXELS, Codec
from ddpm_ray.data.dataset import Dataset, DatasetError
from ddpm_ray.data.latent_codec import LatentCodec
from ddpm_ray.data.loader import read_images

DECODED_AT_ONCE = 32  # images in one call of the autoencoder
SEED = 0  # of the draws from the posteriors


def image_codec(dataset: Dataset, codec: Codec) -> Codec:
    """Return the codec that decodes the samples of `dataset`; `codec` is that of the model.

    Raises DatasetError for latents that the model's autoencoder did not encode.
    """
    if dataset.manifest.codec == "pixels":
        return PIXELS
    autoencoder = codec.autoencoder if isinstance(codec, LatentCodec) else None
    if autoencoder is None or autoencoder.sha256 != dataset.manifest.autoencoder_sha256:
        problem = f"it holds {dataset.manifest.codec} that the model's autoencoder did not encode"
        raise DatasetError(dataset.url, problem, "name the data set of pixels")
    return LatentCodec.of(dataset.manifest).bound(autoencoder)


def decoded_images(codec: Codec, stored: Tensor) -> Tensor:
    """Return the images uint8 [n, H, W, C] of stored samples: pixels as they are, latents decoded.

    Latents are the means of their posteriors. `codec` is that of the samples: see `image_codec`.
    """
    if codec is PIXELS or not len(stored):
        return stored
    parts = torch.split(stored, DECODED_AT_ONCE)
    return torch.from_numpy(np.concatenate([codec.decode(codec.encode(part)) for part in parts]))


def read_decoded(
    dataset: Dataset,
    codec: Codec,
    shard_numbers: range,
    wanted: Tensor | None = None,
    batch_size: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield positions [n] and images uint8 [n, H, W, C] of these shards, in batches.

    A batch has at most `batch_size` images of one shard; 0: all of them. `codec` is that of the
    model: see `image_codec`. Latents are drawn from their posteriors; the draw depends on the
    position only. `wanted` [samples] bool is True for the images to yield; None: all.
    """
    own, position = image_codec(dataset, codec), int(dataset.counts[: shard_numbers.start].sum())
    for batch in read_images(dataset, shard_numbers):
        stored = batch.images
        positions = torch.arange(position, position + len(stored))
        position += len(stored)
        if wanted is not None:
            chosen = wanted[positions]
            positions, stored = positions[chosen], stored[chosen]
        if own is not PIXELS and len(stored):
            parts = (torch.split(each, DECODED_AT_ONCE) for each in (stored, positions))
            decoded = [
                own.decode(own.draw(part, None, SEED, 0, at))
                for part, at in zip(*parts, strict=True)
            ]
            stored = torch.from_numpy(np.concatenate(decoded))
        if len(stored):
            size = batch_size or len(stored)
            yield from zip(torch.split(positions, size), torch.split(stored, size), strict=True)
