"""Evaluate a trained model against a data set on a group of workers."""

import dataclasses
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_ray.assembly import scoring, training_run
from ddpm_ray.collectives import Workers
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.jobs import EvaluateConfig
from ddpm_ray.config.loading import ConfigError, from_dict, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import Dataset, open_dataset
from ddpm_ray.distributed import fatal_errors, startup, worker_group
from ddpm_ray.distributed.control_actor import RunControl
from ddpm_ray.distributed.worker_context import distributed_context
from ddpm_ray.evaluation import sample_quality
from ddpm_ray.evaluation.likelihood_over_dataset import Likelihood, flow_likelihood
from ddpm_ray.evaluation.memorisation import Neighbours, nearest_images, spread
from ddpm_ray.evaluation.reference_statistics import reference
from ddpm_ray.evaluation.sample_quality import Scores
from ddpm_ray.evaluation.vlb_over_dataset import BitsPerDim, vlb_bits_per_dim
from ddpm_ray.reporting import Progress
from ddpm_ray.runs import load_model
from ddpm_ray.runs.evaluate_autoencoder import (
    autoencoder_run,
    autoencoder_scores,
    require_reconstruction_scores,
)
from ddpm_ray.runs.image_progress import ImageProgress
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.sampling.sampling import SamplingPlan, draw_uint8, sampling_plan
from ddpm_ray.storage import object_store
from ddpm_ray.tracking.model_uri import IN_MLFLOW
from ddpm_ray.tracking.tracking_uri import resolve_tracking_uri

log = logging.getLogger(__name__)


def run_evaluation(
    model_uri: str,
    config: EvaluateConfig,
    home: Path,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Any]:
    """Return the metrics and their provenance. Relative paths are relative to `home`.

    `on_progress` gets the number of images that are scored, about once a second. Raises ConfigError
    if model and config do not fit, and RunFailedError, CheckpointError, DatasetError, StorageError
    or TrackingError.
    """
    tracking_uri = resolve_tracking_uri(home)
    if not model_uri.startswith(IN_MLFLOW):
        model_uri = object_store.absolute(model_uri, home)
    if begun := autoencoder_run(model_uri):
        require_reconstruction_scores(config.evaluation)
        if config.autoencoder:
            raise ConfigError(
                f"autoencoder is {config.autoencoder!r}, and {model_uri} is an autoencoder: leave "
                "it out"
            )
    else:
        begun = _denoiser_run(model_uri, config, tracking_uri)
    wanted, encodes = config.evaluation, begun.traits.reconstructs
    trained_on = (begun.evaluation.held_out_url if encodes else "") or begun.data.url
    if not (data_url := config.data_url or trained_on):
        raise ConfigError(
            "data_url is empty, and the model was imported without the URL of its training data; "
            "give the reference shards, as in data_url=data/cifar10"
        )
    if not config.data_url and not wanted.reference_url:  # as the run's own scores
        place = begun.evaluation.reference_url
        wanted = dataclasses.replace(wanted, reference_url=place)
    config = dataclasses.replace(
        config,
        data_url=object_store.absolute(data_url, home),
        evaluation=absolute_evaluation_paths(wanted, home),
    )
    named = config.evaluation.held_out_url, config.evaluation.reference_url
    for url in filter(None, (config.data_url, *named)):
        open_dataset(url)  # before Ray starts
    settings = {
        "model_uri": model_uri,
        "tracking_uri": tracking_uri,
        "config": to_dict(config),
        "encodes": encodes,
    }
    scores: dict[str, Any] = worker_group.run(
        evaluate_worker, settings, config.cluster, on_progress
    )
    for line in score_lines(scores["metrics"]):
        log.info("%s", line)
    return scores


def _denoiser_run(model_uri: str, config: EvaluateConfig, tracking_uri: str) -> RunConfig:
    """Config of the run that trained the model; raises ConfigError for settings that do not fit."""
    model = load_model.load(model_uri, tracking_uri=tracking_uri, autoencoder=config.autoencoder)
    begun = from_dict(RunConfig, model.provenance["config"])
    # Before Ray starts: raises ConfigError for settings or a guidance model that do not fit.
    load_model.configured(model, config.sampling, config.guidance, tracking_uri)
    wanted = config.evaluation
    if wanted.features == "none":
        raise ConfigError("evaluation.features is 'none'; choose inception or digits")
    _require_likelihoods(wanted, model)
    return begun


