"""A packed data set on disk: `manifest.json`, `index.arrow`, `shard-00000.arrow`, ...

The index has a row for each shard, with its sha256 and exact integer sums of its pixels and, in a
set of latents or embeddings, of these; in a set with captions also their number. Sets of latents,
of embeddings and with captions have format 2, others format 1. The manifest is written last and
holds the index's sha256; its own sha256 is the data set's fingerprint. Neither has time stamps or
paths: the same images have the same fingerprint wherever and by however many tasks they were
packed. shards.py has the format of a shard.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ddpm_ray.data import shard_index
from ddpm_ray.data.manifest import FORMATS, Manifest, Recipe, ShardRow, index_of, manifest_of
from ddpm_ray.redaction import sanitize
from ddpm_ray.storage import object_store
from ddpm_ray.storage.file_formats import require_readable

UInt8s = npt.NDArray[np.uint8]
Int64s = npt.NDArray[np.int64]

MANIFEST, INDEX = "manifest.json", "index.arrow"
NEWEST_FORMAT = 2
NUMBERED = re.compile("ddpm-ray shards ([1-9][0-9]{0,8})")


class DatasetError(RuntimeError):
    """An invalid data set or source; args are (url, problem, remedy)."""

    def __str__(self) -> str:
        url, problem, remedy = self.args
        return sanitize(f"{url}: {problem}; {remedy}")


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
    def images_fingerprint(self) -> str:
        """Fingerprint of the set of pixels: of this set, or of the one that was encoded."""
        manifest = self.manifest
        return self.fingerprint if manifest.codec == "pixels" else manifest.source_sha256

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
        remedy = f"this version reads {' and '.join(map(repr, dict.fromkeys(FORMATS.values())))}"
        raise DatasetError(where, f"format is {stated!r}", remedy)
    return found
