"""Build the objects of a training run from its config."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ddpm_ray.assembly import data_order, diffusion, optimization, run_config
from ddpm_ray.assembly.autoencoder import adversary, autoencoder_objective, autoencoder_spec
from ddpm_ray.assembly.compilation import require_bf16
from ddpm_ray.assembly.contrastive import contrastive_objective
from ddpm_ray.assembly.diffusion import memory_format
from ddpm_ray.assembly.frozen_text import bind_text_model
from ddpm_ray.assembly.image_embeddings import stored_embeddings
from ddpm_ray.assembly.image_encoders import named_encoder
from ddpm_ray.assembly.networks import network
from ddpm_ray.collectives import Workers
from ddpm_ray.config.data import DataConfig
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.training import TrainingConfig
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.data.dataset_codec import codec_of
from ddpm_ray.data.embedded_stream import EmbeddedStream
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.loader import Batch, ShardStream
from ddpm_ray.data.tokenized_stream import TokenizedStream
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.diffusion.timestep_sampling import SecondMoments
from ddpm_ray.models.autoencoder import Autoencoder
from ddpm_ray.sampling.conditioning import ImageEmbedder
from ddpm_ray.storage import object_store
from ddpm_ray.training import validation_loss
from ddpm_ray.training.bf16_weights import Bf16Weights
from ddpm_ray.training.checkpoint_writer import CheckpointWriter
from ddpm_ray.training.contrastive_objective import ContrastiveMonitor
from ddpm_ray.training.ema import (
    EMA,
    Averages,
    decay_from_half_life,
    decay_group,
    ramped,
    width_group,
)
from ddpm_ray.training.ema_snapshots import SNAPSHOTS, EmaSnapshotter, SnapshotStore
from ddpm_ray.training.metrics_buffer import StepLog, Terms
from ddpm_ray.training.post_hoc_ema import gamma_of, power_decay
from ddpm_ray.training.posterior_monitor import PosteriorMonitor
from ddpm_ray.training.run import Plan, TrainingObjective
from ddpm_ray.training.sample_grids import SampleGridLogger
from ddpm_ray.training.state import TrainingState
from ddpm_ray.training.throughput import DeviceUse
from ddpm_ray.training.validation_loss import LEVELS, Validator

DEFAULT_CACHE = "~/.cache/ddpm-ray"


def training_state(
    config: RunConfig,
    image_shape: ImageShape,
    device: torch.device,
    facts: dict[str, Any],
) -> TrainingState:
    """The initial training state; it depends on the config only, not on the machine.

    A text encoder that is trained elsewhere is loaded as the facts name it: CheckpointError.
    """
    torch.manual_seed(config.seed)
    training = config.training
    checkpoints, tokenizer = training.gradient_checkpointing, run_config.saved_tokenizer(facts)
    model = network(
        config,
        image_shape,
        tokenizer=tokenizer,
        frozen_text=run_config.saved_frozen_text(facts, tokenizer),
        gradient_checkpointing=checkpoints,
    ).to(device)
    bind_text_model(model, facts)
    model.to(memory_format=memory_format(training))  # type: ignore[call-overload]  # torch's stubs
    optimizer = optimization.optimizer(model, training)
    weighs = config.objective.timesteps == "second_moment"
    moments = SecondMoments.empty(config.schedule.num_steps, device) if weighs else None
    averages = Averages.of(model, more_decays(training))
    weights = None
    if training.precision == "bf16_weights":
        require_bf16(device, "training.precision")
        weights = Bf16Weights(model)
    state = TrainingState(model, EMA(model), optimizer, facts, moments, averages, weights=weights)
    if isinstance(model, Autoencoder):
        state.adversary = adversary(config, state.network, device)
    return state


def training_objective(
    config: RunConfig, state: TrainingState, device: torch.device
) -> TrainingObjective:
    """The training objective of `state`'s network."""
    if config.traits.reconstructs:
        cache = cache_dir(config.data, "weights")
        return autoencoder_objective(config, state, device, cache)
    if config.traits.embeds:
        return contrastive_objective(config, state)
    encoder: ImageEmbedder | None = None
    if named := named_encoder(config, state.facts, device):
        # Loaded here, since a compiled step cannot load it; stored embeddings need none.
        encoder = named if config.embedding.url else named.encoders
    return diffusion.objective(config, state, device, encoder)


