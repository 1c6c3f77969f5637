"""The encoder of a set of images, by codec: a network, and how its results are stored.

latent_encoder.py and embedding_encoder.py implement it; encoded_packer.py packs any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import torch
from torch import nn

from ddpm_ray.config.jobs.encode import EncodeConfig
from ddpm_ray.data.dataset import Dataset, DatasetError, UInt8s
from ddpm_ray.data.latent_preview import Gram
from ddpm_ray.data.latent_sums import Float16s
from ddpm_ray.data.shard_index import CodecName
from ddpm_ray.data.shards import Latents

EncodedBatch: TypeAlias = tuple[Float16s, ...]  # arrays [B, ...]: mean and log variance, or one


class EncodingNetwork(Protocol):
    """A trained network that encodes images, as TrainedAutoencoder and TrainedEncoders."""

    @property
    def model(self) -> nn.Module:
        """The network itself."""
        ...

    @property
    def core_seconds(self) -> float | None:
        """Core-seconds of its training; None: unknown."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        ...

    @property
    def url(self) -> str:
        """URL of its checkpoint or folder."""
        ...

    @property
    def sha256(self) -> str:
        """sha256 of its weights."""
        ...


class UnencodableError(ValueError):
    """An image of a batch that cannot be stored; args are (row, problem, remedy)."""


class EncodedImages(NamedTuple):
    """The images of a shard as they are stored, with their sums."""

    samples: Latents | Float16s
    sums: Mapping[str, list[int]]  # columns of the index
    gram: Gram | None = None  # for the preview of latents


class SetEncoder(Protocol):
    """A network with the codec of the sets that it makes."""

    codec: ClassVar[CodecName]

    @property
    def network(self) -> EncodingNetwork:
        """The network."""
        ...

    def recipe_fields(self, source: Dataset, options: EncodeConfig) -> dict[str, Any]:
        """Return the fields of a recipe that only this codec has.

        Raises DatasetError if the images cannot be encoded, and ConfigError for options.
        """
        ...

    def encode(self, images: UInt8s) -> EncodedBatch:
        """Encode images [B, H, W, C]. Raises UnencodableError."""
        ...

    def join(self, views: Sequence[EncodedBatch], images: UInt8s) -> EncodedImages:
        """Return the samples of the images [n, H, W, C] from their views, as `encode` gave them."""
        ...


def require_images(source: Dataset) -> None:
    """Raise DatasetError if the data set holds encoded images."""
    if source.manifest.codec != "pixels":
        problem = f"the data set holds {source.manifest.codec}, not images"
        raise DatasetError(source.url, problem, "name the images that they were encoded from")
