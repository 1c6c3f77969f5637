"""Prepare training batches: timesteps, noise, flips, crops, label dropout, conditioning, masks.

All random numbers are keyed by (seed, step, position in the global batch), so any number of workers
and any restart produce the same batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from ddpm_ray import counter_rng
from ddpm_ray.counter_rng import Purpose, Step
from ddpm_ray.data.codec import PIXELS, Codec
from ddpm_ray.data.loader import Batch
from ddpm_ray.diffusion.conditioning import Conditioning, known_part
from ddpm_ray.sampling.conditioning import ConditioningSpec
from ddpm_ray.training.inpainting_masks import known_mask
from ddpm_ray.training.upsampler_augmentation import blurred, cropped

ChooseSteps: TypeAlias = Callable[[Step, Tensor], tuple[Tensor, Tensor | None]]
"""(training step, positions [b]) -> t [b] in 1..T and the importance weights [b] of the losses, or
None if t is uniform."""


@dataclass(frozen=True, eq=False)
class NoisyBatch:
    """Inputs of the loss for b images, in the order of their positions."""

    x_0: Tensor  # float32 [b, C, H, W], pixels in [-1, 1] or latents
    t: Tensor  # int64 [b]
    importance: Tensor | None  # float [b], importance weights with expectation 1
    noise: Tensor  # [b, C, H, W]
    perturbation: Tensor | None  # [b, C, H, W], extra noise in x_t that is not in the target
    conditioning: Conditioning  # without the network's own estimate


@dataclass(frozen=True)
class NoisingRecipe:
    """Settings of the noising of images: everything that is drawn for a training batch."""

    seed: int
    steps: ChooseSteps
    takes: ConditioningSpec
    flip: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    label_dropout: float = 0.0
    embedding_dropout: float = 0.0
    offset_noise: float = 0.0
    input_perturbation: float = 0.0
    low_resolution_noise: float = 0.0
    low_resolution_blur: float = 0.0
    low_resolution_crop: int = 0
    codec: Codec = PIXELS
    compiled: bool = False  # with torch.compile

    def noisy_batch(
        self, batch: Batch, step: int, positions: Tensor, device: torch.device
    ) -> NoisyBatch:
        """Prepare the samples of `batch`, as `codec` stores them, at global positions of `step`."""
        there = batch.map(lambda part: part.to(device, non_blocking=True))
        if not self.compiled:
            return self.draw(*there.tensors, *there.inputs, step, positions)
        # What is compiled or captured keeps each number of the host for ever, and reads a tensor.
        number = torch.full((), step, device=device)
        return self._compiled(*there.tensors, *there.inputs, number, positions)

    @cached_property
    def _compiled(self) -> Callable[..., NoisyBatch]:
        return torch.compile(self.draw)

    def draw(
        self,
        stored: Tensor,
        labels: Tensor,
        tokens: Tensor | None,
        embeddings: Tensor | None,
        step: Step,
        positions: Tensor,
    ) -> NoisyBatch:
        """Prepare samples that are on the device; `step` may be there too, as counter_rng.Step.

        No other number of the host changes from step to step: one capture serves all steps.
        """
        seed = self.seed
        flips = counter_rng.coin(seed, Purpose.FLIP, step, positions) if self.flip else None
        x_0 = self.codec.draw(stored, flips, seed, step, positions)
        x_0 = x_0.contiguous(memory_format=self.memory_format)
        of_data = self.takes.of_data(x_0, labels, tokens, embeddings)
        conditioning = self._conditioning(of_data, x_0, step, positions)
        low, side = conditioning.low_resolution, self.low_resolution_crop
        if low is not None and side:
            x_0, low = cropped(x_0, low, side, seed, step, positions)
            conditioning = replace(conditioning, low_resolution=low)
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
        return NoisyBatch(x_0, t, importance, noise, perturbation, conditioning)

    def _chosen(self, share: float, purpose: Purpose, step: Step, positions: Tensor) -> Tensor:
        """Choose each image with probability `share`: bool [b]."""
        return counter_rng.uniform_int(self.seed, purpose, step, positions, 2**31) < share * 2**31

    def _conditioning(
        self, conditioning: Conditioning, x_0: Tensor, step: Step, positions: Tensor
    ) -> Conditioning:
        """`conditioning` of x_0 with dropouts, conditioning augmentation and a mask."""
        if self.label_dropout and not (
            conditioning.labels is None and conditioning.tokens is None
        ):  # (Ho and Salimans 2022, arXiv:2207.12598, algorithm 1)
            chosen = self._chosen(self.label_dropout, Purpose.LABEL_DROP, step, positions)
            conditioning = conditioning.drop(chosen)
        if self.embedding_dropout:
            chosen = self._chosen(self.embedding_dropout, Purpose.EMBEDDING_DROP, step, positions)
            conditioning = conditioning.drop_embedding(chosen)
        if (low := conditioning.low_resolution) is not None:
            # Makes a cascade robust to errors of the model before it (Ho et al. 2022,
            # arXiv:2106.15282, section 4).
            pixels, key = self.takes.low_resolution_pixels, (self.seed, step, positions)
            if self.low_resolution_blur:
                low = blurred(low, self.low_resolution_blur, pixels, *key)
            if self.low_resolution_noise:
                noise = counter_rng.normal(
                    self.seed, Purpose.LOW_RESOLUTION, step, positions, tuple(low.shape[1:])
                )
                low = low + self.low_resolution_noise * noise
            conditioning = replace(conditioning, low_resolution=low)
        if self.takes.known_pixels:
            mask = known_mask(self.seed, step, positions, x_0.shape[2], x_0.shape[3])
            conditioning = replace(conditioning, known=known_part(x_0, mask))
        return conditioning
