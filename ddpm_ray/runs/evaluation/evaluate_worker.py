"""One worker of an evaluation: each score that the config asks for, with its provenance."""

import dataclasses
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_ray.assembly import data_order, scoring, training_run
from ddpm_ray.assembly.inference import inference_network
from ddpm_ray.assembly.inputs_of_data import with_inputs_of_data
from ddpm_ray.assembly.prompts import with_prompts
from ddpm_ray.collectives import Workers
from ddpm_ray.config.jobs.evaluate import EvaluateConfig
from ddpm_ray.config.loading import from_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.task import TRAITS
from ddpm_ray.data.dataset import Dataset, open_dataset
from ddpm_ray.distributed import fatal_errors, startup
from ddpm_ray.distributed.control_actor import RunControl
from ddpm_ray.distributed.worker_context import distributed_context
from ddpm_ray.evaluation.alignment import Alignment
from ddpm_ray.evaluation.likelihood_over_dataset import Likelihood, flow_likelihood
from ddpm_ray.evaluation.memorisation import Neighbours, nearest_images, spread
from ddpm_ray.evaluation.sample_quality import SampleSet, Scores
from ddpm_ray.evaluation.vlb_over_dataset import BitsPerDim, vlb_bits_per_dim
from ddpm_ray.reporting import Progress
from ddpm_ray.runs import load_model
from ddpm_ray.runs.evaluation.evaluate_autoencoder import autoencoder_scores
from ddpm_ray.runs.evaluation.evaluate_cascade import cascade_scores
from ddpm_ray.runs.evaluation.evaluate_contrastive import contrastive_scores
from ddpm_ray.runs.evaluation.image_progress import ImageProgress
from ddpm_ray.runs.evaluation.scored_samples import scored_samples, weights_of
from ddpm_ray.sampling.cascade import Cascade
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.drawing_model import DrawingModel
from ddpm_ray.sampling.image_text import TrainedEncoders
from ddpm_ray.sampling.sampling import SamplingPlan, draw_uint8, sampling_plan
from ddpm_ray.storage import object_store


def evaluate_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Evaluate as one worker; return the same scores on each worker."""
    config = from_dict(EvaluateConfig, settings["config"])
    control: RunControl = settings["control"]
    startup.mark_done(control)
    if control.status().fatal is not None:
        return {}
    with fatal_errors.report_fatal_errors(control):
        return _scores(config, settings, control.report)


def _images_to_score(config: EvaluateConfig) -> int:
    wanted = config.evaluation
    likelihoods = wanted.bits_per_dim_images + wanted.likelihood_images
    return wanted.num_images + likelihoods + wanted.memorisation_images


def _scores(
    config: EvaluateConfig, settings: dict[str, Any], report: Callable[[Progress], object]
) -> dict[str, Any]:
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    object_store.set_retry_timeout(config.cluster.storage_timeout_s)
    workers = distributed_context()
    progress = ImageProgress(_images_to_score(config), workers, report)
    traits = TRAITS[settings.get("task", "denoiser")]
    if traits.reconstructs:
        return autoencoder_scores(settings["model_uri"], config, workers, progress)
    if traits.embeds:
        return contrastive_scores(settings["model_uri"], config, workers, progress)
    tracking_uri = settings["tracking_uri"]
    model = load_model.load_to_draw(
        settings["model_uri"],
        workers.device,
        autoencoder=config.autoencoder,
        text_model=config.text_model,
        tracking_uri=tracking_uri,
    )
    model = load_model.configured(model, config.sampling, config.guidance, tracking_uri)
    checkpoint = settings.get("alignment_checkpoint", {})
    encoders = scoring.alignment_encoders(config.evaluation, checkpoint, workers.device)
    if isinstance(model, Cascade):
        return cascade_scores(model, config, encoders, workers, progress)
    plan = sampling_plan(config.sampling, model.denoiser.schedule)
    begun, dataset = from_dict(RunConfig, model.provenance["config"]), open_dataset(config.data_url)
    drawn = max(config.evaluation.num_images, config.evaluation.memorisation_images, 1)
    count = min(drawn, int(dataset.counts.sum()))
    shown = with_inputs_of_data(model.denoiser, begun.data, dataset, count, workers.device)
    model = dataclasses.replace(model, denoiser=shown)
    found: dict[str, Any] = {"metrics": {}}
    if config.evaluation.num_images:
        found |= _sample_scores(config, model, plan, encoders, workers, progress).to_json()
    if config.evaluation.bits_per_dim_images:
        bits = _bits_per_dim(config, model, workers, progress).to_json()
        found["metrics"] = found["metrics"] | bits.pop("metrics")
        found["bits_per_dim"] = _with_origin(bits, model, dataset)
    if config.evaluation.likelihood_images:
        of = _likelihood(config, model, workers, progress).to_json()
        found["metrics"] = found["metrics"] | of.pop("metrics")
        found["likelihood"] = _with_origin(of, model, dataset)
    if count := config.evaluation.memorisation_images:
        near = _neighbours(config, model, plan, workers, progress)
        found["metrics"] = found["metrics"] | near.metrics
        found["memorisation"] = near.facts
        if held_out := config.evaluation.held_out_url:
            codec, data = model.denoiser.codec, scoring.reference_data(config.evaluation, dataset)
            others = spread(open_dataset(held_out), count, workers, codec)
            found_near = nearest_images(others, data, workers, codec=codec)
            compared_with = near.compared_with(found_near)
            found["metrics"] = found["metrics"] | compared_with
        if workers.is_main and (path := config.evaluation.memorisation_picture):
            png = io.BytesIO()
            near.picture().save(png, format="PNG")
            object_store.write_bytes(path, png.getvalue())
    progress.finish()
    return found


def _sample_scores(
    config: EvaluateConfig,
    model: DrawingModel,
    plan: SamplingPlan,
    encoders: TrainedEncoders | None,
    workers: Workers,
    progress: ImageProgress,
) -> Scores:
    """Score samples against the data: FID and the other feature metrics."""

    def samples_for(data: Dataset) -> SampleSet:
        """The model's samples, of prompts or of captions of `data`."""
        prompted = with_prompts(plan, model.denoiser, data, config.evaluation.num_images)
        return SampleSet(
            _drawing(model, config, workers),
            prompted,
            image_shape=model.image_shape,
            num_images=config.evaluation.num_images,
            batch_size=config.sampling.batch_size,
            weights=weights_of(model.provenance) | {"guidance": vars(config.guidance)},
            arithmetic=scoring.arithmetic_of_samples(config.evaluation),
            alignment=Alignment.of(encoders, prompted.settings.clean_prompts),
        )

    begun, codec = from_dict(RunConfig, model.provenance["config"]), model.denoiser.codec
    return scored_samples(config, begun, codec, samples_for, workers, progress)


