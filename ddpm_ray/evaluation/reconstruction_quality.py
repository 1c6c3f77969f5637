"""Scores of an autoencoder: PSNR, SSIM, rFID and the KL of its latents, with their provenance."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_ray.collectives import Workers
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.evaluation import feature_metrics
from ddpm_ray.evaluation.confidence_interval import GROUPS, groups_of, interval_of_mean
from ddpm_ray.evaluation.features.feature_extractor import FeatureNet
from ddpm_ray.evaluation.image_similarity import WINDOW, psnr, ssim
from ddpm_ray.evaluation.reference_statistics import Reference
from ddpm_ray.evaluation.sample_quality import PLAIN, Scores, arithmetic
from ddpm_ray.models.autoencoder import Autoencoder, channels_in_use
from ddpm_ray.sampling.reconstruction import round_trip


@dataclass(frozen=True)
class Distances:
    """A feature network, and the statistics of the images' whole data set."""

    net: FeatureNet
    reference: Reference


def reconstruction_quality(
    model: Autoencoder,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_images: int,
    workers: Workers,
    distances: Distances | None,
    provenance: Mapping[str, Any],
) -> Scores:
    """Scores of the reconstructions of all workers' images; all workers must call it.

    A batch is (indices [b] in 0..num_images-1, images uint8 [b, H, W, C]). PSNR, SSIM (of images
    of at least 11 pixels a side) and KL are means over images with Student's 95 % interval; the
    Frechet distance to the data set is as in `sample_quality.evaluate_samples`. `provenance`
    identifies images and weights. Raises ValueError for fewer than 2 images.
    """
    values: list[Tensor] = []
    reconstructions = _reconstructed(model, batches, values, workers.device)
    distance = _distance(distances, reconstructions, num_images, workers) if distances else {}
    for _ in reconstructions:  # the rest: `values` needs every batch
        pass
    gathered = workers.gather(torch.cat([torch.empty(0, 3 + _channels(model)), *values]))
    return Scores(
        _means(torch.cat(gathered), _channels(model)) | distance,
        {
            "model": dict(provenance),
            "reconstructions": {
                "images": sum(map(len, gathered)),
                "latents": "posterior mean",
                "rounding": PIXELS.rounding,
                "ssim": f"{WINDOW} x {WINDOW} Gaussian window, mean over channels",
            },
            "features": distances.net.facts if distances else "none",
            "interval": "95 %: Student's t over images; of a distance, a jackknife over "
            f"{GROUPS} groups of images",
            "arithmetic": arithmetic(workers.device),
        },
    )


def _channels(model: Autoencoder) -> int:
    return model.spec.latent_channels


def _reconstructed(
    model: Autoencoder,
    batches: Iterable[tuple[Tensor, Tensor]],
    values: list[Tensor],
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the reconstructed batches, and add to `values` [b, 3 + c] of each.

    The values of an image are PSNR, SSIM (NaN if it is too small), KL in bits, and the KL of each
    channel in nats per latent value.
    """
    for index, images in batches:
        found, kl = round_trip(model, images.to(device))
        found, kl = found.cpu(), kl.cpu().double()
        of_channels = kl / math.prod(model.spec.latent_shape(images.shape[1:3])[1:])
        similar = torch.full((len(images),), math.nan, dtype=torch.float64)
        if min(images.shape[1:3]) >= WINDOW:
            similar = ssim(images.cpu(), found)
        columns = [psnr(images.cpu(), found), similar, kl.sum(1) / math.log(2)]
        values.append(torch.cat([torch.stack(columns, 1), of_channels], 1))
        yield index, found.to(device)


def _means(values: Tensor, channels: int) -> dict[str, float]:
    """Metrics from the values [N, 3 + channels] of all images."""
    metrics: dict[str, float] = {}
    for name, column in zip(("psnr", "ssim", "kl_bits"), values.T, strict=False):
        if not column.isnan().any():
            squares = float(column.square().sum())
            mean, low, high = interval_of_mean(len(column), float(column.sum()), squares)
            metrics |= {f"eval/{name}": mean, f"eval/{name}_low": low, f"eval/{name}_high": high}
    in_use = channels_in_use(values[:, -channels:].mean(0))
    return metrics | {"eval/channels_in_use": float(in_use.sum())}


def _distance(
    distances: Distances,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_images: int,
    workers: Workers,
) -> dict[str, float]:
    """Frechet distances of the reconstructions to the data set: eval/rfid and its interval."""
    net, known = distances.net, distances.reference
    keep = {w: feature_metrics.kept_images(w, known, num_images) for w in net.widths}
    groups = groups_of(num_images, 1)
    statistics = feature_metrics.extract_features(net, batches, keep, workers, groups)
    if not workers.is_main:
        return workers.gather({})[0]  # type: ignore[no-any-return]
    found = feature_metrics.metrics(net, known, statistics, PLAIN, None)
    names = [feature_metrics.metric_names(net, w).frechet for w in net.widths]
    ours = {
        f"eval/r{name.removeprefix('eval/')}{end}": found[name + end]
        for name in names
        for end in ("", "_low", "_high")
        if name + end in found
    }
    return workers.gather(ours)[0]  # type: ignore[no-any-return]
