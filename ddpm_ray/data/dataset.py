"""A packed data set on disk: `manifest.json`, `index.arrow`, `shard-00000.arrow`, ...

The index has a row for each shard, with its sha256 and exact integer sums of its pixels. The
manifest is written last and holds the index's sha256; its own sha256 is the data set's fingerprint.
Neither has time stamps or paths: the same images have the same fingerprint wherever and by however
many tasks they were packed. shards.py has the format of a shard.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ddpm_ray.config.pack import Encoding
from ddpm_ray.data import shard_index
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.shard_index import CodecName
from ddpm_ray.redaction import sanitize
from ddpm_ray.storage import object_store
from ddpm_ray.storage.file_formats import require_readable

UInt8s = npt.NDArray[np.uint8]
Int64s = npt.NDArray[np.int64]

MANIFEST, INDEX = "manifest.json", "index.arrow"
NEWEST_FORMAT = 1
FORMAT = f"ddpm-ray shards {NEWEST_FORMAT}"
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

    def to_json(self) -> dict[str, Any]:
        """Return the stored form."""
        return _named_codec(asdict(self))


@dataclass(frozen=True)
class ShardRow:
    """One row of the index."""

    name: str
    samples: int
    stored_bytes: int
    sha256: str
    pixel_sum: list[int]  # [C], over all pixels of all images: exact integers
    pixel_sum_of_squares: list[int]  # [C]


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

    @property
    def sample_bytes(self) -> int:
        """Bytes of one decoded image."""
        return math.prod(self.image_shape)

    def to_json(self) -> bytes:
        """Return canonical JSON: the fingerprint is the sha256 of exactly these bytes."""
        return (json.dumps(_named_codec(asdict(self)), sort_keys=True, indent=1) + "\n").encode()


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
    data = shard_index.serialize_index(recipe.to_json(), [asdict(row) for row in rows])
    table = shard_index.parse_index(data)
    manifest = manifest_of(table, hashlib.sha256(data).hexdigest())
    object_store.write_bytes(object_store.join(url, INDEX), data)
    object_store.write_bytes(object_store.join(url, MANIFEST), manifest.to_json())
    return Dataset(url, manifest, table)


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
        format=FORMAT,
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
    )


def _named_codec(stored: dict[str, Any]) -> dict[str, Any]:
    """Leave out the codec "pixels", the only one of earlier versions: fingerprints stay equal."""
    return {key: value for key, value in stored.items() if (key, value) != ("codec", "pixels")}


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
    if stated != FORMAT:
        remedy = f"this version reads {FORMAT!r}"
        raise DatasetError(where, f"format is {stated!r}", remedy)
    return found
