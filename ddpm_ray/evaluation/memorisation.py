"""Whether samples are copies: each next to the training images nearest to it, by all workers.

Distances are Euclidean, between images in [-1, 1] or between their features. Each worker reads its
share of the shards once, and keeps the nearest so far of every sample. Mirrored copies are near in
features only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ddpm_ray.collectives import Workers
from ddpm_ray.data.codec import PIXELS, Codec
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.data.decoded_images import read_decoded
from ddpm_ray.evaluation.features.feature_extractor import FeatureNet
from ddpm_ray.evaluation.features.inception import SPATIAL
from ddpm_ray.evaluation.nearest_neighbours import first_by, nearest_squares
from ddpm_ray.redaction import counted
from ddpm_ray.sampling.image_grid import captioned, grid

if TYPE_CHECKING:
    from PIL import Image

NEIGHBOURS = 50  # of a sample, whose mean distance says how crowded its surroundings are
COPY_RATIO = 0.5  # a sample nearer than this share of that mean counts as a copy
SHOWN = 5  # nearest images that are kept whole
SUSPECTS = 16  # samples that are listed one by one
BATCH = 64  # images that a network looks at, at once
GREY_LEVEL = 1 / PIXELS.levels_per_unit  # in units of x_0


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The training images nearest to each of N samples, nearest first; equal on every worker."""

    samples: Tensor  # uint8 [N, H, W, C]
    distance: Tensor  # float64 [N, k], rising
    position: Tensor  # int64 [N, k]: in the order in which the data was packed
    images: Tensor  # uint8 [N, 5, H, W, C], of the first five
    space: str = ""  # how metrics of it end: "" of pixels, else the network's name and width

    @property
    def ratio(self) -> Tensor:
        """The nearest distance over the mean of all k, [N]: small for a copy, 1 at the most.

        (Carlini et al. 2023, arXiv:2301.13188, section 5.1, with their k = 50 and factor 1/2.)
        """
        return self.distance[:, 0] / self.distance.mean(1).clamp(min=1e-12)

    @property
    def metrics(self) -> dict[str, float]:
        """`eval/memorised_share`, of samples that count as copies, and the ratios' median.

        By chance, of images that were not trained on, 0.4 % count on MNIST and 1 % on CIFAR-10,
        which holds near-duplicates; see `compared_with`.
        """
        return {
            f"eval/memorised_share{self.space}": self._share,
            f"eval/nearest_ratio{self.space}": float(self.ratio.median()),
        }

    def compared_with(self, held_out: Neighbours) -> dict[str, float]:
        """The same of images that were not trained on, in the same space, and how they compare.

        `eval/nearest_to_held_out` is the samples' median distance to the data over theirs: about 1
        where a model has learnt the distribution, far below it where it recites (the question of
        Meehan et al. 2020, arXiv:2004.05675). `eval/memorised_share_held_out` is what chance gives.
        """
        usual = held_out.distance[:, 0].median().clamp(min=1e-12)
        return {
            f"eval/memorised_share_held_out{self.space}": held_out._share,
            f"eval/nearest_to_held_out{self.space}": float(self.distance[:, 0].median() / usual),
        }

    @property
    def _share(self) -> float:
        return float((self.ratio < COPY_RATIO).double().mean())

    @property
    def facts(self) -> dict[str, Any]:
        """Facts that the metrics depend on, and the 16 most suspicious samples; plain JSON.

        A position counts images in the order in which the data was packed, from 0.
        """
        return {
            "samples": len(self.samples),
            "space": self.space.lstrip("_") or "pixels",
            "neighbours": self.distance.shape[1],
            "copy_ratio": COPY_RATIO,
            "most_suspicious": [
                {
                    "sample": i,
                    "ratio": float(self.ratio[i]),
                    "positions": self.position[i, :SHOWN].tolist(),
                    "distances": self.distance[i, :SHOWN].tolist(),
                }
                for i in self._order[:SUSPECTS]
            ],
        }

    @property
    def _order(self) -> list[int]:
        """Samples, the most suspicious first."""
        order: list[int] = self.ratio.argsort(stable=True, dim=0).tolist()
        return order

    def picture(self, most: int = SUSPECTS) -> Image.Image:
        """Samples, the most suspicious first, each next to its five nearest images.

        Left of a sample is its ratio, above each of the nearest is its distance.
        """
        from PIL import Image

        rows = []
        for i in self._order[:most]:
            row = torch.cat([self.samples[i][None], self.images[i]]).numpy()
            above = ["sample", *(f"{d:.3g}" for d in self.distance[i, :SHOWN].tolist())]
            rows.append(captioned(grid(row, len(row)), above, [f"{float(self.ratio[i]):.2f}"]))
        width, height = max(row.width for row in rows), rows[0].height
        whole = Image.new(rows[0].mode, (width, len(rows) * height), "white")
        for i, picture in enumerate(rows):  # flush right: ratios differ in width
            whole.paste(picture, (width - picture.width, i * height))
        return whole


