"""Denoising diffusion models on a Ray cluster. `load` gives a trained one to a notebook.

Importing this package loads neither torch nor Ray nor MLflow.
"""

from os import PathLike, fspath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddpm_ray.sampling.cascade import Cascade
    from ddpm_ray.sampling.image_text import TrainedEncoders
    from ddpm_ray.sampling.pipeline import TrainedModel


def load(
    uri: "str | PathLike[str]",
    device: str | None = None,
    *,
    autoencoder: str = "",
    text_model: str = "",
) -> "TrainedModel":
    """A trained model; `.sample(16)` draws uint8 images [16, H, W, C] from its EMA weights.

    `uri` is a run's folder or one checkpoint's, as a path or any fsspec URL, `runs:/<run id>/model`
    or `models:/<name>@<alias>`; the last two are looked up where $MLFLOW_TRACKING_URI says, or in
    ./mlflow.db, and they alone need MLflow installed. It lies on `device`, by default on a GPU
    where there is one. `autoencoder` is the URL of the autoencoder of a model of latents, if it
    has moved since training, `text_model` that of a frozen text encoder. Raises ValueError for an
    invalid `uri` or `device`, and CheckpointError, StorageError or TrackingError.
    """
    places = "a run's folder, one checkpoint's, runs:/<run id>/model or models:/<name>@<alias>"
    where = _text(uri, places)
    if where.startswith(("runs:/", "models:/")):
        from ddpm_ray.runs.load_model import load as load_from_mlflow

        return load_from_mlflow(where, device, autoencoder=autoencoder, text_model=text_model)
    from ddpm_ray.assembly.checkpoint_loading import trained_model

    return trained_model(where, device, autoencoder=autoencoder, text_model=text_model)


def load_cascade(uri: "str | PathLike[str]", device: str | None = None) -> "Cascade":
    """The prior, decoder and upsamplers in a folder of `ddpm-ray cascade`.

    `.sample(8, prompts=[...])`, `.variations(images)` and `.interpolate(first, second)` draw uint8
    images [N, H, W, C]. `uri` is that folder, as a path or any fsspec URL, or the cascade in MLflow
    (`models:/<name>@<alias>`), and `device` is as in `load`. Raises ValueError for an invalid `uri`
    or `device`, ConfigError for a folder without a cascade, and CheckpointError, StorageError or
    TrackingError.
    """
    where = _text(uri, "a folder that `ddpm-ray cascade` wrote, or models:/<name>@<alias>")
    if where.startswith(("runs:/", "models:/")):
        from ddpm_ray.runs.load_model import cascade_of_uri

        return cascade_of_uri(where, device)
    from ddpm_ray.assembly.cascades import trained_cascade

    return trained_cascade(where, device)


def load_encoders(uri: "str | PathLike[str]", device: str | None = None) -> "TrainedEncoders":
    """The image and text encoder of a run with task=contrastive, with its EMA weights.

    `.image_embeddings(images)`, `.text_embeddings(prompts)` and `.similarity(images, prompts)` are
    torch tensors. `uri` is a run's folder or one checkpoint's, as a path or any fsspec URL, and
    `device` is as in `load`. Raises ValueError for an invalid `uri` or `device`, ConfigError for a
    run that trained something else, TokenizerError for a tokenizer that cannot be used, and
    CheckpointError or StorageError.
    """
    where = _text(uri, "a run's folder or one checkpoint's")
    from ddpm_ray.assembly.encoder_loading import trained_encoders

    return trained_encoders(where, device)


def _text(uri: object, valid: str) -> str:
    """`uri` as text; a notebook has no type checker."""
    where = fspath(uri) if isinstance(uri, PathLike) else uri
    if not isinstance(where, str) or not where.strip():
        raise ValueError(f"uri is {where!r}; name {valid}")
    return where
