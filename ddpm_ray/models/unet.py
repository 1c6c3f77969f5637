"""The noise-predicting U-Net of Ho et al. 2020 (arXiv:2006.11239, appendix B).

With its defaults on 3x32x32 images and dropout 0.1 it is the paper's CIFAR-10 network: 35,746,307
parameters, the structure of the published weights `google/ddpm-cifar10-32`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ddpm_ray.diffusion.conditioning import UNCONDITIONAL, Conditioning
from ddpm_ray.models.layers import (
    HO,
    Attention,
    Downsample,
    Resample,
    ResBlock,
    Stage,
    TimeEmbedding,
    Upsample,
    Variant,
    conv,
    downsample_2x,
    upsample_2x,
    zero_init,
)
from ddpm_ray.models.loss_uncertainty import LogVariance


class Sizes(TypedDict):
    """The size arguments that UNet and NoisyClassifier share."""

    image_channels: int
    base_channels: int
    channel_mults: tuple[int, ...]
    blocks_per_level: int
    attention_factors: tuple[int, ...]
    dropout: float
    groups: int


@dataclass(frozen=True)
class Parts:
    """Builds the stages of one network, which differ only in their channels."""

    time_width: int
    groups: int
    dropout: float
    variant: Variant

    def stage(self, channels_in: int, channels_out: int, attends: bool) -> Stage:
        """A residual block, with attention if `attends`."""
        block = self._block(channels_in, channels_out)
        return Stage(block, Attention(channels_out, self.groups, self.variant) if attends else None)

    def downsample(self, channels: int) -> Downsample | ResBlock:
        """The layer that halves H and W."""
        if self.variant.resampling_blocks:
            return self._block(channels, channels, downsample_2x)
        return Downsample(channels, self.variant)

    def upsample(self, channels: int) -> Upsample | ResBlock:
        """The layer that doubles H and W."""
        if self.variant.resampling_blocks:
            return self._block(channels, channels, upsample_2x)
        return Upsample(channels)

    def _block(self, c_in: int, c_out: int, resample: Resample | None = None) -> ResBlock:
        return ResBlock(
            c_in, c_out, self.time_width, self.groups, self.dropout, self.variant, resample
        )


def pyramid(widths: Sequence[int], attention_factors: Sequence[int]) -> list[tuple[int, bool]]:
    """(channels, whether its stages have attention) of each level, largest resolution first."""
    return [(width, 2**level in attention_factors) for level, width in enumerate(widths)]


def down_path(
    channels: int, levels: Sequence[tuple[int, bool]], blocks_per_level: int, parts: Parts
) -> tuple[nn.ModuleList, list[int]]:
    """The stages of the down path, and the channels of its input and of each stage's output."""
    path, skips = nn.ModuleList(), [channels]
    for level, (width, attends) in enumerate(levels):
        if level > 0:
            path.append(parts.downsample(skips[-1]))
            skips.append(skips[-1])
        for _ in range(blocks_per_level):
            path.append(parts.stage(skips[-1], width, attends))
            skips.append(width)
    return path, skips


