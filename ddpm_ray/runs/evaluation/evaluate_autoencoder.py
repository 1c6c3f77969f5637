"""Scores of a trained autoencoder, for the job evaluate."""

from typing import Any

from ddpm_ray.assembly import checkpoint_loading, scoring
from ddpm_ray.assembly.autoencoder_loading import trained_autoencoder
from ddpm_ray.collectives import Workers
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.jobs.evaluate import EvaluateConfig
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.runs.autoencoder_outputs import reconstruction_scores
from ddpm_ray.runs.evaluation.image_progress import ImageProgress
from ddpm_ray.tracking.model_uri import IN_MLFLOW


def autoencoder_run(model_uri: str) -> RunConfig | None:
    """Config of the run at `model_uri` if it trained an autoencoder, else None.

    Raises what `checkpoint_loading.run_facts` raises.
    """
    if model_uri.startswith(IN_MLFLOW):  # where only models that draw images are logged
        return None
    config, _ = checkpoint_loading.run_facts(model_uri)
    return config if config.traits.reconstructs else None


def require_reconstruction_scores(wanted: EvaluationConfig) -> None:
    """Raise ConfigError with a line for each score that an autoencoder does not have."""
    problems = [
        f"evaluation.{key} is {getattr(wanted, key)}; it is a score of denoisers: set it to 0"
        for key in ("bits_per_dim_images", "likelihood_images", "memorisation_images")
        if getattr(wanted, key)
    ]
    if wanted.precision_recall:
        problems.append(
            "evaluation.precision_recall is true; it is a score of denoisers: leave it out"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def autoencoder_scores(
    model_uri: str, config: EvaluateConfig, workers: Workers, progress: ImageProgress
) -> dict[str, Any]:
    """Metrics and their provenance; all workers must call it."""
    begun, facts = checkpoint_loading.run_facts(model_uri)
    model = trained_autoencoder(model_uri, workers.device)
    weights = scoring.ema_provenance(begun, facts["step"]) | {"model_sha256": model.sha256}
    dataset = open_dataset(config.data_url)
    scores = reconstruction_scores(
        begun, config.evaluation, dataset, model.model, weights, workers, progress.counted
    )
    progress.finish()
    return scores.to_json()
