"""Training with bfloat16 weights and float32 master weights.

(Micikevicius et al. 2018, arXiv:1710.03740, section 3.1.) The master weights are those of
`TrainingState.model`: the optimiser updates them, the EMAs follow them, checkpoints hold them. The
network computes with copies in bfloat16, made anew from the master weights for each batch. A
restart therefore repeats the same bits. Gradients of the copies are summed in float32.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_ray.models.contrastive import LogitScale
from ddpm_ray.models.loss_uncertainty import LogVariance

FLOAT32 = nn.GroupNorm, LogVariance, LogitScale  # layers whose weights stay float32


class Bf16Weights:
    """Copies of a network's weights in bfloat16, in `network`, which computes with them.

    `network` is a copy of `model`. It shares with `model` the weights of the layers FLOAT32, whose
    gradients go to `model` by themselves.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        shared = {
            id(weight): weight
            for layer in model.modules()
            if isinstance(layer, FLOAT32)
            for weight in layer.parameters()
        }
        self._masters: list[Tensor] = [one for one in model.parameters() if id(one) not in shared]
        self._copies: list[Tensor] = [
            nn.Parameter(one.detach().bfloat16(), one.requires_grad) for one in self._masters
        ]
        made: dict[int, Any] = {**shared}
        made |= zip(map(id, self._masters), self._copies, strict=True)
        for buffer in model.buffers():  # a DiT's positions, which are constant
            if buffer.is_floating_point():
                made[id(buffer)] = buffer.bfloat16()
        self.network: nn.Module = copy.deepcopy(model, made)
        self._reduced = False  # whether DDP has put the gradients into the master weights

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the master weights to the copies."""
        torch._foreach_copy_(self._copies, self._masters)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add the copies' gradients to those of the master weights, and drop the former."""
        pairs = zip(self._masters, self._copies, strict=True)
        found = [(master, one.grad) for master, one in pairs if one.grad is not None]
        if found and not self._reduced:
            new = [master for master, _ in found if master.grad is None]
            is_first = len(new) == len(found)  # of the batch's micro-batches
            for master in new:
                master.grad = torch.empty_like(master) if is_first else torch.zeros_like(master)
            sums = [master.grad for master, _ in found if master.grad is not None]
            more = [gradient for _, gradient in found]
            if is_first:
                torch._foreach_copy_(sums, more)
            else:
                torch._foreach_add_(sums, more)
        for one in self._copies:
            one.grad = None
        self._reduced = False

    def master_of(self) -> dict[int, Tensor]:
        """The master weight of each copy, by the copy's id."""
        return dict(zip(map(id, self._copies), self._masters, strict=True))

    def mark_reduced(self) -> None:
        """Note that the master weights have their gradients: the mean over all workers."""
        self._reduced = True
