"""The record of a set of latents: its autoencoder, options and preview map.

It is stored as `encoding.json`, outside the data set's fingerprint, since the autoencoder may be
moved. The cost of the set has a file of its own, `encoding-cost.json`, because it is measured: all
other files have the same bytes whenever the set is encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ddpm_ray.data.dataset import Dataset
from ddpm_ray.data.latent_preview import PreviewMatrix
from ddpm_ray.storage import checksummed_json, object_store

RECORD, COST = "encoding.json", "encoding-cost.json"


@dataclass(frozen=True)
class EncodingRecord:
    """Facts about a set of latents that its manifest does not hold."""

    autoencoder: str  # its URL, without secrets
    autoencoder_sha256: str
    data: str  # URL of the images, without secrets
    options: Mapping[str, Any]
    preview: PreviewMatrix


@dataclass(frozen=True)
class EncodingCost:
    """Core-seconds (core_clock.py) spent before a model can be trained on a set of latents."""

    encoding: float  # of all tasks and starts of the job
    autoencoder: float | None  # its training; None: unknown


def write_cost(destination: str, cost: EncodingCost) -> None:
    """Store the cost next to the shards. Raises StorageError."""
    checksummed_json.write(object_store.join(destination, COST), asdict(cost))


def read_cost(dataset: Dataset) -> EncodingCost | None:
    """Return the cost of a set of latents; None if it is not recorded. Raises StorageError."""
    where = object_store.join(dataset.url, COST)
    return checksummed_json.read_as(where, "the cost of an encoding", _cost)


def write_encoding(destination: str, record: EncodingRecord) -> None:
    """Store the record next to the shards. Raises StorageError."""
    checksummed_json.write(object_store.join(destination, RECORD), asdict(record))


def read_encoding(dataset: Dataset) -> EncodingRecord | None:
    """Return the record of a set of latents; None if it has none, or that of another set.

    Raises StorageError.
    """
    shape = dataset.manifest.latent_shape
    channels = shape.channels if shape else None
    where = object_store.join(dataset.url, RECORD)
    build = partial(_record, channels=channels)
    record = checksummed_json.read_as(where, "an encoding record", build)
    if record is None or record.autoencoder_sha256 != dataset.manifest.autoencoder_sha256:
        return None
    return record


def _cost(held: Any) -> EncodingCost:
    trained = held["autoencoder"]
    return EncodingCost(float(held["encoding"]), None if trained is None else float(trained))


def _record(held: Any, channels: int | None) -> EncodingRecord:
    """The record in `held`; its preview has a column for each of `channels`, unless None."""
    return EncodingRecord(
        str(held["autoencoder"]),
        str(held["autoencoder_sha256"]),
        str(held["data"]),
        dict(held["options"]),
        PreviewMatrix.of_json(held["preview"], channels),
    )