def _require_likelihoods(wanted: EvaluationConfig, model: TrainedModel) -> None:
    """Raise ConfigError for bits per dimension or a likelihood that `model` does not have."""
    most, codec = model.denoiser.schedule.num_steps, model.denoiser.codec.name
    for name, images, key, value in (
        ("bits_per_dim", wanted.bits_per_dim_images, "terms", wanted.bits_per_dim_terms),
        ("likelihood", wanted.likelihood_images, "steps", wanted.likelihood_steps),
    ):
        if images and codec != "pixels":
            raise ConfigError(
                f"evaluation.{name}_images is {images}, which is of 8-bit pixels, and this model "
                f"diffuses {codec}: set it to 0"
            )
        if images and value > most:
            raise ConfigError(
                f"evaluation.{name}_{key} is {value}; it cannot exceed the model's T = {most}"
            )


def score_lines(metrics: dict[str, float]) -> list[str]:
    """Format each score in a line, with its 95 % interval if it has one."""
    names = [name for name in metrics if not name.endswith(("_low", "_high"))]
    width = max(map(len, names), default=0)
    lines = []
    for name in names:
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        interval = "" if low is None else f"  (95 % interval {low:.4g} .. {high:.4g})"
        lines.append(f"{name:{width}}  {metrics[name]:.4g}{interval}")
    return lines


def absolute_evaluation_paths(wanted: EvaluationConfig, home: Path) -> EvaluationConfig:
    """Make relative paths in `wanted` absolute: workers have other working directories."""
    return dataclasses.replace(
        wanted,
        weights=object_store.absolute(wanted.weights, home),
        held_out_url=object_store.absolute(wanted.held_out_url, home),
        reference_url=object_store.absolute(wanted.reference_url, home),
        memorisation_picture=object_store.absolute(wanted.memorisation_picture, home),
    )


