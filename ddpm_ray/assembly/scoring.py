"""Build what the scores of a run need: feature network, metrics, held-out statistics."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, assert_never

import torch

from ddpm_ray.assembly.continued_encoder import UNLOADABLE
from ddpm_ray.assembly.encoder_loading import encoders_of_sha256, trained_encoders
from ddpm_ray.assembly.run_config import run_history
from ddpm_ray.assembly.training_run import ema_decay
from ddpm_ray.collectives import Workers
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.config.option_fields import shown
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.codec import Codec
from ddpm_ray.data.dataset import Dataset, open_dataset
from ddpm_ray.evaluation.ceiling import Ceiling, ceiling_facts, measure_ceiling, stored_ceiling
from ddpm_ray.evaluation.feature_metrics import OptionalMetrics
from ddpm_ray.evaluation.features import feature_extractor
from ddpm_ray.evaluation.features.feature_extractor import FeatureNet
from ddpm_ray.evaluation.reference_statistics import Reference, reference
from ddpm_ray.redaction import sanitize
from ddpm_ray.sampling.image_text import TrainedEncoders
from ddpm_ray.storage import checksummed


def feature_net(config: EvaluationConfig, cache: Path, device: torch.device) -> FeatureNet:
    """The feature extractor of the image scores; raises ValueError for features=none."""
    match config.features:
        case "none":
            raise ValueError("evaluation.features is 'none'; choose inception or digits")
        case "inception":
            path = checksummed.fetch(config.weights, config.weights_sha256, cache)
            return feature_extractor.inception_net(path, config.widths, config.resize, device)
        case "digits":
            return feature_extractor.digits_net(device)
        case _:
            assert_never(config.features)


def optional_metrics(config: EvaluationConfig) -> OptionalMetrics:
    """The optional metrics, as configured."""
    return OptionalMetrics(config.precision_recall, config.extrapolate)


def arithmetic_of_samples(config: EvaluationConfig) -> dict[str, Any]:
    """Precision and compilation of the network that draws samples, for their provenance."""
    return {"samples_precision": config.precision, "samples_compile": config.compile}


def held_out(
    config: EvaluationConfig, net: FeatureNet, workers: Workers, codec: Codec
) -> Reference | None:
    """Feature statistics of the held-out data set; None without one. `codec` is the model's."""
    if not config.held_out_url:
        return None
    return reference(open_dataset(config.held_out_url), net, workers, codec=codec)


def alignment_checkpoint(
    config: EvaluationConfig, draws_captions: bool, prompts: Sequence[str], dataset: Dataset
) -> dict[str, str]:
    """URL and sha256 of the checkpoint that scores alignment, for all workers; {} for none.

    The driver calls it: the encoder's run may train on while workers score. The samples have
    `prompts`, or if there are none and `draws_captions`, captions. Raises ConfigError, in one
    line, for samples without prompts, and for an encoder that does not load or fit the images.
    """
    if not (config.alignment_encoder and config.num_images):
        return {}
    given, data = _given_alignment(config), reference_data(config, dataset)
    captions = data.manifest.captioned and draws_captions
    if not (prompts or captions):
        raise ConfigError(
            f"{given}, but the samples have no prompts: set sampling.prompts for a model of texts, "
            f"or leave it out"
        )
    try:
        found = trained_encoders(config.alignment_encoder)
        found.require_fitting(data.manifest.image_shape)
    except (*UNLOADABLE, ValueError) as error:
        raise ConfigError(f"{given}: {error}") from error
    return {"url": found.url, "sha256": found.sha256}


def alignment_encoders(
    config: EvaluationConfig, checkpoint: Mapping[str, str], device: torch.device
) -> TrainedEncoders | None:
    """Load the encoders of `alignment_checkpoint` for a worker; None if alignment is not scored.

    Raises ConfigError unless they load and have that sha256.
    """
    if not (config.alignment_encoder and config.num_images):
        return None
    try:
        return encoders_of_sha256(checkpoint["url"], checkpoint["sha256"], device)
    except ValueError as error:
        remedy = "put that checkpoint back"
        raise ConfigError(f"{_given_alignment(config)}: {error}: {remedy}") from error


def _given_alignment(config: EvaluationConfig) -> str:
    return f"evaluation.alignment_encoder is {sanitize(shown(config.alignment_encoder))}"


def reference_data(config: EvaluationConfig, dataset: Dataset) -> Dataset:
    """The data set that samples are compared with: evaluation.reference_url, else `dataset`."""
    return open_dataset(config.reference_url) if config.reference_url else dataset


def ceiling(
    dataset: Dataset,
    codec: Codec,
    net: FeatureNet,
    known: Reference,
    config: EvaluationConfig,
    workers: Workers,
    scores: Mapping[str, Any] | None = None,
) -> Ceiling | None:
    """The ceiling of a model of latents that is scored with `dataset`; None for one of pixels.

    `scores` are earlier scores of the run; their ceiling is reused if its facts are the same.
    """
    if codec.name == "pixels":
        return None
    facts = ceiling_facts(dataset, known, config.num_images)
    if found := stored_ceiling(scores or {}, facts):
        return found
    return measure_ceiling(dataset, codec, net, known, config.num_images, workers)


def ema_provenance(
    config: RunConfig,
    step: int | None,
    average: str | dict[str, Any] | None = None,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Provenance of the weights that are scored: the main EMA, or `average`.

    `step` is None if it is unknown, as that of a folder of diffusers.
    `facts`: of the run's checkpoint; its initial weights and changes belong to the provenance.
    """
    training = config.training
    main = {
        "weights": "ema",
        "ema_decay_per_step": ema_decay(training)(training.steps),
        "ema_ramp": training.ema_ramp,
    }
    weights = {"weights": average} if average else main
    return weights | {
        "step": step,
        "training_seed": config.seed,
        "precision": training.precision,
        **run_history(facts),
    }
