"""From a source to a data set: a plan, its shards in any order and anywhere, and the end.

Shard n holds the source's samples n * k to (n + 1) * k - 1 for a fixed k, so its bytes do not
depend on who writes it. Beside each finished shard lies a small part file with its row of the
index; a packer that was killed finds them and goes on. They go when the manifest is written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ddpm_ray.config.pack import PackConfig
from ddpm_ray.data import shards
from ddpm_ray.data.packing import pack_report
from ddpm_ray.data.packing.image_files import (
    BadImageError,
    decode_image,
    decoded,
    encoded,
    from_pixels,
    pixels,
)
from ddpm_ray.data.packing.pack_report import PackReport, Record
from ddpm_ray.data.packing.sources import open_source
from ddpm_ray.data.resizing import resized
from ddpm_ray.data.samples import NamedGroup, Sample, Source, groups
from ddpm_ray.data.shards import Dataset, DatasetError, Recipe, ShardRow, UInt8s
from ddpm_ray.redaction import redacted
from ddpm_ray.storage import object_store

log = logging.getLogger(__name__)

PARTS = "parts"


@dataclass(frozen=True)
class Plan:
    """All that a task needs to write any shard."""

    source: Source
    destination: str
    options: PackConfig
    recipe: Recipe
    shards: int
    shard_samples: int
    name: str = ""  # of the source, as it was given


class Packed(NamedTuple):
    """A finished shard; `row` is None where every image of it was skipped."""

    number: int
    row: ShardRow | None
    skipped: tuple[str, ...]  # a line for each bad image
    changed: tuple[NamedGroup, ...]  # what was done to images beside decoding
    class_samples: tuple[int, ...]  # packed samples of each class
    content_sha256: str  # of the bytes that the source gave


class Fitted(NamedTuple):
    """The samples of a shard that are packed, and what became of all of them."""

    samples: list[Sample]
    images: list[UInt8s]
    skipped: list[str]
    changes: dict[str, list[str]]  # keys of samples, by what was done to them
    content_sha256: str


def plan(source: str, destination: str, options: PackConfig) -> Plan:
    """What is to be done; reads the source's list and its first good image.

    Raises DatasetError for an empty source or a destination that holds something else,
    BadImageError, StorageError.
    """
    opened = open_source(source, options)
    first = _first_image(source, opened, options)
    recipe = Recipe(
        image_shape=(first.shape[0], first.shape[1], first.shape[2]),
        encoding=options.encoding,
        resize=options.resize,
        label_names=opened.label_names,
        source_sha256=opened.digest,
    )
    shard_samples = max(1, options.shard_bytes // math.prod(recipe.image_shape))
    count = math.ceil(len(opened) / shard_samples)
    return Plan(opened, destination, options, recipe, count, shard_samples, redacted(source))


def finished(wanted: Plan) -> Dataset | None:
    """The data set at the destination if it is already what is wanted, None if there is none.

    Raises DatasetError where another data set is there, or one of other options or of files that
    were changed since: it is never overwritten.
    """
    if not object_store.exists(object_store.join(wanted.destination, shards.MANIFEST)):
        return None
    dataset = shards.open_dataset(wanted.destination)
    if dataset.recipe != wanted.recipe:
        there, here = asdict(dataset.recipe), asdict(wanted.recipe)
        keys = [key for key in there if there[key] != here[key]]
        raise pack_report.another(wanted.destination, f"{', '.join(keys)} differ")
    record = pack_report.read(dataset)
    pack_report.require_same(dataset, record, _options(wanted))
    if record is not None and record.version != wanted.source.version:
        log.info("files of %s were written anew since; comparing their bytes", wanted.name)
        if record.content_sha256 != _content(wanted):
            raise pack_report.another(wanted.destination, "the source's files differ")
    return dataset


def pack_shard(wanted: Plan, number: int) -> Packed:
    """Write shard `number` and its part file, or take what an earlier run left.

    Raises BadImageError (on_bad_image "stop"), DatasetError and StorageError.
    """
    part = _part(wanted, number)
    where = object_store.join(wanted.destination, shards.shard_name(number))
    identity = json.dumps([asdict(wanted.recipe), wanted.source.version, _options(wanted)])
    if object_store.exists(part):
        left = json.loads(object_store.read_bytes(part))
        if left["identity"] == identity and (left["row"] is None or object_store.exists(where)):
            return _packed(number, left)
    fitted = _fitted_samples(wanted, number)
    row = None
    if samples := fitted.samples:
        files, images = list[bytes](), fitted.images
        if (encoding := wanted.recipe.encoding) != "raw":
            files = [encoded(image, encoding) for image in images]
            shape = wanted.recipe.image_shape
            images = [decoded(file, encoding, shape) for file in files]  # what a reader will see
        stacked = np.stack(images)
        labels = [sample.label for sample in samples]
        keys = [sample.key for sample in samples]
        data = shards.shard_bytes(files or stacked, labels, keys)
        object_store.write_bytes(where, data)
        digest = hashlib.sha256(data).hexdigest()
        sums = shards.pixel_sums(stacked)
        row = ShardRow(shards.shard_name(number), len(samples), len(data), digest, *sums)
    counts = Counter(sample.label for sample in samples)
    left = {
        "identity": identity,
        "row": row and asdict(row),
        "skipped": fitted.skipped,
        "changed": [asdict(group) for group in groups(fitted.changes.items())],
        "class_samples": [counts[label] for label in range(len(wanted.recipe.label_names))],
        "content_sha256": fitted.content_sha256,
    }
    object_store.write_bytes(part, json.dumps(left).encode())
    return _packed(number, left)


def finish(wanted: Plan, packed: Iterable[Packed]) -> Dataset:
    """Write record, index and, last, the manifest; then the part files go."""
    done = sorted(packed, key=lambda shard: shard.number)
    rows = [shard.row for shard in done if shard.row is not None]
    if not rows:
        raise DatasetError(wanted.destination, "every image was skipped", "mend the source")
    skipped = [line for shard in done for line in shard.skipped]
    report = PackReport(
        len(skipped),
        tuple(skipped[: pack_report.MOST_NAMED]),
        wanted.source.left_out,
        pack_report.merged(group for shard in done for group in shard.changed),
        tuple(map(sum, zip(*(shard.class_samples for shard in done), strict=True))),
    )
    content = _joined(shard.content_sha256 for shard in done)
    source = wanted.name, wanted.source.digest, wanted.source.version
    record = Record(*source, content, _options(wanted), report)
    pack_report.write(wanted.destination, record)
    dataset = shards.write_index(wanted.destination, wanted.recipe, rows)
    object_store.delete_folder(object_store.join(wanted.destination, PARTS))
    return dataset


def _options(wanted: Plan) -> dict[str, Any]:
    """What the shards depend on beside the recipe."""
    options = wanted.options
    return {
        "shard_samples": wanted.shard_samples,
        "image_key": options.image_key,
        "label_key": options.label_key,
        "on_bad_image": options.on_bad_image,
        "max_pixels": options.max_pixels,
        "max_file_bytes": options.max_file_bytes,
    }


def _content(wanted: Plan) -> str:
    """sha256 of all bytes of the source, read anew."""
    return _joined(
        _joined(_sha256(sample) for sample in wanted.source.read(_range(wanted, number)))
        for number in range(wanted.shards)
    )


def _joined(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _sha256(sample: Sample) -> str:
    data = sample.image if isinstance(sample.image, bytes) else np.asarray(sample.image).tobytes()
    return hashlib.sha256(data if sample.image is not None else b"too large").hexdigest()


def _range(wanted: Plan, number: int) -> range:
    start = number * wanted.shard_samples
    return range(start, min(start + wanted.shard_samples, len(wanted.source)))


def _fitted_samples(wanted: Plan, number: int) -> Fitted:
    """The samples of shard `number` with their fitted images, and a line for each bad one."""
    fitted, digests = Fitted([], [], [], defaultdict(list), ""), []
    for sample in wanted.source.read(_range(wanted, number)):
        digests.append(_sha256(sample))
        try:
            image, changes = _fitted(sample, wanted.options, wanted.recipe.image_shape)
        except BadImageError as error:
            if wanted.options.on_bad_image == "stop":
                raise _or_skip(error) from error
            fitted.skipped.append(str(error))
            continue
        fitted.samples.append(sample)
        fitted.images.append(image)
        for change in changes:
            fitted.changes[change].append(sample.key)
    return fitted._replace(content_sha256=_joined(digests))


def _or_skip(error: BadImageError) -> BadImageError:
    """The error of a job that stops at it, with that way out, which one that skips has taken."""
    file, problem, remedy = error.args
    return BadImageError(file, problem, f"{remedy}, or use on_bad_image=skip")


def _first_image(name: str, source: Source, options: PackConfig) -> UInt8s:
    """The first good image, which sets the channels and, without a resize, the size."""
    for sample in source.read(range(len(source))):
        try:
            return _fitted(sample, options, None)[0]
        except BadImageError as error:
            if options.on_bad_image == "stop":
                raise _or_skip(error) from error
    raise DatasetError(redacted(name), "it has no good image", "give a source with images")


def _fitted(
    sample: Sample, options: PackConfig, image_shape: tuple[int, int, int] | None
) -> tuple[UInt8s, tuple[str, ...]]:
    """uint8 [H, W, C] of the shape of all others, or any shape for the first, and its changes.

    Raises BadImageError, and DatasetError where a colour image would become grey unasked.
    """
    if sample.image is None:
        problem = f"a file of more than {options.max_file_bytes} bytes (max_file_bytes)"
        remedy = "make it smaller, raise max_file_bytes if you trust it"
        raise BadImageError(sample.place, problem, remedy)
    changes: tuple[str, ...] = ()
    channels = options.channels
    if isinstance(sample.image, bytes):
        image, changes = decode_image(sample.image, sample.place, channels, options.max_pixels)
    else:
        image = from_pixels(sample.image, channels)
    if image_shape and len(image.getbands()) != image_shape[-1]:
        if image.mode == "RGB" and _has_colour(image):
            problem = "it has colours, and the first image is grey"
            remedy = "give channels=3 to keep them, or channels=1 to make all images grey"
            raise DatasetError(sample.place, problem, remedy)
        image = image.convert("RGB" if image_shape[-1] == 3 else "L")  # no value is lost
    fitted = pixels(resized(image, options.resize, options.image_size))
    if image_shape and fitted.shape != image_shape:
        height, width, _ = fitted.shape
        problem = f"{width} x {height} pixels, and the first image has {image_shape[1]} x "
        remedy = "give resize=centre-crop-box-bicubic and an image_size"
        raise BadImageError(sample.place, f"{problem}{image_shape[0]}", remedy)
    return fitted, changes


def _has_colour(image: Image.Image) -> bool:
    red, green, blue = np.moveaxis(pixels(image), -1, 0)
    return bool((red != green).any() or (red != blue).any())


def _part(wanted: Plan, number: int) -> str:
    return object_store.join(wanted.destination, PARTS, f"{shards.shard_name(number)}.json")


def _packed(number: int, left: dict[str, Any]) -> Packed:
    row = ShardRow(**left["row"]) if left["row"] else None
    skipped, counts = tuple(left["skipped"]), tuple(left["class_samples"])
    changed = tuple(map(NamedGroup.from_json, left["changed"]))
    return Packed(number, row, skipped, changed, counts, left["content_sha256"])
