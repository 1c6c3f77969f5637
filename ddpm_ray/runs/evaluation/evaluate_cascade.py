"""Scores of a cascade: its images of the captions of the data, against the data."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ddpm_ray.assembly import scoring, training_run
from ddpm_ray.assembly.prompts import prompts_of_data
from ddpm_ray.collectives import Workers
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.jobs.evaluate import EvaluateConfig
from ddpm_ray.config.loading import ConfigError, from_dict, to_dict
from ddpm_ray.config.option_fields import shown
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import Dataset, open_dataset
from ddpm_ray.evaluation import sample_quality
from ddpm_ray.evaluation.alignment import Alignment
from ddpm_ray.evaluation.reference_statistics import reference
from ddpm_ray.runs.evaluation.image_progress import ImageProgress
from ddpm_ray.sampling.cascade import Cascade
from ddpm_ray.sampling.drawing_model import DrawingModel
from ddpm_ray.sampling.image_text import TrainedEncoders
from ddpm_ray.sampling.sampling import Images, sampling_plan

OF_ONE_NETWORK = ("bits_per_dim_images", "likelihood_images", "memorisation_images")


def last_stage(cascade: Cascade) -> DrawingModel:
    """The model of a cascade that draws its images."""
    return cascade.upsamplers[-1] if cascade.upsamplers else cascade


def run_of_last_stage(cascade: Cascade) -> RunConfig:
    """Config of the run that trained the last stage, whose data the images are compared with."""
    return from_dict(RunConfig, last_stage(cascade).provenance["config"])


def require_cascade_scores(wanted: EvaluationConfig) -> None:
    """Raise ConfigError with a line for each option of a score that a cascade does not have."""
    problems = [
        f"evaluation.{key} is {shown(getattr(wanted, key))}; it is a score of one network: score "
        f"the decoder by itself, or leave it out"
        for key in wanted.set_of(OF_ONE_NETWORK)
    ]
    problems += wanted.problems_of_arithmetic("a cascade draws in float32")
    if problems:
        raise ConfigError("\n".join(problems))


def require_prompts(config: EvaluateConfig, data: Dataset) -> None:
    """Raise ConfigError if there are no texts to draw images of."""
    if not (config.sampling.prompts or data.manifest.captioned):
        raise ConfigError(
            f"sampling.prompts is empty, and {data.url} holds no captions: a cascade draws images "
            f"of texts, so give one or more"
        )


def cascade_scores(
    cascade: Cascade,
    config: EvaluateConfig,
    encoders: TrainedEncoders | None,
    workers: Workers,
    progress: ImageProgress,
) -> dict[str, Any]:
    """Metrics and their provenance; all workers must call it.

    The prompt of image i is one of sampling.prompts in turn, or if there are none, a caption of the
    data that is drawn by (seed, i).
    """
    wanted, begun = config.evaluation, run_of_last_stage(cascade)
    dataset, codec = open_dataset(config.data_url), last_stage(cascade).denoiser.codec
    data, plan = (
        scoring.reference_data(wanted, dataset),
        sampling_plan(cascade.settings, cascade.denoiser.schedule),
    )
    prompts = plan.settings.prompts or tuple(
        prompts_of_data(data, wanted.num_images, plan.settings.seed)
    )
    plan = replace(plan, settings=replace(plan.settings, prompts=prompts))
    net = scoring.feature_net(wanted, training_run.cache_dir(begun.data, "weights"), workers.device)
    kept = min(wanted.kernel_distance_images, wanted.num_images) * wanted.kernel_distance
    known = reference(data, net, workers, kernel_images=kept, codec=codec)

    def drawn(indices: range) -> Images:
        texts = [prompts[i % len(prompts)] for i in indices]
        turned = indices.start % len(texts)  # image i has text i % n, and the first one texts[0]
        texts = texts[-turned:] + texts[:-turned] if turned else texts
        return cascade.sample(len(indices), first=indices.start, prompts=texts)

    scores = sample_quality.evaluate_samples(
        sample_quality.SampleSet(
            cascade.denoiser,
            plan,
            image_shape=cascade.drawn_shape,
            num_images=wanted.num_images,
            batch_size=config.sampling.batch_size,
            weights=_weights(cascade) | {"guidance": vars(config.guidance)},
            arithmetic=scoring.arithmetic_of_samples(wanted),
            alignment=Alignment.of(encoders, prompts),
            drawn=drawn,
        ),
        net,
        known,
        workers,
        optional_metrics=scoring.optional_metrics(wanted),
        held_out=scoring.held_out(wanted, net, workers, codec),
        ceiling=scoring.ceiling(dataset, codec, net, known, wanted, workers),
        counted=progress.counted,
    )
    progress.finish()
    return scores.to_json()


def _weights(cascade: Cascade) -> dict[str, Any]:
    """Provenance of all weights, with the settings by which prior and upsamplers draw."""

    def part(provenance: Mapping[str, Any], settings: Any = None) -> dict[str, Any]:
        begun = from_dict(RunConfig, provenance["config"])
        found = scoring.ema_provenance(
            begun, provenance["step"], provenance.get("average"), provenance
        )
        found |= {"model_sha256": provenance["weights_sha256"]}
        return found | ({} if settings is None else {"sampling": to_dict(settings)})

    return part(cascade.provenance) | {
        "candidates": cascade.candidates,
        "prior": part(cascade.prior.provenance, cascade.prior.settings),
        "upsamplers": [part(one.provenance, one.settings) for one in cascade.upsamplers],
    }
