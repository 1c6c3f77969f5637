"""Pictures, scores and validation losses of a run while it trains: the callbacks of its task."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ddpm_ray.assembly import diffusion, run_config, training_run
from ddpm_ray.assembly.image_encoders import named_encoder
from ddpm_ray.assembly.inference import inference_network
from ddpm_ray.assembly.inputs_of_data import with_inputs_of_data
from ddpm_ray.assembly.prompts import with_prompts
from ddpm_ray.collectives import Workers
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.codec import Codec
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.reporting import Sink
from ddpm_ray.runs.autoencoder_outputs import AutoencoderOutputs
from ddpm_ray.runs.contrastive_outputs import ContrastiveOutputs
from ddpm_ray.runs.periodic_evaluation import PeriodicEvaluator
from ddpm_ray.storage import object_store
from ddpm_ray.training.sample_grids import GRID_IMAGES, PROMPTS, SampleGridLogger
from ddpm_ray.training.state import TrainingState


class TrainingOutputs(NamedTuple):
    """Callbacks of the loop that show and score the EMA weights of a step."""

    draw_grid: Callable[[int], None]
    draw_strip: Callable[[int], None]
    evaluate: Callable[[int], None]
    validate: Callable[[int], None]


def training_outputs(
    config: RunConfig,
    settings: Mapping[str, Any],
    dataset: Dataset,
    codec: Codec,
    state: TrainingState,
    workers: Workers,
    sink: Sink | None,
) -> TrainingOutputs:
    """Build the callbacks of the task; all workers call them.

    `settings`: of the run's workers. Grids mark the rows of their `held_out_prompts`, which no
    training image has as a caption.
    """
    pictures = object_store.join(settings["folder"], "pictures")
    if config.traits.reconstructs:
        found = AutoencoderOutputs(config, dataset, state, workers, pictures, sink)
        return TrainingOutputs(found.draw_grid, _nothing, found.evaluate, _nothing)
    if config.traits.embeds:
        scored = ContrastiveOutputs(config, dataset, state, workers, sink)
        return TrainingOutputs(_nothing, _nothing, scored.evaluate, _nothing)
    network = inference_network(state.ema.model, config.evaluation, workers.device)
    tokenizer = run_config.saved_tokenizer(state.facts)
    encoder = named_encoder(config, state.facts, workers.device)
    denoiser = diffusion.denoiser(config, network, workers.device, codec, tokenizer, encoder)
    draws = config.traits.draws_images
    if draws:
        denoiser = with_inputs_of_data(denoiser, config.data, dataset, GRID_IMAGES, workers.device)
    names = dataset.manifest.label_names
    plan = diffusion.sampling_plan(config.sampling, denoiser.schedule, names)
    grid_logger = SampleGridLogger(
        denoiser,
        with_prompts(plan, denoiser, dataset, PROMPTS) if draws else plan,
        dataset.manifest.image_shape,
        workers,
        pictures,
        sink,
        config.sampling.batch_size,
        frozenset(settings.get("held_out_prompts", ())),
    )
    return TrainingOutputs(
        grid_logger.log_grid if draws else _nothing,
        grid_logger.log_strip if draws else _nothing,
        PeriodicEvaluator(
            config, dataset, state, grid_logger, settings.get("alignment_checkpoint", {})
        ).evaluate,
        _validate_callback(config, dataset, state, grid_logger),
    )


def _validate_callback(
    config: RunConfig, dataset: Dataset, state: TrainingState, grid_logger: SampleGridLogger
) -> Callable[[int], None]:
    """The callback that computes the validation loss; reads its images only if it is enabled."""
    if not config.evaluation.validation_every_steps:
        return _nothing
    return training_run.validator(config, dataset, state, grid_logger).validate


def _nothing(step: int) -> None:
    """Do nothing, for disabled outputs."""
