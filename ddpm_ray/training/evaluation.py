"""How far a model's samples are from a data set: FID, KID, and the certificate of each score.

Samples, like everything random, are keyed by their index, so any number of workers draws the same
images; sums are merged in float64.
"""

import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ddpm_ray.diffusion.frechet import (
    Moments,
    frechet_distance,
    frechet_distance_to_features,
    kernel_distance,
)
from ddpm_ray.diffusion.process import NoiseSchedule
from ddpm_ray.diffusion.spacing import log_snr_steps, quadratic_steps, uniform_steps
from ddpm_ray.generation.denoiser import Denoiser
from ddpm_ray.generation.sample import SamplingPlan, draw, to_uint8
from ddpm_ray.training.features import FeatureNet
from ddpm_ray.training.interval import GROUPS, jackknife_interval
from ddpm_ray.training.reference import Reference
from ddpm_ray.training.workers import Workers

CONFIDENT = 0.9  # probability of a class from which an image counts as recognised


@dataclass(frozen=True)
class Scores:
    """What one evaluation found, and all that the numbers depend on; equal on every worker."""

    metrics: dict[str, float]
    certificate: dict[str, Any]  # plain JSON


@dataclass(frozen=True, eq=False)
class _Seen:
    """What was seen of the samples, of one worker or merged."""

    moments: dict[int, list[Moments]]  # of each group of samples, see interval.py
    kept: dict[int, Tensor]  # float32 [n, D]: features of the samples with the lowest indices
    recognised: Tensor | None  # int64 [classes]: images that the classifier is sure of


def evaluate(
    denoiser: Denoiser,
    plan: SamplingPlan,
    net: FeatureNet,
    reference: Reference,
    *,
    num_images: int,
    batch_size: int,
    image_shape: tuple[int, int, int],
    workers: Workers,
    provenance: Mapping[str, Any],
) -> Scores:
    """Scores of the samples 0..num_images-1 against `reference`, lower is nearer.

    Beside a Frechet distance stand `_low` and `_high`, the ends of its interval (interval.py).
    `image_shape` is (C, H, W); `provenance` is what the caller knows of the weights (EMA decay,
    step, sha256) and goes into the certificate. All workers must call it, on all of them the result
    is the same. Raises ValueError where images, features or numbers cannot be compared.
    """
    if num_images < 2:
        raise ValueError(f"num_images is {num_images}; a covariance needs at least 2 images")
    if reference.image_shape != image_shape:
        raise ValueError(
            f"the model draws {_shape(image_shape)} images and the reference data holds "
            f"{_shape(reference.image_shape)}; choose a data set of the model's shape"
        )
    if (known := reference.identity["features"]) != net.facts:
        raise ValueError(
            f"the reference was made with other features, {known}, than {net.facts}; make it with "
            "the network that looks at the samples"
        )
    if reference.count < 2:
        raise ValueError(f"the reference data holds {reference.count} image; at least 2 are needed")
    batches = _drawn(
        denoiser, plan, workers.share(num_images), batch_size, image_shape, workers.device
    )
    keep = {w: _kept_images(w, reference, num_images) for w in net.widths}
    seen = _see(net, batches, keep, workers)
    metrics = _metrics(net, reference, seen, num_images) if workers.leads else {}
    return Scores(
        metrics=workers.gather(metrics)[0],
        certificate=_certificate(denoiser.schedule, plan, net, reference, num_images, provenance),
    )


def metric_names(net: FeatureNet, width: int) -> tuple[str, str]:
    """Names of the Frechet and the kernel distance; `eval/fid` is the standard protocol's alone."""
    if net.name == "inception":
        suffix = "" if width == 2048 else str(width)
        return f"eval/fid{suffix}", f"eval/kid{suffix}"
    return f"eval/fd_{net.name}", f"eval/kd_{net.name}"