def evaluate_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Evaluate as one worker; return the same scores on each worker."""
    config = from_dict(EvaluateConfig, settings["config"])
    control: RunControl = settings["control"]
    startup.mark_done(control)
    if control.status().fatal is not None:
        return {}
    with fatal_errors.report_fatal_errors(control):
        return _scores(config, settings, control.report)


def _images_to_score(config: EvaluateConfig) -> int:
    wanted = config.evaluation
    likelihoods = wanted.bits_per_dim_images + wanted.likelihood_images
    return wanted.num_images + likelihoods + wanted.memorisation_images


def _scores(
    config: EvaluateConfig, settings: dict[str, Any], report: Callable[[Progress], object]
) -> dict[str, Any]:
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    object_store.set_retry_timeout(config.cluster.storage_timeout_s)
    workers = distributed_context()
    progress = ImageProgress(_images_to_score(config), workers, report)
    if settings.get("encodes"):
        return autoencoder_scores(settings["model_uri"], config, workers, progress)
    tracking_uri = settings["tracking_uri"]
    model = load_model.load(
        settings["model_uri"], workers.device, tracking_uri, autoencoder=config.autoencoder
    )
    model = load_model.configured(model, config.sampling, config.guidance, tracking_uri)
    plan = sampling_plan(config.sampling, model.denoiser.schedule)
    begun, dataset = from_dict(RunConfig, model.provenance["config"]), open_dataset(config.data_url)
    drawn = max(config.evaluation.num_images, config.evaluation.memorisation_images, 1)
    count = min(drawn, int(dataset.counts.sum()))
    shown = training_run.with_low_resolution(
        model.denoiser, begun.data, dataset, count, workers.device
    )
    model = dataclasses.replace(model, denoiser=shown)
    found: dict[str, Any] = {"metrics": {}}
    if config.evaluation.num_images:
        found |= _sample_scores(config, model, plan, workers, progress).to_json()
    if config.evaluation.bits_per_dim_images:
        bits = _bits_per_dim(config, model, workers, progress).to_json()
        found["metrics"] = found["metrics"] | bits.pop("metrics")
        found["bits_per_dim"] = _with_origin(bits, model, dataset)
    if config.evaluation.likelihood_images:
        of = _likelihood(config, model, workers, progress).to_json()
        found["metrics"] = found["metrics"] | of.pop("metrics")
        found["likelihood"] = _with_origin(of, model, dataset)
    if count := config.evaluation.memorisation_images:
        near = _neighbours(config, model, plan, workers, progress)
        found["metrics"] = found["metrics"] | near.metrics
        found["memorisation"] = near.facts
        if held_out := config.evaluation.held_out_url:
            codec, data = model.denoiser.codec, scoring.reference_data(config.evaluation, dataset)
            others = spread(open_dataset(held_out), count, workers, codec)
            found_near = nearest_images(others, data, workers, codec=codec)
            compared_with = near.compared_with(found_near)
            found["metrics"] = found["metrics"] | compared_with
        if workers.is_main and (path := config.evaluation.memorisation_picture):
            png = io.BytesIO()
            near.picture().save(png, format="PNG")
            object_store.write_bytes(path, png.getvalue())
    progress.finish()
    return found


def _sample_scores(
    config: EvaluateConfig,
    model: TrainedModel,
    plan: SamplingPlan,
    workers: Workers,
    progress: ImageProgress,
) -> Scores:
    """Score samples against the data: FID and the other feature metrics."""
    begun = from_dict(RunConfig, model.provenance["config"])
    wanted = config.evaluation
    net = scoring.feature_net(wanted, training_run.cache_dir(begun.data, "weights"), workers.device)
    kept = min(wanted.kernel_distance_images, wanted.num_images) * wanted.kernel_distance
    dataset, codec = open_dataset(config.data_url), model.denoiser.codec
    data = scoring.reference_data(wanted, dataset)
    known = reference(data, net, workers, kernel_images=kept, codec=codec)
    return sample_quality.evaluate_samples(
        sample_quality.SampleSet(
            model.denoiser,
            plan,
            image_shape=model.image_shape,
            num_images=wanted.num_images,
            batch_size=config.sampling.batch_size,
            weights=_weights(model) | {"guidance": vars(config.guidance)},
        ),
        net,
        known,
        workers,
        optional_metrics=scoring.optional_metrics(wanted),
        held_out=scoring.held_out(wanted, net, workers, codec),
        ceiling=scoring.ceiling(dataset, codec, net, known, wanted, workers),
        counted=progress.counted,
    )


def _weights(model: TrainedModel) -> dict[str, Any]:
    """Provenance of the weights: step, EMA, sha256."""
    begun, origin = from_dict(RunConfig, model.provenance["config"]), model.provenance
    return scoring.ema_provenance(begun, origin["step"], origin.get("average"), origin) | {
        "model_sha256": origin["weights_sha256"]
    }


def _with_origin(found: dict[str, Any], model: TrainedModel, dataset: Dataset) -> dict[str, Any]:
    """Add weights, data set and choice of images to the provenance in `found`."""
    begun = from_dict(RunConfig, model.provenance["config"])
    origin = {
        "model": _weights(model),
        "data": {
            "sha256": dataset.fingerprint,
            "lanes": begun.data.lanes,
            "shuffle_window_bytes": begun.data.shuffle_window_bytes,
        },
        "labels": "of the images" if model.denoiser.takes.num_classes else "none",
    }
    return found | {"certificate": found["certificate"] | origin}


def _bits_per_dim(
    config: EvaluateConfig, model: TrainedModel, workers: Workers, progress: ImageProgress
) -> BitsPerDim:
    """Variational bound in bits per dimension on images of the data set."""
    wanted, sampling = config.evaluation, config.sampling
    variance = model.denoiser.variance if sampling.variance == "learned" else sampling.variance
    return vlb_bits_per_dim(
        model.denoiser,
        progress.counted(_images(config, wanted.bits_per_dim_images, model, workers)),
        variance="fixed_small" if variance == "fixed" else variance,
        workers=workers,
        terms=wanted.bits_per_dim_terms or None,
        clip=sampling.clip is not False,
    )


def _neighbours(
    config: EvaluateConfig,
    model: TrainedModel,
    plan: SamplingPlan,
    workers: Workers,
    progress: ImageProgress,
) -> Neighbours:
    """Nearest images of the data set to the first `memorisation_images` samples."""
    mine, size = workers.share(config.evaluation.memorisation_images), config.sampling.batch_size
    shape, device = model.image_shape, workers.device
    batches = progress.counted((index,) for index in torch.split(torch.tensor(mine), size))
    parts = (range(int(index[0]), int(index[-1]) + 1) for (index,) in batches if len(index))
    images = [draw_uint8(model.denoiser, plan, one, shape, device, size) for one in parts]
    drawn = np.concatenate([np.empty((0, *shape), np.uint8), *images])
    samples = torch.from_numpy(np.concatenate(workers.gather(drawn)))
    data = scoring.reference_data(config.evaluation, open_dataset(config.data_url))
    return nearest_images(samples, data, workers, codec=model.denoiser.codec)


def _likelihood(
    config: EvaluateConfig, model: TrainedModel, workers: Workers, progress: ImageProgress
) -> Likelihood:
    """Likelihood of images of the data set under the probability flow ODE."""
    wanted = config.evaluation
    batches = progress.counted(_images(config, wanted.likelihood_images, model, workers))
    return flow_likelihood(model.denoiser, batches, steps=wanted.likelihood_steps, workers=workers)


def _images(
    config: EvaluateConfig, count: int, model: TrainedModel, workers: Workers
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This worker's share of a fixed choice of `count` images: batches of index, image, label."""
    begun, dataset = from_dict(RunConfig, model.provenance["config"]), open_dataset(config.data_url)
    total = min(count, int(dataset.counts.sum()))
    mine = workers.share(total)
    images, labels = training_run.fixed_images(begun.data, dataset, mine, total)
    if not mine:  # fewer images than workers
        return iter(())
    index = torch.arange(mine.start, mine.stop)
    size = config.sampling.batch_size
    return zip(*(torch.split(each, size) for each in (index, images, labels)), strict=True)
