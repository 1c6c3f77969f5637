"""Small captioned sets of pixels, written shard by shard."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddpm_ray.config.jobs.pack import Encoding
from ddpm_ray.data import shards
from ddpm_ray.data.dataset import Dataset, write_index
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.manifest import Recipe, ShardRow
from ddpm_ray.data.packing.image_files import encode_image

SHAPE = ImageShape(4, 4, 1)


def write_captioned(
    folder: Path,
    captions: Sequence[Sequence[str]],
    shard_samples: int,
    encoding: Encoding = "raw",
    *,
    noise: bool = False,
    shape: ImageShape = SHAPE,
) -> Dataset:
    """Write a set whose sample n has label n % 7 and captions[n].

    Its images are the grey levels n % 250, or noise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, start in enumerate(range(0, len(captions), shard_samples)):
        numbers = range(start, min(start + shard_samples, len(captions)))
        images = np.stack([_noise(n, shape) if noise else np.full(shape, n % 250) for n in numbers])
        images = images.astype(np.uint8)
        texts, name = [captions[n] for n in numbers], shards.shard_name(number)
        data = shards.shard_bytes(
            images if encoding == "raw" else [encode_image(image, encoding) for image in images],
            [n % 7 for n in numbers],
            [f"n-{n}" for n in numbers],
            texts,
        )
        (folder / name).write_bytes(data)
        digest, sums = hashlib.sha256(data).hexdigest(), shards.pixel_sums(images)
        count = sum(map(len, texts))
        rows.append(ShardRow(name, len(numbers), len(data), digest, *sums, captions=count))
    recipe = Recipe(shape, encoding, "none", tuple("abcdefg"), "0" * 64, captioned=True)
    return write_index(str(folder), recipe, rows)


def _noise(seed: int, shape: ImageShape) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 256, shape)
