"""What loss is to be expected at each step, learned beside the network."""

import torch
from torch import Tensor, nn

from ddpm_ray.models.layers import sinusoidal_embedding, zero_init


class LogVariance(nn.Module):
    """u(t): the logarithm of the expected loss, for `diffusion.weights.uncertain`; 0 at first.

    One linear layer on sines and cosines of t (Karras et al. 2024, arXiv:2312.02696, eq. 14, has it
    on those of log sigma). It is of no use in sampling.
    """

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.width = width  # of the embedding of t
        self.dense = nn.Linear(width, 1)
        zero_init(self.dense)

    def forward(self, t: Tensor) -> Tensor:
        """u [B], in the type of the weights even under autocast, for t [B] int64 in 1..T."""
        with torch.autocast(t.device.type, enabled=False):
            waves = sinusoidal_embedding(t - 1, self.width).to(self.dense.weight.dtype)
            u: Tensor = self.dense(waves)
        return u.squeeze(1)
