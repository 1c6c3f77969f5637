"""The manifest of a data set, computed from its index; recipe and rows of the index.

Every sum is of exact integers, so that the manifest's bytes are equal on every machine.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, assert_never

import numpy as np
import pyarrow as pa

from ddpm_ray.config.jobs.pack import Encoding
from ddpm_ray.data import shard_index
from ddpm_ray.data.embedding_sums import EmbeddingSums, embedding_mean_and_variance
from ddpm_ray.data.image_shape import ImageShape, LatentShape
from ddpm_ray.data.latent_sums import LatentSums, mean_and_variance
from ddpm_ray.data.shard_index import CodecName

FORMATS: dict[CodecName, str] = {
    "pixels": "ddpm-ray shards 1",
    "latents": "ddpm-ray shards 2",
    "embeddings": "ddpm-ray shards 2",
}
OF_CODEC: dict[CodecName, tuple[str, ...]] = {
    "pixels": (),
    "latents": ("latent_shape", "views", "autoencoder_sha256", "latent_mean", "latent_std"),
    "embeddings": ("embedding_width", "encoder_sha256", "embedding_mean", "embedding_std"),
}
"""Fields of a recipe or manifest that only sets of this codec have."""
ENCODED_BY: dict[CodecName, str] = {"latents": "autoencoder", "embeddings": "encoder"}
"""Networks of encoded sets, as in the fields autoencoder_sha256 and encoder_sha256."""
OF_CAPTIONED = ("captioned", "captions")
"""Fields of a recipe or manifest that only sets with captions have."""


@dataclass(frozen=True)
class Recipe:
    """The processing that made a data set's images; stored in the index and in the manifest."""

    image_shape: ImageShape
    encoding: Encoding
    resize: str  # name of a recipe in resizing.py
    label_names: tuple[str, ...]  # name of label 0, 1, ...; empty: images without labels
    source_sha256: str  # identifies the packed samples (Source.digest)
    codec: CodecName = "pixels"
    latent_shape: LatentShape | None = None  # None: a set of pixels
    views: tuple[str, ...] = ()  # encoded views of each image: plain, or plain and flipped
    autoencoder_sha256: str = ""  # of the weights that encoded the latents
    embedding_width: int = 0  # E; 0: a set of pixels or latents
    encoder_sha256: str = ""  # of the weights that embedded the images
    captioned: bool = False  # whether shards have a column of captions

    def to_json(self) -> dict[str, Any]:
        """Return the stored form."""
        return _stored(asdict(self))


@dataclass(frozen=True)
class ShardRow:
    """One row of the index of a set of pixels."""

    name: str
    samples: int
    stored_bytes: int
    sha256: str
    pixel_sum: list[int]  # [C], over all pixels of all images: exact integers
    pixel_sum_of_squares: list[int]  # [C]
    captions: int = field(default=0, kw_only=True)  # of all samples


@dataclass(frozen=True)
class LatentShardRow(ShardRow):
    """One row of the index of a set of latents; the sums of pixels are those of its images."""

    mean_sum: list[int]  # [c], see LatentSums
    mean_sum_of_squares: list[int]
    variance_sum: list[int]


@dataclass(frozen=True)
class EmbeddingShardRow(ShardRow):
    """One row of the index of a set of embeddings; the sums of pixels are those of its images."""

    embedding_sum: list[int]  # [E], see EmbeddingSums
    embedding_sum_of_squares: list[int]


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json; all but `index_sha256` can be computed from the index."""

    format: str
    image_shape: ImageShape
    encoding: Encoding
    resize: str
    label_names: tuple[str, ...]
    source_sha256: str
    samples: int
    shards: int
    stored_bytes: int  # of all shards, as stored
    pixel_mean: tuple[float, ...]  # [C], of pixels in 0..255
    pixel_std: tuple[float, ...]  # [C]
    index_sha256: str
    codec: CodecName = "pixels"
    latent_shape: LatentShape | None = None
    views: tuple[str, ...] = ()
    autoencoder_sha256: str = ""
    latent_mean: tuple[float, ...] = ()  # [c], over all images and views
    latent_std: tuple[float, ...] = ()  # [c], of draws: sqrt(Var(mean) + E[exp(log_variance)])
    embedding_width: int = 0
    encoder_sha256: str = ""
    embedding_mean: tuple[float, ...] = ()  # [E], over all images
    embedding_std: tuple[float, ...] = ()  # [E]; 0: equal in all images
    captioned: bool = False
    captions: int = 0  # of all samples

    @property
    def network_sha256(self) -> str:
        """sha256 of the network that encoded the images; empty: a set of pixels."""
        return self.autoencoder_sha256 or self.encoder_sha256

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of a sample in memory.

        [H, W, C]; of latents, mean and log variance [2, views, c, h, w]; of embeddings [E].
        """
        if self.latent_shape is not None:
            return 2, len(self.views), *self.latent_shape
        return (self.embedding_width,) if self.codec == "embeddings" else self.image_shape

    @property
    def diffused_shape(self) -> ImageShape:
        """Shape (height, width, channels) of what a network sees: pixels, latents, embeddings."""
        if self.latent_shape is not None:
            channels, height, width = self.latent_shape
            return ImageShape(height, width, channels)
        if self.codec == "embeddings":
            return ImageShape(1, 1, self.embedding_width)
        return self.image_shape

    @property
    def sample_dtype(self) -> np.dtype[Any]:
        """Type of the values of a sample in memory."""
        return np.dtype(np.uint8 if self.codec == "pixels" else np.float16)

    @property
    def sample_bytes(self) -> int:
        """Bytes of a sample in memory."""
        return math.prod(self.sample_shape) * self.sample_dtype.itemsize

    def to_json(self) -> bytes:
        """Return canonical JSON: the fingerprint is the sha256 of exactly these bytes."""
        return (json.dumps(_stored(asdict(self)), sort_keys=True, indent=1) + "\n").encode()


