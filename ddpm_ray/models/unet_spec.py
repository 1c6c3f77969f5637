"""Sizes that determine the tensors of a U-Net, and the images it takes."""

from collections.abc import Sequence
from dataclasses import dataclass

from ddpm_ray.models.layers import HO, Variant
from ddpm_ray.models.text_encoder import FrozenTextSpec, TextEncoderSpec


@dataclass(frozen=True)
class UNetSpec:
    """Sizes, inputs and outputs of a U-Net; the defaults are the CIFAR-10 network of Ho et al.

    Level i has base_channels * channel_mults[i] channels at H / 2**i x W / 2**i. It has attention
    if its downsampling factor 2**i is one of `attention_factors`; the middle always has. Where it
    has attention, it also attends to the text, if there is one. With `transformer_depth` a spatial
    transformer attends to both, as in Stable Diffusion.
    """

    image_channels: int
    base_channels: int = 128
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)
    blocks_per_level: int = 2
    attention_factors: tuple[int, ...] = (2,)
    dropout: float = 0.0
    groups: int = 32
    num_classes: int = 0  # labels 0..num_classes-1; 0: no labels
    condition_channels: int = 0  # of the conditioning images, all together
    learns_variance: bool = False
    variant: Variant = HO  # details in which published networks differ
    text: TextEncoderSpec | FrozenTextSpec | None = None  # None: no text
    embedding_width: int = 0  # of image embeddings; 0: none
    transformer_depth: int = 0  # blocks of each spatial transformer; 0: attentions of their own
    pools_text: bool = True  # the vector of the whole text is added to the embedding of t

    @property
    def widths(self) -> list[int]:
        """The channels of each level, largest resolution first."""
        return [self.base_channels * mult for mult in self.channel_mults]

    def attends(self, level: int) -> bool:
        """Whether the stages of `level` have attention."""
        return 2**level in self.attention_factors

    def require_consistent(self) -> None:
        """Validate channels, groups and levels. Raises ValueError."""
        widths, base_channels = self.widths, self.base_channels
        if not widths or min(widths) < 1 or base_channels % 2 or self.blocks_per_level < 1:
            raise ValueError(
                f"base_channels is {base_channels}, the levels' channels are {widths} and "
                f"blocks_per_level is {self.blocks_per_level}; there must be a level, every number "
                "must be at least 1 and base_channels even"
            )
        if self.transformer_depth < 0 or (self.transformer_depth and self.text is None):
            raise ValueError(
                f"transformer_depth is {self.transformer_depth}; a spatial transformer attends to "
                "a text: build the network with text, or use 0"
            )
        for channels in (base_channels, *widths):
            if self.groups < 1 or channels % self.groups:
                raise ValueError(
                    f"groups is {self.groups}, which does not divide a level's {channels} channels"
                )
        factors = [2**level for level in range(len(widths))]
        for factor in self.attention_factors:
            if factor not in factors:
                raise ValueError(
                    f"attention_factors names {factor}, but the downsampling factors of the levels "
                    f"are {', '.join(map(str, factors))}"
                )

    def require_divisible(self, image_size: Sequence[int]) -> None:
        """Raise ValueError unless H and W of `image_size` can be halved between all levels."""
        require_divisible(image_size, len(self.channel_mults))


def require_divisible(image_size: Sequence[int], levels: int) -> None:
    """Raise ValueError unless H and W of `image_size` can be halved levels - 1 times."""
    height, width = image_size
    factor = 2 ** (levels - 1)
    if height % factor or width % factor or not height or not width:
        sides = (max(factor, round(side / factor) * factor) for side in (height, width))
        raise ValueError(
            f"images are {height} x {width}, which {levels} levels do not halve evenly: both "
            f"sides must be multiples of {factor}; nearest valid: {' x '.join(map(str, sides))}"
        )
