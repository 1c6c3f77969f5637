"""A small packed data set, for tests that are not about its pictures."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddpm_ray.data import shards
from ddpm_ray.data.dataset import Dataset, write_index
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.manifest import Recipe, ShardRow
from ddpm_ray.storage import object_store


def pack(folder: str | Path, images: npt.NDArray[np.uint8], sizes: Sequence[int]) -> Dataset:
    """`images` [N, H, W, C] without labels in shards of these sizes, in `folder`."""
    rows = []
    for number, part in enumerate(np.split(images, np.cumsum(sizes)[:-1])):
        name, keys = shards.shard_name(number), [f"{number}-{i}" for i in range(len(part))]
        packed = shards.shard_bytes(part, [-1] * len(part), keys)
        object_store.write_bytes(object_store.join(str(folder), name), packed)
        sha256, sums = hashlib.sha256(packed).hexdigest(), shards.pixel_sums(part)
        rows.append(ShardRow(name, len(part), len(packed), sha256, *sums))
    height, width, channels = images.shape[1:]
    recipe = Recipe(ImageShape(height, width, channels), "raw", "none", (), "0" * 64)
    return write_index(str(folder), recipe, rows)


def pack_noise(folder: str, images: int, side: int) -> None:
    """Put `images` grey squares of noise, in three shards, into `folder`."""
    noise = np.random.default_rng(0).integers(0, 256, (images, side, side, 1)).astype(np.uint8)
    pack(folder, noise, [len(part) for part in np.array_split(noise, 3)])
