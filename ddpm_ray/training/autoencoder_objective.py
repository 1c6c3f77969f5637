"""The training objective of an autoencoder (Rombach et al. 2022, arXiv:2112.10752, appendix G)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from ddpm_ray import counter_rng
from ddpm_ray.collectives import Workers
from ddpm_ray.counter_rng import Purpose
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.loader import Batch
from ddpm_ray.models.autoencoder import AutoencoderSpec, Posterior
from ddpm_ray.training.adversary import Adversary
from ddpm_ray.training.bf16_weights import Bf16Weights
from ddpm_ray.training.gradient_accumulation import GradientAccumulation, Losses

Perceptual: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Images x and x_hat [b, C, H, W] in [-1, 1] -> their distance [b]."""


@dataclass(frozen=True)
class AutoencoderObjective:
    """The losses of each image: reconstruction, perceptual and KL, and the adversary's.

    All are means over the image's values, so that weights do not depend on its size: KL in nats is
    divided by the number of values C * H * W. Up to that common factor, this is Rombach et al.'s
    code.
    """

    seed: int
    spec: AutoencoderSpec
    loss: Literal["l1", "mse"]
    kl_weight: float
    gradient_difference_weight: float = 0.0
    perceptual_weight: float = 0.0
    perceptual: Perceptual | None = None
    adversary: Adversary | None = None
    adversary_from_step: int = 0  # number of the first step with it, from 1
    adversary_weight: float = 0.5
    flip: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    bf16: bool = False  # autocast
    weights: Bf16Weights | None = None  # that the autoencoder computes with
    slots: int = 0  # as in GradientAccumulation
    cuda_graphs: bool = False  # as in GradientAccumulation

    def backward(
        self,
        network: nn.Module,
        batch: Batch,
        step: int,
        workers: Workers,
        micro_batch: int,
    ) -> Losses:
        """Add the gradient of the global batch's mean loss to the networks' parameters.

        Arguments are as in `TrainingObjective.backward`. The returned loss has no adversarial part,
        whose weight changes from step to step.
        """
        adversary = self.adversary if step + 1 >= self.adversary_from_step else None
        used = self.weights, adversary.weights if adversary else None
        return GradientAccumulation(
            network,
            partial(self._part, network, adversary, step, workers.device),
            step,
            workers,
            others=adversary.leaves() if adversary else (),
            slots=self.slots,
            cuda_graphs=self.cuda_graphs,
            weights=[one for one in used if one is not None],
        ).backward(batch, micro_batch)

    def log_snr(self, t: Tensor) -> None:
        """Return None: reconstructions have no noise level."""

    def _part(
        self,
        network: nn.Module,
        adversary: Adversary | None,
        step: int,
        device: torch.device,
        batch: Batch,
        positions: Tensor,
    ) -> tuple[Losses, Tensor]:
        """Losses of a micro-batch of batch `step`, and the values [b] that are minimised."""
        seed = self.seed
        flips = counter_rng.coin(seed, Purpose.FLIP, step, positions) if self.flip else None
        x = PIXELS.encode(batch.images.to(device, non_blocking=True), flips)
        x = x.contiguous(memory_format=self.memory_format)
        shape = self.spec.latent_shape(x.shape[2:])
        noise = counter_rng.normal(seed, Purpose.RECONSTRUCTION, step, positions, shape)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            x_hat, posterior = network(x, noise)
            x_hat = x_hat.float()
            kl = Posterior(*(part.float() for part in posterior)).kl_by_channel()  # [b, c]
            error = self._error(x, x_hat)
            reconstruction = error + self._further(x, x_hat)
            loss = reconstruction + self.kl_weight * kl.sum(1) / x[0].numel()
            terms, minimised = [error[:, None], kl / noise[0, 0].numel()], loss
            if self.adversary is not None:
                parts = [torch.zeros_like(loss)] * 3
                if adversary is not None:
                    adversarial, hinge = adversary.losses(x, x_hat, reconstruction)
                    weight = self.adversary_weight * adversary.weight
                    minimised = loss + weight * adversarial + hinge
                    parts = [adversarial, hinge, weight.expand_as(loss)]
                terms.append(torch.stack(parts, 1))
        t = torch.zeros(len(x), dtype=torch.int64, device=device)
        return Losses(loss.detach(), t, torch.cat(terms, 1).detach()), minimised

    def _error(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Mean absolute or squared error [b]."""
        error = x_hat - x
        return _mean(error.abs() if self.loss == "l1" else error.square())

    def _further(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """The weighted gradient-difference and perceptual parts of the reconstruction loss, [b]."""
        total = torch.zeros_like(x[:, 0, 0, 0])
        if self.gradient_difference_weight:
            error = x_hat - x
            slopes = _mean(error.diff(dim=2).abs()) + _mean(error.diff(dim=3).abs())
            total = total + self.gradient_difference_weight * slopes
        if self.perceptual is not None:
            total = total + self.perceptual_weight * self.perceptual(x, x_hat)
        return total


def _mean(values: Tensor) -> Tensor:
    """Mean [b] over all but the first axis."""
    return values.flatten(1).mean(1)
