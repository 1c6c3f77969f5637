"""Trained models by name: from a checkpoint folder, or out of MLflow."""

import os
import tempfile
from pathlib import Path

import torch

from ddpm_ray import build
from ddpm_ray.cluster import registry
from ddpm_ray.generation.trained_model import TrainedModel
from ddpm_ray.knobs import ConfigError
from ddpm_ray.telling import NO_SECRET, has_secret, redacted

IN_MLFLOW = ("runs:/", "models:/")


def load(uri: str, device: torch.device | str = "", tracking_uri: str = "") -> TrainedModel:
    """The model at a folder's URL, `runs:/<run id>/model` or `models:/<name>@<alias>`.

    The latter two are looked up at `tracking_uri`, or where `tracking_place` says. Raises
    CheckpointError, StorageError or TrackingError.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not uri.startswith(IN_MLFLOW):
        return build.trained_model(uri, device)
    with tempfile.TemporaryDirectory() as scratch:
        where = tracking_uri or tracking_place(Path.cwd())
        return build.trained_model(str(registry.download_model(where, uri, Path(scratch))), device)


def tracking_place(home: Path) -> str:
    """$MLFLOW_TRACKING_URI, or the database that runs started in `home` are logged to.

    Raises ConfigError where that variable holds a password: runs save where they are tracked.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"
    if has_secret(uri):
        raise ConfigError(f"$MLFLOW_TRACKING_URI is {redacted(uri)}: {NO_SECRET}")
    return uri
