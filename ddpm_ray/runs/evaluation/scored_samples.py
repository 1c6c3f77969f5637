"""Scores of the samples of a model or a cascade: feature network, reference, held-out data."""

from collections.abc import Callable, Mapping
from typing import Any

from ddpm_ray.assembly import scoring, training_run
from ddpm_ray.collectives import Workers
from ddpm_ray.config.jobs.evaluate import EvaluateConfig
from ddpm_ray.config.loading import from_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.codec import Codec
from ddpm_ray.data.dataset import Dataset, open_dataset
from ddpm_ray.evaluation import sample_quality
from ddpm_ray.evaluation.reference_statistics import reference
from ddpm_ray.evaluation.sample_quality import SampleSet, Scores
from ddpm_ray.runs.evaluation.image_progress import ImageProgress


def scored_samples(
    config: EvaluateConfig,
    begun: RunConfig,
    codec: Codec,
    samples_for: Callable[[Dataset], SampleSet],
    workers: Workers,
    progress: ImageProgress,
) -> Scores:
    """Score samples against the data of `config`: FID and the other feature metrics.

    `begun` and `codec` are those of the model that draws the images; `samples_for` gives the
    samples for the data set that they are compared with. All workers must call it.
    """
    wanted, dataset = config.evaluation, open_dataset(config.data_url)
    net = scoring.feature_net(wanted, training_run.cache_dir(begun.data, "weights"), workers.device)
    kept = min(wanted.kernel_distance_images, wanted.num_images) * wanted.kernel_distance
    data = scoring.reference_data(wanted, dataset)
    known = reference(data, net, workers, kernel_images=kept, codec=codec)
    return sample_quality.evaluate_samples(
        samples_for(data),
        net,
        known,
        workers,
        optional_metrics=scoring.optional_metrics(wanted),
        held_out=scoring.held_out(wanted, net, workers, codec),
        ceiling=scoring.ceiling(dataset, codec, net, known, wanted, workers),
        counted=progress.counted,
    )


def weights_of(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a score's provenance on a model's weights: step, EMA, sha256."""
    begun = from_dict(RunConfig, origin["config"])
    return scoring.ema_provenance(begun, origin["step"], origin.get("average"), origin) | {
        "model_sha256": origin["weights_sha256"]
    }
