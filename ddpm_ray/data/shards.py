"""A shard: an Arrow IPC file of samples, read with its sha256 checked.

Its columns are `image` (uint8 tensor [H, W, C], or encoded bytes), `label` (int64, -1: none) and
`key` (the sample's name). In place of `image`, a shard of latents has `mean` and `logvar` (float16
tensors [views, c, h, w]), and one of embeddings `embedding` (float16 tensor [E]). A shard of a set
with captions has a last column `captions` (list of strings, captions.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, assert_never

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ddpm_ray.data import arrow_io
from ddpm_ray.data.arrow_io import ArrowFileError
from ddpm_ray.data.captions import COLUMN_TYPE, caption_column, require_captions
from ddpm_ray.data.dataset import Dataset, DatasetError, Int64s, UInt8s
from ddpm_ray.data.latent_sums import LOG_VARIANCES, Float16s
from ddpm_ray.data.manifest import Manifest
from ddpm_ray.data.shard_cache import ShardCache
from ddpm_ray.data.shard_index import CodecName
from ddpm_ray.redaction import counted, sanitize
from ddpm_ray.storage import checksummed, object_store

COLUMNS: dict[CodecName, list[str]] = {
    "pixels": ["image"],
    "latents": ["mean", "logvar"],
    "embeddings": ["embedding"],
}
"""Columns of the samples."""


class ShardCorruptError(RuntimeError):
    """A shard whose bytes do not match its index; args are (url, expected, found, attempts)."""

    def __str__(self) -> str:
        url, expected, found, attempts = self.args
        return sanitize(
            f"{url}: sha256 is {found[:12]}, the index says {expected[:12]} after "
            f"{counted(attempts, 'download')}; write it again with `ddpm-ray pack` or, if it "
            "holds latents or embeddings, `ddpm-ray encode`"
        )


class Latents(NamedTuple):
    """The encoder's normal distributions of n images, with log variances in LOG_VARIANCES."""

    mean: Float16s  # [n, views, c, h, w]
    log_variance: Float16s  # [n, views, c, h, w]


@dataclass(frozen=True)
class Shard:
    """A parsed shard; `images` is a view of the file's own bytes.

    It holds pixels [n, H, W, C], n encoded images, their latents, or embeddings float16 [n, E].
    """

    images: UInt8s | pa.BinaryArray | Latents | Float16s
    labels: Int64s  # [n]
    keys: pa.StringArray  # n
    captions: pa.ListArray | None = None  # n lists of strings; None: a set without captions

    def __len__(self) -> int:
        return len(self.labels)


def shard_name(number: int) -> str:
    """Return the file name of shard `number`."""
    return f"shard-{number:05d}.arrow"


def shard_bytes(
    images: UInt8s | Sequence[bytes] | Latents | Float16s,
    labels: Sequence[int],
    keys: Sequence[str],
    captions: Sequence[Sequence[str]] | None = None,
) -> bytes:
    """Serialize uint8 [n, H, W, C], n encoded files, latents, or embeddings float16 [n, E].

    Equal input gives equal bytes. `captions` are those of each sample; None: the set has none.
    """
    match images:
        case Latents(mean, log_variance):
            samples = {"mean": _tensor_column(mean), "logvar": _tensor_column(log_variance)}
        case np.ndarray():
            name = "image" if images.dtype == np.uint8 else "embedding"
            samples = {name: _tensor_column(images)}
        case files:
            samples = {"image": pa.array(files, pa.binary())}
    columns = {**samples, "label": pa.array(labels, pa.int64()), "key": pa.array(keys, pa.string())}
    if captions is not None:
        columns["captions"] = caption_column(captions)
    return arrow_io.serialize_table(pa.table(columns))


def parse_shard(data: bytes | memoryview, manifest: Manifest) -> Shard:
    """Parse a shard without copying its samples. Raises ArrowFileError."""
    raw = manifest.codec != "pixels" or manifest.encoding == "raw"
    names = COLUMNS[manifest.codec]
    shape = manifest.sample_shape[1:] if manifest.codec == "latents" else manifest.sample_shape
    kind = pa.fixed_shape_tensor(_arrow_type(manifest.sample_dtype), shape) if raw else pa.binary()
    columns = {**dict.fromkeys(names, kind), "label": pa.int64(), "key": pa.string()}
    if manifest.captioned:
        columns["captions"] = COLUMN_TYPE
    batch = arrow_io.parse_batch(data, pa.schema(columns))
    captions = batch["captions"] if manifest.captioned else None
    if captions is not None:
        require_captions(captions)
    rest = batch["label"].to_numpy(), batch["key"], captions
    if not raw:
        return Shard(batch[names[0]], *rest)
    arrays = [_tensors(name, batch[name], shape) for name in names]
    match manifest.codec:
        case "pixels":
            return Shard(arrays[0], *rest)
        case "latents":
            return Shard(_checked_latents(*arrays), *rest)
        case "embeddings":
            return Shard(_require_finite("embedding", arrays[0]), *rest)
        case _:
            assert_never(manifest.codec)


