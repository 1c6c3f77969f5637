"""How far a model's samples are from a data set: FID, KID, and the certificate of each score.

Samples, like everything random, are keyed by their index, so any number of workers draws the same
images; sums are merged in float64.
"""

import logging
import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from ddpm_ray.collectives import Workers
from ddpm_ray.diffusion.process import NoiseSchedule
from ddpm_ray.diffusion.timestep_spacing import log_snr_steps, quadratic_steps, uniform_steps
from ddpm_ray.evaluation import feature_metrics
from ddpm_ray.evaluation.confidence_interval import GROUPS, enough_for_infinity, groups_of
from ddpm_ray.evaluation.feature_metrics import Extras
from ddpm_ray.evaluation.features.feature_extractor import FeatureNet, float32_backends
from ddpm_ray.evaluation.reference_statistics import Reference
from ddpm_ray.redaction import counted
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.sampling import SamplingPlan, draw, to_uint8

log = logging.getLogger(__name__)

PLAIN = Extras()
NO_CLASSES = "the weights' last layer, fc.weight, was not read; take the release file, width 2048"


@dataclass(frozen=True)
class Scores:
    """What one evaluation found, and all that the numbers depend on; equal on every worker."""

    metrics: dict[str, float]
    certificate: dict[str, Any]  # plain JSON


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
    extras: Extras = PLAIN,
    held_out: Reference | None = None,
) -> Scores:
    """Scores of the samples 0..num_images-1 against `reference`, lower is nearer.

    Beside a Frechet distance stand `_low` and `_high`, the ends of its interval (interval.py), and
    `_held_out`, that to images which were not trained on, where these are given.
    `image_shape` is (C, H, W); `provenance` is what the caller knows of the weights (EMA decay,
    step, sha256) and goes into the certificate. All workers must call it, on all of them the result
    is the same. Raises ValueError where images, features or numbers cannot be compared.
    """
    if num_images < 2:
        raise ValueError(f"num_images is {num_images}; a covariance needs at least 2 images")
    for known in filter(None, (reference, held_out)):
        _require_comparable(known, net, image_shape)
    batches = _drawn(
        denoiser, plan, workers.share(num_images), batch_size, image_shape, workers.device
    )
    keep = {w: feature_metrics.kept_images(w, reference, num_images) for w in net.widths}
    groups = groups_of(num_images, _cycle(denoiser, plan))
    seen = feature_metrics.see(net, batches, keep, workers, groups)
    metrics = (
        feature_metrics.metrics(net, reference, seen, extras, held_out) if workers.is_main else {}
    )
    certificate = _certificate(denoiser.schedule, plan, net, reference, num_images, provenance)
    certificate["arithmetic"] = arithmetic(workers.device)
    if held_out is not None:
        certificate["held_out"] = _facts(held_out)
    if extras.extrapolate:
        certificate["infinity"] = {f"{w}": _infinity(w, num_images) for w in net.widths}
        for reason in certificate["infinity"].values():
            if workers.is_main and reason.startswith("none"):
                log.warning("no distance of infinitely many samples is given: %s", reason)
    return Scores(metrics=workers.gather(metrics)[0], certificate=certificate)


def arithmetic(device: torch.device) -> dict[str, Any]:
    """What the samples and their features were computed on and with, plain JSON.

    It is told beside the scores and does not part them: a run is scored where it was trained.
    """
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "samples_tf32": cuda and any(one.fp32_precision == "tf32" for one in float32_backends()),
        "features": "float32 without TF32",
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _require_comparable(
    reference: Reference, net: FeatureNet, image_shape: tuple[int, int, int]
) -> None:
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
        raise ValueError(
            f"the reference data holds {counted(reference.count, 'image')}; at least 2 are needed"
        )


def _cycle(denoiser: Denoiser, plan: SamplingPlan) -> int:
    """After how many samples what they are told, a label or a small image, comes again."""
    labels = len(plan.labels) or denoiser.num_classes or 1
    return (
        labels
        if denoiser.low_resolution_images is None
        else math.lcm(labels, len(denoiser.low_resolution_images))
    )


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
        "reference": _facts(reference),
        "covariance": "n-1",
        "interval": f"95 %, delete-a-group jackknife over {GROUPS} groups of samples",
        "inception_score": _inception_score(net, num_images),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("ddpm-ray", "torch", "numpy")},
        },
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout that only lies on the path
        return "not installed"


def _facts(reference: Reference) -> dict[str, Any]:
    return {
        "sha256": reference.sha256,
        "data": reference.identity["data"],
        "images": reference.count,
        "kernel_images": reference.kernel_images,
    }


def _infinity(width: int, num_images: int) -> str:
    """How the distance of infinitely many samples is taken, or after "none" why it is not."""
    if num_images < (enough := enough_for_infinity(width)):
        return f"none: {num_images} images are too few for {width} features; draw {enough}"
    return f"bias correction and standard error of the jackknife over {GROUPS} groups of samples"


def _inception_score(net: FeatureNet, num_images: int) -> str:
    """How it is taken, or why there is none."""
    if net.classify is None:
        return f"none: {NO_CLASSES}"
    if num_images < GROUPS:
        return f"none: {num_images} images cannot fill {GROUPS} splits; draw more"
    return f"{GROUPS} splits in order of index"


def _spacing(schedule: NoiseSchedule, steps: tuple[int, ...]) -> str:
    """The name of the rule that gives these steps: found out, so that it cannot be mislabelled."""
    first, count = steps[0], min(len(steps) - 1, steps[0])
    for name, found in (
        ("uniform", uniform_steps(first, count)),
        ("quadratic", quadratic_steps(first, count)),
        ("log_snr", log_snr_steps(schedule, count, first)),
    ):
        if found == steps:
            return name
    return "custom"


def _shape(image_shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, image_shape))
