"""Attention of pixels or patches to the tokens of a text (Rombach et al. 2022, arXiv:2112.10752).

B: batch; C: channels; L: tokens; W: width of the text's vectors.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_ray.models.group_norm import GroupNorm
from ddpm_ray.models.layers import (
    HO,
    Variant,
    attend,
    dense,
    heads,
    split_heads,
    xavier_init,
    zero_init,
)


class CrossAttention(nn.Module):
    """Attention of N vectors to L others: [B, N, C], [B, L, W] -> [B, N, C]; 0 at first.

    With `bias` the projections to query, key and value have one.
    """

    def __init__(
        self, channels: int, text_width: int, num_heads: int, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(channels, channels, bias=bias)
        xavier_init(self.query)
        self.key_value = nn.Linear(text_width, 2 * channels, bias=bias)  # rows: key, value
        xavier_init(self.key_value, fused=2)
        self.out = dense(channels, channels)
        zero_init(self.out)

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        """The projected values that each vector of x [B, N, C] finds in `states` [B, L, W]."""
        key, value = self.key_value(states).chunk(2, dim=-1)
        parts = (split_heads(part, self.num_heads) for part in (self.query(x), key, value))
        result: Tensor = self.out(attend(*parts).transpose(1, 2).flatten(2))
        return result


class TextAttention(nn.Module):
    """Attention of all pixels to a text: [B, C, H, W] -> [B, C, H, W]; the identity at first.

    Uses norm_eps and the number of heads of `variant`.
    """

    def __init__(self, channels: int, text_width: int, groups: int, variant: Variant = HO) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=variant.norm_eps)
        self.attention = CrossAttention(channels, text_width, heads(channels, variant))

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        """x plus what its pixels find in `states` [B, L, W]."""
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # [B, H*W, C]
        update: Tensor = self.attention(pixels, states)
        return x + update.transpose(1, 2).reshape(x.shape)


class TokenTextAttention(nn.Module):
    """The same of a transformer's tokens: [B, N, C] -> [B, N, C]; the identity at first.

    (Chen et al. 2023, arXiv:2310.00426, section 2.3, with a norm.)
    """

    def __init__(self, channels: int, text_width: int, num_heads: int, norm_eps: float) -> None:
        super().__init__()
        self.norm_eps = norm_eps
        self.attention = CrossAttention(channels, text_width, num_heads)

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        """x plus what its tokens find in `states` [B, L, W]."""
        update: Tensor = self.attention(F.layer_norm(x, x.shape[-1:], eps=self.norm_eps), states)
        return x + update