def fetch_shard(dataset: Dataset, number: int, cache: ShardCache | None = None) -> Shard:
    """Read shard `number` from the cache or the object store; every read is checked by sha256.

    Raises ShardCorruptError if no download matches the index, StorageError if the shard is missing,
    and DatasetError if its bytes match but are not a shard of this data set.
    """
    row = dataset.index.slice(number, 1).to_pylist()[0]
    url, expected, size = (
        object_store.join(dataset.url, row["name"]),
        row["sha256"],
        row["stored_bytes"],
    )

    def download() -> bytes | memoryview:
        """Read the shard from the object store."""
        try:
            return checksummed.read_verified_view(url, expected, size)
        except checksummed.DamagedError as error:
            raise ShardCorruptError(url, expected, error.args[2], checksummed.READS) from None

    data = download() if cache is None else cache.load(expected, size, download)
    return _parse(url, data, dataset, row)


def pixel_sums(images: UInt8s) -> tuple[list[int], list[int]]:
    """Return per channel the sum and sum of squares of images [n, H, W, C] as exact integers."""
    channels = images.shape[-1]
    counts = [np.bincount(images[..., c].reshape(-1), minlength=256) for c in range(channels)]
    value = np.arange(256, dtype=np.int64)
    return [int(n @ value) for n in counts], [int(n @ value**2) for n in counts]


def _tensor_column(values: npt.NDArray[Any]) -> pa.ExtensionArray:
    """Return a column of fixed-shape tensors from an array [n, ...]."""
    shape = values.shape[1:]
    kind = pa.fixed_shape_tensor(_arrow_type(values.dtype), shape)
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    storage = pa.FixedSizeListArray.from_arrays(flat, math.prod(shape))
    return pa.ExtensionArray.from_storage(kind, storage)


def _arrow_type(dtype: np.dtype[Any]) -> pa.DataType:
    return pa.from_numpy_dtype(dtype)


def _tensors(name: str, column: pa.ExtensionArray, shape: Sequence[int]) -> npt.NDArray[Any]:
    """Return a column of tensors as an array [n, *shape], without a copy. Raises ArrowFileError."""
    if (flat := column.storage.flatten()).null_count:
        raise ArrowFileError(f"it has null values in the tensors of {name}")
    values: npt.NDArray[Any] = flat.to_numpy().reshape(-1, *shape)
    return values


def _checked_latents(mean: Float16s, log_variance: Float16s) -> Latents:
    """Raise ArrowFileError for values that no encoder has; training would diverge on them."""
    low, high = LOG_VARIANCES
    _require_finite("mean", mean)
    if not ((log_variance >= low) & (log_variance <= high)).all():
        raise ArrowFileError(f"a value of logvar is not in {low:g}..{high:g}")
    return Latents(mean, log_variance)


def _require_finite(name: str, values: Float16s) -> Float16s:
    """Return `values`. Raises ArrowFileError if one is not finite."""
    if not np.isfinite(values).all():
        raise ArrowFileError(f"a value of {name} is not finite")
    return values


def _parse(url: str, data: bytes | memoryview, dataset: Dataset, row: dict[str, Any]) -> Shard:
    """Parse a shard and check it against its row of the index. Raises DatasetError."""
    try:
        shard = parse_shard(data, dataset.manifest)
        found, stated = (len(data), len(shard)), (row["stored_bytes"], row["samples"])
        if found != stated:
            raise ArrowFileError(f"its bytes and samples are {found}, the index says {stated}")
        captions = 0 if shard.captions is None else len(shard.captions.flatten())
        if captions != (expected := row.get("captions", 0)):
            raise ArrowFileError(
                f"it has {counted(captions, 'caption')}, the index says {expected}"
            )
    except ArrowFileError as error:
        raise DatasetError(url, f"not a shard: {error}", "pack the data set again") from None
    return shard