def _drawing(model: DrawingModel, config: EvaluateConfig, workers: Workers) -> Denoiser:
    """The denoiser that draws samples, in the configured arithmetic."""
    wanted, loaded = config.evaluation, model.denoiser.network
    if (wanted.precision, wanted.compile) == ("fp32", "off"):
        return model.denoiser
    assert isinstance(loaded, nn.Module)
    network = inference_network(loaded, wanted, workers.device)
    return dataclasses.replace(model.denoiser, network=network)


def _with_origin(found: dict[str, Any], model: DrawingModel, dataset: Dataset) -> dict[str, Any]:
    """Add weights, data set and choice of images to the provenance in `found`."""
    begun = from_dict(RunConfig, model.provenance["config"])
    origin = {
        "model": weights_of(model.provenance),
        "data": {"sha256": dataset.fingerprint} | data_order.provenance(begun.data),
        "labels": "of the images" if model.denoiser.takes.num_classes else "none",
    }
    return found | {"certificate": found["certificate"] | origin}


def _bits_per_dim(
    config: EvaluateConfig, model: DrawingModel, workers: Workers, progress: ImageProgress
) -> BitsPerDim:
    """Variational bound in bits per dimension on images of the data set."""
    wanted, sampling = config.evaluation, config.sampling
    variance = model.denoiser.variance if sampling.variance == "learned" else sampling.variance
    return vlb_bits_per_dim(
        model.denoiser,
        progress.counted(_images(config, wanted.bits_per_dim_images, model, workers)),
        variance="fixed_small" if variance == "fixed" else variance,
        workers=workers,
        terms=wanted.bits_per_dim_terms or None,
        clip=sampling.clip is not False,
    )


def _neighbours(
    config: EvaluateConfig,
    model: DrawingModel,
    plan: SamplingPlan,
    workers: Workers,
    progress: ImageProgress,
) -> Neighbours:
    """Nearest images of the data set to the first `memorisation_images` samples."""
    mine, size = workers.share(config.evaluation.memorisation_images), config.sampling.batch_size
    shape, device = model.image_shape, workers.device
    batches = progress.counted((index,) for index in torch.split(torch.tensor(mine), size))
    parts = (range(int(index[0]), int(index[-1]) + 1) for (index,) in batches if len(index))
    denoiser = _drawing(model, config, workers)
    images = [draw_uint8(denoiser, plan, one, shape, device, size) for one in parts]
    drawn = np.concatenate([np.empty((0, *shape), np.uint8), *images])
    samples = torch.from_numpy(np.concatenate(workers.gather(drawn)))
    data = scoring.reference_data(config.evaluation, open_dataset(config.data_url))
    return nearest_images(samples, data, workers, codec=model.denoiser.codec)


def _likelihood(
    config: EvaluateConfig, model: DrawingModel, workers: Workers, progress: ImageProgress
) -> Likelihood:
    """Likelihood of images of the data set under the probability flow ODE."""
    wanted = config.evaluation
    batches = progress.counted(_images(config, wanted.likelihood_images, model, workers))
    return flow_likelihood(model.denoiser, batches, steps=wanted.likelihood_steps, workers=workers)


def _images(
    config: EvaluateConfig, count: int, model: DrawingModel, workers: Workers
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This worker's share of a fixed choice of `count` images: batches of index, image, label."""
    begun, dataset = from_dict(RunConfig, model.provenance["config"]), open_dataset(config.data_url)
    total = min(count, int(dataset.counts.sum()))
    mine = workers.share(total)
    images, labels = training_run.fixed_images(begun.data, dataset, mine, total).tensors
    if not mine:  # fewer images than workers
        return iter(())
    index = torch.arange(mine.start, mine.stop)
    size = config.sampling.batch_size
    return zip(*(torch.split(each, size) for each in (index, images, labels)), strict=True)
