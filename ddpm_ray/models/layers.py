"""The parts of the U-Net of Ho et al. 2020 (arXiv:2006.11239, appendix B), each one idea.

B: batch; C: channels; H, W: height and width; E: width of the time embedding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Resample: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Variant:
    """Where published U-Nets part ways; the defaults are Ho et al.'s.

    GUIDED is Dhariwal and Nichol's (2021, arXiv:2105.05233, section 3 and appendix G), up to the
    number of heads.
    """

    norm_eps: float = 1e-6
    num_heads: int = 1  # of each attention
    head_channels: int = 0  # above 0: a head for each so many channels, whatever num_heads is
    scale_shift: bool = False  # t scales and shifts what norm_2 gives; otherwise adds to its input
    resampling_blocks: bool = False  # residual blocks resample, not convolutions
    pads_both_sides: bool = False  # before a strided convolution; otherwise the end alone
    cosines_first: bool = False  # in the embedding of t
    frequency_shift: int = 1  # 1: its lowest frequency is 1/10,000; 0: just above


HO = Variant()
GUIDED = Variant(
    norm_eps=1e-5, scale_shift=True, resampling_blocks=True, pads_both_sides=True,
    cosines_first=True, frequency_shift=0,
)  # fmt: skip


def sinusoidal_embedding(t: Tensor, width: int, variant: Variant = HO) -> Tensor:
    """[B, width] float32 for counts t [B] from 0: all sines, then all cosines; width is even.

    Angular frequencies fall geometrically from 1 to 1/10,000, both included (Vaswani et al. 2017,
    arXiv:1706.03762, section 3.5, with the ends as Ho et al.'s code has them). Of `variant`,
    cosines_first and frequency_shift count.
    """
    half = width // 2
    spacing = math.log(10_000) / max(half - variant.frequency_shift, 1)
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * -spacing)
    angles = t.to(torch.float32)[:, None] * frequencies
    parts = (angles.cos(), angles.sin()) if variant.cosines_first else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=1)


def conv(channels_in: int, channels_out: int, kernel: int = 3) -> nn.Conv2d:
    """A convolution that keeps [H, W], initialised by `xavier_init`."""
    layer = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2)
    xavier_init(layer)
    return layer


def dense(width_in: int, width_out: int) -> nn.Linear:
    """A dense layer, initialised by `xavier_init`."""
    layer = nn.Linear(width_in, width_out)
    xavier_init(layer)
    return layer


def xavier_init(layer: nn.Conv2d | nn.Linear, fused: int = 1) -> None:
    """Fill the weight with U(-a, a), a^2 = 6 / (fan_in + fan_out), and the bias with 0.

    A layer that fuses several of equal width counts the fan_out of one. (Glorot and Bengio 2010;
    Ho et al.'s code: variance scaling, scale 1, average fan, uniform.)
    """
    for part in layer.weight.chunk(fused):
        nn.init.xavier_uniform_(part)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


def zero_init(layer: nn.Conv2d | nn.Linear) -> None:
    """Set a layer to 0: what it ends starts as the identity (Ho et al.'s code, init_scale=0)."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class TimeEmbedding(nn.Module):
    """Steps t [B] in 1..T -> [B, E], swish already applied, as each block's projection wants it."""

    def __init__(self, base_channels: int, width: int, variant: Variant = HO) -> None:
        super().__init__()
        self.base_channels, self.variant = base_channels, variant
        self.dense_1 = dense(base_channels, width)
        self.dense_2 = dense(width, width)

    def forward(self, t: Tensor, label: Tensor | None = None) -> Tensor:
        """[B, E] float for t [B] int64 and, where there are classes, their embedding [B, E].

        The two are added before the last swish (Dhariwal and Nichol 2021, arXiv:2105.05233, 2.2).
        """
        # Ho et al.'s code counts from 0.
        counted_from_0 = sinusoidal_embedding(t - 1, self.base_channels, self.variant)
        hidden = self.dense_1(counted_from_0.to(self.dense_1.weight.dtype))
        embedding: Tensor = self.dense_2(F.silu(hidden))
        return F.silu(embedding if label is None else embedding + label)


def downsample_2x(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, H/2, W/2]: the mean of each 2x2."""
    return F.avg_pool2d(x, 2)


def upsample_2x(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, 2H, 2W]: each pixel becomes four."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class ResBlock(nn.Module):
    """[B, C_in, H, W], [B, E] -> [B, C_out, H, W]; starts as its own skip connection.

    With `resample`, downsample_2x or upsample_2x, it also changes the sides (Brock et al. 2019,
    arXiv:1809.11096, figure 15).
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        time_width: int,
        groups: int,
        dropout: float,
        variant: Variant = HO,
        resample: Resample | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = variant.scale_shift, resample
        self.norm_1 = nn.GroupNorm(groups, channels_in, eps=variant.norm_eps)
        self.conv_1 = conv(channels_in, channels_out)
        self.time = dense(time_width, channels_out * (2 if variant.scale_shift else 1))
        self.norm_2 = nn.GroupNorm(groups, channels_out, eps=variant.norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = conv(channels_out, channels_out)
        zero_init(self.conv_2)
        self.skip: nn.Module = nn.Identity()
        if channels_in != channels_out:
            self.skip = conv(channels_in, channels_out, kernel=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x + f(x, t) [B, C_out, H, W]; where the channels change, x goes through a 1x1."""
        h = F.silu(self.norm_1(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv_1(h)
        time = self.time(embedding)[:, :, None, None]
        if self.scale_shift:  # Dhariwal and Nichol 2021, section 3.1: AdaGN
            scale, shift = time.chunk(2, dim=1)
            h = self.norm_2(h) * (1 + scale) + shift
        else:
            h = self.norm_2(h + time)
        h = self.conv_2(self.dropout(F.silu(h)))
        result: Tensor = self.skip(x) + h
        return result


class Attention(nn.Module):
    """[B, C, H, W] -> the same shape: each pixel attends to all; starts as the identity.

    Of `variant`, norm_eps and the heads count: one in Ho et al.'s. Raises ValueError where the
    channels do not divide by them.
    """

    def __init__(self, channels: int, groups: int, variant: Variant = HO) -> None:
        super().__init__()
        self.num_heads = heads(channels, variant)
        self.norm = nn.GroupNorm(groups, channels, eps=variant.norm_eps)
        self.query_key_value = nn.Linear(channels, 3 * channels)  # rows: query, key, value
        xavier_init(self.query_key_value, fused=3)
        self.out = dense(channels, channels)
        zero_init(self.out)

    def forward(self, x: Tensor) -> Tensor:
        """x + what each pixel takes from all of them, [B, C, H, W]."""
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # [B, H*W, C]
        query, key, value = in_heads(self.query_key_value(pixels), self.num_heads)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        update: Tensor = self.out(mixed).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + update


def heads(channels: int, variant: Variant) -> int:
    """Heads of an attention over so many channels; raises ValueError where they do not divide."""
    count, rest = variant.num_heads, 0
    if variant.head_channels:
        count, rest = divmod(channels, variant.head_channels)
    if rest or count < 1 or channels % count:
        raise ValueError(
            f"num_heads is {variant.num_heads} and head_channels {variant.head_channels}; an "
            f"attention over {channels} channels must divide evenly by them"
        )
    return count


def in_heads(query_key_value: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, each [B, heads, N, C / heads], of all three in one [B, N, 3C]."""
    parts = query_key_value.reshape(*query_key_value.shape[:2], 3 * count, -1).transpose(1, 2)
    query, key, value = parts.chunk(3, dim=1)
    return query, key, value


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

    def __init__(self, channels: int, variant: Variant = HO) -> None:
        super().__init__()
        # TensorFlow's SAME at stride 2 pads an even side at its end only.
        self.padding = (1, 1, 1, 1) if variant.pads_both_sides else (0, 1, 0, 1)
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)
        xavier_init(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(F.pad(x, self.padding))
        return result


class Upsample(nn.Module):
    """[B, C, H, W] -> [B, C, 2H, 2W]: each pixel becomes four, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(upsample_2x(x))
        return result
