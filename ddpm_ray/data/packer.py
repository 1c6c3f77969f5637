"""From a source to a data set: a plan, its shards in any order and anywhere, and the end.

Shard n holds the source's samples n * k to (n + 1) * k - 1 for a fixed k, so its bytes do not
depend on who writes it. Beside each finished shard lies a small part file with its row of the
index; a packer that was killed finds them and goes on. They go when the manifest is written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from ddpm_ray.data import shards, storage
from ddpm_ray.data.built_in_sets import Split
from ddpm_ray.data.image_files import (
    BadImageError,
    decoded,
    encoded,
    from_pixels,
    open_image,
    pixels,
)
from ddpm_ray.data.shards import Dataset, DatasetError, Encoding, Recipe, ShardRow, UInt8s
from ddpm_ray.data.sources import Sample, Source, open_source
from ddpm_ray.data.transforms import Resize, resized

PARTS = "parts"


@dataclass(frozen=True)
class PackOptions:
    """What the user chose; the defaults are those of config.PackConfig."""

    image_size: int = 0  # pixels; 0 with resize "none"
    resize: Resize = "none"
    channels: int = 0  # 1, 3, or 0: as the first image
    encoding: Encoding = "raw"
    shard_bytes: int = 32 << 20  # decoded
    split: Split = "train"
    url: str = ""
    sha256: tuple[str, ...] = ()
    on_bad_image: Literal["stop", "skip"] = "stop"
    max_pixels: int = 64_000_000
    max_file_bytes: int = 256 << 20


@dataclass(frozen=True)
class Plan:
    """All that a task needs to write any shard."""

    source: Source
    destination: str
    options: PackOptions
    recipe: Recipe
    shards: int
    shard_samples: int


class Packed(NamedTuple):
    """A finished shard; `row` is None where every image of it was skipped."""

    number: int
    row: ShardRow | None
    skipped: tuple[str, ...]  # a line for each bad image


def plan(source: str, destination: str, options: PackOptions) -> Plan:
    """What is to be done; reads the source's list and its first good image.

    Raises DatasetError for an empty source or a destination that holds something else,
    BadImageError, StorageError.
    """
    opened = open_source(source, options.split, options.url, options.sha256, options.max_file_bytes)
    first = _first_image(opened, options)
    recipe = Recipe(
        image_shape=(first.shape[0], first.shape[1], first.shape[2]),
        encoding=options.encoding,
        resize=options.resize,
        label_names=opened.label_names,
        source_sha256=opened.digest,
    )
    shard_samples = max(1, options.shard_bytes // math.prod(recipe.image_shape))
    count = math.ceil(len(opened) / shard_samples)
    return Plan(opened, destination, options, recipe, count, shard_samples)


def finished(wanted: Plan) -> Dataset | None:
    """The data set at the destination if it is already what is wanted, None if there is none.

    Raises DatasetError where another data set is there: it is never overwritten.
    """
    if not storage.exists(storage.join(wanted.destination, shards.MANIFEST)):
        return None
    dataset = shards.open_dataset(wanted.destination)
    if dataset.recipe == wanted.recipe:
        return dataset
    problem = "another data set is here already"
    raise DatasetError(
        wanted.destination, problem, "remove it, or choose another destination for this one"
    )


def pack_shard(wanted: Plan, number: int) -> Packed:
    """Write shard `number` and its part file, or take what an earlier run left.

    Raises BadImageError (on_bad_image "stop") and StorageError.
    """
    part = _part(wanted, number)
    where = storage.join(wanted.destination, shards.shard_name(number))
    options = wanted.options
    limits = options.max_pixels, options.max_file_bytes
    identity = json.dumps(
        [asdict(wanted.recipe), wanted.shard_samples, options.on_bad_image, *limits]
    )
    if storage.exists(part):
        left = json.loads(storage.read_bytes(part))
        if left["identity"] == identity and (left["row"] is None or storage.exists(where)):
            return _packed(number, left)
    samples, images, skipped = _good(wanted, number)
    row = None
    if samples:
        files: list[bytes] = []
        if (encoding := wanted.recipe.encoding) != "raw":
            files = [encoded(image, encoding) for image in images]
            shape = wanted.recipe.image_shape
            images = [decoded(file, encoding, shape) for file in files]  # what a reader will see
        stacked = np.stack(images)
        labels = [sample.label for sample in samples]
        keys = [sample.key for sample in samples]
        data = shards.shard_bytes(files or stacked, labels, keys)
        storage.write_bytes(where, data)
        digest = hashlib.sha256(data).hexdigest()
        sums = shards.pixel_sums(stacked)
        row = ShardRow(shards.shard_name(number), len(samples), len(data), digest, *sums)
    left = {"identity": identity, "row": row and asdict(row), "skipped": skipped}
    storage.write_bytes(part, json.dumps(left).encode())
    return _packed(number, left)


def finish(wanted: Plan, packed: Iterable[Packed]) -> Dataset:
    """Write the index and, last, the manifest; then the part files go."""
    rows = [shard.row for shard in sorted(packed) if shard.row is not None]
    if not rows:
        raise DatasetError(wanted.destination, "every image was skipped", "mend the source")
    dataset = shards.write_index(wanted.destination, wanted.recipe, rows)
    storage.delete_folder(storage.join(wanted.destination, PARTS))
    return dataset


def _good(wanted: Plan, number: int) -> tuple[list[Sample], list[UInt8s], list[str]]:
    """The samples of shard `number` with their fitted images, and a line for each bad one."""
    start = number * wanted.shard_samples
    samples, images, skipped = [], [], []
    for sample in wanted.source.read(
        range(start, min(start + wanted.shard_samples, len(wanted.source)))
    ):
        try:
            images.append(_fitted(sample, wanted.options, wanted.recipe.image_shape))
            samples.append(sample)
        except BadImageError as error:
            if wanted.options.on_bad_image == "stop":
                raise
            skipped.append(str(error))
    return samples, images, skipped


def _first_image(source: Source, options: PackOptions) -> UInt8s:
    """The first good image, which sets the channels and, without a resize, the size."""
    for sample in source.read(range(len(source))):
        try:
            return _fitted(sample, options, None)
        except BadImageError:
            if options.on_bad_image == "stop":
                raise
    raise DatasetError("the source", "it has no good image", "give a source with images")


def _fitted(
    sample: Sample, options: PackOptions, image_shape: tuple[int, int, int] | None
) -> UInt8s:
    """uint8 [H, W, C] of the shape of all others, or any shape for the first; BadImageError."""
    channels = image_shape[-1] if image_shape else options.channels
    if sample.image is None:
        problem = f"a file of more than {options.max_file_bytes} bytes (max_file_bytes)"
        remedy = "make it smaller, raise max_file_bytes if you trust it, or use on_bad_image=skip"
        raise BadImageError(sample.place, problem, remedy)
    if isinstance(sample.image, bytes):
        image = open_image(sample.image, sample.place, channels, options.max_pixels)
    else:
        image = from_pixels(sample.image, channels)
    fitted = pixels(resized(image, options.resize, options.image_size))
    if image_shape and fitted.shape != image_shape:
        height, width, _ = fitted.shape
        problem = f"{width} x {height} pixels, and the first image has {image_shape[1]} x "
        remedy = "give resize=centre-crop-box-bicubic and an image_size, or use on_bad_image=skip"
        raise BadImageError(sample.place, f"{problem}{image_shape[0]}", remedy)
    return fitted


def _part(wanted: Plan, number: int) -> str:
    return storage.join(wanted.destination, PARTS, f"{shards.shard_name(number)}.json")


def _packed(number: int, left: dict[str, Any]) -> Packed:
    row = ShardRow(**left["row"]) if left["row"] else None
    return Packed(number, row, tuple(left["skipped"]))
