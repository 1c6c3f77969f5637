"""Learned log-variance of the loss at each step (uncertainty weighting)."""

import torch
from torch import Tensor, nn

from ddpm_ray.models.layers import sinusoidal_embedding, zero_init


class LogVariance(nn.Module):
    """u(t), the logarithm of the expected loss, for `loss_weighting.uncertain`; 0 at first.

    One linear layer on the sinusoidal embedding of t (Karras et al. 2024, arXiv:2312.02696, eq. 14,
    use log sigma). Not used in sampling.
    """

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.width = width  # width of the embedding of t
        self.dense = nn.Linear(width, 1)
        zero_init(self.dense)

    def forward(self, t: Tensor) -> Tensor:
        """u [B] for t [B] int64 in 1..T, in the dtype of the weights even under autocast."""
        with torch.autocast(t.device.type, enabled=False):
            waves = sinusoidal_embedding(t - 1, self.width).to(self.dense.weight.dtype)
            u: Tensor = self.dense(waves)
        return u.squeeze(1)