class UNet(nn.Module):
    """A denoiser: x_t [B, C, H, W], t [B] int64 in 1..T -> predicted noise [B, C, H, W].

    H and W are any multiples of 2**(levels - 1).

    With `num_classes` K > 0 it takes labels 0..K-1 and learns an embedding for images without a
    label (Ho and Salimans 2022, arXiv:2207.12598). With `condition_channels` it takes conditioning
    images of that many channels in all, concatenated to x_t. With `learns_variance` the output is
    [B, 2C, H, W], the second half for the variance (Nichol and Dhariwal 2021, arXiv:2102.09672,
    section 3.1). With `learns_uncertainty` it holds a module that learns the expected loss at each
    t, for training only.

    Level i has base_channels * channel_mults[i] channels at H / 2**i x W / 2**i. It has attention
    if its downsampling factor 2**i is one of `attention_factors`; the middle always has. Before
    training the output is exactly 0. Dropout draws from torch's default generator.
    `gradient_checkpointing` stores only each stage's input and recomputes the stage in the backward
    pass: same numbers, less memory, more time. `variant` selects details of other published
    networks.

    Raises ValueError for inconsistent sizes.
    """

    def __init__(
        self,
        *,
        image_channels: int,
        base_channels: int = 128,
        channel_mults: Sequence[int] = (1, 2, 2, 2),
        blocks_per_level: int = 2,
        attention_factors: Sequence[int] = (2,),
        dropout: float = 0.0,
        groups: int = 32,
        gradient_checkpointing: bool = False,
        num_classes: int = 0,
        condition_channels: int = 0,
        learns_variance: bool = False,
        learns_uncertainty: bool = False,
        variant: Variant = HO,
    ) -> None:
        super().__init__()
        widths = [base_channels * mult for mult in channel_mults]
        check_sizes(base_channels, widths, blocks_per_level, attention_factors, groups)
        self.gradient_checkpointing = gradient_checkpointing
        self.num_classes, self.condition_channels = num_classes, condition_channels
        self.variant = variant
        parts = Parts(4 * base_channels, groups, dropout, variant)
        levels = pyramid(widths, attention_factors)
        self.num_levels = len(levels)
        self.time = TimeEmbedding(base_channels, parts.time_width, variant)
        self.conv_in = conv(image_channels + condition_channels, base_channels)
        self.down, skips = down_path(base_channels, levels, blocks_per_level, parts)
        self.up = nn.ModuleList()  # registered here, since parameters are numbered in this order
        channels = skips[-1]
        self.middle_1 = parts.stage(channels, channels, attends=True)
        self.middle_2 = parts.stage(channels, channels, attends=False)
        for level, (width, attends) in reversed([*enumerate(levels)]):
            for _ in range(blocks_per_level + 1):
                self.up.append(parts.stage(channels + skips.pop(), width, attends))
                channels = width
            if level > 0:
                self.up.append(parts.upsample(channels))
        self.norm_out = nn.GroupNorm(groups, channels, eps=variant.norm_eps)
        self.conv_out = conv(channels, image_channels * (2 if learns_variance else 1))
        zero_init(self.conv_out)
        self.label = nn.Embedding(num_classes + 1, parts.time_width) if num_classes else None
        self.uncertainty = LogVariance() if learns_uncertainty else None

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        conditioning: Conditioning = UNCONDITIONAL,
    ) -> Tensor:
        """epsilon_theta(x_t, t), shaped like x_t, or [B, 2C, H, W] with a learned variance.

        Labels default to none and conditioning images to 0, so that all parameters take part in
        each pass. Raises ValueError for sizes and conditioning that the network was not built for.
        """
        require_divisible(x_t.shape[-2:], self.num_levels)
        embedding = self.time(t, self._label(conditioning.labels, t))
        h = self.conv_in(self._with_images(x_t, conditioning.images))
        skips = [h]
        for module in self.down:
            h = module(h) if isinstance(module, Downsample) else self._run(module, h, embedding)
            skips.append(h)
        h = self._run(self.middle_1, h, embedding)
        h = self._run(self.middle_2, h, embedding)
        for module in self.up:
            if isinstance(module, Stage):
                h = torch.cat([h, skips.pop()], dim=1)
            h = module(h) if isinstance(module, Upsample) else self._run(module, h, embedding)
        prediction: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return prediction

    def _label(self, labels: Tensor | None, t: Tensor) -> Tensor | None:
        """The embedding [B, E] of each label."""
        if self.label is None:
            if labels is not None:
                raise ValueError(
                    "labels are given, but num_classes is 0: the network has no classes; build it "
                    "with num_classes, or leave labels out"
                )
            return None
        null = self.num_classes  # the last embedding is that of NO_LABEL
        embedding: Tensor = self.label(
            torch.full_like(t, null, dtype=torch.int64)
            if labels is None
            else torch.where(labels < 0, null, labels)
        )
        return embedding

    def _with_images(self, x_t: Tensor, images: list[Tensor]) -> Tensor:
        """x_t concatenated with the conditioning images, 0 if there are none."""
        if not images:
            missing = self.condition_channels
            return F.pad(x_t, (0, 0, 0, 0, 0, missing)) if missing else x_t
        fits = sum(image.shape[1] for image in images) == self.condition_channels
        if not fits or any(image.shape[2:] != x_t.shape[2:] for image in images):
            found = " and ".join(str(list(image.shape)) for image in images)
            raise ValueError(
                f"conditioning images are {found} for x_t {list(x_t.shape)}; the network takes "
                f"condition_channels {self.condition_channels} in all, of x_t's height and width"
            )
        return torch.cat([x_t, *images], dim=1)

    def _run(self, stage: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # checkpoint() restores the generator's state, so that dropout repeats its mask.
            h = checkpoint(stage, h, embedding, use_reentrant=False)
        else:
            h = stage(h, embedding)
        return h


def require_divisible(image_size: Sequence[int], num_levels: int) -> None:
    """Raise ValueError unless H and W of `image_size` can be halved between all levels."""
    factor, (height, width) = 2 ** (num_levels - 1), image_size
    if height % factor or width % factor or not height or not width:
        nearest = " x ".join(str(max(factor, round(n / factor) * factor)) for n in (height, width))
        raise ValueError(
            f"images are {height} x {width}, which {num_levels} levels do not halve evenly: both "
            f"sides must be multiples of {factor}; nearest valid: {nearest}"
        )


def check_sizes(
    base_channels: int,
    widths: Sequence[int],
    blocks_per_level: int,
    attention_factors: Sequence[int],
    groups: int,
) -> None:
    """Validate channels and levels. Raises ValueError."""
    if not widths or min(widths) < 1 or base_channels % 2 or blocks_per_level < 1:
        raise ValueError(
            f"base_channels is {base_channels}, the levels' channels are {list(widths)} and "
            f"blocks_per_level is {blocks_per_level}; there must be a level, every number must be "
            "at least 1 and base_channels even"
        )
    for channels in (base_channels, *widths):
        if groups < 1 or channels % groups:
            raise ValueError(
                f"groups is {groups}, which does not divide a level's {channels} channels"
            )
    factors = [2**level for level in range(len(widths))]
    for factor in attention_factors:
        if factor not in factors:
            raise ValueError(
                f"attention_factors names {factor}, but the downsampling factors of the levels are "
                f"{', '.join(map(str, factors))}"
            )
