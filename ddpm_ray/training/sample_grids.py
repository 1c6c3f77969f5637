"""Sample grids drawn during training, always from the same noise."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ddpm_ray.collectives import Workers
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.reporting import Sink
from ddpm_ray.sampling import image_grid
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.sampling import SamplingPlan, draw_uint8
from ddpm_ray.storage import object_store

if TYPE_CHECKING:
    from PIL import Image

GRID_IMAGES = 64
PROMPTS = 8  # that a grid shows where the run names none


@dataclass(frozen=True)
class SampleGridLogger:
    """Draws sample grids on all workers; rank 0 logs them."""

    denoiser: Denoiser  # of the EMA weights
    plan: SamplingPlan
    image_shape: ImageShape
    workers: Workers
    url: str  # folder of the PNG files
    sink: Sink | None  # on the main worker
    batch_size: int = 64
    held_out: frozenset[str] = frozenset()  # prompts that no training image has as a caption

    def log_grid(self, step: int) -> None:
        """Draw samples 0..63 and log them as `samples` at `step`; all workers must call it."""
        mine = draw_uint8(
            self.denoiser,
            self.plan,
            self.workers.share(GRID_IMAGES),
            self.image_shape,
            self.workers.device,
            self.batch_size,
        )
        images = self.workers.gather(mine)
        if self.sink is not None:
            prompts = self.plan.settings.prompts
            drawn = np.concatenate(images)
            picture = image_grid.grid_of_samples(drawn, prompts, self.held_out)
            log_picture(self.sink, self.url, "samples", step, picture)

    def log_strip(self, step: int) -> None:
        """Log the denoising of samples 0..3 from t = T to 0; drawn by rank 0 only."""
        if self.sink is not None:
            strip = image_grid.denoising_strip(
                self.denoiser,
                self.plan,
                torch.arange(image_grid.STRIP_IMAGES),
                self.image_shape,
                self.workers.device,
            )
            log_picture(self.sink, self.url, "denoising", step, strip)


def log_picture(sink: Sink, folder: str, key: str, step: int, picture: Image.Image) -> None:
    """Log `picture` with its step to the sink, and write it below a run's folder of pictures."""
    sink.image(key, step, image_grid.titled(picture, f"step {step:,}"))
    png = io.BytesIO()
    picture.save(png, format="PNG")
    object_store.write_bytes(picture_url(folder, key, step), png.getvalue())


def picture_url(folder: str, key: str, step: int) -> str:
    """URL of the picture `key` of `step` below a run's folder of pictures."""
    return object_store.join(folder, f"{key}-step-{step:08d}.png")
