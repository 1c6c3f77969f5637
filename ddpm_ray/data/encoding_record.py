"""The record of a set of latents or embeddings: its network, options and preview map.

The network is the autoencoder of latents, or the image encoder of embeddings. The record is stored
as `encoding.json`, outside the data set's fingerprint, since the network may be moved. The cost of
the set has a file of its own, `encoding-cost.json`, because it is measured: all other files have
the same bytes whenever the set is encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ddpm_ray.data.dataset import Dataset
from ddpm_ray.data.latent_preview import PreviewMatrix
from ddpm_ray.data.manifest import ENCODED_BY, Manifest
from ddpm_ray.data.shard_index import CodecName
from ddpm_ray.storage import checksummed_json, object_store

RECORD, COST = "encoding.json", "encoding-cost.json"


@dataclass(frozen=True)
class EncodingRecord:
    """Facts about a set of latents or embeddings that its manifest does not hold."""

    network: str  # its URL, without secrets
    network_sha256: str
    data: str  # URL of the images, without secrets
    options: Mapping[str, Any]
    preview: PreviewMatrix | None = None  # of latents


@dataclass(frozen=True)
class EncodingCost:
    """Core-seconds (core_clock.py) spent before a model can be trained on such a set."""

    encoding: float  # of all tasks and starts of the job
    network: float | None  # its training; None: unknown


def write_cost(destination: str, codec: CodecName, cost: EncodingCost) -> None:
    """Store the cost next to the shards. Raises StorageError."""
    held = {"encoding": cost.encoding, ENCODED_BY[codec]: cost.network}
    checksummed_json.write(object_store.join(destination, COST), held)


def read_cost(dataset: Dataset) -> EncodingCost | None:
    """Return the cost of an encoded set; None if it is not recorded. Raises StorageError."""
    where = object_store.join(dataset.url, COST)
    build = partial(_cost, network=ENCODED_BY[dataset.manifest.codec])
    return checksummed_json.read_as(where, "the cost of an encoding", build)


def write_encoding(destination: str, codec: CodecName, record: EncodingRecord) -> None:
    """Store the record next to the shards. Raises StorageError."""
    network = ENCODED_BY[codec]
    held = {
        network: record.network,
        f"{network}_sha256": record.network_sha256,
        "data": record.data,
        "options": record.options,
        **({"preview": asdict(record.preview)} if record.preview else {}),
    }
    checksummed_json.write(object_store.join(destination, RECORD), held)


def read_encoding(dataset: Dataset) -> EncodingRecord | None:
    """Return the record of an encoded set; None if it has none, or that of another set.

    Raises StorageError.
    """
    where = object_store.join(dataset.url, RECORD)
    build = partial(_record, manifest=dataset.manifest)
    record = checksummed_json.read_as(where, "an encoding record", build)
    if record is None or record.network_sha256 != dataset.manifest.network_sha256:
        return None
    return record


def _cost(held: Any, network: str) -> EncodingCost:
    trained = held[network]
    return EncodingCost(float(held["encoding"]), None if trained is None else float(trained))


def _record(held: Any, manifest: Manifest) -> EncodingRecord:
    """The record in `held` of a set; the preview of latents has a column for each channel."""
    network, shape = ENCODED_BY[manifest.codec], manifest.latent_shape
    return EncodingRecord(
        str(held[network]),
        str(held[f"{network}_sha256"]),
        str(held["data"]),
        dict(held["options"]),
        PreviewMatrix.of_json(held["preview"], shape.channels) if shape else None,
    )
