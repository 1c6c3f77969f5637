"""Options of the network."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ddpm_ray.config.option_fields import option
from ddpm_ray.config.reading.former_keys import Former


@dataclass(frozen=True)
class ModelConfig:
    """The network: its width, depth, attention and labels."""

    network: Literal["unet"] = option(
        "unet",
        "network architecture; unet: Ho et al. 2020; a classifier uses its downsampling half",
        defines_run=True,
        formerly=Former("model.kind", {"classifier": "unet"}),
    )
    base_channels: int = option(
        128, "channels of the first resolution level", at_least=1, defines_run=True
    )
    channel_mults: tuple[int, ...] = option(
        (1, 2, 2, 2), "channels of each level as a multiple of base_channels", defines_run=True
    )
    blocks_per_level: int = option(2, "residual blocks per level", at_least=1, defines_run=True)
    attention_factors: tuple[int, ...] | None = option(
        None,
        "downsampling factors (1, 2, 4, ...) of the levels with self-attention; null: the level "
        "whose shorter side is 16 pixels",
        defines_run=True,
    )
    attention_resolutions: tuple[int, ...] | None = option(
        None,
        "shorter sides in pixels of the levels with self-attention; give this or attention_factors",
        defines_run=True,
        instead_of="attention_factors",
    )
    dropout: float = option(
        0.0,
        "dropout probability in residual blocks",
        at_least=0,
        below=1,
        defines_run=True,
        may_change=True,
    )
    groups: int = option(
        32,
        "groups of each group normalization; must divide all channel counts",
        at_least=1,
        defines_run=True,
    )
    num_classes: int = option(
        0,
        "class-conditional model of labels 0 to num_classes - 1; 0: unconditional",
        at_least=0,
        defines_run=True,
    )

    def problems(self) -> Iterator[str]:
        """Yield a line for sizes that do not fit together."""
        if self.attention_factors is not None and self.attention_resolutions is not None:
            yield (
                f"model.attention_resolutions is {list(self.attention_resolutions)} and "
                f"model.attention_factors {list(self.attention_factors)}; give one of the two"
            )
        if not self.channel_mults or min(self.channel_mults) < 1:
            yield (
                f"model.channel_mults is {list(self.channel_mults)}; it needs one factor of at "
                f"least 1 per level, as in [1,2,2,2]"
            )
            return
        for mult in sorted(set(self.channel_mults)) if self.groups > 0 else ():
            if rest := (self.base_channels * mult) % self.groups:
                yield (
                    f"model.groups is {self.groups}; it must divide every level's channels, and "
                    f"{self.base_channels * mult} leaves {rest}: "
                    f"try {math.gcd(self.groups, self.base_channels)}"
                )
                return

    def for_images(self, height: int, width: int) -> "ModelConfig":
        """The options with attention by downsampling factor, for images of height x width.

        Factors are sorted and each stands once: equal networks have equal options. Raises
        ValueError for a resolution that no level has.
        """
        if self.attention_factors is not None:
            return replace(self, attention_factors=tuple(sorted({*self.attention_factors})))
        sides = [min(height, width) >> level for level in range(len(self.channel_mults))]
        wanted = (16,) if self.attention_resolutions is None else self.attention_resolutions
        for side in wanted:
            if side not in sides:
                default = " by default" if self.attention_resolutions is None else ""
                raise ValueError(
                    f"attention_resolutions names {side}{default}, but the levels of images of "
                    f"{height} x {width} have sides {', '.join(map(str, sides))}; set "
                    "model.attention_factors, as in [2]"
                )
        factors = tuple(2**level for level, side in enumerate(sides) if side in wanted)
        return replace(self, attention_factors=factors, attention_resolutions=None)
