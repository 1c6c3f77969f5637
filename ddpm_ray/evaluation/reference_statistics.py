"""Feature statistics of a data set: computed once, stored next to its shards.

The cache's name is the sha256 of everything that its content depends on, so a changed network,
resize recipe or data set is another file and nothing ever has to be invalidated.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ddpm_ray.collectives import Workers
from ddpm_ray.data.codec import PIXELS, Codec
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.data.decoded_images import image_codec, read_decoded
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.evaluation.features.feature_extractor import FeatureNet
from ddpm_ray.evaluation.frechet import Moments
from ddpm_ray.storage import object_store
from ddpm_ray.storage.errors import StorageError

log = logging.getLogger(__name__)

STAMP = "ddpm-ray"  # the metadata entry of a cache file: its sha256, and what it is of
PARTS = ("count", "sum", "outer")  # of Moments, in its order
# What a cache file of another form or origin raises.
UNREADABLE = (StorageError, SafetensorError, ValueError, KeyError, TypeError, RecursionError)


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of a data set's features, by width; equal on every worker."""

    identity: Mapping[str, Any]
    image_shape: ImageShape
    moments: Mapping[int, Moments]
    kept: Mapping[int, Tensor]  # float32 [K, D]: features of K evenly spaced images; K may be 0

    @property
    def count(self) -> int:
        """Images in the data set."""
        return int(next(iter(self.moments.values())).count)

    @property
    def kernel_images(self) -> int:
        """K, the images of each side that the kernel distance compares; 0: none."""
        return len(next(iter(self.kept.values())))

    @property
    def sha256(self) -> str:
        """sha256 of the identity: name of the cache file and of the reference in a provenance."""
        return _sha256(self.identity)


def reference(
    dataset: Dataset,
    net: FeatureNet,
    workers: Workers,
    *,
    kernel_images: int = 0,
    batch_size: int = 64,
    codec: Codec = PIXELS,
) -> Reference:
    """The reference of the data set's images, read from the cache or computed by all workers.

    `kernel_images` (at most the data set's) are kept whole for the kernel distance; 0: none. The
    cache is `<data url>/reference/<sha256>.safetensors`; one that does not pass its own checksum
    is computed again, and where it cannot be written a warning says so. All workers must call it.
    `codec` is that of the model that is scored; it decodes a set of latents (`image_codec`).
    """
    identity: dict[str, Any] = {
        "format": "ddpm-ray reference 1",
        "data": dataset.fingerprint,
        "features": net.facts,
        "kernel_images": min(kernel_images, dataset.manifest.samples),
    }
    if image_codec(dataset, codec) is not PIXELS:
        identity["images_of"] = "decoded latents"
    url = object_store.join(dataset.url, "reference", f"{_sha256(identity)}.safetensors")
    tensors = _read_cache(url, identity)
    cached_everywhere = all(workers.gather(tensors is not None))
    if tensors is None or not cached_everywhere:
        tensors = _compute(dataset, codec, net, workers, identity["kernel_images"], batch_size)
        if workers.is_main:
            _write_cache(url, identity, tensors)
    here = {name: tensor.to(workers.device) for name, tensor in tensors.items()}
    return Reference(
        identity=identity,
        image_shape=dataset.manifest.image_shape,
        moments={w: Moments(*(here[f"{w}.{part}"] for part in PARTS)) for w in net.widths},
        kept={w: here[f"{w}.kept"] for w in net.widths},
    )


def _compute(
    dataset: Dataset,
    codec: Codec,
    net: FeatureNet,
    workers: Workers,
    kernel_images: int,
    batch_size: int,
) -> dict[str, Tensor]:
    """Each worker takes a share of the shards; float64 sums and kept features are merged."""
    samples = dataset.manifest.samples
    is_kept = torch.zeros(samples, dtype=torch.bool)
    if kernel_images:  # evenly spaced, as shards may be sorted by class
        is_kept[torch.arange(kernel_images) * samples // kernel_images] = True
    shards = workers.share(dataset.manifest.shards)
    moments = {w: Moments.zeros(w, workers.device) for w in net.widths}
    kept = {w: [torch.empty(0, w)] for w in net.widths}
    for positions, images in read_decoded(dataset, codec, shards, batch_size=batch_size):
        chosen = is_kept[positions]
        for w, features in net(images.to(workers.device)).items():
            moments[w].update(features)
            kept[w].append(features.cpu()[chosen])
    tensors = {}
    for w in net.widths:
        for part, tensor in zip(PARTS, moments[w].tensors(), strict=True):
            tensors[f"{w}.{part}"] = workers.sum_(tensor).cpu()
        tensors[f"{w}.kept"] = torch.cat(workers.gather(torch.cat(kept[w])))
    return tensors


def _write_cache(url: str, identity: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    # One entry, because safetensors writes several in no fixed order.
    stamp = json.dumps({"sha256": _checksum(identity, tensors), "identity": identity})
    try:
        object_store.write_bytes(url, safetensors.torch.save(dict(tensors), {STAMP: stamp}))
    except StorageError as error:
        log.warning("reference statistics are not kept (%s); the next run computes them", error)


def _read_cache(url: str, identity: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The tensors at `url`, or None where there are none or they are not what was written."""
    try:
        if not object_store.exists(url):
            return None
        data = object_store.read_bytes(url)
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        stamp = json.loads(header["__metadata__"][STAMP])
        if stamp["sha256"] != _checksum(identity, tensors):
            raise ValueError("its sha256 is wrong")
    except UNREADABLE as error:
        message = "the stored reference statistics %s cannot be used (%s); they are computed again"
        log.warning(message, url, error)
        return None
    return tensors


def _sha256(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _checksum(identity: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the identity and over every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(_sha256(identity).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
