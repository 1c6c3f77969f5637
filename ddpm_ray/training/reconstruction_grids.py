"""Pictures of an autoencoder in training: images above their reconstructions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ddpm_ray.collectives import Workers
from ddpm_ray.models.autoencoder import Autoencoder
from ddpm_ray.reporting import Sink
from ddpm_ray.sampling import image_grid
from ddpm_ray.sampling.reconstruction import round_trip
from ddpm_ray.sampling.sampling import Images
from ddpm_ray.training.sample_grids import log_picture

if TYPE_CHECKING:
    from PIL import Image

RECONSTRUCTIONS = "reconstructions"  # key of the picture
COLUMNS, ROWS = 8, 4  # of images; each row has a row of reconstructions below it
GRID_IMAGES = COLUMNS * ROWS


@dataclass(frozen=True)
class ReconstructionGridLogger:
    """Reconstructs fixed images with the EMA weights on all workers; rank 0 logs the picture."""

    model: Autoencoder  # of the EMA weights
    images: Tensor  # uint8 [n, H, W, C]: this worker's share
    workers: Workers
    url: str  # folder of the PNG files
    sink: Sink | None  # on the main worker
    batch_size: int = 64

    def log_grid(self, step: int) -> None:
        """Log the picture of `step`; all workers must call it."""
        parts = [
            round_trip(self.model, part.to(self.workers.device))[0].cpu()
            for part in torch.split(self.images, self.batch_size)
            if len(part)
        ]
        mine = torch.cat(parts) if parts else self.images
        pairs = self.workers.gather((self.images.numpy(), mine.numpy()))
        if self.sink is not None:
            images, found = (np.concatenate(each) for each in zip(*pairs, strict=True))
            picture = picture_of(images, found)
            log_picture(self.sink, self.url, RECONSTRUCTIONS, step, picture)


def picture_of(images: Images, reconstructions: Images) -> Image.Image:
    """Rows of images uint8 [N, H, W, C], each above the row of their reconstructions.

    N is at most COLUMNS, or a multiple of COLUMNS.
    """
    rows: list[Images] = []
    for start in range(0, len(images), COLUMNS):
        part = slice(start, start + COLUMNS)
        rows += [images[part], reconstructions[part]]
    captions = ["image", "decoded"] * (len(rows) // 2)
    width = min(COLUMNS, len(images))
    return image_grid.captioned(image_grid.grid(np.concatenate(rows), width), [], captions)
