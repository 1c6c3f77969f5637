"""A small packed data set, for tests that are not about its pictures."""

import hashlib

import numpy as np

from ddpm_ray.data import shards, storage
from ddpm_ray.data.shards import Recipe, ShardRow


def pack_noise(folder: str, images: int, side: int) -> None:
    """Put `images` grey squares of noise, in three shards, into `folder`."""
    noise = np.random.default_rng(0).integers(0, 256, (images, side, side, 1)).astype(np.uint8)
    rows = []
    for number, part in enumerate(np.array_split(noise, 3)):
        name, keys = shards.shard_name(number), [f"{number}-{i}" for i in range(len(part))]
        packed = shards.shard_bytes(part, [-1] * len(part), keys)
        storage.write_bytes(storage.join(folder, name), packed)
        sha256, sums = hashlib.sha256(packed).hexdigest(), shards.pixel_sums(part)
        rows.append(ShardRow(name, len(part), len(packed), sha256, *sums))
    shards.write_index(folder, Recipe((side, side, 1), "raw", "none", (), "0" * 64), rows)
