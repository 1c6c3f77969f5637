"""Sample quality: FID, KID and other metrics of a model's samples, with evaluation provenance.

Samples are keyed by their index, so any number of workers draws the same images; sums are merged
in float64.
"""

import hashlib
import json
import logging
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ddpm_ray.collectives import Workers
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion.process import NoiseSchedule
from ddpm_ray.diffusion.timestep_spacing import log_snr_steps, quadratic_steps, uniform_steps
from ddpm_ray.evaluation import feature_metrics
from ddpm_ray.evaluation.alignment import Alignment
from ddpm_ray.evaluation.ceiling import Ceiling
from ddpm_ray.evaluation.confidence_interval import GROUPS, enough_for_infinity, groups_of
from ddpm_ray.evaluation.feature_metrics import OptionalMetrics
from ddpm_ray.evaluation.features.feature_extractor import FeatureNet, float32_backends
from ddpm_ray.evaluation.reference_statistics import Reference
from ddpm_ray.redaction import counted
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.sampling import Images, SamplingPlan, draw_uint8

log = logging.getLogger(__name__)

Batches: TypeAlias = Iterator[tuple[Tensor, Tensor]]  # indices [n], images uint8 [n, H, W, C]

PLAIN = OptionalMetrics()
NO_CLASSES = "the weights' last layer, fc.weight, was not read; take the release file, width 2048"


@dataclass(frozen=True)
class SampleSet:
    """Samples 0..num_images-1 of a model: all that they depend on."""

    denoiser: Denoiser
    plan: SamplingPlan
    image_shape: ImageShape
    num_images: int
    batch_size: int
    weights: Mapping[str, Any]  # plain JSON: EMA decay, step, sha256
    # Plain JSON: precision and compilation of the network that draws the samples.
    arithmetic: Mapping[str, Any] = field(default_factory=dict)
    alignment: Alignment | None = None  # with their prompts; None: not scored
    drawn: Callable[[range], Images] | None = None  # of a cascade, by index; None: by `denoiser`

    def images(self, share: range, device: torch.device) -> Batches:
        """Yield batches: indices [n] from `share` and images uint8 [n, H, W, C] on `device`."""
        drawn = self.drawn or self._drawn_on(device)
        for start in range(share.start, share.stop, self.batch_size):
            part = range(start, min(start + self.batch_size, share.stop))
            yield torch.tensor(part), torch.from_numpy(drawn(part)).to(device)

    def _drawn_on(self, device: torch.device) -> Callable[[range], Images]:
        size = self.batch_size
        return partial(
            draw_uint8,
            self.denoiser,
            self.plan,
            image_shape=self.image_shape,
            device=device,
            batch_size=size,
        )


@dataclass(frozen=True)
class Scores:
    """Metrics of one evaluation and their provenance; equal on every worker."""

    metrics: dict[str, float]
    provenance: dict[str, Any]  # plain JSON: all that the metrics depend on

    def to_json(self) -> dict[str, Any]:
        """Return the stored form; the key of the provenance is "certificate" there."""
        return {"metrics": self.metrics, "certificate": self.provenance}


def evaluate_samples(
    samples: SampleSet,
    net: FeatureNet,
    reference: Reference,
    workers: Workers,
    *,
    optional_metrics: OptionalMetrics = PLAIN,
    held_out: Reference | None = None,
    ceiling: Ceiling | None = None,
    counted: Callable[[Batches], Batches] = iter,
) -> Scores:
    """Draw `samples` and compute their metrics against `reference`.

    A Frechet distance comes with `_low` and `_high`, the ends of its 95 % confidence interval, and
    with `_held_out`, the distance to `held_out`, and `_ceiling`, that of `ceiling`, if given.
    `counted` passes each batch on and counts it, for a job's progress. All workers must call it and
    get the same result. Raises ValueError if images, features or their numbers are not comparable.
    """
    num_images = samples.num_images
    if num_images < 2:
        raise ValueError(f"num_images is {num_images}; a covariance needs at least 2 images")
    for known in filter(None, (reference, held_out)):
        _require_comparable(known, net, samples.image_shape)
    batches = counted(samples.images(workers.share(num_images), workers.device))
    batches = batches if samples.alignment is None else samples.alignment.watched(batches)
    keep = {w: feature_metrics.kept_images(w, reference, num_images) for w in net.widths}
    groups = groups_of(num_images, _cycle(samples))
    statistics = feature_metrics.extract_features(net, batches, keep, workers, groups)
    metrics = (
        feature_metrics.metrics(net, reference, statistics, optional_metrics, held_out)
        if workers.is_main
        else {}
    )
    found = _provenance(samples, net, reference)
    if (fits := samples.alignment) is not None:
        metrics, found["alignment"] = metrics | fits.metrics(workers), fits.facts
    found["arithmetic"] = arithmetic(workers.device) | dict(samples.arithmetic)
    if ceiling is not None:
        metrics, found["ceiling"] = ceiling.with_ceilings(metrics), ceiling.facts
    if held_out is not None:
        found["held_out"] = _facts(held_out)
    if optional_metrics.extrapolate:
        found["infinity"] = {f"{w}": _infinity(w, num_images) for w in net.widths}
        for reason in found["infinity"].values():
            if workers.is_main and reason.startswith("none"):
                log.warning("no extrapolation to infinitely many samples: %s", reason)
    return Scores(metrics=workers.gather(metrics)[0], provenance=found)


