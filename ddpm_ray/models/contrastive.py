"""Image and text encoder with embeddings in one space (Radford et al. 2021, arXiv:2103.00020).

B: batch; C, H, W: channels and sides of images; L: tokens of a text; E: width of the embeddings.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_ray.models.group_norm import GroupNormSiLU
from ddpm_ray.models.layers import Downsample, ResBlock, as_weights, conv, dense
from ddpm_ray.models.text_encoder import TextEncoder, TextEncoderSpec
from ddpm_ray.models.unet_spec import require_divisible

SIGMOID_START = 10.0, -10.0  # scale and bias of Zhai et al. 2023, arXiv:2303.15343, section 3.2
INFONCE_START = 1 / 0.07, 0.0  # CLIP's; a bias would not change its loss
MOST_SCALE = 100.0  # of the scale of InfoNCE (Radford et al. 2021, section 2.5)


class Embedded(NamedTuple):
    """A batch of images and texts, and what turns their similarities into logits."""

    images: Tensor  # float32 [B, E], each of length 1
    texts: Tensor  # float32 [B, E], each of length 1
    log_scale: Tensor  # float32 []
    bias: Tensor  # float32 []


@dataclass(frozen=True)
class ContrastiveSpec:
    """Sizes of the two encoders; level i of the image encoder has base_channels * channel_mults[i].

    The sides of level i are H / 2**i and W / 2**i.
    """

    image_channels: int
    base_channels: int
    channel_mults: tuple[int, ...]
    blocks_per_level: int
    groups: int  # of the group norms
    width: int  # E
    text: TextEncoderSpec
    learns_bias: bool = True  # of the logits, for the sigmoid loss

    def require_consistent(self) -> None:
        """Validate channels and groups. Raises ValueError."""
        for mult in self.channel_mults:
            if (channels := self.base_channels * mult) % self.groups:
                raise ValueError(
                    f"groups is {self.groups}, which does not divide a level's {channels} channels"
                )


class ContrastiveEncoders(nn.Module):
    """Images [B, C, H, W] in [-1, 1] and tokens int64 [B, L] -> Embedded.

    The image encoder is a residual network with a mean over the pixels, the text encoder CLIP's;
    each ends in a linear projection to E. Raises ValueError for an inconsistent spec.
    """

    def __init__(self, spec: ContrastiveSpec) -> None:
        super().__init__()
        spec.require_consistent()
        self.spec = spec
        self.image = ImageEncoder(spec)
        self.image_projection = dense(spec.base_channels * spec.channel_mults[-1], spec.width)
        self.text = TextEncoder(spec.text)
        self.text_projection = dense(spec.text.width, spec.width)
        self.logits = LogitScale(learns_bias=spec.learns_bias)

    def forward(self, x: Tensor, tokens: Tensor) -> Embedded:
        """Embeddings of B images and B texts."""
        return Embedded(self.embed_images(x), self.embed_texts(tokens), *self.logits())

    def embed_images(self, x: Tensor) -> Tensor:
        """Embeddings float32 [B, E]; raises ValueError unless the levels halve H and W evenly."""
        require_divisible(x.shape[-2:], len(self.spec.channel_mults))
        return F.normalize(self.image_projection(self.image(x)).float(), dim=1)

    def embed_texts(self, tokens: Tensor) -> Tensor:
        """Embeddings float32 [B, E]; a row of NO_TEXT is the text ""."""
        return F.normalize(self.text_projection(self.text(tokens).pooled).float(), dim=1)


class ImageEncoder(nn.Module):
    """Images [B, C, H, W] -> features [B, channels of the last level]."""

    def __init__(self, spec: ContrastiveSpec) -> None:
        super().__init__()
        channels = spec.base_channels
        self.conv_in = conv(spec.image_channels, channels)
        self.down = nn.Sequential()
        for level, mult in enumerate(spec.channel_mults):
            if level > 0:
                self.down.append(Downsample(channels))
            for _ in range(spec.blocks_per_level):
                width = spec.base_channels * mult
                self.down.append(ResBlock(channels, width, 0, spec.groups, dropout=0.0))
                channels = width
        self.norm_out = GroupNormSiLU(spec.groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Means over the pixels of the last level."""
        h: Tensor = self.norm_out(self.down(self.conv_in(as_weights(x, self.conv_in))))
        return h.mean((2, 3))


class _AtMost(torch.autograd.Function):
    """min(x, most), with a gradient above `most` that only lowers x.

    That of `clamp` is 0 there: a value that is once above would stay for ever.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, most: float) -> Tensor:
        """The minimum of `x` and `most`."""
        ctx.save_for_backward(x)
        ctx.most = most
        return x.clamp(max=most)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient, 0 where a descent would raise an `x` that is at the limit."""
        (x,), (gradient,) = ctx.saved_tensors, gradients
        return torch.where(x < ctx.most, gradient, gradient.clamp(min=0)), None


class LogitScale(nn.Module):
    """Learned scale, as its logarithm, and bias: logits = scale * similarity + bias.

    Without a bias, which is that of InfoNCE, the scale is at most MOST_SCALE.
    """

    def __init__(self, *, learns_bias: bool) -> None:
        super().__init__()
        scale, bias = SIGMOID_START if learns_bias else INFONCE_START
        self.log_scale = nn.Parameter(torch.tensor(scale).log())
        self.bias = nn.Parameter(torch.tensor(bias)) if learns_bias else None

    def forward(self) -> tuple[Tensor, Tensor]:
        """Logarithm of the scale and bias, each []."""
        if self.bias is not None:
            return self.log_scale, self.bias
        most = math.log(MOST_SCALE)
        scale: Tensor = _AtMost.apply(self.log_scale, most)  # type: ignore[no-untyped-call]
        return scale, torch.zeros_like(scale)