def nearest_images(
    samples: Tensor,
    dataset: Dataset,
    workers: Workers,
    net: FeatureNet | None = None,
    codec: Codec = PIXELS,
) -> Neighbours:
    """The neighbours in `dataset` of all workers' samples, uint8 [N, H, W, C], the same on all.

    In pixels, or in the widest features of `net`. All workers must call it. `codec` is the model's,
    see `image_codec`. Raises ValueError where the data has another shape of images, or fewer than
    six.
    """
    if samples.shape[1:] != torch.Size(dataset.manifest.image_shape):
        shapes = [list(samples.shape[1:]), list(dataset.manifest.image_shape)]
        raise ValueError(
            f"samples are {shapes[0]} and the images of {dataset.url} {shapes[1]}; name the data "
            "that the model was trained on"
        )
    if dataset.manifest.samples <= SHOWN:
        raise ValueError(
            f"{dataset.url} holds {counted(dataset.manifest.samples, 'image')}; the search for "
            f"nearest neighbours needs at least {SHOWN + 1}: name a larger data set"
        )
    features_of, space, unit = _feature_space(net, workers.device)
    vectors, found = features_of(samples), _Nearest(samples)
    shards = workers.share(dataset.manifest.shards)
    for positions, images in read_decoded(dataset, codec, shards):
        near = nearest_squares(vectors, features_of(images), NEIGHBOURS)
        square, place = (part.cpu() for part in near)
        found.merge(square, positions[place], images[place[:, :SHOWN]])
    merged = _Nearest(samples)
    for square, places, images in workers.gather((found.square, found.position, found.images)):
        merged.merge(square, places, images)
    met = merged.position[0] >= 0
    distance = merged.square[:, met].sqrt() * unit
    return Neighbours(samples, distance, merged.position[:, met], merged.images, space)


def spread(dataset: Dataset, count: int, workers: Workers, codec: Codec = PIXELS) -> Tensor:
    """`count` evenly spaced images, uint8 [count, H, W, C], or all of fewer; the same on each.

    All workers must call it, and each reads its share of the shards.
    """
    total = dataset.manifest.samples
    count = min(count, total)
    wanted = torch.zeros(total, dtype=torch.bool)
    wanted[torch.arange(count) * total // count] = True
    shards = workers.share(dataset.manifest.shards)
    mine = [images.numpy() for _, images in read_decoded(dataset, codec, shards, wanted)]
    parts = [part for of_one in workers.gather(mine) for part in of_one]
    return torch.from_numpy(np.concatenate(parts))


def _feature_space(
    net: FeatureNet | None, device: torch.device
) -> tuple[Callable[[Tensor], Tensor], str, float]:
    """uint8 images [N, H, W, C] -> vectors [N, D] on `device`; its space, and their unit."""
    if net is None:
        return lambda images: images.to(device).flatten(1), "", GREY_LEVEL
    width = max(net.widths, key=lambda width: (width != SPATIAL, width))

    def features(images: Tensor) -> Tensor:
        return torch.cat([net(part.to(device))[width] for part in torch.split(images, BATCH)])

    name = f"_{net.name}{width}" if net.name == "inception" else f"_{net.name}"
    return features, name, 1.0


class _Nearest:
    """The nearest images so far of each sample, on the CPU; farther than all where none was met."""

    def __init__(self, samples: Tensor) -> None:
        count = len(samples)
        self.square = torch.full((count, NEIGHBOURS), torch.inf, dtype=torch.float64)
        self.position = torch.full((count, NEIGHBOURS), -1)
        self.images = torch.zeros(count, SHOWN, *samples.shape[1:], dtype=torch.uint8)

    def merge(self, square: Tensor, position: Tensor, images: Tensor) -> None:
        """Others' nearest [N, m], rising, their positions, and the images of the first five."""
        squares = torch.cat([self.square, square], 1)
        positions = torch.cat([self.position, position], 1)
        order = first_by(squares, positions, NEIGHBOURS)
        self.square, self.position = squares.gather(1, order), positions.gather(1, order)
        # Among a list's first five are all of it that can be among the first five of both.
        here = order[:, :SHOWN]
        at = torch.where(here < NEIGHBOURS, here, here - NEIGHBOURS + SHOWN)
        both = torch.cat([self.images, images], 1)
        at = at.clamp(max=both.shape[1] - 1)  # of those not met yet, which all are as far
        rows = torch.arange(len(both))[:, None]
        self.images = both[rows, at]
