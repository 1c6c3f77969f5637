"""The noise-predicting U-Net of Ho et al. 2020 (arXiv:2006.11239, appendix B).

With its defaults on 3x32x32 images and dropout 0.1 it is the paper's CIFAR-10 network: 35,746,307
parameters, the structure of the published weights `google/ddpm-cifar10-32`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddpm_ray.diffusion.conditioning import UNCONDITIONAL, Conditioning
from ddpm_ray.models.conditioning_inputs import EmbeddingInput, vector_inputs, with_images
from ddpm_ray.models.cross_attention import TextAttention
from ddpm_ray.models.group_norm import GroupNormSiLU
from ddpm_ray.models.layers import (
    Attention,
    Downsample,
    Resample,
    ResBlock,
    TimeEmbedding,
    Upsample,
    as_input,
    as_weights,
    conv,
    downsample_2x,
    upsample_2x,
    zero_init,
)
from ddpm_ray.models.loss_uncertainty import LogVariance
from ddpm_ray.models.spatial_transformer import SpatialTransformer
from ddpm_ray.models.stage import Stage
from ddpm_ray.models.text_encoder import TextInput
from ddpm_ray.models.unet_spec import UNetSpec


@dataclass(frozen=True)
class Parts:
    """Builds the stages of one network, which differ only in their channels."""

    spec: UNetSpec

    @property
    def time_width(self) -> int:
        """Width of the time embedding."""
        return 4 * self.spec.base_channels

    def stage(self, channels_in: int, channels_out: int, attends: bool) -> Stage:
        """A residual block, with attention if `attends`."""
        block, spec = self._block(channels_in, channels_out), self.spec
        if not attends:
            return Stage(block, None)
        if spec.transformer_depth and spec.text is not None:
            return Stage(block, None, transformer=SpatialTransformer(channels_out, spec))
        attention, text = Attention(channels_out, spec.groups, spec.variant), None
        if spec.text is not None:
            text = TextAttention(channels_out, spec.text.width, spec.groups, spec.variant)
        return Stage(block, attention, text)

    def downsample(self, channels: int) -> Downsample | ResBlock:
        """The layer that halves H and W."""
        if self.spec.variant.resampling_blocks:
            return self._block(channels, channels, downsample_2x)
        return Downsample(channels, self.spec.variant)

    def upsample(self, channels: int) -> Upsample | ResBlock:
        """The layer that doubles H and W."""
        if self.spec.variant.resampling_blocks:
            return self._block(channels, channels, upsample_2x)
        return Upsample(channels)

    def down_path(self) -> tuple[nn.ModuleList, list[int]]:
        """The stages of the down path, and the channels of its input and of each stage's output."""
        spec = self.spec
        path, skips = nn.ModuleList(), [spec.base_channels]
        for level, width in enumerate(spec.widths):
            if level > 0:
                path.append(self.downsample(skips[-1]))
                skips.append(skips[-1])
            for _ in range(spec.blocks_per_level):
                path.append(self.stage(skips[-1], width, spec.attends(level)))
                skips.append(width)
        return path, skips

    def _block(self, c_in: int, c_out: int, resample: Resample | None = None) -> ResBlock:
        spec = self.spec
        return ResBlock(
            c_in, c_out, self.time_width, spec.groups, spec.dropout, spec.variant, resample
        )


