"""What a data set is on disk: `manifest.json`, `index.arrow`, `shard-00000.arrow`, ...

A shard is an Arrow IPC file with the columns `image` (uint8 tensor [H, W, C], or encoded bytes),
`label` (int64, -1: none) and `key` (the sample's name). The index has a row for each shard, with
its sha256 and the exact sums that reference statistics start from. The manifest is written last
and holds the index's sha256; its own sha256 is the data set's fingerprint. No time stamps, no
paths: the same images give the same fingerprint wherever they were packed, by however many tasks.
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
from ddpm_ray.data import arrow_io, shard_index
from ddpm_ray.data.arrow_io import ArrowFileError
from ddpm_ray.data.shard_cache import ShardCache
from ddpm_ray.redaction import counted, sanitize
from ddpm_ray.storage import checksummed, object_store
from ddpm_ray.storage.file_formats import require_readable

UInt8s = npt.NDArray[np.uint8]
Int64s = npt.NDArray[np.int64]

MANIFEST, INDEX = "manifest.json", "index.arrow"
NEWEST_FORMAT = 1
FORMAT = f"ddpm-ray shards {NEWEST_FORMAT}"
NUMBERED = re.compile("ddpm-ray shards ([1-9][0-9]{0,8})")


class DatasetError(RuntimeError):
    """A data set that is not what it says; args are (url, problem, remedy)."""

    def __str__(self) -> str:
        url, problem, remedy = self.args
        return sanitize(f"{url}: {problem}; {remedy}")


class ShardCorruptError(RuntimeError):
    """A shard whose bytes do not match its index; args are (url, expected, found, attempts)."""

    def __str__(self) -> str:
        url, expected, found, attempts = self.args
        return sanitize(
            f"{url}: sha256 is {found[:12]}, the index says {expected[:12]} after "
            f"{counted(attempts, 'download')}; write it again with jobs/pack_shards.py"
        )


@dataclass(frozen=True)
class Recipe:
    """How the images of a data set were made: set by the packer, known to every reader."""

    image_shape: tuple[int, int, int]  # H, W, C
    encoding: Encoding
    resize: str  # a recipe of resizing.py
    label_names: tuple[str, ...]  # name of label 0, 1, ...; empty: images without labels
    source_sha256: str  # names the samples that it was packed from (sources.py)


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
    """What manifest.json holds; but for `index_sha256` it follows from the index."""

    format: str
    image_shape: tuple[int, int, int]
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

    @property
    def sample_bytes(self) -> int:
        """Bytes of one decoded image."""
        return math.prod(self.image_shape)

    def to_json(self) -> bytes:
        """Canonical JSON: the fingerprint is the sha256 of exactly these bytes."""
        return (json.dumps(asdict(self), sort_keys=True, indent=1) + "\n").encode()


@dataclass(frozen=True)
class Dataset:
    """A data set that was opened and checked; small enough to send to every worker."""

    url: str
    manifest: Manifest
    index: pa.Table  # one row per shard

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the manifest's bytes: names the images, their order and their encoding."""
        return hashlib.sha256(self.manifest.to_json()).hexdigest()

    @property
    def recipe(self) -> Recipe:
        """How its images came about."""
        return Recipe(
            **{field.name: getattr(self.manifest, field.name) for field in fields(Recipe)}
        )

    @cached_property
    def counts(self) -> Int64s:
        """Samples in each shard, [shards]."""
        return np.asarray(self.index.column("samples").to_numpy(), dtype=np.int64)


@dataclass(frozen=True)
class Shard:
    """A parsed shard; `images` is a view of the file's own bytes."""

    images: UInt8s | pa.BinaryArray  # [n, H, W, C], or n encoded images
    labels: Int64s  # [n]
    keys: pa.StringArray  # n

    def __len__(self) -> int:
        return len(self.labels)


def open_dataset(url: str) -> Dataset:
    """The data set at `url`, its manifest and index checked against each other.

    Raises DatasetError, which names the field, where they differ, StorageError where they cannot be
    read, and NewerFormatError for a set that a later version packed. Shards are checked when they
    are read.
    """
    where = object_store.join(url, MANIFEST)
    if not object_store.exists(where):
        remedy = "check the address, or pack it with jobs/pack_shards.py (which writes it last)"
        raise DatasetError(url, f"there is no {MANIFEST}, so this is not a whole data set", remedy)
    found = _manifest_fields(where, object_store.read_bytes(where))
    data = object_store.read_bytes(object_store.join(url, INDEX))
    if (digest := hashlib.sha256(data).hexdigest()) != (stated := str(found.get("index_sha256"))):
        problem = f"index_sha256 is {stated[:12]}, but {INDEX} has {digest[:12]}"
        raise DatasetError(where, problem, "one of the two was changed: pack the data set again")
    try:
        table = shard_index.read(data)
        manifest = _manifest(table, digest)
    except ValueError as error:  # also of sums that no pixels have
        where = object_store.join(url, INDEX)
        raise DatasetError(where, str(error), "pack the data set again") from None
    expected = json.loads(manifest.to_json())
    for name in sorted(expected.keys() | found.keys()):
        states, fits = found.get(name), expected.get(name)
        if states != fits:
            problem = f"{name} is {states!r}, but by the index it is {fits!r}"
            raise DatasetError(where, problem, "the manifest was edited: pack the data set again")
    return Dataset(url, manifest, table)


