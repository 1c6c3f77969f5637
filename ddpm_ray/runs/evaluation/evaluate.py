"""Driver of an evaluation: check model, config and data, run the workers, log the scores."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddpm_ray.assembly import scoring
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.jobs.evaluate import EvaluateConfig
from ddpm_ray.config.loading import ConfigError, from_dict, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.distributed import worker_group
from ddpm_ray.reporting import Progress
from ddpm_ray.runs import load_model
from ddpm_ray.runs.absolute_paths import absolute_evaluation_paths
from ddpm_ray.runs.evaluation.evaluate_autoencoder import (
    require_images_of,
    require_reconstruction_scores,
    run_without_noise,
)
from ddpm_ray.runs.evaluation.evaluate_cascade import (
    require_cascade_scores,
    require_prompts,
    run_of_last_stage,
)
from ddpm_ray.runs.evaluation.evaluate_contrastive import scored_checkpoint
from ddpm_ray.runs.evaluation.evaluate_worker import evaluate_worker
from ddpm_ray.runs.training_data import require_scored_data
from ddpm_ray.sampling.cascade import Cascade
from ddpm_ray.sampling.drawing_model import DrawingModel
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
    begun, cascade = _scored_run(model_uri, config, tracking_uri)
    wanted, traits = config.evaluation, begun.traits
    trained_on = (begun.evaluation.held_out_url if not traits.has_noise else "") or begun.data.url
    if not (data_url := config.data_url or trained_on):
        raise ConfigError(
            "data_url is empty, and the model does not name its training data; give the reference "
            "shards, as in data_url=data/cifar10"
        )
    if not config.data_url and not wanted.reference_url:  # as the run's own scores
        place = begun.evaluation.reference_url
        wanted = dataclasses.replace(wanted, reference_url=place)
    config = dataclasses.replace(
        config,
        data_url=object_store.absolute(data_url, home),
        evaluation=absolute_evaluation_paths(wanted, home),
    )
    others = ("held_out_url", "reference_url")
    require_scored_data(traits, config.data_url, config.evaluation, others)  # before Ray starts
    dataset, prompts = open_dataset(config.data_url), config.sampling.prompts
    if cascade:
        require_prompts(config, scoring.reference_data(config.evaluation, dataset))
    captions = cascade or begun.draws_captions
    pinned = scoring.alignment_checkpoint(config.evaluation, captions, prompts, dataset)
    if traits.reconstructs:
        require_images_of(model_uri, config.data_url)
    if traits.embeds:
        model_uri = scored_checkpoint(model_uri, config)
    settings = {
        "model_uri": model_uri,
        "tracking_uri": tracking_uri,
        "config": to_dict(config),
        "task": begun.task,
        "alignment_checkpoint": pinned,
    }
    scores: dict[str, Any] = worker_group.run(
        evaluate_worker, settings, config.cluster, on_progress
    )
    for line in score_lines(scores["metrics"]):
        log.info("%s", line)
    return scores


def _scored_run(
    model_uri: str, config: EvaluateConfig, tracking_uri: str
) -> tuple[RunConfig, bool]:
    """Config of the run that trained the model, and whether it is a cascade: then its last stage's.

    Raises ConfigError for settings that do not fit.
    """
    if begun := run_without_noise(model_uri):
        require_reconstruction_scores(config.evaluation, begun.traits.name)
        if config.autoencoder:
            raise ConfigError(
                f"autoencoder is {config.autoencoder!r}, and {model_uri} is {begun.traits.name}: "
                "leave it out"
            )
        return begun, False
    model = load_model.load_to_draw(
        model_uri,
        tracking_uri=tracking_uri,
        autoencoder=config.autoencoder,
        text_model=config.text_model,
    )
    # Before Ray starts: raises ConfigError for settings or a guidance model that do not fit.
    load_model.configured(model, config.sampling, config.guidance, tracking_uri)
    wanted = config.evaluation
    if wanted.features == "none":
        raise ConfigError("evaluation.features is 'none'; choose inception or digits")
    if isinstance(model, Cascade):
        require_cascade_scores(wanted)
        return run_of_last_stage(model), True
    _require_likelihoods(wanted, model)
    return from_dict(RunConfig, model.provenance["config"]), False


def _require_likelihoods(wanted: EvaluationConfig, model: DrawingModel) -> None:
    """Raise ConfigError for bits per dimension or a likelihood that `model` does not have."""
    most, codec = model.denoiser.schedule.num_steps, model.denoiser.codec.name
    for name, images, key, value in (
        ("bits_per_dim", wanted.bits_per_dim_images, "terms", wanted.bits_per_dim_terms),
        ("likelihood", wanted.likelihood_images, "steps", wanted.likelihood_steps),
    ):
        if images and codec != "pixels":
            raise ConfigError(
                f"evaluation.{name}_images is {images}, but this score is defined for 8-bit pixels "
                f"and this model diffuses {codec}: set it to 0"
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
