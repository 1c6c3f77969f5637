"""Layers of the U-Net of Ho et al. 2020 (arXiv:2006.11239, appendix B).

B: batch; C: channels; H, W: height and width; E: width of the time embedding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_ray.models.group_norm import GroupNorm, GroupNormSiLU, in_autocast

Resample: TypeAlias = Callable[[Tensor], Tensor]
# Keys of `attend`; the weights of so many are 2 MiB for an image and head, in bfloat16.
MAX_KEYS_OF_PRODUCTS = 1024


@dataclass(frozen=True)
class Variant:
    """Options in which published U-Nets differ; the defaults are Ho et al.'s.

    GUIDED is Dhariwal and Nichol's (2021, arXiv:2105.05233, section 3 and appendix G) except for
    the number of heads.
    """

    norm_eps: float = 1e-6
    num_heads: int = 1  # heads per attention
    head_channels: int = 0  # channels per head; above 0 it overrides num_heads
    scale_shift: bool = (
        False  # t scales and shifts the output of norm_2; else is added to its input
    )
    resampling_blocks: bool = False  # residual blocks resample instead of convolutions
    pads_both_sides: bool = False  # padding of strided convolutions; else at the end only
    cosines_first: bool = False  # order in the embedding of t
    frequency_shift: int = 1  # 1: the lowest frequency is 1/10,000; 0: slightly higher


HO = Variant()
GUIDED = Variant(
    norm_eps=1e-5,
    scale_shift=True,
    resampling_blocks=True,
    pads_both_sides=True,
    cosines_first=True,
    frequency_shift=0,
)


def sinusoidal_embedding(t: Tensor, width: int, variant: Variant = HO) -> Tensor:
    """Embed t [B], counted from 0, as [B, width] float32: all sines, then all cosines.

    Angular frequencies decrease geometrically from 1 to 1/10,000, both included (Vaswani et al.
    2017, arXiv:1706.03762, section 3.5, with the end points of Ho et al.'s code). `width` is even.
    Uses cosines_first and frequency_shift of `variant`.
    """
    half = width // 2
    spacing = math.log(10_000) / max(half - variant.frequency_shift, 1)
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * -spacing)
    angles = t.to(torch.float32)[:, None] * frequencies
    parts = (angles.cos(), angles.sin()) if variant.cosines_first else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=1)


def as_weights(x: Tensor, layer: nn.Module) -> Tensor:
    """A network's input x, as its first layer takes it: in bfloat16 if its weights are."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return x.to(weight.dtype) if weight.dtype == torch.bfloat16 else x


def as_input(y: Tensor, x: Tensor) -> Tensor:
    """A network's output y in the dtype of its input x; as it is under autocast."""
    return y if in_autocast(y) else y.to(x.dtype)


def conv(channels_in: int, channels_out: int, kernel: int = 3) -> nn.Conv2d:
    """A convolution that preserves [H, W], with `xavier_init`."""
    layer = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2)
    xavier_init(layer)
    return layer


def dense(width_in: int, width_out: int) -> nn.Linear:
    """A dense layer with `xavier_init`."""
    layer = nn.Linear(width_in, width_out)
    xavier_init(layer)
    return layer


