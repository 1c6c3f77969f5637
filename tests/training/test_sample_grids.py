"""The pictures of a run: the same ones whoever draws them, on disk and in the sink."""

import copy
import functools
import io
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_ray.collectives import Workers
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion import schedules
from ddpm_ray.diffusion.conditioning import UNCONDITIONAL
from ddpm_ray.diffusion.process import NoiseSchedule
from ddpm_ray.diffusion.timestep_spacing import uniform_steps
from ddpm_ray.models.unet import UNet
from ddpm_ray.models.unet_spec import UNetSpec
from ddpm_ray.reporting import Row
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.sampling import SamplingPlan
from ddpm_ray.storage import object_store
from ddpm_ray.training.sample_grids import SampleGridLogger, picture_url

COSINE = NoiseSchedule(schedules.cosine(10))
OnWorkers = Callable[[int, Callable[[Workers], Any]], list[Any]]


@dataclass
class Wall:
    """A sink that keeps what is hung up."""

    pictures: dict[tuple[str, int], Image.Image] = field(default_factory=dict)

    def rows(self, rows: list[Row]) -> None: ...

    def image(self, key: str, step: int, image: Image.Image) -> None:
        self.pictures[key, step] = image

    def document(self, path: str, content: dict[str, Any]) -> None: ...

    def unsent(self) -> list[Row]:
        return []

    def close(self, patience_s: float) -> int:
        return 0


@functools.cache  # made once: threads that seed torch's one generator at once would draw anything
def network(channels: int) -> UNet:
    """Weights that are not zero, so that images differ."""
    torch.manual_seed(0)
    model = UNet(
        UNetSpec(
            image_channels=channels,
            base_channels=4,
            channel_mults=(1,),
            blocks_per_level=1,
            attention_factors=(),
            groups=2,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def grid_logger(
    folder: Path, workers: Workers, channels: int = 1, batch: int = 64
) -> tuple[SampleGridLogger, Wall]:
    """A grid logger, and the sink of its main worker."""
    model = copy.deepcopy(network(channels))
    denoiser = Denoiser.of_noise(model.eval(), COSINE)
    wall = Wall()
    plan = SamplingPlan(uniform_steps(10, 3), SamplingSettings(seed=4))
    made = SampleGridLogger(
        denoiser,
        plan,
        ImageShape(4, 4, channels),
        workers,
        str(folder),
        wall if workers.is_main else None,
        batch,
    )
    return made, wall


def pixels(image: Image.Image) -> Any:
    return np.asarray(image).astype(int)


def images(wall: Wall, step: int) -> Any:
    """The grid of `step` without its title."""
    picture = wall.pictures["samples", step]
    return pixels(picture)[picture.height - picture.width :]


def grid_by(workers: Workers, folder: Path, batch: int = 64, channels: int = 1) -> Wall:
    made, wall = grid_logger(folder, workers, channels, batch)
    made.log_grid(30)
    return wall


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_logged_and_saved_in_the_folder(channels: int, tmp_path: Path) -> None:
    made, wall = grid_logger(tmp_path, Workers(), channels)
    made.log_grid(30)
    made.log_strip(30)
    assert set(wall.pictures) == {("samples", 30), ("denoising", 30)}
    for (key, step), hung in wall.pictures.items():
        data = object_store.read_bytes(picture_url(str(tmp_path), key, step))
        lying = Image.open(io.BytesIO(data))
        assert lying.format == "PNG"
        assert (pixels(lying) == pixels(hung)[-lying.height :]).all()
        assert hung.height > lying.height, "the step is written above"
    assert len(np.unique(pixels(wall.pictures["samples", 30]))) > 4  # it shows something


@pytest.mark.parametrize("count", [2, 3])
def test_the_grid_is_the_same_on_any_number_of_workers(
    count: int, tmp_path: Path, on_workers: OnWorkers
) -> None:
    """Up to one grey level: a network's sums run in another order in another batch size."""
    alone = pixels(grid_by(Workers(), tmp_path / "1").pictures["samples", 30])
    walls = on_workers(count, lambda workers: grid_by(workers, tmp_path / "n"))
    together = pixels(walls[0].pictures["samples", 30])
    assert np.abs(together - alone).max() <= 1
    assert not any(wall.pictures for wall in walls[1:])  # the main worker alone logs them
    assert len(list((tmp_path / "n").iterdir())) == 1


def test_the_grid_is_the_same_in_batches_of_any_size(tmp_path: Path) -> None:
    whole, parts = (
        pixels(grid_by(Workers(), tmp_path / str(b), b).pictures["samples", 30]) for b in (64, 7)
    )
    assert np.abs(whole - parts).max() <= 1


def test_the_noise_is_the_same_at_each_step_and_the_weights_those_of_now(tmp_path: Path) -> None:
    made, wall = grid_logger(tmp_path, Workers())
    made.log_grid(1)
    made.log_grid(2)
    assert (images(wall, 1) == images(wall, 2)).all()
    network = made.denoiser.network
    made = replace(
        made, denoiser=Denoiser.of_noise(lambda x, t: network(x / 2, t, UNCONDITIONAL), COSINE)
    )
    made.log_grid(3)
    assert (images(wall, 3) != images(wall, 2)).any()
