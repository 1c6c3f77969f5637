"""Pack a source into a data set: plan, write shards in any order on any machine, then finish.

Shard n holds samples n * k to (n + 1) * k - 1 of the source for a fixed k, so its bytes do not
depend on who writes it. A packing job that continues after a kill reuses finished shards, by their
part files.
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

from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.data import shards
from ddpm_ray.data.captions import caption_bytes
from ddpm_ray.data.dataset import MANIFEST, Dataset, DatasetError, UInt8s, open_dataset, write_index
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.manifest import Recipe, ShardRow
from ddpm_ray.data.packing import pack_report
from ddpm_ray.data.packing.image_files import BadImageError, decode_stored, encode_image
from ddpm_ray.data.packing.image_fitting import first_image, fit_image, suggest_skip
from ddpm_ray.data.packing.pack_report import PackRecord, PackReport
from ddpm_ray.data.packing.part_files import PartFiles
from ddpm_ray.data.packing.sources import open_source
from ddpm_ray.data.samples import NamedGroup, Sample, Source, named_groups
from ddpm_ray.redaction import redacted
from ddpm_ray.storage import object_store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackPlan:
    """The inputs of a task that writes a shard."""

    source: Source
    destination: str
    options: PackConfig
    recipe: Recipe
    shards: int
    shard_samples: int
    name: str = ""  # the source as the user gave it, without secrets


class PackedShard(NamedTuple):
    """A finished shard; `row` is None if all its images were skipped."""

    number: int
    row: ShardRow | None
    skipped: tuple[str, ...]  # one line for each bad image
    changed: tuple[NamedGroup, ...]  # changes made to images after decoding
    class_samples: tuple[int, ...]  # packed samples of each class
    content_sha256: str  # of the bytes read from the source
    captioned: int = 0  # samples with a caption


class FittedSamples(NamedTuple):
    """The samples of one shard that can be packed, and a record of all that were read."""

    samples: list[Sample]
    images: list[UInt8s]
    skipped: list[str]
    changes: dict[str, list[str]]  # keys of the changed samples, by kind of change
    content_sha256: str


def make_plan(source: str, destination: str, options: PackConfig) -> PackPlan:
    """List the source, read its first good image, and decide shape and number of shards.

    Raises DatasetError for an empty source, BadImageError, StorageError.
    """
    opened = open_source(source, options)
    recipe = Recipe(
        image_shape=ImageShape(*first_image(source, opened, options).shape),
        encoding=options.encoding,
        resize=options.resize,
        label_names=opened.label_names,
        source_sha256=opened.digest,
        captioned=opened.captions is not None,
    )
    shard_samples = _samples_per_shard(opened, recipe, options)
    count = math.ceil(len(opened) / shard_samples)
    return PackPlan(opened, destination, options, recipe, count, shard_samples, redacted(source))


def find_finished(plan: PackPlan) -> Dataset | None:
    """Return the finished data set at the destination, or None if there is none.

    Raises DatasetError if the data set there differs in its samples, its options or the contents
    of its source files; it is never overwritten.
    """
    if not object_store.exists(object_store.join(plan.destination, MANIFEST)):
        return None
    dataset = open_dataset(plan.destination)
    if dataset.recipe != plan.recipe:
        there, here = asdict(dataset.recipe), asdict(plan.recipe)
        keys = [key for key in there if there[key] != here[key]]
        raise pack_report.other_dataset(plan.destination, f"{', '.join(keys)} differ")
    record = pack_report.read_record(dataset)
    pack_report.require_same(dataset, record, _options(plan))
    if record is not None and record.version != plan.source.version:
        log.info("files of %s have a newer date; comparing their contents", plan.name)
        if record.content_sha256 != _hash_source(plan):
            raise pack_report.other_dataset(plan.destination, "the source's files differ")
    return dataset


def pack_shard(plan: PackPlan, number: int) -> PackedShard:
    """Write shard `number` and its part file, or reuse those of an interrupted job.

    Raises BadImageError (on_bad_image "stop"), DatasetError and StorageError.
    """
    parts = _part_files(plan)
    if (finished := parts.find(number)) is not None:
        return _packed_shard(number, finished)
    shard_url = object_store.join(plan.destination, shards.shard_name(number))
    fitted = _fit_samples(plan, number)
    row = _write_shard(plan, number, shard_url, fitted) if fitted.samples else None
    counts = Counter(sample.label for sample in fitted.samples)
    part = {
        "row": row and asdict(row),
        "skipped": fitted.skipped,
        "changed": [asdict(group) for group in named_groups(fitted.changes.items())],
        "class_samples": [counts[label] for label in range(len(plan.recipe.label_names))],
        "content_sha256": fitted.content_sha256,
        "captioned": sum(bool(sample.captions) for sample in fitted.samples),
    }
    parts.write(number, part)
    return _packed_shard(number, part)


def finish_dataset(plan: PackPlan, packed: Iterable[PackedShard]) -> Dataset:
    """Write the packing record, the index and, last, the manifest; delete the part files.

    Raises DatasetError if every image was skipped, StorageError.
    """
    done = sorted(packed, key=lambda shard: shard.number)
    rows = [shard.row for shard in done if shard.row is not None]
    if not rows:
        raise DatasetError(plan.destination, "every image was skipped", "repair the source")
    skipped = [line for shard in done for line in shard.skipped]
    report = PackReport(
        len(skipped),
        tuple(skipped[: pack_report.MAX_NAMED]),
        plan.source.left_out,
        pack_report.merge_groups(group for shard in done for group in shard.changed),
        tuple(map(sum, zip(*(shard.class_samples for shard in done), strict=True))),
        sum(shard.captioned for shard in done),
        sum(row.captions for row in rows),
    )
    content = _join_digests(shard.content_sha256 for shard in done)
    source = plan.name, plan.source.digest, plan.source.version
    pack_report.write_record(plan.destination, PackRecord(*source, content, _options(plan), report))
    dataset = write_index(plan.destination, plan.recipe, rows)
    _part_files(plan).delete()
    return dataset


def _write_shard(plan: PackPlan, number: int, url: str, fitted: FittedSamples) -> ShardRow:
    files, images = list[bytes](), fitted.images
    if (encoding := plan.recipe.encoding) != "raw":
        files = [encode_image(image, encoding) for image in images]
        # JPEG is lossy: the sums below are of the pixels that a reader will decode.
        images = [decode_stored(file, encoding, plan.recipe.image_shape) for file in files]
    stacked = np.stack(images)
    labels = [sample.label for sample in fitted.samples]
    keys = [sample.key for sample in fitted.samples]
    captions = [sample.captions for sample in fitted.samples] if plan.recipe.captioned else None
    data = shards.shard_bytes(files or stacked, labels, keys, captions)
    object_store.write_bytes(url, data)
    digest = hashlib.sha256(data).hexdigest()
    sums = shards.pixel_sums(stacked)
    count = sum(map(len, captions or ()))
    name = shards.shard_name(number)
    return ShardRow(name, len(labels), len(data), digest, *sums, captions=count)


def _options(plan: PackPlan) -> dict[str, Any]:
    """Return the options other than the recipe on which the shards depend."""
    options = plan.options
    return {
        "shard_samples": plan.shard_samples,
        "image_key": options.image_key,
        "label_key": options.label_key,
        "on_bad_image": options.on_bad_image,
        "max_pixels": options.max_pixels,
        "max_file_bytes": options.max_file_bytes,
    }


def _hash_source(plan: PackPlan) -> str:
    """Read the whole source; return the same hash as PackRecord.content_sha256."""
    return _join_digests(
        _join_digests(_sha256(sample) for sample in plan.source.read(_samples_of(plan, number)))
        for number in range(plan.shards)
    )


def _join_digests(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _sha256(sample: Sample) -> str:
    data = sample.image if isinstance(sample.image, bytes) else np.asarray(sample.image).tobytes()
    return hashlib.sha256(data if sample.image is not None else b"too large").hexdigest()


def _samples_of(plan: PackPlan, number: int) -> range:
    """Return the numbers of the source's samples in shard `number`."""
    start = number * plan.shard_samples
    return range(start, min(start + plan.shard_samples, len(plan.source)))


