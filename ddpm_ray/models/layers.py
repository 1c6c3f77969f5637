"""The parts of the U-Net of Ho et al. 2020 (arXiv:2006.11239, appendix B), each one idea.

B: batch; C: channels; H, W: height and width; E: width of the time embedding.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-6  # Ho et al.'s; torch's default is 1e-5


def sinusoidal_embedding(t: Tensor, width: int) -> Tensor:
    """[B, width] float32 for counts t [B] from 0: all sines, then all cosines; width is even.

    Angular frequencies fall geometrically from 1 to 1/10,000, both included (Vaswani et al. 2017,
    arXiv:1706.03762, section 3.5, with the ends as Ho et al.'s code has them).
    """
    half = width // 2
    spacing = math.log(10_000) / max(half - 1, 1)
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * -spacing)
    angles = t.to(torch.float32)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def conv(channels_in: int, channels_out: int, kernel: int = 3) -> nn.Conv2d:
    """A convolution that keeps [H, W], initialised by `spread`."""
    layer = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2)
    spread(layer)
    return layer


def dense(width_in: int, width_out: int) -> nn.Linear:
    """A dense layer, initialised by `spread`."""
    layer = nn.Linear(width_in, width_out)
    spread(layer)
    return layer


def spread(layer: nn.Conv2d | nn.Linear, fused: int = 1) -> None:
    """Fill the weight with U(-a, a), a^2 = 6 / (fan_in + fan_out), and the bias with 0.

    A layer that fuses several of equal width counts the fan_out of one. (Glorot and Bengio 2010;
    Ho et al.'s code: variance scaling, scale 1, average fan, uniform.)
    """
    for part in layer.weight.chunk(fused):
        nn.init.xavier_uniform_(part)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


def silence(layer: nn.Conv2d | nn.Linear) -> None:
    """Set a layer to 0: what it ends starts as the identity (Ho et al.'s code, init_scale=0)."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class TimeEmbedding(nn.Module):
    """Steps t [B] in 1..T -> [B, E], swish already applied, as each block's projection wants it."""

    def __init__(self, base_channels: int, width: int) -> None:
        super().__init__()
        self.base_channels = base_channels
        self.dense_1 = dense(base_channels, width)
        self.dense_2 = dense(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """[B, E] float for t [B] int64."""
        counted_from_0 = sinusoidal_embedding(t - 1, self.base_channels)  # as Ho et al.'s code
        hidden = self.dense_1(counted_from_0.to(self.dense_1.weight.dtype))
        embedding: Tensor = F.silu(self.dense_2(F.silu(hidden)))
        return embedding


class ResBlock(nn.Module):
    """[B, C_in, H, W], [B, E] -> [B, C_out, H, W]; starts as its own skip connection."""

    def __init__(
        self, channels_in: int, channels_out: int, time_width: int, groups: int, dropout: float
    ) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(groups, channels_in, eps=NORM_EPS)
        self.conv_1 = conv(channels_in, channels_out)
        self.time = dense(time_width, channels_out)
        self.norm_2 = nn.GroupNorm(groups, channels_out, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = conv(channels_out, channels_out)
        silence(self.conv_2)
        self.skip: nn.Module = nn.Identity()
        if channels_in != channels_out:
            self.skip = conv(channels_in, channels_out, kernel=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x + f(x, t) [B, C_out, H, W]; where the channels change, x goes through a 1x1."""
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = h + self.time(embedding)[:, :, None, None]
        h = self.conv_2(self.dropout(F.silu(self.norm_2(h))))
        result: Tensor = self.skip(x) + h
        return result


class Attention(nn.Module):
    """[B, C, H, W] -> the same shape: each pixel attends to all, one head; starts as identity."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.query_key_value = nn.Linear(channels, 3 * channels)  # rows: query, key, value
        spread(self.query_key_value, fused=3)
        self.out = dense(channels, channels)
        silence(self.out)

    def forward(self, x: Tensor) -> Tensor:
        """x + what each pixel takes from all of them, [B, C, H, W]."""
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # [B, H*W, C]
        query, key, value = self.query_key_value(pixels)[:, None].chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value)[:, 0]
        update: Tensor = self.out(mixed).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + update


class Stage(nn.Module):
    """A residual block and, where it has one, the attention after it."""

    def __init__(self, block: ResBlock, attention: Attention | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h: Tensor = self.block(x, embedding)
        return h if self.attention is None else self.attention(h)


class Downsample(nn.Module):
    """[B, C, H, W] -> [B, C, H/2, W/2] by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)
        spread(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        # TensorFlow's SAME at stride 2 pads an even side at its end only.
        result: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return result


class Upsample(nn.Module):
    """[B, C, H, W] -> [B, C, 2H, 2W]: each pixel becomes four, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return result
