"""Classifier of noisy images for classifier guidance.

(Dhariwal and Nichol 2021, arXiv:2105.05233, section 4 and appendix H.) It is the down path of the
U-Net followed by attention pooling.
"""

import math

import torch
from torch import Tensor, nn

from ddpm_ray.models.group_norm import GroupNormSiLU
from ddpm_ray.models.layers import (
    HO,
    Downsample,
    TimeEmbedding,
    Variant,
    as_input,
    as_weights,
    attend,
    conv,
    dense,
    heads,
    in_heads,
    xavier_init,
    zero_init,
)
from ddpm_ray.models.unet import Parts
from ddpm_ray.models.unet_spec import UNetSpec


class NoisyClassifier(nn.Module):
    """x_t [B, C, H, W], t [B] int64 in 1..T -> logits [B, K] of the classes 0..K-1.

    `spec` is that of the U-Net; its num_classes is K. `image_size` is (H, W): the pooling has a
    position embedding for each pixel. Before training all logits are exactly 0. Guidance uses the
    gradient of log_softmax(logits)[y] with respect to x_t (algorithm 1). The variant GUIDED gives
    the paper's blocks. Raises ValueError for inconsistent sizes.
    """

    def __init__(self, spec: UNetSpec, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.num_classes = spec.num_classes
        if spec.num_classes < 2:
            raise ValueError(f"num_classes is {spec.num_classes}; there must be at least 2")
        spec.require_consistent()
        spec.require_divisible(image_size)
        variant, parts = spec.variant, Parts(spec)
        self.time = TimeEmbedding(spec.base_channels, parts.time_width, variant)
        self.conv_in = conv(spec.image_channels, spec.base_channels)
        self.down, skips = parts.down_path()
        channels = skips[-1]
        self.middle_1 = parts.stage(channels, channels, attends=True)
        self.middle_2 = parts.stage(channels, channels, attends=False)
        self.norm_out = GroupNormSiLU(spec.groups, channels, eps=variant.norm_eps)
        pixels = math.prod(side >> (len(spec.channel_mults) - 1) for side in image_size)
        self.pool = AttentionPool(channels, pixels, variant)
        self.out = dense(channels, spec.num_classes)
        zero_init(self.out)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Logits [B, K]: log p(y | x_t) up to a constant."""
        embedding = self.time(t)
        h = self.conv_in(as_weights(x_t, self.conv_in))
        for module in self.down:
            h = module(h) if isinstance(module, Downsample) else module(h, embedding)
        h = self.middle_2(self.middle_1(h, embedding), embedding)
        return as_input(self.out(self.pool(self.norm_out(h))), x_t)


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
        return attend(query[:, :, :1], key, value).flatten(1)
