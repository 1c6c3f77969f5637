"""Encode a set of pixels to one of another codec: plan, encode shards in any order, then finish.

Encoded shard n holds the samples of pixel shard n, encoded in batches that begin at its first
sample, so its bytes do not depend on which task encodes it. As in packer.py, each finished shard
has a part file, and the manifest is written last. What differs between codecs is in a
SetEncoder (set_encoder.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from ddpm_ray.config.jobs.encode import EncodeConfig
from ddpm_ray.core_clock import core_clock
from ddpm_ray.data import encoding_record, shards
from ddpm_ray.data.captions import caption_tuples
from ddpm_ray.data.dataset import MANIFEST, Dataset, DatasetError, UInt8s, open_dataset, write_index
from ddpm_ray.data.encoding_record import EncodingCost, EncodingRecord
from ddpm_ray.data.image_decoders import ImageDecoders
from ddpm_ray.data.latent_preview import Gram, add_grams, fit_preview
from ddpm_ray.data.manifest import (
    ENCODED_BY,
    EmbeddingShardRow,
    LatentShardRow,
    Recipe,
    ShardRow,
    index_of,
)
from ddpm_ray.data.packing import pack_report
from ddpm_ray.data.packing.part_files import PartFiles
from ddpm_ray.data.packing.set_encoder import EncodedBatch, SetEncoder, UnencodableError
from ddpm_ray.data.shard_index import CodecName
from ddpm_ray.data.shard_samples import gather
from ddpm_ray.data.shards import Shard, fetch_shard
from ddpm_ray.redaction import redacted
from ddpm_ray.storage import object_store

ROWS: Mapping[CodecName, type[LatentShardRow | EmbeddingShardRow]] = {
    "latents": LatentShardRow,
    "embeddings": EmbeddingShardRow,
}


@dataclass(frozen=True)
class EncodePlan:
    """The inputs of a task that encodes a shard, apart from the network."""

    source: Dataset
    destination: str
    recipe: Recipe
    network: str  # its URL
    batch_size: int
    network_core_s: float | None = None  # core-seconds of its training; None: unknown

    @property
    def shards(self) -> int:
        """Number of shards."""
        return self.source.manifest.shards

    @property
    def network_sha256(self) -> str:
        """sha256 of the network's weights."""
        return self.recipe.autoencoder_sha256 or self.recipe.encoder_sha256


class EncodedShard(NamedTuple):
    """A finished shard."""

    number: int
    row: ShardRow
    gram: Gram | None  # for the preview of latents
    core_s: float = 0.0  # core-seconds of its encoding


def make_encoding_plan(
    source: Dataset, destination: str, encoder: SetEncoder, options: EncodeConfig
) -> EncodePlan:
    """Decide the recipe. Raises DatasetError if the images cannot be encoded, ConfigError."""
    manifest, network = source.manifest, encoder.network
    recipe = Recipe(
        image_shape=manifest.image_shape,
        encoding="raw",
        resize=manifest.resize,
        label_names=manifest.label_names,
        source_sha256=source.fingerprint,
        codec=encoder.codec,
        captioned=manifest.captioned,
        **encoder.recipe_fields(source, options),
    )
    known = network.url, options.batch_size, network.core_seconds
    return EncodePlan(source, destination, recipe, *known)


def find_finished_set(plan: EncodePlan) -> Dataset | None:
    """Return the finished set at the destination, or None if there is none.

    Raises DatasetError if a data set of other images, another network or other options is there; it
    is never overwritten.
    """
    if not object_store.exists(object_store.join(plan.destination, MANIFEST)):
        return None
    dataset, codec = open_dataset(plan.destination), plan.recipe.codec
    there, here = dataset.recipe.to_json(), plan.recipe.to_json()
    if (held := dataset.manifest.codec) != codec:
        held_here = "images" if held == "pixels" else held
        raise pack_report.other_dataset(plan.destination, f"it holds {held_here}, not {codec}")
    if (found := dataset.manifest.network_sha256) != (wanted := plan.network_sha256):
        how = f"encoded by the {ENCODED_BY[codec]} of sha256 {found[:12]}, and {plan.network} is"
        raise pack_report.other_dataset(plan.destination, f"{how} {wanted[:12]}")
    if keys := [key for key in here | there if there.get(key) != here.get(key)]:
        raise pack_report.other_dataset(plan.destination, f"{', '.join(keys)} differ")
    record, options = encoding_record.read_encoding(dataset), _options(plan)
    if record is not None and record.options != options:
        how = f"encoded with {dict(record.options)}, now {options}"
        raise pack_report.other_dataset(plan.destination, how)
    return dataset


def find_encoded(plan: EncodePlan, number: int) -> EncodedShard | None:
    """Return shard `number` if an interrupted job finished it, else None. Raises StorageError."""
    part = _part_files(plan).find(number)
    if part is None or "core_s" not in part:  # of a commit that did not record the cost
        return None
    row = ROWS[plan.recipe.codec](**part["row"])
    return EncodedShard(number, row, part["gram"], part["core_s"])


