"""Small sets of latents with chosen values, and an autoencoder that is exact."""

import hashlib
from pathlib import Path

import numpy as np

from ddpm_ray.data import shards
from ddpm_ray.data.dataset import Dataset, LatentShardRow, Recipe, write_index
from ddpm_ray.data.image_shape import ImageShape, LatentShape
from ddpm_ray.data.latent_sums import latent_sums
from ddpm_ray.data.shards import Latents

VIEWS = ("plain", "flipped")


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
