"""Options of the autoencoder: its sizes, its loss and its discriminator."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ddpm_ray.config.option_fields import option


@dataclass(frozen=True)
class AutoencoderConfig:
    """The KL autoencoder of task=autoencoder: latents, network, loss and discriminator."""

    latent_channels: int = option(4, "channels of the latents", at_least=1, defines_run=True)
    base_channels: int = option(
        128, "channels of the first resolution level", at_least=1, defines_run=True
    )
    channel_mults: tuple[int, ...] = option(
        (1, 2, 4),
        "channels of each level as a multiple of base_channels; n levels downsample by 2^(n-1)",
        defines_run=True,
    )
    blocks_per_level: int = option(
        2, "residual blocks per level of the encoder", at_least=1, defines_run=True
    )
    groups: int = option(
        32,
        "groups of each group normalization; must divide all channel counts",
        at_least=1,
        defines_run=True,
    )
    middle_attention: bool = option(
        False, "self-attention at the lowest resolution", defines_run=True
    )
    loss: Literal["l1", "mse"] = option(
        "l1",
        "reconstruction error; l1: mean absolute error; mse: mean squared error",
        defines_run=True,
    )
    gradient_difference_weight: float = option(
        0.0,
        "weight of the L1 error of image gradients, differences of neighbouring pixels; 0: off",
        at_least=0,
        defines_run=True,
    )
    perceptual_weight: float = option(
        0.0,
        "weight of the perceptual distance; 0: off",
        at_least=0,
        defines_run=True,
    )
    perceptual: Literal["inception", "lpips"] = option(
        "inception",
        "perceptual distance; inception: in first stages of evaluation.weights; lpips: VGG16 with "
        "learned weights, by the package lpips",
        defines_run=True,
    )
    kl_weight: float = option(
        1e-6,
        "weight of the KL divergence to N(0, 1), in nats per value of the image, as in "
        "latent-diffusion",
        at_least=0,
        defines_run=True,
    )
    discriminator_from_step: int = option(
        0,
        "step from which on the patch discriminator is trained and used; 0: never",
        at_least=0,
        defines_run=True,
    )
    discriminator_weight: float = option(
        0.5,
        "weight of the adversarial loss, times the ratio of gradient norms at the last layer",
        above=0,
        defines_run=True,
    )
    discriminator_channels: int = option(
        64, "channels of the discriminator's first layer", at_least=1, defines_run=True
    )

    def problems(self) -> Iterator[str]:
        """Yield a line if sizes do not fit together."""
        if not self.channel_mults or min(self.channel_mults) < 1:
            yield (
                f"autoencoder.channel_mults is {list(self.channel_mults)}; it needs one factor of "
                f"at least 1 per level, as in [1,2,4]"
            )
            return
        if self.perceptual != "inception" and not self.perceptual_weight:
            yield (
                f"autoencoder.perceptual is {self.perceptual}, which autoencoder.perceptual_weight "
                f"0 leaves out: set it above 0, as in autoencoder.perceptual_weight=1"
            )
        for mult in sorted(set(self.channel_mults)) if self.groups > 0 else ():
            if rest := (width := self.base_channels * mult) % self.groups:
                yield (
                    f"autoencoder.groups is {self.groups}; it must divide every level's channels, "
                    f"and {width} leaves {rest}: choose a divisor of {self.base_channels}"
                )
                return