def find_all_encoded(plan: EncodePlan) -> list[EncodedShard]:
    """Return the shards that an interrupted job finished. Raises StorageError."""
    numbers = (number for number in _part_files(plan).numbers() if number < plan.shards)
    found = (find_encoded(plan, number) for number in numbers)
    return [shard for shard in found if shard is not None]


def encode_shard(plan: EncodePlan, number: int, encoder: SetEncoder) -> EncodedShard:
    """Write shard `number` and its part file, or reuse those of an interrupted job.

    Raises DatasetError if float16 cannot hold what an image is encoded to, ShardCorruptError and
    StorageError.
    """
    if (finished := find_encoded(plan, number)) is not None:
        return finished
    clock = core_clock(encoder.network.device.type)
    began = clock()
    shard = fetch_shard(plan.source, number)
    images = _pixels(plan.source, shard)
    views = [images, images[:, :, ::-1]] if "flipped" in plan.recipe.views else [images]
    joined = encoder.join([_encode(plan, encoder, view, shard) for view in views], images)
    captions = None if shard.captions is None else caption_tuples(shard.captions)
    rest = shard.labels.tolist(), shard.keys.to_pylist(), captions
    data, name = shards.shard_bytes(joined.samples, *rest), shards.shard_name(number)
    object_store.write_bytes(object_store.join(plan.destination, name), data)
    pixels = plan.source.index.slice(number, 1).to_pylist()[0]
    fields: dict[str, Any] = {
        "name": name,
        "samples": len(shard),
        "stored_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "pixel_sum": pixels["pixel_sum"],
        "pixel_sum_of_squares": pixels["pixel_sum_of_squares"],
        **joined.sums,
        "captions": pixels.get("captions", 0),
    }
    row = ROWS[plan.recipe.codec](**fields)
    encoded = EncodedShard(number, row, joined.gram, round(clock() - began, 3))
    part = {"row": asdict(row), "gram": encoded.gram, "core_s": encoded.core_s}
    _part_files(plan).write(number, part)
    return encoded


def finish_encoded(plan: EncodePlan, encoded: Iterable[EncodedShard]) -> Dataset:
    """Write the record, the index and, last, the manifest; then delete the part files.

    Raises StorageError.
    """
    done = sorted(encoded, key=lambda shard: shard.number)
    rows, codec = [shard.row for shard in done], plan.recipe.codec
    grams = [shard.gram for shard in done if shard.gram is not None]
    _, _, manifest = index_of(plan.recipe, rows)
    record = EncodingRecord(
        redacted(plan.network),
        plan.network_sha256,
        redacted(plan.source.url),
        _options(plan),
        fit_preview(add_grams(grams), manifest) if grams else None,
    )
    encoding_record.write_encoding(plan.destination, codec, record)
    core_s = round(sum(shard.core_s for shard in done), 3)
    cost = EncodingCost(core_s, plan.network_core_s)
    encoding_record.write_cost(plan.destination, codec, cost)
    dataset = write_index(plan.destination, plan.recipe, rows)
    _part_files(plan).delete()
    return dataset


def _options(plan: EncodePlan) -> dict[str, Any]:
    """Return the options other than the recipe on which the shards' bytes depend."""
    return {"batch_size": plan.batch_size}


def _part_files(plan: EncodePlan) -> PartFiles:
    identity = json.dumps([plan.recipe.to_json(), _options(plan)])
    return PartFiles(plan.destination, identity)


def _pixels(source: Dataset, shard: Shard) -> UInt8s:
    """Return the decoded images of a shard, [n, H, W, C]."""
    images = np.empty((len(shard), source.manifest.sample_bytes), dtype=np.uint8)
    with ImageDecoders(source.manifest.encoding, source.manifest.image_shape, 1) as decoders:
        gather(shard, np.arange(len(shard)), images, source, decoders)
    return images.reshape(-1, *source.manifest.image_shape)


def _encode(plan: EncodePlan, encoder: SetEncoder, images: UInt8s, shard: Shard) -> EncodedBatch:
    """Return the encodings of images [n, H, W, C] of `shard`, in arrays [n, ...].

    Raises DatasetError that names the first image that cannot be stored.
    """
    batches = []
    for start in range(0, len(images), plan.batch_size):
        batch = np.ascontiguousarray(images[start : start + plan.batch_size])
        try:
            batches.append(encoder.encode(batch))
        except UnencodableError as error:
            row, problem, remedy = error.args
            problem = f"sample {shard.keys[start + row].as_py()}: {problem}"
            raise DatasetError(plan.source.url, problem, remedy) from None
    return tuple(np.concatenate(parts) for parts in zip(*batches, strict=True))
