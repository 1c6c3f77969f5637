"""Trained models by name: from a checkpoint folder, or out of MLflow."""

import dataclasses
import tempfile
from pathlib import Path

import torch

from ddpm_ray import build_trained
from ddpm_ray.cluster import registry
from ddpm_ray.cluster.tracking_place import tracking_place
from ddpm_ray.generation import leading
from ddpm_ray.generation.sample import SamplingPlan
from ddpm_ray.generation.trained_model import TrainedModel
from ddpm_ray.job_config import LeadConfig
from ddpm_ray.knobs import ConfigError

IN_MLFLOW = ("runs:/", "models:/")


def load(uri: str, device: torch.device | str = "", tracking_uri: str = "") -> TrainedModel:
    """The model at a folder's URL, `runs:/<run id>/model` or `models:/<name>@<alias>`.

    The latter two are looked up at `tracking_uri`, or where `tracking_place` says. Raises
    CheckpointError, StorageError or TrackingError.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not uri.startswith(IN_MLFLOW):
        return build_trained.trained_model(uri, device)
    with tempfile.TemporaryDirectory() as scratch:
        where = tracking_place(Path.cwd(), tracking_uri)
        return build_trained.trained_model(
            str(registry.download_model(where, uri, Path(scratch))), device
        )


def led(
    model: TrainedModel, config: LeadConfig, plan: SamplingPlan, tracking_uri: str = ""
) -> TrainedModel:
    """`model` with what leads its samples; raises ConfigError where the two do not fit."""
    of, device = model.denoiser, model.device
    if config.weak_model:
        weak = load(config.weak_model, device, tracking_uri)
        try:
            lead = leading.by_weaker(of, weak.denoiser, config.weak_scale)
        except ValueError as error:
            raise ConfigError(f"lead.weak_model is {config.weak_model!r}: {error}") from error
    elif config.classifier:
        classifier = build_trained.trained_classifier(config.classifier, device)
        means = config.classifier_form == "mean"
        lead = leading.by_classifier(
            classifier, of, config.classifier_scale,
            steps=plan.steps if means else None,
            variance="fixed_large" if plan.variance == "fixed_large" else "fixed_small",
        )  # fmt: skip
    else:
        return model
    return dataclasses.replace(model, denoiser=dataclasses.replace(of, lead=lead))
