"""Scores of a cascade: its images of the captions of the data, against the data."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ddpm_ray.assembly import scoring
from ddpm_ray.assembly.prompts import prompts_of_data
from ddpm_ray.collectives import Workers
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.jobs.evaluate import EvaluateConfig
from ddpm_ray.config.loading import ConfigError, from_dict, to_dict
from ddpm_ray.config.option_fields import shown
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.evaluation.alignment import Alignment
from ddpm_ray.evaluation.sample_quality import SampleSet
from ddpm_ray.runs.evaluation.image_progress import ImageProgress
from ddpm_ray.runs.evaluation.scored_samples import scored_samples, weights_of
from ddpm_ray.sampling.cascade import Cascade
from ddpm_ray.sampling.drawing_model import DrawingModel
from ddpm_ray.sampling.image_text import TrainedEncoders
from ddpm_ray.sampling.prior import TrainedPrior
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
    last = last_stage(cascade)

    def samples_for(data: Dataset) -> SampleSet:
        """The cascade's samples, of prompts or of captions of `data`."""
        plan, count = (
            sampling_plan(cascade.settings, cascade.denoiser.schedule),
            config.evaluation.num_images,
        )
        prompts = plan.settings.prompts or tuple(prompts_of_data(data, count, plan.settings.seed))
        return SampleSet(
            cascade.denoiser,
            replace(plan, settings=replace(plan.settings, prompts=prompts)),
            image_shape=cascade.drawn_shape,
            num_images=count,
            batch_size=config.sampling.batch_size,
            weights=_weights(cascade) | {"guidance": vars(config.guidance)},
            arithmetic=scoring.arithmetic_of_samples(config.evaluation),
            alignment=Alignment.of(encoders, prompts),
            drawn=partial(_drawn, cascade, prompts),
        )

    begun, codec = run_of_last_stage(cascade), last.denoiser.codec
    scores = scored_samples(config, begun, codec, samples_for, workers, progress)
    progress.finish()
    return scores.to_json()


def _drawn(cascade: Cascade, prompts: Sequence[str], indices: range) -> Images:
    """The images `indices`; image i has prompt i % n. The call gets their own prompts alone."""
    texts = [prompts[i % len(prompts)] for i in indices]
    turned = indices.start % len(texts)  # of the call's texts, image i has text i % len(texts)
    texts = texts[-turned:] + texts[:-turned] if turned else texts
    return cascade.sample(len(indices), first=indices.start, prompts=texts)


def _weights(cascade: Cascade) -> dict[str, Any]:
    """Provenance of all weights, with the settings by which prior and upsamplers draw."""
    stages: tuple[TrainedPrior | DrawingModel, ...] = (cascade.prior, *cascade.upsamplers)
    prior, *upsamplers = (
        weights_of(one.provenance) | {"sampling": to_dict(one.settings)} for one in stages
    )
    return weights_of(cascade.provenance) | {
        "candidates": cascade.candidates,
        "prior": prior,
        "upsamplers": upsamplers,
    }
