"""DALL-E 2's prior: from a text to the embedding of an image.

(Ramesh et al. 2022, arXiv:2204.06125, section 2.2.) B: batch; D: width of the embeddings; L: tokens
of the text; W: width of the transformer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpm_ray.diffusion.conditioning import UNCONDITIONAL, Conditioning
from ddpm_ray.models.layers import TimeEmbedding, Variant, as_input, as_weights, dense, zero_init
from ddpm_ray.models.text_encoder import FrozenTextSpec, TextBlock, TextEncoderSpec, TextInput

FREQUENCIES = 256  # sines and cosines of t, as in the DiT
COSINES_FIRST = Variant(cosines_first=True)
OWN_VECTORS = 4  # after those of the tokens: the text, t, x_t, and the one that is read


@dataclass(frozen=True)
class PriorSpec:
    """Sizes of a prior."""

    embedding_width: int  # D
    text: TextEncoderSpec | FrozenTextSpec
    width: int = 256  # W
    depth: int = 6  # number of blocks
    heads: int = 4
    mlp_width: int = 0  # inside each MLP; 0: four times the width
    quick_gelu: bool = False
    norm_eps: float = 1e-5

    def require_consistent(self) -> None:
        """Validate the sizes. Raises ValueError."""
        if min(self.embedding_width, self.width, self.depth, self.heads) < 1 or (
            self.width % self.heads
        ):
            raise ValueError(
                f"the prior's width is {self.width}, depth {self.depth}, heads {self.heads} and "
                f"embedding_width {self.embedding_width}; each must be at least 1, and width a "
                "multiple of heads"
            )


class Prior(nn.Module):
    """A denoiser of embeddings: x_t [B, D, 1, 1], t [B] int64 in 1..T -> [B, D, 1, 1].

    A causal transformer over the vectors of the text's tokens, the vector of the whole text, t, x_t
    and a learned one, at whose place the output is read. Before training the output is exactly 0.
    Without a text it takes the text "". Raises ValueError for an inconsistent spec.
    """

    def __init__(self, spec: PriorSpec) -> None:
        super().__init__()
        spec.require_consistent()
        self.spec, width = spec, spec.width
        self.text = TextInput(spec.text, width)
        self.states = dense(spec.text.width, width)
        self.time = TimeEmbedding(FREQUENCIES, width, COSINES_FIRST)
        self.noisy = dense(spec.embedding_width, width)
        self.query = nn.Parameter(torch.empty(width))
        self.position = nn.Embedding(len(spec.text.null_tokens) + OWN_VECTORS, width)
        self.blocks = nn.ModuleList(TextBlock(spec) for _ in range(spec.depth))
        self.norm_out = nn.LayerNorm(width, eps=spec.norm_eps)
        self.out = dense(width, spec.embedding_width)
        zero_init(self.out)
        nn.init.normal_(self.query, std=0.02)
        nn.init.normal_(self.position.weight, std=0.01)

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning = UNCONDITIONAL) -> Tensor:
        """The output of the parameterization, shaped like x_t.

        Raises ValueError for another width, and for conditioning other than a text.
        """
        if x_t.shape[1:] != (self.spec.embedding_width, 1, 1):
            raise ValueError(
                f"x_t is {list(x_t.shape)}; this prior takes [B, {self.spec.embedding_width}, 1, 1]"
            )
        if conditioning.images or conditioning.labels is not None:
            raise ValueError("a prior takes a text alone: leave labels and images out")
        states, pooled = self.text(conditioning, len(t))
        assert pooled is not None  # TextInput pools by default
        vectors = (
            self.states(states),
            pooled[:, None],
            self.time(t)[:, None],
            self.noisy(as_weights(x_t.flatten(1), self.noisy))[:, None],
            self.query.expand(len(t), 1, -1),
        )
        h = torch.cat(vectors, dim=1) + self.position.weight
        for block in self.blocks:
            h = block(h)
        return as_input(self.out(self.norm_out(h[:, -1])), x_t)[:, :, None, None]
