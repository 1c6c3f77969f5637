"""What a network is shown of a batch of images: noisy, at which t, with which labels beside.

Everything random about an image is drawn from (seed, step, its position in the global batch), so
that any number of workers, and any restart, show it in the same way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ddpm_ray import counter_rng
from ddpm_ray.counter_rng import Purpose
from ddpm_ray.data.transforms import lowered, to_model_range
from ddpm_ray.diffusion.guidance import dropped, or_null

ChooseSteps: TypeAlias = Callable[[int, Tensor], tuple[Tensor, Tensor | None]]
"""(training step, positions [b]) -> t [b] in 1..T, and what each loss weighs for having been drawn
so often, or None where all are alike."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Of b images, in the order of their positions."""

    x_0: Tensor  # float32 [b, C, H, W] in [-1, 1]
    t: Tensor  # int64 [b]
    importance: Tensor | None  # float [b], of mean 1 over many draws
    noise: Tensor  # [b, C, H, W]
    perturbation: Tensor | None  # noise on x_t that the target knows nothing of, as a multiple
    labels: Tensor | None  # int64 [b], num_classes where it was dropped
    low_resolution: Tensor | None  # [b, C, H, W]


@dataclass(frozen=True)
class Showing:
    """How images become examples, as configured."""

    seed: int
    steps: ChooseSteps
    flip: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    num_classes: int = 0
    label_dropout: float = 0.0
    offset_noise: float = 0.0
    input_perturbation: float = 0.0
    low_resolution_pixels: int = 0
    low_resolution_noise: float = 0.0

    def examples(
        self, images: Tensor, labels: Tensor, step: int, positions: Tensor, device: torch.device
    ) -> Examples:
        """Of images [b, H, W, C] uint8 and labels [b] at global positions [b] of batch `step`."""
        seed = self.seed
        flips = counter_rng.coin(seed, Purpose.FLIP, step, positions) if self.flip else None
        x_0 = to_model_range(images.to(device, non_blocking=True), flips)
        x_0 = x_0.contiguous(memory_format=self.memory_format)
        shape = tuple(x_0.shape[1:])
        t, importance = self.steps(step, positions)
        noise = counter_rng.normal(seed, Purpose.NOISE, step, positions, shape)
        noise = noise.contiguous(memory_format=self.memory_format)
        if self.offset_noise:  # (Guttenberg 2023, "Diffusion with offset noise")
            offset = counter_rng.normal(
                seed, Purpose.OFFSET_NOISE, step, positions, (shape[0], 1, 1)
            )
            noise = noise + self.offset_noise * offset
        perturbation = None
        if self.input_perturbation:  # (Ning et al. 2023, arXiv:2301.11706, algorithm 1)
            more = counter_rng.normal(seed, Purpose.PERTURBATION, step, positions, shape)
            perturbation = self.input_perturbation * more
        return Examples(
            x_0, t, importance, noise, perturbation,
            labels=self._labels(labels, step, positions, device),
            low_resolution=self._low_resolution(x_0, step, positions),
        )  # fmt: skip

    def _labels(
        self, labels: Tensor, step: int, positions: Tensor, device: torch.device
    ) -> Tensor | None:
        if not self.num_classes:
            return None
        known = or_null(labels.to(device, non_blocking=True), self.num_classes)
        return dropped(known, self.num_classes, self.label_dropout, self.seed, step, positions)

    def _low_resolution(self, x_0: Tensor, step: int, positions: Tensor) -> Tensor | None:
        if not self.low_resolution_pixels:
            return None
        small = lowered(x_0, self.low_resolution_pixels)
        if not self.low_resolution_noise:
            return small
        # Noise on it makes a cascade forgive what the model before it draws (Ho et al. 2022,
        # arXiv:2106.15282, section 4).
        more = counter_rng.normal(
            self.seed, Purpose.LOW_RESOLUTION, step, positions, tuple(small.shape[1:])
        )
        return small + self.low_resolution_noise * more
