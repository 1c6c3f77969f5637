"""Scores of a trained image and text encoder, for the job evaluate."""

from typing import Any

from ddpm_ray.assembly import checkpoint_loading, scoring
from ddpm_ray.assembly.encoder_loading import trained_encoders
from ddpm_ray.assembly.newest_checkpoint import newest_checkpoint
from ddpm_ray.assembly.run_config import saved_config, saved_tokenizer
from ddpm_ray.collectives import Workers
from ddpm_ray.config.jobs.evaluate import EvaluateConfig
from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.runs.contrastive_outputs import retrieval_scores
from ddpm_ray.runs.evaluation.image_progress import ImageProgress
from ddpm_ray.runs.scored_captions import require_retrieval


def scored_checkpoint(model_uri: str, config: EvaluateConfig) -> str:
    """URL of the checkpoint that `model_uri` names at this time, for all workers.

    Raises CheckpointError, and DatasetError unless its encoders can be scored as configured.
    """
    where, snapshot = newest_checkpoint(model_uri)
    begun, tokenizer = saved_config(snapshot.facts, where), saved_tokenizer(snapshot.facts, where)
    assert tokenizer is not None  # a config with this task has text
    dataset, (*_, channels) = open_dataset(config.data_url), snapshot.facts["image_shape"]
    require_retrieval(begun, dataset, config.evaluation.num_images, channels, tokenizer)
    return where


def contrastive_scores(
    model_uri: str, config: EvaluateConfig, workers: Workers, progress: ImageProgress
) -> dict[str, Any]:
    """Metrics and their provenance; all workers must call it."""
    encoders = trained_encoders(model_uri, workers.device)
    begun, facts = checkpoint_loading.run_facts(encoders.url)  # of these weights
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
