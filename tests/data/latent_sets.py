"""Small sets of latents with chosen values, and an autoencoder that is exact."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpm_ray.assembly import training_run
from ddpm_ray.assembly.autoencoder_loading import trained_autoencoder
from ddpm_ray.assembly.latents import codec_facts, codec_of_data
from ddpm_ray.config.jobs.encode import EncodeConfig
from ddpm_ray.config.loading import to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data import shards
from ddpm_ray.data.dataset import Dataset, open_dataset, write_index
from ddpm_ray.data.image_shape import ImageShape, LatentShape
from ddpm_ray.data.latent_sums import latent_sums
from ddpm_ray.data.manifest import LatentShardRow, Recipe
from ddpm_ray.data.packing import encoded_packer
from ddpm_ray.data.packing.latent_encoder import LatentEncoder
from ddpm_ray.data.shards import Latents
from ddpm_ray.models.autoencoder import Autoencoder, AutoencoderSpec
from ddpm_ray.models.interop import autoencoder_kl
from ddpm_ray.sampling.autoencoder import TrainedAutoencoder
from ddpm_ray.storage.object_store import write_bytes
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.state import TrainingState
from tests.noise import pack_noise

VIEWS = ("plain", "flipped")
TINY_UNET = (  # options of a network for latents of 4 x 4 and more
    "model.base_channels=4",
    "model.groups=2",
    "model.channel_mults=[1,2]",
    "model.blocks_per_level=1",
    "model.attention_factors=[2]",
)


def random_latents(samples: int, views: int = 2, seed: int = 0) -> Latents:
    """Latents [samples, views, 3, 2, 4] with another mean and scale in each channel."""
    rng = np.random.default_rng(seed)
    shape, column = (samples, views, 3, 2, 4), (3, 1, 1)
    mean = rng.standard_normal(shape) * np.reshape([0.3, 2, 40], column)
    log_variance = rng.uniform(-30, 3, shape)
    return Latents(
        (mean + np.reshape([5, 0, -1], column)).astype(np.float16),
        log_variance.astype(np.float16),
    )


def write_latents(
    folder: Path, latents: Latents, shard_samples: int, views: tuple[str, ...] = VIEWS
) -> Dataset:
    """Write a set of latents of images of twice their sides; sample n has label n % 7."""
    count, _, channels, height, width = latents.mean.shape
    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, count, shard_samples)):
        at = slice(start, min(start + shard_samples, count))
        part = Latents(latents.mean[at], latents.log_variance[at])
        numbers = range(at.start, at.stop)
        data = shards.shard_bytes(part, [n % 7 for n in numbers], [f"n-{n}" for n in numbers])
        (folder / shards.shard_name(number)).write_bytes(data)
        digest, sums = hashlib.sha256(data).hexdigest(), latent_sums(*part)
        name = shards.shard_name(number)
        rows.append(LatentShardRow(name, len(numbers), len(data), digest, [9], [9], *sums))
    image_shape = ImageShape(2 * height, 2 * width, 1)
    shape = LatentShape(channels, height, width)
    recipe = Recipe(
        image_shape,
        "raw",
        "none",
        tuple("abcdefg"),
        "0" * 64,
        codec="latents",
        latent_shape=shape,
        views=views,
        autoencoder_sha256="a" * 64,
    )
    return write_index(str(folder), recipe, rows)


def write_autoencoder(folder: Path, channels: int = 1, side: int = 8) -> TrainedAutoencoder:
    """Write an autoencoder of factor 2 with random weights, as diffusers does, and load it."""
    spec = AutoencoderSpec(channels, 2, 4, (1, 1), 1, 2, middle_attention=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = Autoencoder(spec).state_dict()
    autoencoder_kl.write_folder(folder, spec, tensors, (side, side), write_bytes)
    return trained_autoencoder(str(folder))


def encode_noise(folder: Path, images: int = 45, side: int = 8) -> str:
    """Write noise to pixels/, an autoencoder to autoencoder/, latents to latents/; their URL."""
    pack_noise(str(folder / "pixels"), images, side)
    return encode_pixels(folder, side)


def encode_pixels(folder: Path, side: int) -> str:
    """Encode the images in pixels/ to latents/ by an autoencoder in autoencoder/; their URL."""
    encoder = LatentEncoder(write_autoencoder(folder / "autoencoder", side=side))
    source = open_dataset(str(folder / "pixels"))
    plan = encoded_packer.make_encoding_plan(
        source, str(folder / "latents"), encoder, EncodeConfig(flipped=True)
    )
    encoded = [encoded_packer.encode_shard(plan, n, encoder) for n in range(plan.shards)]
    return encoded_packer.finish_encoded(plan, encoded).url


def initial_run(config: RunConfig, **more: Any) -> TrainingState:
    """The first state of a run on the data at config.data.url, with `more` facts."""
    dataset = open_dataset(config.data.url)
    facts: dict[str, Any] = {
        "config": to_dict(config),
        "image_shape": list(dataset.manifest.image_shape),
        "data_fingerprint": dataset.fingerprint,
        **codec_facts(codec_of_data(config.data, dataset)),
        **more,
    }
    shape = dataset.manifest.diffused_shape
    return training_run.training_state(config, shape, torch.device("cpu"), facts)


def commit(state: TrainingState, folder: Path) -> str:
    """Save the checkpoint of a run in `folder`; its URL."""
    CheckpointStore(str(folder / "checkpoints")).save(state.snapshot([]))
    return str(folder)
