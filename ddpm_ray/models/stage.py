"""One stage of a U-Net: a residual block and the attentions after it."""

from torch import Tensor, nn

from ddpm_ray.models.layers import Attention, ResBlock


class Stage(nn.Module):
    """A residual block with optional self-attention after it, and optional attention to a text.

    `transformer` is one module for both attentions, in place of the two.
    """

    def __init__(
        self,
        block: ResBlock,
        attention: Attention | None,
        text_attention: nn.Module | None = None,
        transformer: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.block, self.attention, self.text_attention = block, attention, text_attention
        self.transformer = transformer

    def forward(self, x: Tensor, embedding: Tensor, text: Tensor | None = None) -> Tensor:
        """[B, C_in, H, W], [B, E], vectors of a text [B, L, W] -> [B, C_out, H, W]."""
        h: Tensor = self.block(x, embedding)
        h = h if self.attention is None else self.attention(h)
        h = h if self.text_attention is None else self.text_attention(h, text)
        return h if self.transformer is None else self.transformer(h, text)
