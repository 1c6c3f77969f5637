"""Prepare training batches: timesteps, noise, flips, label dropout and conditioning images.

All random numbers are keyed by (seed, step, position in the global batch), so any number of workers
and any restart produce the same batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ddpm_ray import counter_rng
from ddpm_ray.counter_rng import Purpose
from ddpm_ray.data.transforms import downscaled, to_model_range
from ddpm_ray.diffusion.guidance import dropped, or_null

ChooseSteps: TypeAlias = Callable[[int, Tensor], tuple[Tensor, Tensor | None]]
"""(training step, positions [b]) -> t [b] in 1..T and the importance weights [b] of the losses, or
None if t is uniform."""


@dataclass(frozen=True, eq=False)
class NoisyBatch:
    """Inputs of the loss for b images, in the order of their positions."""

    x_0: Tensor  # float32 [b, C, H, W] in [-1, 1]
    t: Tensor  # int64 [b]
    importance: Tensor | None  # float [b], importance weights with expectation 1
    noise: Tensor  # [b, C, H, W]
    perturbation: Tensor | None  # [b, C, H, W], extra noise in x_t that is not in the target
    labels: Tensor | None  # int64 [b], num_classes where dropped
    low_resolution: Tensor | None  # [b, C, H, W], upsampled to full size


@dataclass(frozen=True)
class NoisingRecipe:
    """Settings of the noising of images: everything that is drawn for a training batch."""

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

    def noisy_batch(
        self, images: Tensor, labels: Tensor, step: int, positions: Tensor, device: torch.device
    ) -> NoisyBatch:
        """Prepare images [b, H, W, C] uint8 and labels [b] at global positions [b] of `step`."""
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
        return NoisyBatch(
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
        small = downscaled(x_0, self.low_resolution_pixels)
        if not self.low_resolution_noise:
            return small
        # Conditioning augmentation: makes a cascade robust to errors of the model before it
        # (Ho et al. 2022, arXiv:2106.15282, section 4).
        more = counter_rng.normal(
            self.seed, Purpose.LOW_RESOLUTION, step, positions, tuple(small.shape[1:])
        )
        return small + self.low_resolution_noise * more
