"""Classifier of noisy images for classifier guidance.

(Dhariwal and Nichol 2021, arXiv:2105.05233, section 4 and appendix H.) It is the down path of the
U-Net followed by attention pooling.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_ray.models.layers import (
    HO,
    Downsample,
    TimeEmbedding,
    Variant,
    conv,
    dense,
    heads,
    in_heads,
    xavier_init,
    zero_init,
)
from ddpm_ray.models.unet import Parts, check_sizes, down_path, pyramid, require_divisible


class NoisyClassifier(nn.Module):
    """x_t [B, C, H, W], t [B] int64 in 1..T -> logits [B, K] of the classes 0..K-1.

    The arguments are those of UNet, and `image_size` (H, W), as the pooling has a position
    embedding of each pixel. Before training all logits are exactly 0. Guidance uses the
    gradient of log_softmax(logits)[y] with respect to x_t (algorithm 1). The variant GUIDED gives
    the paper's blocks. Raises ValueError for inconsistent sizes.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        image_channels: int,
        num_classes: int,
        base_channels: int = 128,
        channel_mults: Sequence[int] = (1, 2, 2, 2),
        blocks_per_level: int = 2,
        attention_factors: Sequence[int] = (2, 4),
        dropout: float = 0.0,
        groups: int = 32,
        variant: Variant = HO,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; there must be at least 2")
        widths = [base_channels * mult for mult in channel_mults]
        check_sizes(base_channels, widths, blocks_per_level, attention_factors, groups)
        require_divisible(image_size, len(widths))
        parts = Parts(4 * base_channels, groups, dropout, variant)
        levels = pyramid(widths, attention_factors)
        self.time = TimeEmbedding(base_channels, parts.time_width, variant)
        self.conv_in = conv(image_channels, base_channels)
        self.down, skips = down_path(base_channels, levels, blocks_per_level, parts)
        channels = skips[-1]
        self.middle_1 = parts.stage(channels, channels, attends=True)
        self.middle_2 = parts.stage(channels, channels, attends=False)
        self.norm_out = nn.GroupNorm(groups, channels, eps=variant.norm_eps)
        pixels = math.prod(side >> (len(widths) - 1) for side in image_size)
        self.pool = AttentionPool(channels, pixels, variant)
        self.out = dense(channels, num_classes)
        zero_init(self.out)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Logits [B, K]: log p(y | x_t) up to a constant."""
        embedding = self.time(t)
        h = self.conv_in(x_t)
        for module in self.down:
            h = module(h) if isinstance(module, Downsample) else module(h, embedding)
        h = self.middle_2(self.middle_1(h, embedding), embedding)
        logits: Tensor = self.out(self.pool(F.silu(self.norm_out(h))))
        return logits


class AttentionPool(nn.Module):
    """Attention pooling: [B, C, H, W] -> [B, C], with the mean over the pixels as the query.

    (Radford et al. 2021, arXiv:2103.00020, section 2.3.) `pixels` is H W. Uses the number of heads
    of `variant`.
    """

    def __init__(self, channels: int, pixels: int, variant: Variant = HO) -> None:
        super().__init__()
        self.num_heads = heads(channels, variant)
        self.position = nn.Parameter(torch.randn(pixels + 1, channels) / math.sqrt(channels))
        self.query_key_value = nn.Linear(channels, 3 * channels)
        xavier_init(self.query_key_value, fused=3)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C]; keys and values are those of the mean and of all pixels."""
        pixels = x.flatten(2).transpose(1, 2)  # [B, H*W, C]
        tokens = torch.cat([pixels.mean(dim=1, keepdim=True), pixels], dim=1) + self.position
        query, key, value = in_heads(self.query_key_value(tokens), self.num_heads)
        return F.scaled_dot_product_attention(query[:, :, :1], key, value).flatten(1)
