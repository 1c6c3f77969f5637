"""Fixtures: small packed data sets in which each image encodes its number."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_ray.config.jobs.pack import Encoding, PackConfig
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.manifest import Recipe
from ddpm_ray.data.packing import packer
from ddpm_ray.data.packing.sources import ArraySource

MakeDataset = Callable[..., Dataset]


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """Pack `samples` grey images of 2 x 3 pixels, `shard_samples` per shard.

    Image n holds the digits of n to base 250, so that an image tells which one it is.
    """

    def make(
        samples: int, shard_samples: int, url: str | None = None, encoding: Encoding = "raw"
    ) -> Dataset:
        numbers = np.arange(samples)
        images = np.zeros((samples, 2, 3, 1), np.uint8)
        images[:, 0, 0, 0], images[:, 1, 2, 0] = numbers // 250, numbers % 250
        source = ArraySource("n", images, numbers % 7, tuple("abcdefg"))
        recipe = Recipe(ImageShape(2, 3, 1), encoding, "none", source.label_names, source.digest)
        count = -(-samples // shard_samples)
        place = url or str(tmp_path / "set")
        plan = packer.PackPlan(source, place, PackConfig(), recipe, count, shard_samples)
        return packer.finish_dataset(plan, [packer.pack_shard(plan, n) for n in range(count)])

    return make


@pytest.fixture
def numbers_of() -> Callable[[torch.Tensor], list[int]]:
    """Return the numbers of images [n, 2, 3, 1] of `make_dataset`."""

    def find(images: torch.Tensor) -> list[int]:
        wide = images.to(torch.int64)
        found: list[int] = (wide[:, 0, 0, 0] * 250 + wide[:, 1, 2, 0]).tolist()
        return found

    return find