def xavier_init(layer: nn.Conv2d | nn.Linear, fused: int = 1) -> None:
    """Initialise the weight from U(-a, a), a^2 = 6 / (fan_in + fan_out), and a bias to 0.

    `fused` is the number of equal layers that the layer combines; fan_out is that of one of them.
    (Glorot and Bengio 2010; Ho et al.'s code: variance scaling, scale 1, average fan, uniform.)
    """
    for part in layer.weight.chunk(fused):
        nn.init.xavier_uniform_(part)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def zero_init(layer: nn.Conv2d | nn.Linear) -> None:
    """Set all parameters to 0: a residual branch starts at 0 (Ho et al.'s init_scale=0)."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class TimeEmbedding(nn.Module):
    """Steps t [B] in 1..T -> [B, E], including the swish before each block's projection."""

    def __init__(self, base_channels: int, width: int, variant: Variant = HO) -> None:
        super().__init__()
        self.base_channels, self.variant = base_channels, variant
        self.dense_1 = dense(base_channels, width)
        self.dense_2 = dense(width, width)

    def forward(self, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return [B, E] for t [B] int64 and the class embedding `label` [B, E], if there is one.

        The two are added before the last swish (Dhariwal and Nichol 2021, arXiv:2105.05233, 2.2).
        """
        # Ho et al.'s code counts steps from 0.
        counted_from_0 = sinusoidal_embedding(t - 1, self.base_channels, self.variant)
        hidden = self.dense_1(counted_from_0.to(self.dense_1.weight.dtype))
        embedding: Tensor = self.dense_2(F.silu(hidden))
        return F.silu(embedding if label is None else embedding + label)


def downsample_2x(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, H/2, W/2]: 2x2 average pooling."""
    return F.avg_pool2d(x, 2)


def upsample_2x(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, 2H, 2W]: nearest-neighbour interpolation."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class ResBlock(nn.Module):
    """Residual block: [B, C_in, H, W], [B, E] -> [B, C_out, H, W]; its branch is 0 at first.

    With time_width 0 it takes no time embedding. With `resample` = downsample_2x or upsample_2x it
    also changes H and W (Brock et al. 2019, arXiv:1809.11096, figure 15).
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
        self.norm_1 = GroupNormSiLU(groups, channels_in, eps=variant.norm_eps)
        self.conv_1 = conv(channels_in, channels_out)
        width = channels_out * (2 if variant.scale_shift else 1)
        self.time = dense(time_width, width) if time_width else None
        norm = GroupNorm if variant.scale_shift and time_width else GroupNormSiLU
        self.norm_2 = norm(groups, channels_out, eps=variant.norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = conv(channels_out, channels_out)
        zero_init(self.conv_2)
        self.skip: nn.Module = nn.Identity()
        if channels_in != channels_out:
            self.skip = conv(channels_in, channels_out, kernel=1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """x + f(x, t) [B, C_out, H, W]; if the channels change, x passes a 1x1 convolution."""
        h = self.norm_1(x)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self._activated(self.conv_1(h), embedding)
        h = self.conv_2(self.dropout(h))
        result: Tensor = self.skip(x) + h
        return result

    def _activated(self, h: Tensor, embedding: Tensor | None) -> Tensor:
        """SiLU of norm_2 of h [B, C_out, H, W], with the time embedding."""
        if self.time is None:
            without_time: Tensor = self.norm_2(h)
            return without_time
        time = self.time(embedding)[:, :, None, None]
        if self.scale_shift:  # Dhariwal and Nichol 2021, section 3.1: AdaGN
            scale, shift = time.chunk(2, dim=1)
            return F.silu(self.norm_2(h) * (1 + scale) + shift)
        added: Tensor = self.norm_2(h + time)
        return added


class Attention(nn.Module):
    """Self-attention over all pixels: [B, C, H, W] -> [B, C, H, W]; the identity at first.

    Uses norm_eps and the number of heads of `variant`. Raises ValueError unless the channels are a
    multiple of the heads.
    """

    def __init__(self, channels: int, groups: int, variant: Variant = HO) -> None:
        super().__init__()
        self.num_heads = heads(channels, variant)
        self.norm = GroupNorm(groups, channels, eps=variant.norm_eps)
        self.query_key_value = nn.Linear(channels, 3 * channels)  # rows: query, key, value
        xavier_init(self.query_key_value, fused=3)
        self.out = dense(channels, channels)
        zero_init(self.out)

    def forward(self, x: Tensor) -> Tensor:
        """x plus the projected attention output, [B, C, H, W]."""
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # [B, H*W, C]
        query, key, value = in_heads(self.query_key_value(pixels), self.num_heads)
        mixed = attend(query, key, value).transpose(1, 2).flatten(2)
        update: Tensor = self.out(mixed).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + update


def heads(channels: int, variant: Variant) -> int:
    """Number of heads for `channels`; raises ValueError unless they divide evenly."""
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
    """Split [B, N, 3C] into query, key and value, each [B, heads, N, C / heads]."""
    query, key, value = split_heads(query_key_value, 3 * count).chunk(3, dim=1)
    return query, key, value


def split_heads(x: Tensor, count: int) -> Tensor:
    """[B, N, C] -> [B, count, N, C / count]."""
    return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v [B, heads, M, d] of q of that shape, and k and v [B, heads, N, d].

    By torch's fused kernel, except with bfloat16 on a CPU: there the matrix products take 0.4 of
    its time with 256 keys, as long with 4,096, and 0.3 to 0.9 with a backward pass. Without one
    they are used up to MAX_KEYS_OF_PRODUCTS keys.
    """
    by_products = query.dtype == torch.bfloat16 and query.device.type == "cpu"
    few = torch.is_grad_enabled() or key.shape[-2] <= MAX_KEYS_OF_PRODUCTS
    if not (by_products and few) or in_autocast(query):
        return F.scaled_dot_product_attention(query, key, value)
    scaled = query / math.sqrt(query.shape[-1])
    return (scaled @ key.transpose(-2, -1)).softmax(-1) @ value


class Downsample(nn.Module):
    """[B, C, H, W] -> [B, C, H/2, W/2] by a strided convolution."""

    def __init__(self, channels: int, variant: Variant = HO) -> None:
        super().__init__()
        # TensorFlow's SAME at stride 2 pads an even side at its end only.
        self.padding = (1, 1, 1, 1) if variant.pads_both_sides else (0, 1, 0, 1)
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)
        xavier_init(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2]."""
        result: Tensor = self.conv(F.pad(x, self.padding))
        return result


class Upsample(nn.Module):
    """[B, C, H, W] -> [B, C, 2H, 2W]: nearest-neighbour interpolation, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        result: Tensor = self.conv(upsample_2x(x))
        return result
