"""The spatial transformer of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, section 3.3).

It has the function and the sizes of `Transformer2DModel` of diffusers, as UNet2DConditionModel
builds it. B: batch; C: channels; N: pixels; L: tokens; W: width of the text's vectors.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_ray.models.cross_attention import CrossAttention
from ddpm_ray.models.group_norm import GroupNorm
from ddpm_ray.models.layers import (
    Variant,
    attend,
    dense,
    heads,
    in_heads,
    xavier_init,
    zero_init,
)
from ddpm_ray.models.text_encoder import FrozenTextSpec, TextEncoderSpec

GROUP_NORM_EPS, LAYER_NORM_EPS = 1e-6, 1e-5  # of all published weights, whatever the other norms
MLP_RATIO = 4  # width inside the MLP, as a multiple of C


class TransformerSizes(Protocol):
    """Sizes of the spatial transformers of a network; a UNetSpec with text has them."""

    @property
    def groups(self) -> int:
        """Groups of the group norm."""
        ...

    @property
    def variant(self) -> Variant:
        """The number of heads."""
        ...

    @property
    def transformer_depth(self) -> int:
        """Number of blocks."""
        ...

    @property
    def text(self) -> TextEncoderSpec | FrozenTextSpec | None:
        """The text encoder."""
        ...


class SpatialTransformer(nn.Module):
    """Blocks over all pixels of an image, given a text: [B, C, H, W] -> [B, C, H, W].

    The identity at first: the projection back to the pixels is 0. Its 1x1 convolutions are dense
    layers over the channels, which compute the same. Raises ValueError unless the channels are a
    multiple of the heads.
    """

    def __init__(self, channels: int, spec: TransformerSizes) -> None:
        super().__init__()
        assert spec.text is not None  # UNetSpec.require_consistent
        width, count = spec.text.width, heads(channels, spec.variant)
        self.norm = GroupNorm(spec.groups, channels, eps=GROUP_NORM_EPS)
        self.proj_in = dense(channels, channels)
        self.blocks = nn.ModuleList(
            SpatialTransformerBlock(channels, width, count) for _ in range(spec.transformer_depth)
        )
        self.proj_out = dense(channels, channels)
        zero_init(self.proj_out)

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        """x plus what its pixels find in each other and in `states` [B, L, W]."""
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # [B, N, C]
        for block in self.blocks:
            h = block(h, states)
        update: Tensor = self.proj_out(h)
        return x + update.transpose(1, 2).reshape(x.shape)


class SpatialTransformerBlock(nn.Module):
    """Self-attention, attention to a text, and a gated MLP: [B, N, C], [B, L, W] -> [B, N, C].

    A layer norm comes before each of the three. (GEGLU: Shazeer 2020, arXiv:2002.05202.)
    """

    def __init__(self, channels: int, text_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, inner = num_heads, MLP_RATIO * channels
        self.norm_1, self.norm_2, self.norm_3 = (
            nn.LayerNorm(channels, eps=LAYER_NORM_EPS) for _ in range(3)
        )
        self.query_key_value = nn.Linear(channels, 3 * channels, bias=False)
        xavier_init(self.query_key_value, fused=3)
        self.attention_out = dense(channels, channels)
        self.text_attention = CrossAttention(channels, text_width, num_heads, bias=False)
        xavier_init(self.text_attention.out)  # proj_out alone is 0 at first
        self.mlp_in = nn.Linear(channels, 2 * inner)  # rows: values, gates
        xavier_init(self.mlp_in, fused=2)
        self.mlp_out = dense(inner, channels)

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        """Add to x each of the three in turn."""
        query, key, value = in_heads(self.query_key_value(self.norm_1(x)), self.num_heads)
        x = x + self.attention_out(attend(query, key, value).transpose(1, 2).flatten(2))
        x = x + self.text_attention(self.norm_2(x), states)
        values, gates = self.mlp_in(self.norm_3(x)).chunk(2, dim=-1)
        result: Tensor = x + self.mlp_out(values * F.gelu(gates))
        return result
