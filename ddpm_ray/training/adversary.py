"""The adversary of an autoencoder in training: discriminator, optimiser, weight of its loss.

The weight of the adversarial loss is the norm of the reconstruction loss's gradient divided by that
of the adversarial loss, both at the decoder's last layer (Esser et al. 2021, arXiv:2012.09841,
eq. 7). It is computed from the global batch and used in the next step, so that it needs no second
backward pass and is the same for any number of workers and any micro-batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ddpm_ray.models.patch_discriminator import PatchDiscriminator
from ddpm_ray.training.bf16_weights import Bf16Weights
from ddpm_ray.training.masked_updates import step_optimizer
from ddpm_ray.training.optimizer_moments import Tensors, load_moments, moments

LARGEST_WEIGHT = 1e4  # as in the code of Esser et al.
WEIGHT = "adversarial_weight"  # in a checkpoint, with the discriminator's weights


@dataclass
class Adversary:
    """Discriminator and adversarial weight; equal on all workers after every step."""

    discriminator: PatchDiscriminator
    optimizer: torch.optim.Optimizer  # of the discriminator
    last_layer: Tensor  # the decoder's last weight, where gradients are compared
    weight: Tensor  # [] float32; 0 until the first step with a discriminator has ended
    weights: Bf16Weights | None = None  # that the discriminator computes with

    def __post_init__(self) -> None:
        # Its gradient is that of both losses at the last layer: a leaf, so that workers average it.
        self.compared = torch.zeros(
            2, *self.last_layer.shape, device=self.weight.device, requires_grad=True
        )

    @property
    def _network(self) -> nn.Module:
        """The discriminator that computes the losses."""
        return self.discriminator if self.weights is None else self.weights.network

    def leaves(self) -> list[Tensor]:
        """Tensors, other than the autoencoder's, whose gradients the workers average."""
        return [*self.discriminator.parameters(), self.compared]

    def losses(self, x: Tensor, x_hat: Tensor, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        """Adversarial loss [b] of x_hat and hinge loss [b] of the discriminator.

        The adversarial loss trains only the autoencoder, the hinge loss only the discriminator.
        Adds the gradients of `reconstruction` [b] and of the adversarial loss at the last layer to
        the batch's sums. x and x_hat are images [b, C, H, W].
        """
        fixed = {name: value.detach() for name, value in self._network.named_parameters()}
        adversarial = -_per_image(functional_call(self._network, fixed, (x_hat,)))
        gradients = torch.stack(
            [
                torch.autograd.grad(loss.sum(), self.last_layer, retain_graph=True)[0].float()
                for loss in (reconstruction, adversarial)
            ]
        )
        with torch.no_grad():
            before = self.compared.grad
            self.compared.grad = gradients if before is None else before + gradients
        real, fake = self._network(x), self._network(x_hat.detach())
        hinge = 0.5 * (_per_image(F.relu(1 - real)) + _per_image(F.relu(1 + fake)))
        return adversarial, hinge

    def step(self, learning_rate: float, accepted: Tensor) -> None:
        """Update discriminator and adversarial weight from the gradients, if `accepted`."""
        if self.compared.grad is None:  # before the first step with a discriminator
            return
        reconstruction, adversarial = self.compared.grad.flatten(1).norm(dim=1)
        ratio = reconstruction / adversarial.clamp(min=1e-12)
        ratio = ratio.clamp(max=LARGEST_WEIGHT)
        self.weight.copy_(torch.where(accepted, ratio, self.weight))
        step_optimizer(self.optimizer, learning_rate, accepted)

    def zero_grad(self) -> None:
        """Drop the batch's gradients."""
        self.optimizer.zero_grad()
        self.compared.grad = None

    def tensors(self) -> dict[str, Tensors]:
        """Return the tensor groups of a checkpoint (no copy)."""
        return {
            "discriminator": self.discriminator.state_dict() | {WEIGHT: self.weight},
            "discriminator-optimizer": moments(self.discriminator, self.optimizer),
        }

    def restore(self, groups: dict[str, Tensors]) -> None:
        """Continue from `tensors`. Raises RuntimeError that names tensors that do not match."""
        weights = dict(groups["discriminator"])
        self.weight.copy_(weights.pop(WEIGHT))
        self.discriminator.load_state_dict(weights)
        load_moments(self.discriminator, self.optimizer, groups["discriminator-optimizer"])


def _per_image(logits: Tensor) -> Tensor:
    """Mean [b] over the patches of each image, float32."""
    return logits.float().flatten(1).mean(1)
