"""Encode a set of pixels to a set of latents: plan, encode shards in any order, then finish.

Latent shard n holds the samples of pixel shard n, encoded in batches that begin at its first
sample, so its bytes do not depend on which task encodes it. As in packer.py, each finished shard
has a part file, and the manifest is written last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ddpm_ray.config.jobs.encode import EncodeConfig
from ddpm_ray.core_clock import core_clock
from ddpm_ray.data import encoding_record, shards
from ddpm_ray.data.captions import caption_tuples
from ddpm_ray.data.dataset import MANIFEST, Dataset, DatasetError, UInt8s, open_dataset, write_index
from ddpm_ray.data.encoding_record import EncodingCost, EncodingRecord
from ddpm_ray.data.image_decoders import ImageDecoders
from ddpm_ray.data.image_shape import ImageShape, LatentShape
from ddpm_ray.data.latent_preview import Gram, add_grams, fit_preview, gram_of
from ddpm_ray.data.latent_sums import LOG_VARIANCES, Float16s, latent_sums
from ddpm_ray.data.manifest import LatentShardRow, Recipe, index_of
from ddpm_ray.data.packing import pack_report
from ddpm_ray.data.packing.part_files import PartFiles
from ddpm_ray.data.shard_samples import gather
from ddpm_ray.data.shards import Latents, Shard, fetch_shard
from ddpm_ray.models.autoencoder import Posterior
from ddpm_ray.redaction import redacted
from ddpm_ray.storage import object_store


class LatentEncoder(Protocol):
    """The encoder of images; TrainedAutoencoder (sampling/autoencoder.py) is one."""

    @property
    def core_seconds(self) -> float | None:
        """Core-seconds of its training; None: unknown."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        ...

    @property
    def url(self) -> str:
        """URL of its checkpoint or folder."""
        ...

    @property
    def sha256(self) -> str:
        """sha256 of its weights."""
        ...

    def latent_shape(self, image_shape: ImageShape) -> tuple[int, int, int]:
        """Return (c, h, w) of the latents of such images; raises ValueError if it takes none."""
        ...

    def encode_uint8(self, images: UInt8s) -> Posterior:
        """Encode uint8 images [B, H, W, C] to posteriors [B, c, h, w]."""
        ...


@dataclass(frozen=True)
class EncodePlan:
    """The inputs of a task that encodes a shard, apart from the autoencoder."""

    source: Dataset
    destination: str
    recipe: Recipe
    autoencoder: str  # its URL
    batch_size: int
    autoencoder_core_s: float | None = None  # core-seconds of its training; None: unknown

    @property
    def shards(self) -> int:
        """Number of shards."""
        return self.source.manifest.shards


class EncodedShard(NamedTuple):
    """A finished shard of latents."""

    number: int
    row: LatentShardRow
    gram: Gram  # for the preview
    core_s: float = 0.0  # core-seconds of its encoding


def make_encoding_plan(
    source: Dataset, destination: str, autoencoder: LatentEncoder, options: EncodeConfig
) -> EncodePlan:
    """Decide the recipe of the latents. Raises DatasetError if the images cannot be encoded."""
    manifest, latent_shape = source.manifest, encoded_shape(source, autoencoder)
    recipe = Recipe(
        image_shape=manifest.image_shape,
        encoding="raw",
        resize=manifest.resize,
        label_names=manifest.label_names,
        source_sha256=source.fingerprint,
        codec="latents",
        latent_shape=latent_shape,
        views=("plain", "flipped") if options.flipped else ("plain",),
        autoencoder_sha256=autoencoder.sha256,
        captioned=manifest.captioned,
    )
    known = autoencoder.url, options.batch_size, autoencoder.core_seconds
    return EncodePlan(source, destination, recipe, *known)


def encoded_shape(source: Dataset, autoencoder: LatentEncoder) -> LatentShape:
    """The shape of an image's latents. Raises DatasetError if the images cannot be encoded."""
    manifest = source.manifest
    if manifest.codec != "pixels":
        problem = f"the data set holds {manifest.codec}, not images"
        raise DatasetError(source.url, problem, "name the images that they were encoded from")
    try:
        return LatentShape(*autoencoder.latent_shape(manifest.image_shape))
    except ValueError as error:
        remedy = "pack the images again, with image_size or channels that the autoencoder takes"
        raise DatasetError(source.url, str(error), remedy) from None


def find_finished_latents(plan: EncodePlan) -> Dataset | None:
    """Return the finished set of latents at the destination, or None if there is none.

    Raises DatasetError if a data set of other images, another autoencoder or other options is
    there; it is never overwritten.
    """
    if not object_store.exists(object_store.join(plan.destination, MANIFEST)):
        return None
    dataset = open_dataset(plan.destination)
    there, here = dataset.recipe.to_json(), plan.recipe.to_json()
    if dataset.manifest.codec != "latents":
        raise pack_report.other_dataset(plan.destination, "it holds images, not latents")
    if (found := there["autoencoder_sha256"]) != (wanted := here["autoencoder_sha256"]):
        how = f"encoded by the autoencoder of sha256 {found[:12]}, and {plan.autoencoder} is"
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
    return EncodedShard(number, LatentShardRow(**part["row"]), part["gram"], part["core_s"])


