"""Micro-batches of a network that replays CUDA graphs."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm_ray.collectives import Workers
from ddpm_ray.data.loader import Batch
from ddpm_ray.training.gradient_accumulation import GradientAccumulation, Losses

MEMORY = np.zeros(1, np.float32)  # of the graphs


class Replayed(torch.autograd.Function):
    """weight * x; its gradient lies in MEMORY, which the next forward pass overwrites."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        MEMORY.fill(math.nan)
        ctx.save_for_backward(x)
        return weight * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        MEMORY.fill((gradient * x).sum().item())
        return torch.frombuffer(MEMORY, dtype=torch.float32), None


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_gradients_outlive_the_next_replay(micro_batch: int) -> None:
    network = nn.Linear(1, 1, bias=False)
    network.weight = nn.Parameter(torch.ones(1))

    def losses(batch: Batch, positions: Tensor) -> tuple[Losses, Tensor]:
        loss: Tensor = Replayed.apply(network.weight, batch.images)
        return Losses(loss.detach(), batch.labels, loss.new_empty(len(loss), 0)), loss

    images = torch.tensor([1.0, 2.0, 3.0, 6.0])
    GradientAccumulation(network, losses, 0, Workers(), cuda_graphs=True).backward(
        Batch(images, torch.zeros(4, dtype=torch.int64)), micro_batch
    )
    assert network.weight.grad is not None
    assert network.weight.grad.item() == 3.0