def index_of(recipe: Recipe, rows: Sequence[ShardRow]) -> tuple[bytes, pa.Table, Manifest]:
    """Return the bytes of an index, its table, and the manifest that belongs to it."""
    data = shard_index.serialize_index(recipe.to_json(), [asdict(row) for row in rows])
    table = shard_index.parse_index(data)
    return data, table, manifest_of(table, hashlib.sha256(data).hexdigest())


def manifest_of(table: pa.Table, index_sha256: str) -> Manifest:
    """Compute the manifest that belongs to an index."""
    recipe = shard_index.recipe(table)
    height, width, channels = recipe["image_shape"]
    samples = sum(table.column("samples").to_pylist())
    sums, squares = (
        table.column(name).combine_chunks().flatten().to_numpy().reshape(-1, channels).sum(axis=0)
        for name in ("pixel_sum", "pixel_sum_of_squares")
    )
    pixels = samples * height * width
    # Integers up to here, so there is one rounding to float and it is equal on every machine.
    mean = tuple(int(s) / pixels for s in sums)
    variance = [
        (pixels * int(q) - int(s) ** 2) / pixels**2 for s, q in zip(sums, squares, strict=True)
    ]
    return Manifest(
        format=FORMATS["latents"] if recipe["captioned"] else FORMATS[recipe["codec"]],
        image_shape=ImageShape(height, width, channels),
        encoding=recipe["encoding"],
        resize=recipe["resize"],
        label_names=tuple(recipe["label_names"]),
        source_sha256=recipe["source_sha256"],
        samples=samples,
        shards=table.num_rows,
        stored_bytes=sum(table.column("stored_bytes").to_pylist()),
        pixel_mean=mean,
        pixel_std=tuple(math.sqrt(v) for v in variance),
        index_sha256=index_sha256,
        codec=recipe["codec"],
        captioned=recipe["captioned"],
        captions=sum(table.column("captions").to_pylist()) if recipe["captioned"] else 0,
        **_codec_fields(table, recipe, samples),
    )


def _codec_fields(table: pa.Table, recipe: dict[str, Any], samples: int) -> dict[str, Any]:
    """Compute the fields of a manifest that only its codec has; raises ValueError."""
    codec: CodecName = recipe["codec"]
    match codec:
        case "pixels":
            return {}
        case "latents":
            return _latent_fields(table, recipe, samples)
        case "embeddings":
            return _embedding_fields(table, recipe, samples)
        case _:
            assert_never(codec)


def _latent_fields(table: pa.Table, recipe: dict[str, Any], samples: int) -> dict[str, Any]:
    """Compute the fields of a manifest that only latents have; raises ValueError."""
    shape = LatentShape(*recipe["latent_shape"])
    totals = _totals(table, shard_index.LATENT_SUMS)
    count = samples * len(recipe["views"]) * shape.height * shape.width
    mean, variance = mean_and_variance(LatentSums(*totals), count)
    return {
        "latent_shape": shape,
        "views": tuple(recipe["views"]),
        "autoencoder_sha256": recipe["autoencoder_sha256"],
        "latent_mean": mean,
        "latent_std": tuple(map(math.sqrt, variance)),
    }


def _embedding_fields(table: pa.Table, recipe: dict[str, Any], samples: int) -> dict[str, Any]:
    """Compute the fields of a manifest that only embeddings have; raises ValueError."""
    sums = EmbeddingSums(*_totals(table, shard_index.EMBEDDING_SUMS))
    mean, variance = embedding_mean_and_variance(sums, samples)
    return {
        "embedding_width": recipe["embedding_width"],
        "encoder_sha256": recipe["encoder_sha256"],
        "embedding_mean": mean,
        "embedding_std": tuple(map(math.sqrt, variance)),
    }


def _totals(table: pa.Table, names: Sequence[str]) -> list[list[int]]:
    """Return the sum over the shards of each number in these columns."""
    return [
        [sum(map(int, numbers)) for numbers in zip(*table.column(name).to_pylist(), strict=True)]
        for name in names
    ]


def _stored(fields: dict[str, Any]) -> dict[str, Any]:
    """Omit fields of other codecs, and those of captions from sets that have none.

    So the fingerprints of earlier sets do not change.
    """
    codec = fields["codec"]
    omitted = {name for other, names in OF_CODEC.items() if other != codec for name in names}
    if codec == "pixels":
        omitted.add("codec")
    if not fields["captioned"]:
        omitted |= set(OF_CAPTIONED)
    return {key: value for key, value in fields.items() if key not in omitted}