class UNet(nn.Module):
    """A denoiser: x_t [B, C, H, W], t [B] int64 in 1..T -> predicted noise [B, C, H, W].

    H and W are any multiples of 2**(levels - 1). With `num_classes` in its spec it takes labels and
    learns an embedding for images without a label (Ho and Salimans 2022, arXiv:2207.12598). With
    `text` it takes the tokens of texts and encodes them, with `embedding_width` image embeddings.
    With `transformer_depth`, and without `pools_text`, it is the network of Stable Diffusion.
    With `condition_channels` it takes conditioning images, concatenated to x_t. With
    `learns_variance` the output is [B, 2C, H, W], the second half for the variance (Nichol and
    Dhariwal 2021, arXiv:2102.09672, section 3.1). With `learns_uncertainty` it holds a module that
    learns the expected loss at each t, for training only.

    Before training the output is exactly 0. Dropout draws from torch's default generator.
    `gradient_checkpointing` stores only each stage's input and recomputes the stage in the backward
    pass: same numbers, less memory, more time. Raises ValueError for an inconsistent spec.
    """

    def __init__(
        self,
        spec: UNetSpec,
        *,
        learns_uncertainty: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        spec.require_consistent()
        self.spec, self.gradient_checkpointing = spec, gradient_checkpointing
        variant, classes, parts = spec.variant, spec.num_classes, Parts(spec)
        self.time = TimeEmbedding(spec.base_channels, parts.time_width, variant)
        self.conv_in = conv(spec.image_channels + spec.condition_channels, spec.base_channels)
        self.down, skips = parts.down_path()
        self.up = nn.ModuleList()  # registered here, since parameters are numbered in this order
        channels = skips[-1]
        self.middle_1 = parts.stage(channels, channels, attends=True)
        self.middle_2 = parts.stage(channels, channels, attends=False)
        for level, width in reversed([*enumerate(spec.widths)]):
            for _ in range(spec.blocks_per_level + 1):
                self.up.append(parts.stage(channels + skips.pop(), width, spec.attends(level)))
                channels = width
            if level > 0:
                self.up.append(parts.upsample(channels))
        self.norm_out = GroupNormSiLU(spec.groups, channels, eps=variant.norm_eps)
        self.conv_out = conv(channels, spec.image_channels * (2 if spec.learns_variance else 1))
        zero_init(self.conv_out)
        self.label = nn.Embedding(classes + 1, parts.time_width) if classes else None
        self.text: TextInput | None = None
        if spec.text:
            self.text = TextInput(spec.text, parts.time_width, pools=spec.pools_text)
        self.embedding: EmbeddingInput | None = None
        if spec.embedding_width:
            text_width = spec.text.width if spec.text else None
            self.embedding = EmbeddingInput(spec.embedding_width, parts.time_width, text_width)
        self.uncertainty = LogVariance() if learns_uncertainty else None

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        conditioning: Conditioning = UNCONDITIONAL,
    ) -> Tensor:
        """epsilon_theta(x_t, t), shaped like x_t, or [B, 2C, H, W] with a learned variance.

        Labels and texts default to none, conditioning images to 0, so that all parameters take part
        in each pass. Raises ValueError for sizes and conditioning that it was not built for.
        """
        self.spec.require_divisible(x_t.shape[-2:])
        text, added = vector_inputs(self.text, self.label, self.embedding, conditioning, t)
        embedding = self.time(t, added)
        images = with_images(x_t, conditioning.images, self.spec.condition_channels)
        h = self.conv_in(as_weights(images, self.conv_in))
        skips = [h]
        for module in self.down:
            h = (
                module(h)
                if isinstance(module, Downsample)
                else self._run(module, h, embedding, text)
            )
            skips.append(h)
        h = self._run(self.middle_1, h, embedding, text)
        h = self._run(self.middle_2, h, embedding, text)
        for module in self.up:
            if isinstance(module, Stage):
                h = torch.cat([h, skips.pop()], dim=1)
            h = module(h) if isinstance(module, Upsample) else self._run(module, h, embedding, text)
        return as_input(self.conv_out(self.norm_out(h)), x_t)

    def _run(self, stage: nn.Module, h: Tensor, embedding: Tensor, text: Tensor | None) -> Tensor:
        inputs = (h, embedding, text) if isinstance(stage, Stage) else (h, embedding)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # checkpoint() restores the generator's state, so that dropout repeats its mask.
            h = checkpoint(stage, *inputs, use_reentrant=False)
        else:
            h = stage(*inputs)
        return h
