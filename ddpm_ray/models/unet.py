"""The noise-predicting U-Net of Ho et al. 2020 (arXiv:2006.11239, appendix B).

With its defaults on 3x32x32 images and dropout 0.1 it is the paper's CIFAR-10 network: 35,746,307
parameters, the structure of the published weights `google/ddpm-cifar10-32`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ddpm_ray.models.layers import (
    NORM_EPS,
    Attention,
    Downsample,
    ResBlock,
    Stage,
    TimeEmbedding,
    Upsample,
    conv,
    silence,
)


class UNet(nn.Module):
    """A denoiser: x_t [B, C, H, W], t [B] int64 in 1..T -> predicted noise [B, C, H, W].

    Level i of the pyramid has base_channels * channel_mults[i] channels at side
    image_size / 2**i. It has attention where that side is one of `attention_resolutions`, and
    always in the middle. Before training the prediction is exactly 0. Dropout draws from torch's
    default generator. `gradient_checkpointing` keeps each stage's input alone and computes the
    stage again in the backward pass: the same numbers for less memory and more time.

    Raises ValueError where the sizes do not fit together.
    """

    def __init__(
        self,
        *,
        image_size: int,
        image_channels: int,
        base_channels: int = 128,
        channel_mults: Sequence[int] = (1, 2, 2, 2),
        blocks_per_level: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        dropout: float = 0.0,
        groups: int = 32,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        widths = [base_channels * mult for mult in channel_mults]
        sides = [image_size >> level for level in range(len(widths))]
        _check(image_size, base_channels, widths, blocks_per_level, attention_resolutions, groups)
        self.gradient_checkpointing = gradient_checkpointing
        time_width = 4 * base_channels

        def stage(channels_in: int, channels_out: int, attends: bool) -> Stage:
            block = ResBlock(channels_in, channels_out, time_width, groups, dropout)
            return Stage(block, Attention(channels_out, groups) if attends else None)

        self.time = TimeEmbedding(base_channels, time_width)
        self.conv_in = conv(image_channels, base_channels)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels, skips = base_channels, [base_channels]
        for width, side in zip(widths, sides, strict=True):
            for _ in range(blocks_per_level):
                self.down.append(stage(channels, width, side in attention_resolutions))
                channels = width
                skips.append(channels)
            if side != sides[-1]:
                self.down.append(Downsample(channels))
                skips.append(channels)
        self.middle_1 = stage(channels, channels, attends=True)
        self.middle_2 = stage(channels, channels, attends=False)
        for width, side in zip(reversed(widths), reversed(sides), strict=True):
            for _ in range(blocks_per_level + 1):
                self.up.append(stage(channels + skips.pop(), width, side in attention_resolutions))
                channels = width
            if side != sides[0]:
                self.up.append(Upsample(channels))
        self.norm_out = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.conv_out = conv(channels, image_channels)
        silence(self.conv_out)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """epsilon_theta(x_t, t), shaped like x_t."""
        embedding = self.time(t)
        h = self.conv_in(x_t)
        skips = [h]
        for module in self.down:
            h = module(h) if isinstance(module, Downsample) else self._run(module, h, embedding)
            skips.append(h)
        h = self._run(self.middle_1, h, embedding)
        h = self._run(self.middle_2, h, embedding)
        for module in self.up:
            if isinstance(module, Upsample):
                h = module(h)
            else:
                h = self._run(module, torch.cat([h, skips.pop()], dim=1), embedding)
        prediction: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return prediction

    def _run(self, stage: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # The generator's state is kept and restored, so that dropout repeats its mask.
            h = checkpoint(stage, h, embedding, use_reentrant=False)
        else:
            h = stage(h, embedding)
        return h


def _check(
    image_size: int,
    base_channels: int,
    widths: Sequence[int],
    blocks_per_level: int,
    attention_resolutions: Sequence[int],
    groups: int,
) -> None:
    if not widths or min(widths) < 1 or base_channels % 2 or blocks_per_level < 1:
        raise ValueError(
            f"base_channels is {base_channels}, the levels' channels are {list(widths)} and "
            f"blocks_per_level is {blocks_per_level}; there must be a level, every number must be "
            "at least 1 and base_channels even"
        )
    factor = 2 ** (len(widths) - 1)
    if image_size < factor or image_size % factor:
        below = image_size // factor * factor
        nearest = f"{below} and {below + factor}" if below else f"{factor}"
        raise ValueError(
            f"image_size is {image_size}, which {len(widths)} levels do not halve evenly: it must "
            f"be a multiple of {factor}; nearest valid: {nearest}"
        )
    for channels in (base_channels, *widths):
        if groups < 1 or channels % groups:
            raise ValueError(
                f"groups is {groups}, which does not divide a level's {channels} channels"
            )
    sides = [image_size >> level for level in range(len(widths))]
    for resolution in attention_resolutions:
        if resolution not in sides:
            raise ValueError(
                f"attention_resolutions names {resolution}, but the levels of an image of side "
                f"{image_size} have sides {', '.join(map(str, sides))}"
            )
