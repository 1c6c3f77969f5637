"""Feature statistics of samples, merged over all workers, and the metrics computed from them."""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_ray.collectives import Workers
from ddpm_ray.evaluation.confidence_interval import (
    GROUPS,
    at_infinity,
    enough_for_infinity,
    jackknife_interval,
)
from ddpm_ray.evaluation.features.feature_extractor import FeatureNet
from ddpm_ray.evaluation.features.inception import SPATIAL
from ddpm_ray.evaluation.frechet import (
    Moments,
    frechet_distance,
    frechet_distance_to_features,
    kernel_distance,
)
from ddpm_ray.evaluation.precision_recall import inception_score, precision_recall
from ddpm_ray.evaluation.reference_statistics import Reference

CONFIDENT = 0.9  # probability of a class from which an image counts as recognised
ALL = range(GROUPS)


@dataclass(frozen=True)
class OptionalMetrics:
    """Optional metrics, which cost more than the others."""

    precision_recall: bool = False
    extrapolate: bool = False  # the Frechet distance, to infinitely many samples


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Statistics of the features of all workers' samples."""

    count: int  # samples
    group: Tensor  # int64 [count]: jackknife group of each sample, see confidence_interval.py
    moments: dict[int, list[Moments]]  # by width: one per group
    kept: dict[int, Tensor]  # by width: features [n, D] float32 of the n samples of lowest index
    probability: Tensor | None  # [N, classes], in order of index; None without a classifier


def extract_features(
    net: FeatureNet,
    batches: Iterable[tuple[Tensor, Tensor]],
    keep: Mapping[int, int],
    workers: Workers,
    group: Tensor,
) -> FeatureStatistics:
    """Extract features of this worker's batches of (indices, images) and merge over all workers.

    `keep`: by width, the sample index below which features are kept in full. `group` int64 [N]: the
    jackknife group of each sample. All workers must call it.
    """
    # 335 MB for ten groups at width 2048: a second pass over the samples would cost far more.
    moments = {w: [Moments.zeros(w, workers.device) for _ in range(GROUPS)] for w in net.widths}
    kept = {w: [torch.empty(0, w)] for w in net.widths}
    probabilities: list[Tensor] = []
    for index, images in batches:
        found, here = net(images), group[index]
        for w, features in found.items():
            for number, of_group in enumerate(moments[w]):
                of_group.update(features[(here == number).to(features.device)])
            kept[w].append(features.cpu()[index < keep[w]])
        if (probability := net.probabilities(found)) is not None:
            probabilities.append(probability.cpu())
    for of_group in (each for of_width in moments.values() for each in of_width):
        for tensor in of_group.tensors():
            workers.sum_(tensor)
    classes = [part for of_one in workers.gather(probabilities) for part in of_one]
    first = moments[net.widths[0]]
    return FeatureStatistics(
        count=int(sum(of_group.count.item() for of_group in first)),
        group=group,
        moments=moments,
        kept={w: torch.cat(workers.gather(torch.cat(kept[w]))) for w in net.widths},
        probability=torch.cat(classes) if classes else None,
    )


def kept_images(width: int, reference: Reference, num_images: int) -> int:
    """Number of samples whose features are kept: those for KID, or all if at most `width`."""
    return num_images if num_images <= width else min(reference.kernel_images, num_images)


class Names(NamedTuple):
    """Metric names of one feature width."""

    frechet: str
    kernel: str
    precision: str
    recall: str


def metric_names(net: FeatureNet, width: int) -> Names:
    """Return the metric names; `eval/fid` is reserved for the standard protocol."""
    if net.name != "inception":
        return Names(*(f"eval/{score}_{net.name}" for score in ("fd", "kd", "precision", "recall")))
    suffix = {2048: "", SPATIAL: "_spatial"}.get(width, str(width))
    names = Names(*(f"eval/{score}{suffix}" for score in ("fid", "kid", "precision", "recall")))
    return names._replace(frechet="eval/sfid") if width == SPATIAL else names


def metrics(
    net: FeatureNet,
    reference: Reference,
    statistics: FeatureStatistics,
    optional_metrics: OptionalMetrics,
    held_out: Reference | None,
) -> dict[str, float]:
    """Return the metrics of the samples against `reference`, by name.

    `held_out`: statistics of images outside the training data, for a second Frechet distance. The
    gap between the two distances measures overfitting.
    """
    found: dict[str, float] = {}
    for w in net.widths:
        frechet, kernel, precision, recall = metric_names(net, w)
        found[frechet] = score = _distance(w, reference, statistics)
        if statistics.count >= 2 * GROUPS:  # with fewer, groups are too small for an interval
            without = [_distance(w, reference, statistics, {*ALL} - {g}) for g in ALL]
            low, high = jackknife_interval(score, without)
            found |= {f"{frechet}_low": low, f"{frechet}_high": high}
            if optional_metrics.extrapolate and statistics.count >= enough_for_infinity(w):
                value, error = at_infinity(score, without)
                found |= {f"{frechet}_infinity": value, f"{frechet}_infinity_error": error}
        if held_out is not None:
            found[f"{frechet}_held_out"] = _distance(w, held_out, statistics)
        if reference.kernel_images and w != SPATIAL:
            data, samples = reference.kept[w], statistics.kept[w].to(reference.kept[w].device)
            samples = samples[: reference.kernel_images]
            found[kernel] = kernel_distance(data, samples)
            if optional_metrics.precision_recall:
                found[precision], found[recall] = precision_recall(data, samples)
    return found | _of_classes(net, statistics)


def frechet_distances(
    net: FeatureNet, reference: Reference, statistics: FeatureStatistics
) -> dict[str, float]:
    """Return the Frechet distance of each width by the name of its metric."""
    return {metric_names(net, w).frechet: _distance(w, reference, statistics) for w in net.widths}


def _of_classes(net: FeatureNet, statistics: FeatureStatistics) -> dict[str, float]:
    if statistics.probability is None:
        return {}
    found = {}
    if net.name == "digits":  # its classes are the data's own
        confidence, label = statistics.probability.max(1)
        sure = label[confidence >= CONFIDENT]
        found["eval/recognised"] = len(sure) / statistics.count
        found["eval/classes"] = float((torch.bincount(sure) > 0).sum())
    if statistics.count >= GROUPS:
        mean, deviation = inception_score(statistics.probability, GROUPS)
        suffix = "" if net.name == "inception" else f"_{net.name}"
        found |= {f"eval/is{suffix}": mean, f"eval/is{suffix}_deviation": deviation}
    return found


def _distance(
    width: int, reference: Reference, statistics: FeatureStatistics, groups: Container[int] = ALL
) -> float:
    """Frechet distance of the samples in these groups to the reference."""
    truth = reference.moments[width]
    if statistics.count <= width:  # singular covariance: the other way loses half the digits
        member = torch.tensor([number in groups for number in statistics.group.tolist()])
        features = statistics.kept[width][member].to(truth.sum.device)
        return frechet_distance_to_features(truth.mean(), truth.covariance(), features)
    sample = Moments.zeros(width, truth.sum.device)
    for number, moments in enumerate(statistics.moments[width]):
        if number in groups:
            sample.merge(moments)
    return frechet_distance(truth.mean(), truth.covariance(), sample.mean(), sample.covariance())