def arithmetic(device: torch.device) -> dict[str, Any]:
    """Device and arithmetic of samples and features, as plain JSON.

    Recorded for information: scores from different devices still count as comparable.
    """
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "samples_tf32": cuda and any(one.fp32_precision == "tf32" for one in float32_backends()),
        "features": "float32 without TF32",
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _require_comparable(reference: Reference, net: FeatureNet, image_shape: ImageShape) -> None:
    if reference.image_shape != image_shape:
        raise ValueError(
            f"the model draws {image_shape} images and the reference data holds "
            f"{reference.image_shape}; choose a data set of the model's shape"
        )
    if (known := reference.identity["features"]) != net.facts:
        raise ValueError(
            f"the reference was made with features {known}, the samples with {net.facts}; make the "
            "reference with the same network"
        )
    if reference.count < 2:
        raise ValueError(
            f"the reference data holds {counted(reference.count, 'image')}; at least 2 are needed"
        )


def _cycle(samples: SampleSet) -> int:
    """Period, in samples, of the conditioning inputs: labels, prompts, images or embeddings."""
    denoiser = samples.denoiser
    labels = len(samples.plan.labels) or denoiser.takes.num_classes or 1
    prompts = len(samples.plan.settings.prompts) or 1
    if prompts < samples.num_images:  # as many prompts as samples are drawn at random
        labels = math.lcm(labels, prompts)
    for inputs in (denoiser.low_resolution_images, denoiser.embeddings):
        labels = labels if inputs is None else math.lcm(labels, len(inputs))
    return labels


def _embedding_facts(denoiser: Denoiser) -> dict[str, Any]:
    """The number of image embeddings that samples have in turn; nothing for other models."""
    return {} if denoiser.embeddings is None else {"embeddings": len(denoiser.embeddings)}


def _provenance(samples: SampleSet, net: FeatureNet, reference: Reference) -> dict[str, Any]:
    """Return all that the scores depend on, as plain JSON; equal ones are comparable."""
    denoiser, plan, num_images = samples.denoiser, samples.plan, samples.num_images
    schedule = denoiser.schedule
    return {
        "model": dict(samples.weights),
        "samples": {
            "images": num_images,
            "seed": plan.settings.seed,
            "indices": [0, num_images - 1],
            "sampler": plan.settings.sampler,
            "steps": len(plan.steps) - 1,
            "spacing": _spacing(schedule, plan.steps),
            "num_steps": schedule.num_steps,
            "eta": plan.settings.eta,
            "variance": plan.settings.variance,
            "clip": plan.clipping(denoiser.codec) is not None,
            "dynamic_quantile": plan.settings.dynamic_quantile,
            "labels": list(plan.labels),
            "guidance": plan.guidance.facts(),
            **_prompt_facts(plan, num_images),
            **_embedding_facts(denoiser),
            "rounding": denoiser.codec.rounding,
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


def _prompt_facts(plan: SamplingPlan, num_images: int) -> dict[str, Any]:
    """Hash of the samples' prompts; empty without prompts, as scores of earlier versions are."""
    if not (prompts := plan.settings.prompts[:num_images]):
        return {}
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    return {"prompts": {"count": len(prompts), "sha256": digest}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout on PYTHONPATH
        return "not installed"


def _facts(reference: Reference) -> dict[str, Any]:
    decoded = {key: reference.identity[key] for key in ("images_of",) if key in reference.identity}
    return decoded | {
        "sha256": reference.sha256,
        "data": reference.identity["data"],
        "images": reference.count,
        "kernel_images": reference.kernel_images,
    }


def _infinity(width: int, num_images: int) -> str:
    """Describe the extrapolation to infinitely many samples, or "none: " and the reason."""
    if num_images < (enough := enough_for_infinity(width)):
        return f"none: {num_images} images are too few for {width} features; draw {enough}"
    return f"bias correction and standard error of the jackknife over {GROUPS} groups of samples"


def _inception_score(net: FeatureNet, num_images: int) -> str:
    """Describe the Inception score, or "none: " and the reason."""
    if net.classify is None:
        return f"none: {NO_CLASSES}"
    if num_images < GROUPS:
        return f"none: {num_images} images cannot fill {GROUPS} splits; draw more"
    return f"{GROUPS} splits in order of index"


def _spacing(schedule: NoiseSchedule, steps: tuple[int, ...]) -> str:
    """Name of the spacing that gives these steps, found by comparison, or "custom"."""
    first, count = steps[0], min(len(steps) - 1, steps[0])
    for name, found in (
        ("uniform", uniform_steps(first, count)),
        ("quadratic", quadratic_steps(first, count)),
        ("log_snr", log_snr_steps(schedule, count, first)),
    ):
        if found == steps:
            return name
    return "custom"
