"""The patch discriminator of adversarial autoencoder training.

(Isola et al. 2017, arXiv:1611.07004.) It classifies overlapping patches of an image: a logit above
0 means real, one below 0 reconstructed.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ddpm_ray.models.group_norm import GroupNorm
from ddpm_ray.models.layers import as_input, as_weights

LEVELS = 3  # strided convolutions, for a receptive field of 70 x 70 pixels
GROUPS = 8  # of the group norms
LEAST_PIXELS = 24  # of a side: gives one logit


class PatchDiscriminator(nn.Module):
    """Images [B, C, H, W] in [-1, 1] -> logits [B, 1, H/8 - 2, W/8 - 2], one per patch.

    Group norms stand where the original has batch norms, so that an image's logits do not depend on
    the other images: they are the same for any number of workers and any micro-batch. Raises
    ValueError unless `base_channels` is a multiple of 8.
    """

    def __init__(self, image_channels: int, base_channels: int = 64) -> None:
        super().__init__()
        if base_channels % GROUPS:
            raise ValueError(
                f"discriminator_channels is {base_channels}; it must be a multiple of {GROUPS}"
            )
        width = base_channels
        self.layers = nn.Sequential(_conv(image_channels, width, stride=2), nn.LeakyReLU(0.2))
        for level in range(1, LEVELS + 1):
            before, width = width, base_channels * 2**level
            stride = 2 if level < LEVELS else 1
            self.layers.append(_conv(before, width, stride))
            self.layers.append(GroupNorm(GROUPS, width))
            self.layers.append(nn.LeakyReLU(0.2))
        self.layers.append(_conv(width, 1, stride=1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the patches of x."""
        return as_input(self.layers(as_weights(x, self.layers[0])), x)


def require_patches(image_size: Sequence[int]) -> None:
    """Raise ValueError for images (H, W) of less than one patch."""
    height, width = image_size
    if min(height, width) < LEAST_PIXELS:
        raise ValueError(
            f"images of {height} x {width} are too small for the patch discriminator, which needs "
            f"{LEAST_PIXELS} pixels a side: set autoencoder.discriminator_from_step=0"
        )


def _conv(channels_in: int, channels_out: int, stride: int) -> nn.Conv2d:
    """A 4 x 4 convolution, weights from N(0, 0.02^2) (Isola et al. 2017, section 6.2)."""
    layer = nn.Conv2d(channels_in, channels_out, 4, stride, padding=1)
    nn.init.normal_(layer.weight, 0.0, 0.02)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
