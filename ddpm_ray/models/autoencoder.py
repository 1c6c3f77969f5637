"""The KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, appendix G).

An image [B, C, H, W] becomes a normal distribution over latents [B, c, h, w], h = H / factor, and a
latent becomes an image again. The structure is that of Stable Diffusion's autoencoder, diffusers'
`AutoencoderKL`, whose tensors ddpm_ray/models/interop/autoencoder_kl.py converts both ways.

B: batch; C, H, W: channels and sides of images; c, h, w: of latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddpm_ray.models.group_norm import GroupNormSiLU
from ddpm_ray.models.layers import (
    Attention,
    Downsample,
    ResBlock,
    Upsample,
    as_input,
    as_weights,
    conv,
)
from ddpm_ray.models.unet_spec import require_divisible

LOG_VARIANCES = (-30.0, 20.0)  # range to which the encoder's log variances are clamped
IN_USE_NATS = 0.01  # mean KL per latent value from which a channel counts as in use
NORM_EPS = 1e-6  # of all group norms; the layers' default


@dataclass(frozen=True)
class AutoencoderSpec:
    """Sizes of an autoencoder; level i has base_channels * channel_mults[i] channels.

    The sides of level i are H / 2**i and W / 2**i. Stable Diffusion's is AutoencoderSpec(3, 4, 128,
    (1, 2, 4, 4), 2, 32, True) with factor 8.
    """

    image_channels: int
    latent_channels: int
    base_channels: int
    channel_mults: tuple[int, ...]
    blocks_per_level: int  # of the encoder; the decoder has one more
    groups: int  # of the group norms
    middle_attention: bool  # self-attention over all latent pixels, in encoder and decoder
    latent_convs: bool = (
        True  # 1x1 convolutions of moments and latents; Stable Diffusion 3 has neither
    )

    @property
    def factor(self) -> int:
        """Downsampling factor: pixels per latent, along each side."""
        factor: int = 2 ** (len(self.channel_mults) - 1)
        return factor

    @property
    def widths(self) -> list[int]:
        """The channels of each level, largest resolution first."""
        return [self.base_channels * mult for mult in self.channel_mults]

    def latent_shape(self, image_size: Sequence[int]) -> tuple[int, int, int]:
        """(c, h, w) of the latents of images of `image_size` (H, W); raises ValueError."""
        require_divisible(image_size, len(self.channel_mults))
        height, width = image_size
        return self.latent_channels, height // self.factor, width // self.factor

    def require_consistent(self) -> None:
        """Validate channels, groups and levels. Raises ValueError."""
        numbers = {
            "image_channels": self.image_channels,
            "latent_channels": self.latent_channels,
            "base_channels": self.base_channels,
            "blocks_per_level": self.blocks_per_level,
            "groups": self.groups,
            "channel_mults": min(self.channel_mults, default=0),
        }
        for name, least in numbers.items():
            if least < 1:
                value = getattr(self, name)
                raise ValueError(f"{name} is {value}; an autoencoder needs at least 1")
        for width in self.widths:
            if width % self.groups:
                raise ValueError(
                    f"groups is {self.groups}, which does not divide a level's {width} channels"
                )


class Posterior(NamedTuple):
    """The encoder's normal distribution q(z | x), independent in every latent value."""

    mean: Tensor  # [B, c, h, w]
    log_variance: Tensor  # [B, c, h, w], in LOG_VARIANCES

    def sample(self, noise: Tensor) -> Tensor:
        """z = mean + std * noise for standard normal noise [B, c, h, w]."""
        return self.mean + torch.exp(0.5 * self.log_variance) * noise

    def kl(self) -> Tensor:
        """KL(q(z | x) || N(0, I)) of each image, [B], in nats, summed over all latent values."""
        return self.kl_by_channel().sum(1)

    def kl_by_channel(self) -> Tensor:
        """The part of `kl` of each latent channel, [B, c], in nats, summed over its values."""
        excess = torch.expm1(self.log_variance) - self.log_variance
        return 0.5 * (self.mean.square() + excess).flatten(2).sum(2)


def channels_in_use(kl_nats: Tensor) -> Tensor:
    """Whether each latent channel is in use, bool [c], from its mean KL per latent value [c].

    A channel whose posterior is the prior for every image carries nothing (Bowman et al. 2016,
    arXiv:1511.06349: posterior collapse).
    """
    return kl_nats >= IN_USE_NATS