def write_index(url: str, recipe: Recipe, rows: Sequence[ShardRow]) -> Dataset:
    """Write index and then manifest for shards that are already at `url`; that completes it."""
    data = shard_index.write(asdict(recipe), [asdict(row) for row in rows])
    table = shard_index.read(data)
    manifest = _manifest(table, hashlib.sha256(data).hexdigest())
    object_store.write_bytes(object_store.join(url, INDEX), data)
    object_store.write_bytes(object_store.join(url, MANIFEST), manifest.to_json())
    return Dataset(url, manifest, table)


def shard_name(number: int) -> str:
    """The file name of shard `number`."""
    return f"shard-{number:05d}.arrow"


def shard_bytes(
    images: UInt8s | Sequence[bytes], labels: Sequence[int], keys: Sequence[str]
) -> bytes:
    """A shard's file: images uint8 [n, H, W, C] or n encoded ones; the same bytes every time."""
    if isinstance(images, np.ndarray):
        kind = pa.fixed_shape_tensor(pa.uint8(), images.shape[1:])
        flat = pa.array(np.ascontiguousarray(images).reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(flat, math.prod(images.shape[1:]))
        column = pa.ExtensionArray.from_storage(kind, column)
    else:
        column = pa.array(images, pa.binary())
    columns = [column, pa.array(labels, pa.int64()), pa.array(keys, pa.string())]
    return arrow_io.write(pa.Table.from_arrays(columns, ["image", "label", "key"]))


def parse_shard(data: bytes, manifest: Manifest) -> Shard:
    """The shard in `data` without a copy of its images; raises ArrowFileError."""
    raw = manifest.encoding == "raw"
    kind = pa.fixed_shape_tensor(pa.uint8(), manifest.image_shape) if raw else pa.binary()
    schema = pa.schema({"image": kind, "label": pa.int64(), "key": pa.string()})
    images, labels, keys = arrow_io.read(data, schema).columns
    if raw:
        if (flat := images.storage.flatten()).null_count:
            raise ArrowFileError("it has empty pixels")
        images = flat.to_numpy().reshape(-1, *manifest.image_shape)
    return Shard(images, labels.to_numpy(), keys)


def fetch_shard(dataset: Dataset, number: int, cache: ShardCache | None = None) -> Shard:
    """Shard `number`, its sha256 checked at every read, also of a cached copy.

    Raises ShardCorruptError where no reading of it matches, StorageError if there is none, and
    DatasetError where what matches is no shard of this data set.
    """
    row = dataset.index.slice(number, 1).to_pylist()[0]
    url, expected = object_store.join(dataset.url, row["name"]), row["sha256"]
    if cache is not None and (data := cache.get(expected)) is not None:
        if hashlib.sha256(data).hexdigest() == expected:
            return _parsed(url, data, dataset, row)
        cache.evict(expected)
    try:
        data = checksummed.read(url, expected, row["stored_bytes"])
    except checksummed.DamagedError as error:
        raise ShardCorruptError(url, expected, error.args[2], checksummed.READS) from None
    if cache is not None:
        cache.put(expected, data)
    return _parsed(url, data, dataset, row)


def _parsed(url: str, data: bytes, dataset: Dataset, row: dict[str, Any]) -> Shard:
    """`parse_shard`, held against its row of the index."""
    try:
        shard = parse_shard(data, dataset.manifest)
        found, stated = (len(data), len(shard)), (row["stored_bytes"], row["samples"])
        if found != stated:
            raise ArrowFileError(f"its bytes and samples are {found}, the index says {stated}")
    except ArrowFileError as error:
        raise DatasetError(url, f"not a shard: {error}", "pack the data set again") from None
    return shard


def pixel_sums(images: UInt8s) -> tuple[list[int], list[int]]:
    """Per channel, the sum and the sum of squares over images [n, H, W, C]: exact integers."""
    channels = images.shape[-1]
    counts = [np.bincount(images[..., c].reshape(-1), minlength=256) for c in range(channels)]
    value = np.arange(256, dtype=np.int64)
    return [int(n @ value) for n in counts], [int(n @ value**2) for n in counts]


def _manifest(table: pa.Table, index_sha256: str) -> Manifest:
    """The only manifest that fits this index."""
    recipe = shard_index.recipe(table)
    height, width, channels = recipe["image_shape"]
    samples = sum(table.column("samples").to_pylist())
    sums, squares = (
        table.column(name).combine_chunks().flatten().to_numpy().reshape(-1, channels).sum(axis=0)
        for name in ("pixel_sum", "pixel_sum_of_squares")
    )
    pixels = samples * height * width
    # Integers up to here: one rounding to float at the end, the same on every machine.
    mean = tuple(int(s) / pixels for s in sums)
    variance = [
        (pixels * int(q) - int(s) ** 2) / pixels**2 for s, q in zip(sums, squares, strict=True)
    ]
    return Manifest(
        format=FORMAT,
        image_shape=(height, width, channels),
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
    )


def _manifest_fields(where: str, data: bytes) -> dict[str, Any]:
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
