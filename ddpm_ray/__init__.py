"""Denoising diffusion models on a Ray cluster. `load` gives a trained one to a notebook.

Importing this package loads neither torch nor Ray nor MLflow.
"""

from os import PathLike, fspath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddpm_ray.generation.trained_model import TrainedModel


def load(uri: "str | PathLike[str]", device: str = "") -> "TrainedModel":
    """A trained model; `.sample(16)` draws uint8 images [16, H, W, C] from its EMA weights.

    `uri` is a run's folder or one checkpoint's, as a path or any fsspec URL, `runs:/<run id>/model`
    or `models:/<name>@<alias>`; the last two are looked up where $MLFLOW_TRACKING_URI says, or in
    ./mlflow.db, and they alone need MLflow installed. It lies on `device`, by default on a GPU
    where there is one. Raises CheckpointError, StorageError or TrackingError.
    """
    uri = fspath(uri)
    if uri.startswith(("runs:/", "models:/")):
        from ddpm_ray.cluster.trained import load as load_from_mlflow

        return load_from_mlflow(uri, device)
    from ddpm_ray.build_trained import default_device, trained_model

    return trained_model(uri, device or default_device())
