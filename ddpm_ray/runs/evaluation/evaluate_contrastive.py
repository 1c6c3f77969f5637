"""Scores of a trained image and text encoder, for the job evaluate."""

from typing import Any

from ddpm_ray.assembly import checkpoint_loading, scoring
from ddpm_ray.assembly.encoder_loading import trained_encoders
from ddpm_ray.collectives import Workers
from ddpm_ray.config.jobs.evaluate import EvaluateConfig
from ddpm_ray.data.dataset import Dataset, DatasetError, open_dataset
from ddpm_ray.runs.contrastive_outputs import retrieval_scores
from ddpm_ray.runs.evaluation.image_progress import ImageProgress


def require_captioned_images(dataset: Dataset, channels: int) -> None:
    """Raise DatasetError unless retrieval among images of `channels` can be scored on `dataset`."""
    manifest, problem = dataset.manifest, ""
    held = f"{manifest.codec} of {manifest.image_shape}"
    if not manifest.captions:
        problem = "the data set has no captions, and retrieval is scored by them"
    elif manifest.codec != "pixels" or manifest.image_shape.channels != channels:
        problem = f"it holds {held}, not images with channels: {channels}"
    if problem:
        raise DatasetError(dataset.url, problem, "name images with captions (docs/packing.md)")


def contrastive_scores(
    model_uri: str, config: EvaluateConfig, workers: Workers, progress: ImageProgress
) -> dict[str, Any]:
    """Metrics and their provenance; all workers must call it."""
    begun, facts = checkpoint_loading.run_facts(model_uri)
    encoders = trained_encoders(model_uri, workers.device)
    weights = scoring.ema_provenance(begun, facts["step"], facts=facts)
    weights |= {"model_sha256": encoders.sha256}
    scores = retrieval_scores(
        begun,
        config.evaluation,
        open_dataset(config.data_url),
        encoders,
        weights,
        workers,
        progress.counted,
    )
    progress.finish()
    return scores.to_json()
