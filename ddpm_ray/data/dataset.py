"""A packed data set on disk: `manifest.json`, `index.arrow`, `shard-00000.arrow`, ...

The index has a row for each shard, with its sha256 and exact integer sums of its pixels and, in a
set of latents, of its latents; in a set with captions also their number. Sets of latents and sets
with captions have format 2, others format 1. The manifest is written last and holds the index's
sha256; its own sha256 is the data set's fingerprint. Neither has time stamps or paths: the same
images have the same fingerprint wherever and by however many tasks they were packed. shards.py has
the format of a shard.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ddpm_ray.config.jobs.pack import Encoding
from ddpm_ray.data import shard_index
from ddpm_ray.data.image_shape import ImageShape, LatentShape
from ddpm_ray.data.latent_sums import LatentSums, mean_and_variance
from ddpm_ray.data.shard_index import CodecName
from ddpm_ray.redaction import sanitize
from ddpm_ray.storage import object_store
from ddpm_ray.storage.file_formats import require_readable

UInt8s = npt.NDArray[np.uint8]
Int64s = npt.NDArray[np.int64]

MANIFEST, INDEX = "manifest.json", "index.arrow"
FORMATS: dict[CodecName, str] = {"pixels": "ddpm-ray shards 1", "latents": "ddpm-ray shards 2"}
NEWEST_FORMAT = 2
OF_LATENTS = (
    "codec",
    "latent_shape",
    "views",
    "autoencoder_sha256",
    "latent_mean",
    "latent_std",
)
"""Fields of a recipe or manifest that only sets of latents have."""
OF_CAPTIONED = ("captioned", "captions")
"""Fields of a recipe or manifest that only sets with captions have."""
NUMBERED = re.compile("ddpm-ray shards ([1-9][0-9]{0,8})")


class DatasetError(RuntimeError):
    """An invalid data set or source; args are (url, problem, remedy)."""

    def __str__(self) -> str:
        url, problem, remedy = self.args
        return sanitize(f"{url}: {problem}; {remedy}")


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
    captioned: bool = False
    captions: int = 0  # of all samples

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of a sample in memory: [H, W, C], or mean and log variance [2, views, c, h, w]."""
        if self.latent_shape is None:
            return self.image_shape
        return 2, len(self.views), *self.latent_shape

    @property
    def diffused_shape(self) -> ImageShape:
        """Shape (height, width, channels) of what a network sees: pixels, or latents."""
        if self.latent_shape is None:
            return self.image_shape
        channels, height, width = self.latent_shape
        return ImageShape(height, width, channels)

    @property
    def sample_dtype(self) -> np.dtype[Any]:
        """Type of the values of a sample in memory."""
        return np.dtype(np.uint8 if self.latent_shape is None else np.float16)

    @property
    def sample_bytes(self) -> int:
        """Bytes of a sample in memory."""
        return math.prod(self.sample_shape) * self.sample_dtype.itemsize

    def to_json(self) -> bytes:
        """Return canonical JSON: the fingerprint is the sha256 of exactly these bytes."""
        return (json.dumps(_stored(asdict(self)), sort_keys=True, indent=1) + "\n").encode()


@dataclass(frozen=True)
class Dataset:
    """An opened and checked data set; small enough to send to every worker."""

    url: str
    manifest: Manifest
    index: pa.Table  # one row per shard

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the manifest's bytes: identifies the images, their order and encoding."""
        return hashlib.sha256(self.manifest.to_json()).hexdigest()

    @property
    def recipe(self) -> Recipe:
        """The processing that made its images."""
        return Recipe(
            **{field.name: getattr(self.manifest, field.name) for field in fields(Recipe)}
        )

    @cached_property
    def counts(self) -> Int64s:
        """Samples in each shard, [shards]."""
        return np.asarray(self.index.column("samples").to_numpy(), dtype=np.int64)


