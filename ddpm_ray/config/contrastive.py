"""Options of contrastive training: the image encoder, the embeddings and the loss."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ddpm_ray.config.option_fields import option


@dataclass(frozen=True)
class ContrastiveConfig:
    """The image encoder and the loss of task=contrastive; `text` has its text encoder."""

    loss: Literal["sigmoid", "infonce"] = option(
        "sigmoid",
        "loss of the global batch; sigmoid: SigLIP's, of each pair by itself; infonce: CLIP's, a "
        "softmax over the batch; equal captions are positives",
        defines_run=True,
    )
    width: int = option(256, "width of the embeddings", at_least=1, defines_run=True)
    base_channels: int = option(
        64, "image encoder: channels of the first level", at_least=1, defines_run=True
    )
    channel_mults: tuple[int, ...] = option(
        (1, 2, 4),
        "image encoder: channels of each level as a multiple of base_channels; n levels downsample "
        "by 2^(n-1)",
        defines_run=True,
    )
    blocks_per_level: int = option(
        2, "image encoder: residual blocks per level", at_least=1, defines_run=True
    )
    groups: int = option(
        32,
        "image encoder: groups of each group normalization; must divide all channel counts",
        at_least=1,
        defines_run=True,
    )

    def problems(self) -> Iterator[str]:
        """Yield a line if sizes do not fit together."""
        if not self.channel_mults or min(self.channel_mults) < 1:
            yield (
                f"contrastive.channel_mults is {list(self.channel_mults)}; it needs one factor of "
                f"at least 1 per level, as in [1,2,4]"
            )
            return
        for mult in sorted(set(self.channel_mults)) if self.groups > 0 else ():
            if rest := (width := self.base_channels * mult) % self.groups:
                yield (
                    f"contrastive.groups is {self.groups}; it must divide every level's channels, "
                    f"and {width} leaves {rest}: choose a divisor of {self.base_channels}"
                )
                return
