"""A shard: an Arrow IPC file of samples, read with its sha256 checked.

Its columns are `image` (uint8 tensor [H, W, C], or encoded bytes), `label` (int64, -1: none) and
`key` (the sample's name).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ddpm_ray.data import arrow_io
from ddpm_ray.data.arrow_io import ArrowFileError
from ddpm_ray.data.dataset import Dataset, DatasetError, Int64s, Manifest, UInt8s
from ddpm_ray.data.shard_cache import ShardCache
from ddpm_ray.redaction import counted, sanitize
from ddpm_ray.storage import checksummed, object_store


class ShardCorruptError(RuntimeError):
    """A shard whose bytes do not match its index; args are (url, expected, found, attempts)."""

    def __str__(self) -> str:
        url, expected, found, attempts = self.args
        return sanitize(
            f"{url}: sha256 is {found[:12]}, the index says {expected[:12]} after "
            f"{counted(attempts, 'download')}; write it again with `ddpm-ray pack`"
        )


@dataclass(frozen=True)
class Shard:
    """A parsed shard; `images` is a view of the file's own bytes."""

    images: UInt8s | pa.BinaryArray  # [n, H, W, C], or n encoded images
    labels: Int64s  # [n]
    keys: pa.StringArray  # n

    def __len__(self) -> int:
        return len(self.labels)


def shard_name(number: int) -> str:
    """Return the file name of shard `number`."""
    return f"shard-{number:05d}.arrow"


def shard_bytes(
    images: UInt8s | Sequence[bytes], labels: Sequence[int], keys: Sequence[str]
) -> bytes:
    """Serialize images, uint8 [n, H, W, C] or n encoded files; equal input gives equal bytes."""
    if isinstance(images, np.ndarray):
        kind = pa.fixed_shape_tensor(pa.uint8(), images.shape[1:])
        flat = pa.array(np.ascontiguousarray(images).reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(flat, math.prod(images.shape[1:]))
        column = pa.ExtensionArray.from_storage(kind, column)
    else:
        column = pa.array(images, pa.binary())
    columns = [column, pa.array(labels, pa.int64()), pa.array(keys, pa.string())]
    return arrow_io.serialize_table(pa.Table.from_arrays(columns, ["image", "label", "key"]))


def parse_shard(data: bytes, manifest: Manifest) -> Shard:
    """Parse a shard without copying its images. Raises ArrowFileError."""
    raw = manifest.encoding == "raw"
    kind = pa.fixed_shape_tensor(pa.uint8(), manifest.image_shape) if raw else pa.binary()
    schema = pa.schema({"image": kind, "label": pa.int64(), "key": pa.string()})
    images, labels, keys = arrow_io.parse_batch(data, schema).columns
    if raw:
        if (flat := images.storage.flatten()).null_count:
            raise ArrowFileError("it has null pixels")
        images = flat.to_numpy().reshape(-1, *manifest.image_shape)
    return Shard(images, labels.to_numpy(), keys)


def fetch_shard(dataset: Dataset, number: int, cache: ShardCache | None = None) -> Shard:
    """Read shard `number` from the cache or the object store; every read is checked by sha256.

    Raises ShardCorruptError if no download matches the index, StorageError if the shard is missing,
    and DatasetError if its bytes match but are not a shard of this data set.
    """
    row = dataset.index.slice(number, 1).to_pylist()[0]
    url, expected = object_store.join(dataset.url, row["name"]), row["sha256"]
    if cache is not None and (data := cache.get(expected)) is not None:
        if hashlib.sha256(data).hexdigest() == expected:
            return _parse(url, data, dataset, row)
        cache.evict(expected)
    try:
        data = checksummed.read_verified(url, expected, row["stored_bytes"])
    except checksummed.DamagedError as error:
        raise ShardCorruptError(url, expected, error.args[2], checksummed.READS) from None
    if cache is not None:
        cache.put(expected, data)
    return _parse(url, data, dataset, row)


def pixel_sums(images: UInt8s) -> tuple[list[int], list[int]]:
    """Return per channel the sum and sum of squares of images [n, H, W, C] as exact integers."""
    channels = images.shape[-1]
    counts = [np.bincount(images[..., c].reshape(-1), minlength=256) for c in range(channels)]
    value = np.arange(256, dtype=np.int64)
    return [int(n @ value) for n in counts], [int(n @ value**2) for n in counts]


def _parse(url: str, data: bytes, dataset: Dataset, row: dict[str, Any]) -> Shard:
    """Parse a shard and check it against its row of the index. Raises DatasetError."""
    try:
        shard = parse_shard(data, dataset.manifest)
        found, stated = (len(data), len(shard)), (row["stored_bytes"], row["samples"])
        if found != stated:
            raise ArrowFileError(f"its bytes and samples are {found}, the index says {stated}")
    except ArrowFileError as error:
        raise DatasetError(url, f"not a shard: {error}", "pack the data set again") from None
    return shard