def _drawn(
    denoiser: Denoiser,
    plan: SamplingPlan,
    share: range,
    batch_size: int,
    image_shape: tuple[int, int, int],
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of indices [n] from `share` and their images, uint8 [n, H, W, C] on `device`."""
    for start in range(share.start, share.stop, batch_size):
        index = torch.arange(start, min(start + batch_size, share.stop))
        images = to_uint8(draw(denoiser, plan, index, image_shape, device))
        yield index, torch.from_numpy(images).to(device)


def _see(
    net: FeatureNet,
    batches: Iterable[tuple[Tensor, Tensor]],
    keep: Mapping[int, int],
    workers: Workers,
) -> _Seen:
    """Look at each of this worker's images once and merge with all workers.

    `keep` says, by width, below which index features are kept whole.
    """
    # 335 MB for ten groups at width 2048: a second pass over the samples would cost far more.
    moments = {w: [Moments.zeros(w, workers.device) for _ in range(GROUPS)] for w in net.widths}
    kept = {w: [torch.empty(0, w)] for w in net.widths}
    recognised: list[Tensor] = []
    for index, images in batches:
        for w, features in net(images).items():
            for number, group in enumerate(moments[w]):
                group.update(features[(index % GROUPS == number).to(features.device)])
            kept[w].append(features.cpu()[index < keep[w]])
        if net.classify is not None:
            recognised.append(_recognised(net.classify(images)))
    for group in (group for of_width in moments.values() for group in of_width):
        for tensor in group.tensors():
            workers.sum_(tensor)
    counts = [count for of_one in workers.gather(recognised) for count in of_one]
    return _Seen(
        moments=moments,
        kept={w: torch.cat(workers.gather(torch.cat(kept[w]))) for w in net.widths},
        recognised=torch.stack(counts).sum(0) if counts else None,
    )


def _kept_images(width: int, reference: Reference, num_images: int) -> int:
    """Samples whose features are kept whole: for the kernel, or all where they are few."""
    return num_images if num_images <= width else min(reference.kernel_images, num_images)


def _recognised(logits: Tensor) -> Tensor:
    """Images of each class, int64 [classes] on the CPU, that the classifier is confident of."""
    probability, label = logits.softmax(1).max(1)
    return torch.bincount(label[probability >= CONFIDENT], minlength=logits.shape[1]).cpu()


def _metrics(
    net: FeatureNet, reference: Reference, seen: _Seen, num_images: int
) -> dict[str, float]:
    metrics = {}
    for w in net.widths:
        frechet, kernel = metric_names(net, w)
        metrics[frechet] = score = _distance(w, reference, seen, num_images)
        if num_images >= 2 * GROUPS:  # fewer leave groups that say nothing of their spread
            without = [_distance(w, reference, seen, num_images, g) for g in range(GROUPS)]
            low, high = jackknife_interval(score, without)
            metrics |= {f"{frechet}_low": low, f"{frechet}_high": high}
        if reference.kernel_images:
            features = seen.kept[w].to(reference.moments[w].sum.device)
            metrics[kernel] = kernel_distance(
                reference.kept[w], features[: reference.kernel_images]
            )
    if seen.recognised is not None:
        metrics["eval/recognised"] = int(seen.recognised.sum()) / num_images
        metrics["eval/classes"] = float((seen.recognised > 0).sum())
    return metrics


def _distance(
    width: int, reference: Reference, seen: _Seen, num_images: int, left_out: int = -1
) -> float:
    """The Frechet distance of the samples, of all or of all but one group, to the reference."""
    truth = reference.moments[width]
    if num_images <= width:  # their covariance is singular: half the digits, and slower
        group = torch.arange(num_images) % GROUPS
        features = seen.kept[width][group != left_out].to(truth.sum.device)
        return frechet_distance_to_features(truth.mean(), truth.covariance(), features)
    sample = Moments.zeros(width, truth.sum.device)
    for number, moments in enumerate(seen.moments[width]):
        if number != left_out:
            sample.merge(moments)
    return frechet_distance(truth.mean(), truth.covariance(), sample.mean(), sample.covariance())


def _certificate(
    schedule: NoiseSchedule,
    plan: SamplingPlan,
    net: FeatureNet,
    reference: Reference,
    num_images: int,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that the scores depend on, as plain JSON: two equal ones are comparable."""
    return {
        "model": dict(provenance),
        "samples": {
            "images": num_images,
            "seed": plan.seed,
            "indices": [0, num_images - 1],
            "sampler": plan.sampler,
            "steps": len(plan.steps) - 1,
            "spacing": _spacing(schedule, plan.steps),
            "num_steps": schedule.num_steps,
            "eta": plan.eta,
            "variance": plan.variance,
            "clip": plan.clip,
            "dynamic_quantile": plan.dynamic_quantile,
            "labels": list(plan.labels),
            "guidance": vars(plan.guidance),
            "rounding": "uint8, (x + 1) * 127.5 half up",
        },
        "features": net.facts,
        "reference": {
            "sha256": reference.sha256,
            "data": reference.identity["data"],
            "images": reference.count,
            "kernel_images": reference.kernel_images,
        },
        "covariance": "n-1",
        "interval": f"95 %, delete-a-group jackknife over {GROUPS} groups of samples",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("ddpm-ray", "torch", "numpy")},
        },
    }


def _spacing(schedule: NoiseSchedule, steps: tuple[int, ...]) -> str:
    """The name of the rule that gives these steps: found out, so that it cannot be mislabelled."""
    num_steps, count = schedule.num_steps, min(len(steps) - 1, schedule.num_steps)
    for name, found in (
        ("uniform", uniform_steps(num_steps, count)),
        ("quadratic", quadratic_steps(num_steps, count)),
        ("log_snr", log_snr_steps(schedule, count)),
    ):
        if found == steps:
            return name
    return "custom"


def _shape(image_shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, image_shape))
