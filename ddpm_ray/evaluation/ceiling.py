"""The ceiling of a model of latents: the Frechet distance that a perfect model would have.

A model of latents cannot draw better images than its autoencoder decodes. Its ceiling is the
distance to the reference of decoded training latents, or of images that are encoded and decoded,
for the same number of images.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_ray.collectives import Workers
from ddpm_ray.data.codec import Codec
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.data.decoded_images import read_decoded
from ddpm_ray.evaluation import feature_metrics
from ddpm_ray.evaluation.confidence_interval import groups_of
from ddpm_ray.evaluation.features.feature_extractor import FeatureNet
from ddpm_ray.evaluation.reference_statistics import Reference

BATCH = 64  # images that a network sees at once
OF_LATENTS = "none: the reference is the decoded latents themselves; set evaluation.reference_url"


@dataclass(frozen=True)
class Ceiling:
    """Distances of decoded images, and their provenance; equal on every worker."""

    distances: Mapping[str, float]  # by the name of the score; empty if there is none
    facts: Any  # plain JSON

    def with_ceilings(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return `metrics` with each ceiling after its score, as `<score>_ceiling`."""
        found = dict[str, float]()
        for name, value in metrics.items():
            found[name] = value
            if name in self.distances:
                found[f"{name}_ceiling"] = self.distances[name]
        return found


def ceiling_facts(dataset: Dataset, reference: Reference, num_images: int) -> Any:
    """Return all that determines the ceiling, or the reason why there is none."""
    stored = dataset.manifest.codec == "latents"
    if stored and reference.identity["data"] == dataset.fingerprint:
        return OF_LATENTS
    return {
        "images": min(num_images, dataset.manifest.samples),
        "data": dataset.fingerprint,
        "latents": "drawn from stored posteriors" if stored else "means of encoded images",
        "reference": reference.sha256,
    }


def measure_ceiling(
    dataset: Dataset,
    codec: Codec,
    net: FeatureNet,
    reference: Reference,
    num_images: int,
    workers: Workers,
) -> Ceiling:
    """Decode `num_images` evenly spaced latents of `dataset` and measure their distances.

    Images of a set of pixels are encoded first. `codec` is the model's. All workers must call it.
    """
    facts = ceiling_facts(dataset, reference, num_images)
    if facts == OF_LATENTS:
        return Ceiling({}, facts)
    count, total = facts["images"], dataset.manifest.samples
    wanted = torch.zeros(total, dtype=torch.bool)
    wanted[torch.arange(count) * total // count] = True
    number = wanted.cumsum(0) - 1
    shards = workers.share(dataset.manifest.shards)
    encodes = dataset.manifest.codec == "pixels"

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        """Yield numbers [b] and decoded images, uint8 [b, H, W, C], of this worker's share."""
        for positions, images in read_decoded(dataset, codec, shards, wanted, BATCH):
            if encodes:
                images = torch.from_numpy(codec.decode(codec.encode_images(images)))
            yield number[positions], images.to(workers.device)

    keep = {w: feature_metrics.kept_images(w, reference, count) for w in net.widths}
    groups = groups_of(count, 1)
    statistics = feature_metrics.extract_features(net, batches(), keep, workers, groups)
    return Ceiling(feature_metrics.frechet_distances(net, reference, statistics), facts)


def stored_ceiling(scores: Mapping[str, Any], facts: Any) -> Ceiling | None:
    """Return the ceiling in stored scores; None if there is none with these facts."""
    if scores.get("certificate", {}).get("ceiling") != facts:
        return None
    ending, metrics = "_ceiling", scores["metrics"]
    held = {key.removesuffix(ending): metrics[key] for key in metrics if key.endswith(ending)}
    return Ceiling(held, facts)