def find_all_encoded(plan: EncodePlan) -> list[EncodedShard]:
    """Return the shards that an interrupted job finished. Raises StorageError."""
    numbers = (number for number in _part_files(plan).numbers() if number < plan.shards)
    found = (find_encoded(plan, number) for number in numbers)
    return [shard for shard in found if shard is not None]


def encode_shard(plan: EncodePlan, number: int, autoencoder: LatentEncoder) -> EncodedShard:
    """Write shard `number` and its part file, or reuse those of an interrupted job.

    Raises DatasetError if float16 cannot hold the latents of an image, ShardCorruptError and
    StorageError.
    """
    if (finished := find_encoded(plan, number)) is not None:
        return finished
    clock = core_clock(autoencoder.device.type)
    began = clock()
    shard = fetch_shard(plan.source, number)
    images = _pixels(plan.source, shard)
    views = [images, images[:, :, ::-1]] if "flipped" in plan.recipe.views else [images]
    encoded_views = [_encode(plan, autoencoder, view, shard) for view in views]
    means, log_variances = zip(*encoded_views, strict=True)
    latents = Latents(np.stack(means, axis=1), np.stack(log_variances, axis=1))
    captions = None if shard.captions is None else caption_tuples(shard.captions)
    data = shards.shard_bytes(latents, shard.labels.tolist(), shard.keys.to_pylist(), captions)
    name = shards.shard_name(number)
    object_store.write_bytes(object_store.join(plan.destination, name), data)
    pixels = plan.source.index.slice(number, 1).to_pylist()[0]
    digest = hashlib.sha256(data).hexdigest()
    sums = pixels["pixel_sum"], pixels["pixel_sum_of_squares"], *latent_sums(*latents)
    row = LatentShardRow(
        name, len(shard), len(data), digest, *sums, captions=pixels.get("captions", 0)
    )
    gram = gram_of(latents.mean[:, 0], images)
    encoded = EncodedShard(number, row, gram, round(clock() - began, 3))
    part = {"row": asdict(row), "gram": gram, "core_s": encoded.core_s}
    _part_files(plan).write(number, part)
    return encoded


def finish_latents(plan: EncodePlan, encoded: Iterable[EncodedShard]) -> Dataset:
    """Write the record, the index and, last, the manifest; then delete the part files.

    Raises StorageError.
    """
    done = sorted(encoded, key=lambda shard: shard.number)
    rows = [shard.row for shard in done]
    gram = add_grams(shard.gram for shard in done)
    _, _, manifest = index_of(plan.recipe, rows)
    record = EncodingRecord(
        redacted(plan.autoencoder),
        plan.recipe.autoencoder_sha256,
        redacted(plan.source.url),
        _options(plan),
        fit_preview(gram, manifest),
    )
    encoding_record.write_encoding(plan.destination, "latents", record)
    core_s = round(sum(shard.core_s for shard in done), 3)
    cost = EncodingCost(core_s, plan.autoencoder_core_s)
    encoding_record.write_cost(plan.destination, "latents", cost)
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


def _encode(
    plan: EncodePlan, autoencoder: LatentEncoder, images: UInt8s, shard: Shard
) -> tuple[Float16s, Float16s]:
    """Return mean and log variance, [n, c, h, w] each, of images [n, H, W, C] of `shard`.

    Raises DatasetError that names the first image whose latents float16 cannot hold.
    """
    means, variances = [], []
    for start in range(0, len(images), plan.batch_size):
        batch = np.ascontiguousarray(images[start : start + plan.batch_size])
        posterior = autoencoder.encode_uint8(batch)
        halves = (half.float().cpu().numpy() for half in posterior)
        with np.errstate(over="ignore"):  # an overflow gives infinity, which is refused below
            mean, log_variance = (half.astype(np.float16) for half in halves)
        low, high = LOG_VARIANCES
        good = np.isfinite(mean) & (log_variance >= low) & (log_variance <= high)
        if not good.all():
            first = int(np.flatnonzero(~good.reshape(len(batch), -1).all(1))[0])
            raise _no_latents(plan, shard.keys[start + first].as_py(), posterior, first)
        means.append(mean)
        variances.append(log_variance)
    return np.concatenate(means), np.concatenate(variances)


def _no_latents(plan: EncodePlan, key: str, posterior: Posterior, row: int) -> DatasetError:
    """Return the error for an image whose latents float16 cannot hold."""
    largest = float(posterior.mean[row].abs().max())
    problem = (
        f"sample {key}: its latents exceed the range of float16 (largest mean {largest:g}, limit "
        "65504)"
    )
    remedy = (
        "train the autoencoder with a larger autoencoder.kl_weight, or pack the images without "
        "this one"
    )
    return DatasetError(plan.source.url, problem, remedy)