def step_log(
    config: RunConfig, image_shape: ImageShape, workers: Workers, use: DeviceUse | None = None
) -> StepLog:
    """The buffer of the steps' metrics, for images [H, W, C]."""
    monitor: Terms | None = None
    if config.traits.embeds:
        monitor = ContrastiveMonitor()
    if config.traits.reconstructs:
        wanted, (height, width, channels) = config.autoencoder, image_shape
        monitor = PosteriorMonitor(
            autoencoder_spec(config, channels).latent_shape((height, width)),
            wanted.kl_weight,
            adversary=wanted.discriminator_from_step > 0,
        )
    return StepLog(workers, config.training.log_every_steps, monitor, use)


def plan(config: RunConfig, workers: int) -> Plan:
    """Loop settings of one of `workers` workers."""
    training = config.training
    share = training.global_batch_size // workers
    return Plan(
        steps=training.steps,
        global_batch_size=training.global_batch_size,
        micro_batch_size=min(training.micro_batch_size or share, share),
        max_grad_norm=training.max_grad_norm,
        learning_rate=optimization.learning_rate(training),
        ema_decay=ema_decay(training),
        checkpoint_every_steps=training.checkpoint_every_steps,
        grid_every_steps=training.grid_every_steps,
        evaluate_every_steps=config.evaluation.every_steps if config.evaluation.num_images else 0,
        validate_every_steps=config.evaluation.validation_every_steps,
        snapshot_every_steps=training.ema_snapshot_every_steps,
        core_seconds=training.core_seconds,
    )


def ema_decay(config: TrainingConfig) -> Callable[[int], float]:
    """EMA decay of update s (from 0), with the ramp if configured."""
    decay = config.ema_decay_per_step or decay_from_half_life(
        config.ema_half_life_images, config.global_batch_size
    )
    return _with_ramp(decay, config)


def more_decays(config: TrainingConfig) -> dict[str, Callable[[int], float]]:
    """Decays of the additional EMAs at update s (from 0), by group name."""
    decays = {decay_group(decay): _with_ramp(decay, config) for decay in config.ema_more_decays}
    powers = {
        width_group(width): partial(power_decay, gamma_of(width))
        for width in config.ema_snapshot_widths
    }
    return decays | powers


def _with_ramp(decay: float, config: TrainingConfig) -> Callable[[int], float]:
    return (lambda step: ramped(decay, step)) if config.ema_ramp else (lambda step: decay)


def ema_snapshotter(
    config: RunConfig, state: TrainingState, writer: CheckpointWriter, folder: str, workers: Workers
) -> Callable[[int], None]:
    """The function that stores EMA snapshots in the run's `folder` at the configured steps."""
    training = config.training
    groups = [width_group(width) for width in training.ema_snapshot_widths]
    store = SnapshotStore(object_store.join(folder, SNAPSHOTS)) if workers.is_main else None
    every, last = training.ema_snapshot_every_steps, training.steps
    return EmaSnapshotter(state, groups, every, last, store, writer).snapshot


def stream(
    config: RunConfig, dataset: Dataset, workers: Workers, embeddings: Dataset | None = None
) -> ShardStream:
    """The data loader of this worker's share of each batch, of images or their `embeddings`."""
    sample_bytes = dataset.manifest.sample_bytes
    config = data_order.settled(config, sample_bytes)  # a run's driver has done so
    assert config.data.lanes is not None
    return ShardStream(
        embeddings or dataset,
        seed=config.seed,
        global_batch_size=config.training.global_batch_size,
        positions=workers.share(config.training.global_batch_size),
        lanes=config.data.lanes,
        window_samples=data_order.window_samples(config.data, sample_bytes),
        cache_dir=cache_dir(config.data, "shards"),
        cache_bytes=config.data.cache_bytes,
    )