def open_dataset(url: str) -> Dataset:
    """Open the data set at `url` and check its manifest against its index.

    Raises DatasetError, which names the field, if they differ, StorageError if they cannot be
    read, and NewerFormatError for a set that a later version packed. Shards are checked when they
    are read.
    """
    where = object_store.join(url, MANIFEST)
    if not object_store.exists(where):
        remedy = "check the address, or pack it with `ddpm-ray pack` (which writes it last)"
        raise DatasetError(url, f"no {MANIFEST}, so this is not a complete data set", remedy)
    found = _read_manifest(where, object_store.read_bytes(where))
    data = object_store.read_bytes(object_store.join(url, INDEX))
    if (digest := hashlib.sha256(data).hexdigest()) != (stated := str(found.get("index_sha256"))):
        problem = f"index_sha256 is {stated[:12]}, but the sha256 of {INDEX} is {digest[:12]}"
        raise DatasetError(where, problem, "one of the two was changed: pack the data set again")
    try:
        table = shard_index.parse_index(data)
        manifest = manifest_of(table, digest)
    except ValueError as error:  # also for sums that no pixels can have
        where = object_store.join(url, INDEX)
        raise DatasetError(where, str(error), "pack the data set again") from None
    expected = json.loads(manifest.to_json())
    for name in sorted(expected.keys() | found.keys()):
        value, by_index = found.get(name), expected.get(name)
        if value != by_index:
            problem = f"{name} is {value!r}, but by the index it is {by_index!r}"
            raise DatasetError(where, problem, "the manifest was edited: pack the data set again")
    return Dataset(url, manifest, table)


def write_index(url: str, recipe: Recipe, rows: Sequence[ShardRow]) -> Dataset:
    """Complete the data set at `url`, whose shards exist: write its index, then its manifest."""
    data, table, manifest = index_of(recipe, rows)
    object_store.write_bytes(object_store.join(url, INDEX), data)
    object_store.write_bytes(object_store.join(url, MANIFEST), manifest.to_json())
    return Dataset(url, manifest, table)


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
        **(_latent_fields(table, recipe, samples) if recipe["codec"] == "latents" else {}),
    )


def _latent_fields(table: pa.Table, recipe: dict[str, Any], samples: int) -> dict[str, Any]:
    """Compute the fields of a manifest that only latents have; raises ValueError."""
    shape = LatentShape(*recipe["latent_shape"])
    totals = [
        [sum(map(int, channel)) for channel in zip(*table.column(name).to_pylist(), strict=True)]
        for name in shard_index.LATENT_SUMS
    ]
    count = samples * len(recipe["views"]) * shape.height * shape.width
    mean, variance = mean_and_variance(LatentSums(*totals), count)
    return {
        "latent_shape": shape,
        "views": tuple(recipe["views"]),
        "autoencoder_sha256": recipe["autoencoder_sha256"],
        "latent_mean": mean,
        "latent_std": tuple(map(math.sqrt, variance)),
    }


def _stored(fields: dict[str, Any]) -> dict[str, Any]:
    """Omit fields of latents or captions from other sets, whose fingerprints must not change."""
    omitted = set[str]()
    if fields["codec"] == "pixels":
        omitted |= set(OF_LATENTS)
    if not fields["captioned"]:
        omitted |= set(OF_CAPTIONED)
    return {key: value for key, value in fields.items() if key not in omitted}


def _read_manifest(where: str, data: bytes) -> dict[str, Any]:
    """Parse manifest.json and check its format number. Raises DatasetError, NewerFormatError."""
    try:
        found = json.loads(data)
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as error:
        raise DatasetError(where, f"not readable ({error})", "pack the data set again") from error
    stated = found.get("format")
    if numbered := NUMBERED.fullmatch(str(stated)):
        require_readable(where, int(numbered[1]), NEWEST_FORMAT)
    if stated not in FORMATS.values():
        remedy = f"this version reads {' and '.join(map(repr, FORMATS.values()))}"
        raise DatasetError(where, f"format is {stated!r}", remedy)
    return found