class Autoencoder(nn.Module):
    """Encodes images [B, C, H, W] in [-1, 1] and decodes latents; H and W: multiples of factor.

    Residual branches and attention begin as 0. Raises ValueError for an inconsistent spec.
    """

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        spec.require_consistent()
        self.spec = spec
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)
        self.moments_conv: nn.Module = nn.Identity()
        self.latents_conv: nn.Module = nn.Identity()
        if spec.latent_convs:
            c = spec.latent_channels
            self.moments_conv = conv(2 * c, 2 * c, kernel=1)
            self.latents_conv = conv(c, c, kernel=1)

    def encode(self, x: Tensor) -> Posterior:
        """q(z | x) for images x [B, C, H, W]; raises ValueError unless factor divides H and W."""
        require_divisible(x.shape[-2:], len(self.spec.channel_mults))
        moments = as_input(self.moments_conv(self.encoder(x)), x)
        mean, log_variance = moments.chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(*LOG_VARIANCES))

    def decode(self, z: Tensor) -> Tensor:
        """Images [B, C, factor * h, factor * w] from latents z [B, c, h, w]; not clipped."""
        h = z
        if self.spec.latent_convs:
            h = self.latents_conv(as_weights(z, self.latents_conv))
        return as_input(self.decoder(h), z)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Posterior]:
        """decode(z) [B, C, H, W] of a z drawn with `noise` [B, c, h, w], and q(z | x)."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(noise)), posterior

    @property
    def last_layer(self) -> Tensor:
        """The weight of the decoder's last convolution, which weighs the adversarial loss."""
        return self.decoder.conv_out.weight


class Encoder(nn.Module):
    """Images [B, C, H, W] -> mean and log variance [B, 2c, h, w]."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        channels = spec.base_channels
        self.conv_in = conv(spec.image_channels, channels)
        self.down = nn.Sequential()
        for level, width in enumerate(spec.widths):
            if level > 0:
                self.down.append(Downsample(channels))
            for _ in range(spec.blocks_per_level):
                self.down.append(block_without_time(channels, width, spec.groups))
                channels = width
        self.middle = Middle(channels, spec)
        self.norm_out = GroupNormSiLU(spec.groups, channels, eps=NORM_EPS)
        self.conv_out = conv(channels, 2 * spec.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 2c, h, w]."""
        h = self.middle(self.down(self.conv_in(as_weights(x, self.conv_in))))
        moments: Tensor = self.conv_out(self.norm_out(h))
        return moments


class Decoder(nn.Module):
    """Latents [B, c, h, w] -> images [B, C, H, W]."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        channels = spec.widths[-1]
        self.conv_in = conv(spec.latent_channels, channels)
        self.middle = Middle(channels, spec)
        self.up = nn.Sequential()
        for level, width in reversed([*enumerate(spec.widths)]):
            for _ in range(spec.blocks_per_level + 1):
                self.up.append(block_without_time(channels, width, spec.groups))
                channels = width
            if level > 0:
                self.up.append(Upsample(channels))
        self.norm_out = GroupNormSiLU(spec.groups, channels, eps=NORM_EPS)
        self.conv_out = conv(channels, spec.image_channels)

    def forward(self, z: Tensor) -> Tensor:
        """[B, c, h, w] -> [B, C, H, W]."""
        h = self.up(self.middle(self.conv_in(as_weights(z, self.conv_in))))
        image: Tensor = self.conv_out(self.norm_out(h))
        return image


class Middle(nn.Module):
    """Two residual blocks with optional attention of one head between them; keeps the shape."""

    def __init__(self, channels: int, spec: AutoencoderSpec) -> None:
        super().__init__()
        self.block_1 = block_without_time(channels, channels, spec.groups)
        self.attention = Attention(channels, spec.groups) if spec.middle_attention else None
        self.block_2 = block_without_time(channels, channels, spec.groups)

    def forward(self, h: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        h = self.block_1(h)
        if self.attention is not None:
            h = self.attention(h)
        result: Tensor = self.block_2(h)
        return result


def block_without_time(channels_in: int, channels_out: int, groups: int) -> ResBlock:
    """A residual block without time embedding and dropout."""
    return ResBlock(channels_in, channels_out, time_width=0, groups=groups, dropout=0.0)