def _fit_samples(plan: PackPlan, number: int) -> FittedSamples:
    """Read the samples of shard `number` and fit their images; bad ones are listed in `skipped`."""
    fitted, digests = FittedSamples([], [], [], defaultdict(list), ""), []
    for sample in plan.source.read(_samples_of(plan, number)):
        digests.append(_sha256(sample))
        try:
            image, changes = fit_image(sample, plan.options, plan.recipe.image_shape)
        except BadImageError as error:
            if plan.options.on_bad_image == "stop":
                raise suggest_skip(error) from error
            fitted.skipped.append(str(error))
            continue
        fitted.samples.append(sample)
        fitted.images.append(image)
        for change in changes:
            fitted.changes[change].append(sample.key)
    return fitted._replace(content_sha256=_join_digests(digests))


def _part_files(plan: PackPlan) -> PartFiles:
    identity = json.dumps([plan.recipe.to_json(), plan.source.version, _options(plan)])
    return PartFiles(plan.destination, identity)


def _packed_shard(number: int, part: dict[str, Any]) -> PackedShard:
    """Return the shard that a part file describes."""
    row = ShardRow(**part["row"]) if part["row"] else None
    skipped, counts = tuple(part["skipped"]), tuple(part["class_samples"])
    changed = tuple(map(NamedGroup.from_json, part["changed"]))
    content, captioned = part["content_sha256"], part.get("captioned", 0)
    return PackedShard(number, row, skipped, changed, counts, content, captioned)


def _samples_per_shard(source: Source, recipe: Recipe, options: PackConfig) -> int:
    """Return the samples of every shard: as many as fit into shard_bytes, with their captions."""
    image_bytes = math.prod(recipe.image_shape)
    samples = max(1, options.shard_bytes // image_bytes)
    if source.captions is None:
        return samples
    sizes = image_bytes + caption_bytes(source.captions)
    while samples > 1:
        largest = np.add.reduceat(sizes, range(0, len(sizes), samples)).max()
        if largest <= options.shard_bytes:
            break
        samples = samples * 15 // 16
    return samples
