"""Options of the network."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeAlias

from ddpm_ray.config.option_fields import option
from ddpm_ray.config.reading.former_keys import Former
from ddpm_ray.config.reading.option_text import value_text

NetworkKind: TypeAlias = Literal["unet", "dit"]
DiTSize: TypeAlias = Literal[
    "", "S/2", "S/4", "S/8", "B/2", "B/4", "B/8", "L/2", "L/4", "L/8", "XL/2", "XL/4", "XL/8"
]


class DiTSizes(NamedTuple):
    """Sizes of a DiT, each the value of the option of that name."""

    patch_size: int
    depth: int
    hidden_size: int
    heads: int


DIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Depth, hidden size and heads by name (Peebles and Xie 2023, arXiv:2212.09748, table 1)."""
OWN_OPTIONS: dict[NetworkKind, tuple[str, ...]] = {
    "unet": (
        "base_channels",
        "channel_mults",
        "blocks_per_level",
        "attention_factors",
        "attention_resolutions",
        "head_channels",
        "transformer_depth",
        "groups",
    ),
    "dit": ("size", *DiTSizes._fields, "mlp_norm_eps"),
}
"""Options that only this network reads."""


@dataclass(frozen=True)
class ModelConfig:
    """The network: its width, depth, attention and labels."""

    network: NetworkKind = option(
        "unet",
        "network architecture; unet: Ho et al. 2020, a classifier uses its downsampling half; "
        "dit: transformer with adaLN-Zero, Peebles and Xie 2023",
        defines_run=True,
        formerly=Former("model.kind", {"classifier": "unet"}),
    )
    base_channels: int = option(
        128, "unet: channels of the first resolution level", at_least=1, defines_run=True
    )
    channel_mults: tuple[int, ...] = option(
        (1, 2, 2, 2),
        "unet: channels of each level as a multiple of base_channels",
        defines_run=True,
    )
    blocks_per_level: int = option(
        2, "unet: residual blocks per level", at_least=1, defines_run=True
    )
    attention_factors: tuple[int, ...] | None = option(
        None,
        "unet: downsampling factors (1, 2, 4, ...) of the levels with self-attention; null: the "
        "level whose shorter side is 16 pixels",
        defines_run=True,
    )
    attention_resolutions: tuple[int, ...] | None = option(
        None,
        "unet: shorter sides in pixels of the levels with self-attention; give this or "
        "attention_factors",
        defines_run=True,
        instead_of="attention_factors",
    )
    head_channels: int = option(
        0,
        "unet: channels per attention head, which must divide those of each level with attention "
        "and of the last level; 0: one head",
        at_least=0,
        defines_run=True,
    )
    transformer_depth: int = option(
        0,
        "unet with text: blocks of the spatial transformer at each attention, as in Stable "
        "Diffusion: 1 there; 0: an attention to the pixels, then one to the text",
        at_least=0,
        defines_run=True,
    )
    dropout: float = option(
        0.0,
        "dropout probability in residual blocks; dit: after each attention and in each MLP",
        at_least=0,
        below=1,
        defines_run=True,
        may_change=True,
    )
    groups: int = option(
        32,
        "unet: groups of each group normalization; must divide all channel counts",
        at_least=1,
        defines_run=True,
    )
    size: DiTSize = option(
        "",
        "dit: name of the paper's size and patch size, as B/2; patch_size, depth, hidden_size and "
        "heads override it; empty: S/2",
        defines_run=True,
    )
    patch_size: int = option(
        0, "dit: side of a patch in pixels; 0: as in size", at_least=0, defines_run=True
    )
    depth: int = option(0, "dit: transformer blocks; 0: as in size", at_least=0, defines_run=True)
    hidden_size: int = option(
        0, "dit: channels of each token; 0: as in size", at_least=0, defines_run=True
    )
    heads: int = option(
        0, "dit: heads of each attention; 0: as in size", at_least=0, defines_run=True
    )
    mlp_norm_eps: float = option(
        1e-6,
        "dit: added to the variance by the norm before each MLP; 1e-5 in DiTs of diffusers",
        above=0,
        defines_run=True,
    )
    num_classes: int = option(
        0,
        "class-conditional model of labels 0 to num_classes - 1; 0: unconditional",
        at_least=0,
        defines_run=True,
    )

    @property
    def dit_sizes(self) -> DiTSizes:
        """The sizes of a DiT: those of `size`, unless they are given."""
        name, _, patch_size = (self.size or "S/2").partition("/")
        named = DiTSizes(int(patch_size), *DIT_SIZES[name])
        given = DiTSizes(self.patch_size, self.depth, self.hidden_size, self.heads)
        return DiTSizes(*(own or size for own, size in zip(given, named, strict=True)))

    @property
    def shown_sizes(self) -> dict[str, Any]:
        """The sizes of the network, by option, for people."""
        if self.network == "dit":
            return self.dit_sizes._asdict()
        names = ("base_channels", "channel_mults", "blocks_per_level")
        return {name: getattr(self, name) for name in names}

    def problems(self) -> Iterator[str]:
        """Yield a line for options of the other network, and for sizes that do not fit together."""
        defaults = {item.name: item.default for item in fields(self)}
        others = [keys for network, keys in OWN_OPTIONS.items() if network != self.network]
        for key in chain.from_iterable(others):
            if getattr(self, key) != defaults[key]:
                yield (
                    f"model.{key} is {value_text(getattr(self, key))}, which model.network="
                    f"{self.network} does not read; leave it out, or set "
                    f"model.{key}={value_text(defaults[key])}"
                )
        yield from self._dit_problems() if self.network == "dit" else self._unet_problems()

    def _dit_problems(self) -> Iterator[str]:
        sizes = self.dit_sizes
        if sizes.hidden_size % 4 or (sizes.heads > 0 and sizes.hidden_size % sizes.heads):
            yield (
                f"model.hidden_size is {sizes.hidden_size}; it must be a multiple of model.heads "
                f"{sizes.heads}, and of 4"
            )

    def _unet_problems(self) -> Iterator[str]:
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
        attending = {len(self.channel_mults) - 1}  # the middle has the last level's channels
        attending |= {factor.bit_length() - 1 for factor in self.attention_factors or ()}
        for level in sorted(attending) if self.head_channels > 0 else ():
            channels = self.base_channels * self.channel_mults[level : level + 1][0]
            if rest := channels % self.head_channels:
                yield (
                    f"model.head_channels is {self.head_channels}; it must divide the channels of "
                    f"each attention, and {channels} leaves {rest}: try "
                    f"{math.gcd(self.head_channels, self.base_channels)}"
                )
                return

    def for_images(self, height: int, width: int) -> "ModelConfig":
        """The options for images of height x width: equal networks have equal options.

        A U-Net has its attention by downsampling factors, sorted, each once; a DiT its sizes by
        number. Raises ValueError for a resolution that no level has.
        """
        if self.network == "dit":
            return replace(self, size="", **self.dit_sizes._asdict())
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
