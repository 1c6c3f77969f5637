"""Scores of a trained autoencoder, for the job evaluate."""

from typing import Any

from ddpm_ray.assembly import cascades, checkpoint_loading, scoring
from ddpm_ray.assembly.autoencoder_loading import trained_autoencoder
from ddpm_ray.collectives import Workers
from ddpm_ray.config.evaluation import OF_DENOISERS, OF_EVALUATE, EvaluationConfig
from ddpm_ray.config.jobs.evaluate import EvaluateConfig
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.config.option_fields import shown
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.data.packing.latent_encoder import encoded_shape
from ddpm_ray.runs.autoencoder_outputs import reconstruction_scores
from ddpm_ray.runs.evaluation.image_progress import ImageProgress
from ddpm_ray.tracking.model_uri import IN_MLFLOW


def autoencoder_run(model_uri: str) -> RunConfig | None:
    """Config of the run or diffusers folder at `model_uri` if it is an autoencoder, else None.

    Raises what `checkpoint_loading.run_facts` raises.
    """
    found = run_without_noise(model_uri)
    return found if found is not None and found.traits.reconstructs else None


def run_without_noise(model_uri: str) -> RunConfig | None:
    """Config of the run or diffusers folder at `model_uri` if its task has no noise, else None.

    Raises what `checkpoint_loading.run_facts` raises.
    """
    # In MLflow only models with noise are logged.
    if model_uri.startswith(IN_MLFLOW) or cascades.is_cascade(model_uri):
        return None
    config, _ = checkpoint_loading.run_facts(model_uri)
    return None if config.traits.has_noise else config


def require_reconstruction_scores(wanted: EvaluationConfig, model: str = "an autoencoder") -> None:
    """Raise ConfigError with a line for each option of a score that `model` does not have."""
    problems = [
        f"evaluation.{key} is {shown(getattr(wanted, key))}; it belongs to scores of denoisers: "
        "leave it out"
        for key in wanted.set_of(OF_EVALUATE + OF_DENOISERS)
    ]
    problems += wanted.problems_of_arithmetic(f"{model} draws no samples")
    if problems:
        raise ConfigError("\n".join(problems))


def require_images_of(model_uri: str, data_url: str) -> None:
    """Raise DatasetError unless the autoencoder encodes the images at `data_url`."""
    encoded_shape(open_dataset(data_url), trained_autoencoder(model_uri))


def autoencoder_scores(
    model_uri: str, config: EvaluateConfig, workers: Workers, progress: ImageProgress
) -> dict[str, Any]:
    """Metrics and their provenance; all workers must call it."""
    begun, facts = checkpoint_loading.run_facts(model_uri)
    model = trained_autoencoder(model_uri, workers.device)
    origin: dict[str, Any] = {"weights": "diffusers"}  # of such a folder, which has no facts
    weights = scoring.ema_provenance(begun, facts["step"]) if facts else origin
    weights |= {"model_sha256": model.sha256}
    dataset = open_dataset(config.data_url)
    scores = reconstruction_scores(
        begun, config.evaluation, dataset, model.model, weights, workers, progress.counted
    )
    progress.finish()
    return scores.to_json()
