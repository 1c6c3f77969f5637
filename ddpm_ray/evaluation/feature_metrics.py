"""What is seen of samples through a feature network, by all workers, and what it is worth."""

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
class Extras:
    """Scores that are taken where they are asked for: they cost more than the others."""

    precision_recall: bool = False
    extrapolate: bool = False  # the Frechet distance to infinitely many samples


@dataclass(frozen=True, eq=False)
class Seen:
    """What was seen of the samples by all workers."""

    count: int  # samples
    group: Tensor  # int64 [count]: of each, see interval.py
    moments: dict[int, list[Moments]]  # of each group of samples
    kept: dict[int, Tensor]  # float32 [n, D]: features of the samples with the lowest indices
    probability: Tensor | None  # [N, classes] of each sample, by index, where the net classifies


def see(
    net: FeatureNet,
    batches: Iterable[tuple[Tensor, Tensor]],
    keep: Mapping[int, int],
    workers: Workers,
    group: Tensor,
) -> Seen:
    """Looks at each of this worker's images once and merges with all workers.

    `keep` says, by width, below which index features are kept whole; `group` int64 [N] the group
    of each sample.
    """
    # 335 MB for ten groups at width 2048: a second pass over the samples would cost far more.
    moments = {w: [Moments.zeros(w, workers.device) for _ in range(GROUPS)] for w in net.widths}
    kept = {w: [torch.empty(0, w)] for w in net.widths}
    judged: list[Tensor] = []
    for index, images in batches:
        found, here = net(images), group[index]
        for w, features in found.items():
            for number, of_group in enumerate(moments[w]):
                of_group.update(features[(here == number).to(features.device)])
            kept[w].append(features.cpu()[index < keep[w]])
        if (probability := net.probabilities(found)) is not None:
            judged.append(probability.cpu())
    for of_group in (each for of_width in moments.values() for each in of_width):
        for tensor in of_group.tensors():
            workers.sum_(tensor)
    classes = [part for of_one in workers.gather(judged) for part in of_one]
    first = moments[net.widths[0]]
    return Seen(
        count=int(sum(of_group.count.item() for of_group in first)),
        group=group,
        moments=moments,
        kept={w: torch.cat(workers.gather(torch.cat(kept[w]))) for w in net.widths},
        probability=torch.cat(classes) if classes else None,
    )


def kept_images(width: int, reference: Reference, num_images: int) -> int:
    """Samples whose features are kept whole: for the kernel, or all where they are few."""
    return num_images if num_images <= width else min(reference.kernel_images, num_images)


class Names(NamedTuple):
    """Of the scores that one width of features gives."""

    frechet: str
    kernel: str
    precision: str
    recall: str


def metric_names(net: FeatureNet, width: int) -> Names:
    """What scores are called; `eval/fid` is the standard protocol's alone."""
    if net.name != "inception":
        return Names(*(f"eval/{score}_{net.name}" for score in ("fd", "kd", "precision", "recall")))
    suffix = {2048: "", SPATIAL: "_spatial"}.get(width, str(width))
    names = Names(*(f"eval/{score}{suffix}" for score in ("fid", "kid", "precision", "recall")))
    return names._replace(frechet="eval/sfid") if width == SPATIAL else names


def metrics(
    net: FeatureNet, reference: Reference, seen: Seen, extras: Extras, held_out: Reference | None
) -> dict[str, float]:
    """Scores of what was seen against `reference` by name, lower is nearer but for shares.

    `held_out`: images that were not trained on, to which the distance is told as well. The gap
    between the two is what a model owes to having seen the images.
    """
    found: dict[str, float] = {}
    for w in net.widths:
        frechet, kernel, precision, recall = metric_names(net, w)
        found[frechet] = score = _distance(w, reference, seen)
        if seen.count >= 2 * GROUPS:  # fewer leave groups that say nothing of their spread
            without = [_distance(w, reference, seen, {*ALL} - {g}) for g in ALL]
            low, high = jackknife_interval(score, without)
            found |= {f"{frechet}_low": low, f"{frechet}_high": high}
            if extras.extrapolate and seen.count >= enough_for_infinity(w):
                value, error = at_infinity(score, without)
                found |= {f"{frechet}_infinity": value, f"{frechet}_infinity_error": error}
        if held_out is not None:
            found[f"{frechet}_held_out"] = _distance(w, held_out, seen)
        if reference.kernel_images and w != SPATIAL:
            data, samples = reference.kept[w], seen.kept[w].to(reference.kept[w].device)
            samples = samples[: reference.kernel_images]
            found[kernel] = kernel_distance(data, samples)
            if extras.precision_recall:
                found[precision], found[recall] = precision_recall(data, samples)
    return found | _of_classes(net, seen)


def _of_classes(net: FeatureNet, seen: Seen) -> dict[str, float]:
    if seen.probability is None:
        return {}
    found = {}
    if net.name == "digits":  # its classes are the data's own
        confidence, label = seen.probability.max(1)
        sure = label[confidence >= CONFIDENT]
        found["eval/recognised"] = len(sure) / seen.count
        found["eval/classes"] = float((torch.bincount(sure) > 0).sum())
    if seen.count >= GROUPS:
        mean, deviation = inception_score(seen.probability, GROUPS)
        suffix = "" if net.name == "inception" else f"_{net.name}"
        found |= {f"eval/is{suffix}": mean, f"eval/is{suffix}_deviation": deviation}
    return found


def _distance(width: int, reference: Reference, seen: Seen, groups: Container[int] = ALL) -> float:
    """The Frechet distance of the samples in these groups to the reference."""
    truth = reference.moments[width]
    if seen.count <= width:  # their covariance is singular: half the digits, and slower
        member = torch.tensor([number in groups for number in seen.group.tolist()])
        features = seen.kept[width][member].to(truth.sum.device)
        return frechet_distance_to_features(truth.mean(), truth.covariance(), features)
    sample = Moments.zeros(width, truth.sum.device)
    for number, moments in enumerate(seen.moments[width]):
        if number in groups:
            sample.merge(moments)
    return frechet_distance(truth.mean(), truth.covariance(), sample.mean(), sample.covariance())