def stream_with_inputs(
    config: RunConfig, dataset: Dataset, workers: Workers, facts: Mapping[str, Any]
) -> ShardStream | EmbeddedStream | TokenizedStream:
    """The `stream` of a run with these facts, with its stored embeddings and tokens, if any."""
    embeddings, tokenizer = stored_embeddings(config, facts), run_config.saved_tokenizer(facts)
    images = stream(config, dataset, workers)
    found: ShardStream | EmbeddedStream = images
    if embeddings:
        found = EmbeddedStream(images, stream(config, dataset, workers, embeddings))
    return TokenizedStream(found, tokenizer, config.seed) if tokenizer else found


def validator(
    config: RunConfig, dataset: Dataset, state: TrainingState, grid_logger: SampleGridLogger
) -> Validator:
    """The validator of the loss by log-SNR; reads this worker's share of its images once."""
    workers, groups = grid_logger.workers, config.evaluation.validation_images // len(LEVELS)
    share, total = workers.share(groups), groups * len(LEVELS)
    positions = range(share.start * len(LEVELS), share.stop * len(LEVELS))
    samples = fixed_images(
        config.data,
        dataset,
        positions,
        total,
        grid_logger.denoiser.takes.tokenizer,
        stored_embeddings(config, state.facts),
    )
    return Validator(
        state,
        grid_logger.denoiser,
        samples,
        positions.start,
        codec_of(dataset.manifest).variance(dataset.manifest.pixel_std),
        workers,
        grid_logger.sink,
        config.sampling.batch_size,
    )


def fixed_images(
    config: DataConfig,
    dataset: Dataset,
    positions: range,
    total: int,
    tokenizer: Tokenizer | None = None,
    embeddings: Dataset | None = None,
) -> Batch:
    """The images at `positions` of a fixed set of `total` images, read from few shards.

    The set depends only on the data set and `total`: it is the first batch for a fixed seed. With a
    `tokenizer` each has the tokens of one of its captions; `embeddings` is a set of those images.
    """
    if not positions:  # with more workers than images, some get none
        nothing = torch.empty(0, *dataset.manifest.sample_shape, dtype=torch.uint8)
        no_tokens = torch.empty(0, tokenizer.length, dtype=torch.int64) if tokenizer else None
        captioned = dataset.manifest.captioned and tokenizer is None
        no_labels = torch.empty(0, dtype=torch.int64)
        no_embeddings = None
        if embeddings:
            no_embeddings = torch.empty(0, embeddings.manifest.embedding_width, dtype=torch.float16)
        captions: list[tuple[str, ...]] | None = [] if captioned else None
        return Batch(nothing, no_labels, captions, no_tokens, no_embeddings)
    read = partial(
        ShardStream,
        seed=validation_loss.SEED,
        global_batch_size=total,
        positions=positions,
        lanes=math.gcd(config.lanes or data_order.LANES, total),
        window_samples=data_order.window_samples(config, dataset.manifest.sample_bytes),
        cache_dir=cache_dir(config, "shards"),
        cache_bytes=config.cache_bytes,
    )
    images = read(dataset)
    found = EmbeddedStream(images, read(embeddings)) if embeddings else images
    fixed = TokenizedStream(found, tokenizer, validation_loss.SEED) if tokenizer else found
    batch = fixed.batch(0)
    found.close()
    return batch


def cache_dir(config: DataConfig, kind: str) -> Path:
    """Folder of this node's cache of one kind."""
    return Path(config.cache_dir or DEFAULT_CACHE).expanduser() / kind
