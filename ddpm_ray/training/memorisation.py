"""Whether samples are copies: each beside the training images nearest to it, by all workers.

Distances are Euclidean between images in [-1, 1]. Each worker reads its share of the shards once,
and keeps the nearest so far of every sample.
"""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ddpm_ray.data.shards import Dataset
from ddpm_ray.data.stream import read_images
from ddpm_ray.data.transforms import to_model_range
from ddpm_ray.generation.grids import captioned, grid
from ddpm_ray.training.workers import Workers

NEIGHBOURS = 50  # of a sample, whose mean distance says how crowded its surroundings are
COPY_RATIO = 0.5  # a sample nearer than this share of that mean counts as a copy
SHOWN = 5  # nearest images that are kept whole
CHUNK = 4096  # training images whose distances are held at once


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The training images nearest to each of N samples, nearest first; equal on every worker."""

    samples: Tensor  # uint8 [N, H, W, C]
    distance: Tensor  # float32 [N, k], rising
    position: Tensor  # int64 [N, k]: in the order in which the data was packed
    images: Tensor  # uint8 [N, 5, H, W, C], of the first five

    @property
    def ratio(self) -> Tensor:
        """The nearest distance over the mean of all k, [N]: small for a copy, 1 at the most.

        (Carlini et al. 2023, arXiv:2301.13188, section 5.1, with their k = 50 and factor 1/2.)
        """
        return self.distance[:, 0] / self.distance.mean(1).clamp(min=1e-12)

    @property
    def metrics(self) -> dict[str, float]:
        """`eval/memorised_share`, of samples that count as copies, and the ratios' median."""
        return {
            "eval/memorised_share": float((self.ratio < COPY_RATIO).double().mean()),
            "eval/nearest_ratio": float(self.ratio.median()),
        }

    def picture(self, most: int = 16) -> Image.Image:
        """Samples, the most suspicious first, each beside its nearest images; their ratios left."""
        order = self.ratio.argsort()[:most]
        rows = torch.cat([self.samples[order][:, None], self.images[order]], 1)
        above = ["sample", *(f"nearest {i + 1}" for i in range(rows.shape[1] - 1))]
        beside = [f"{ratio:.2f}" for ratio in self.ratio[order].tolist()]
        return captioned(grid(rows.flatten(0, 1).numpy(), rows.shape[1]), above, beside)


def nearest(samples: Tensor, dataset: Dataset, workers: Workers) -> Neighbours:
    """The neighbours in `dataset` of all workers' samples, uint8 [N, H, W, C], the same on all.

    Raises ValueError where the data has another shape of images, or fewer than six.
    """
    if samples.shape[1:] != torch.Size(dataset.manifest.image_shape):
        shapes = [list(samples.shape[1:]), list(dataset.manifest.image_shape)]
        raise ValueError(
            f"samples are {shapes[0]} and the images of {dataset.url} {shapes[1]}; name the data "
            "that the model was trained on"
        )
    if dataset.manifest.samples <= SHOWN:
        raise ValueError(f"{dataset.url} holds {dataset.manifest.samples} images; it needs 6")
    shards = workers.share(dataset.manifest.shards)
    position = int(dataset.counts[: shards.start].sum())
    found = _Nearest(samples.to(workers.device))
    for images, _ in read_images(dataset, shards):
        for part in torch.split(images, CHUNK):
            found.meet(part, position)
            position += len(part)
    merged = _Nearest(samples.to(workers.device))
    for distance, places, images in workers.gather((found.distance, found.position, found.images)):
        merged.merge(distance, places, images)
    return Neighbours(samples, *merged.exact())


class _Nearest:
    """The nearest images so far of each sample, on the CPU; farther than all where none was met."""

    def __init__(self, samples: Tensor) -> None:
        self._x = to_model_range(samples).flatten(1)
        count = len(samples)
        self.distance = torch.full((count, NEIGHBOURS), torch.inf)
        self.position = torch.full((count, NEIGHBOURS), -1)
        self.images = torch.zeros(count, SHOWN, *samples.shape[1:], dtype=torch.uint8)

    def meet(self, images: Tensor, first: int) -> None:
        """Training images [n, H, W, C], at positions `first` and on."""
        distance = torch.cdist(self._x, to_model_range(images.to(self._x.device)).flatten(1)).cpu()
        near = distance.topk(min(NEIGHBOURS, len(images)), dim=1, largest=False)
        self.merge(near.values, first + near.indices, images[near.indices[:, :SHOWN]])

    def merge(self, distance: Tensor, position: Tensor, images: Tensor) -> None:
        """Others' nearest [N, m], rising, their positions, and the images of the first five."""
        known = torch.cat([self.distance, distance], 1)
        kept = known.topk(NEIGHBOURS, dim=1, largest=False)
        self.distance = kept.values
        self.position = torch.cat([self.position, position], 1).gather(1, kept.indices)
        # Among a list's first five are all of it that can be among the first five of both.
        here = kept.indices[:, :SHOWN]
        at = torch.where(here < NEIGHBOURS, here, here - NEIGHBOURS + SHOWN)
        both = torch.cat([self.images, images], 1)
        at = at.clamp(max=both.shape[1] - 1)  # of those not met yet, which all are as far
        rows = torch.arange(len(both))[:, None]
        self.images = both[rows, at]

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Distances, positions, images; a copy's distance is exactly 0."""
        shown = (
            to_model_range(self.images.flatten(0, 1)).flatten(1).view(*self.images.shape[:2], -1)
        )
        self.distance[:, :SHOWN] = (shown - self._x.cpu()[:, None]).square().sum(2).sqrt()
        met = self.position[0] >= 0
        return self.distance[:, met], self.position[:, met], self.images
