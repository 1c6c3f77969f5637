"""The diffusion transformer DiT, with adaLN-Zero (Peebles and Xie 2023, arXiv:2212.09748).

An image is cut into patches, which are the tokens of a transformer; t and the label scale, shift
and gate each block. B: batch; N: tokens; D: hidden size; h, w: rows and columns of patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ddpm_ray.diffusion.conditioning import UNCONDITIONAL, Conditioning
from ddpm_ray.models.conditioning_inputs import EmbeddingInput, vector_inputs, with_images
from ddpm_ray.models.cross_attention import TokenTextAttention
from ddpm_ray.models.layers import (
    TimeEmbedding,
    Variant,
    as_input,
    as_weights,
    attend,
    dense,
    in_heads,
    xavier_init,
    zero_init,
)
from ddpm_ray.models.loss_uncertainty import LogVariance
from ddpm_ray.models.text_encoder import FrozenTextSpec, TextEncoderSpec, TextInput

NORM_EPS = 1e-6  # of all layer norms, in the paper's code
FREQUENCIES = 256  # sines and cosines of t, the inputs of its MLP, in the paper's code
COSINES_FIRST = Variant(cosines_first=True)  # the embedding of t in diffusers' DiT


@dataclass(frozen=True)
class DiTSpec:
    """Sizes, inputs and outputs of a DiT; the defaults are DiT-S/2's.

    A DiT takes images of one size: each patch has a fixed position.
    """

    image_size: tuple[int, int]  # (H, W)
    image_channels: int
    patch_size: int = 2  # side of a patch in pixels
    depth: int = 12  # number of blocks
    hidden_size: int = 384  # D
    heads: int = 6  # heads per attention
    dropout: float = 0.0
    num_classes: int = 0  # labels 0..num_classes-1; 0: no labels
    condition_channels: int = 0  # of the conditioning images, all together
    learns_variance: bool = False
    mlp_norm_eps: float = NORM_EPS  # of the norm before each MLP; 1e-5 in weights of diffusers
    text: TextEncoderSpec | FrozenTextSpec | None = None  # None: no text
    embedding_width: int = 0  # of image embeddings; 0: none
    pools_text: bool = True  # the vector of the whole text is added to the embedding of t

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w), the number of patches in each direction."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size

    @property
    def channels_out(self) -> int:
        """Channels of the output: twice the image's with a learned variance."""
        return self.image_channels * (2 if self.learns_variance else 1)

    def require_consistent(self) -> None:
        """Validate patches, heads and depth. Raises ValueError."""
        if min(self.patch_size, self.depth, self.heads, self.hidden_size) < 1:
            raise ValueError(
                f"patch_size is {self.patch_size}, depth {self.depth}, hidden_size "
                f"{self.hidden_size} and heads {self.heads}; each must be at least 1"
            )
        if self.hidden_size % self.heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size is {self.hidden_size}; it must be a multiple of heads {self.heads}, "
                "and of 4 for the position embedding"
            )
        if any(side % self.patch_size or not side for side in self.image_size):
            height, width = self.image_size
            raise ValueError(
                f"images are {height} x {width}; both sides must be multiples of patch_size "
                f"{self.patch_size}"
            )

    def require_size(self, image_size: Sequence[int]) -> None:
        """Raise ValueError unless `image_size` is the one (H, W) that the network takes."""
        if tuple(image_size) != self.image_size:
            raise ValueError(
                f"images are {' x '.join(map(str, image_size))}; this DiT takes "
                f"{' x '.join(map(str, self.image_size))} only: edit larger images in windows of "
                "that size"
            )


class DiT(nn.Module):
    """A denoiser: x_t [B, C, H, W], t [B] int64 in 1..T -> predicted noise [B, C, H, W].

    Takes labels, texts, image embeddings, conditioning images, `learns_variance` and
    `learns_uncertainty` as `UNet` does. Before training the output is exactly 0 and each block is
    the identity. Dropout draws from torch's default generator, after each self-attention and in
    each MLP, where diffusers has it; the paper uses none. `gradient_checkpointing` stores only each
    block's input and recomputes the block in the backward pass. Raises ValueError for an
    inconsistent spec.
    """

    positions: Tensor  # [N, D], not trained

    def __init__(
        self,
        spec: DiTSpec,
        *,
        learns_uncertainty: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        spec.require_consistent()
        self.spec, self.gradient_checkpointing = spec, gradient_checkpointing
        width, patch, classes = spec.hidden_size, spec.patch_size, spec.num_classes
        self.time = TimeEmbedding(FREQUENCIES, width, COSINES_FIRST)
        channels_in = spec.image_channels + spec.condition_channels
        self.patch = nn.Conv2d(channels_in, width, kernel_size=patch, stride=patch)
        self.blocks = nn.ModuleList(DiTBlock(spec) for _ in range(spec.depth))
        self.modulation_out = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, patch**2 * spec.channels_out)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.text = TextInput(spec.text, width, pools=spec.pools_text) if spec.text else None
        self.embedding: EmbeddingInput | None = None
        if spec.embedding_width:
            text_width = spec.text.width if spec.text else None
            self.embedding = EmbeddingInput(spec.embedding_width, width, text_width)
        self.uncertainty = LogVariance() if learns_uncertainty else None
        # Not in the state_dict: it is a function of the spec.
        self.register_buffer("positions", position_embedding(spec.grid, width), persistent=False)
        self._init_weights()

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        conditioning: Conditioning = UNCONDITIONAL,
    ) -> Tensor:
        """epsilon_theta(x_t, t), shaped like x_t, or [B, 2C, H, W] with a learned variance.

        Labels and texts default to none, conditioning images to 0, so that all parameters take part
        in each pass. Raises ValueError for sizes and conditioning that it was not built for.
        """
        spec = self.spec
        spec.require_size(x_t.shape[-2:])
        text, added = vector_inputs(self.text, self.label, self.embedding, conditioning, t)
        embedding = self.time(t, added)  # [B, D]
        images = with_images(x_t, conditioning.images, spec.condition_channels)
        patches = self.patch(as_weights(images, self.patch))
        h = patches.flatten(2).transpose(1, 2) + self.positions  # [B, N, D]
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # checkpoint() restores the generator's state, so that dropout repeats its mask.
                h = checkpoint(block, h, embedding, text, use_reentrant=False)
            else:
                h = block(h, embedding, text)
        shift, scale = self.modulation_out(embedding)[:, None].chunk(2, dim=-1)
        return as_input(self._image(self.out(modulated_norm(h, shift, scale))), x_t)

    def _image(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, P P C], each a patch by rows, columns and channels, as [B, C, H, W]."""
        patch, (rows, columns) = self.spec.patch_size, self.spec.grid
        parts = tokens.reshape(len(tokens), rows, columns, patch, patch, self.spec.channels_out)
        return torch.einsum("bhwpqc->bchpwq", parts).flatten(4, 5).flatten(2, 3)

    def _init_weights(self) -> None:
        """Set the initial weights of the paper's code; the blocks have set their own."""
        nn.init.xavier_uniform_(self.patch.weight.flatten(1))  # as a dense layer of pixels
        assert self.patch.bias is not None
        nn.init.zeros_(self.patch.bias)
        for layer in (self.time.dense_1, self.time.dense_2, self.label):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.02)
        for layer in (self.modulation_out, self.out):
            zero_init(layer)


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero: [B, N, D], [B, D] -> [B, N, D]; the identity at first.

    (Section 3.2 and figure 3.)
    """

    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        width = spec.hidden_size
        self.num_heads, self.mlp_norm_eps = spec.heads, spec.mlp_norm_eps
        self.modulation = nn.Linear(width, 6 * width)  # shift, scale, gate: attention's, MLP's
        zero_init(self.modulation)
        self.query_key_value = nn.Linear(width, 3 * width)  # rows: query, key, value
        xavier_init(self.query_key_value)  # as one layer, unlike the U-Net's
        self.attention_out = dense(width, width)
        self.mlp_in = dense(width, 4 * width)
        self.mlp_out = dense(4 * width, width)
        self.dropout = nn.Dropout(spec.dropout)
        self.text_attention: TokenTextAttention | None = None
        if spec.text is not None:
            self.text_attention = TokenTextAttention(width, spec.text.width, spec.heads, NORM_EPS)

    def forward(self, x: Tensor, embedding: Tensor, text: Tensor | None = None) -> Tensor:
        """Add the gated attention to x, that to the text, then the gated MLP of that sum."""
        parts = self.modulation(embedding)[:, None].chunk(6, dim=-1)  # each [B, 1, D]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        h = self.query_key_value(modulated_norm(x, shift, scale))
        h = attend(*in_heads(h, self.num_heads))
        x = x + gate * self.dropout(self.attention_out(h.transpose(1, 2).flatten(2)))
        if self.text_attention is not None:
            x = self.text_attention(x, text)
        h = self.mlp_in(modulated_norm(x, mlp_shift, mlp_scale, self.mlp_norm_eps))
        h = self.dropout(F.gelu(h, approximate="tanh"))
        result: Tensor = x + mlp_gate * self.mlp_out(h)
        return result


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = NORM_EPS) -> Tensor:
    """Layer norm of x [B, N, D] without weights, scaled by 1 + scale and shifted."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def position_embedding(grid: tuple[int, int], width: int) -> Tensor:
    """Embed the place of each patch of a grid (h, w), row by row: [h w, width] float32.

    The first half of the channels embeds the column, the second half the row, as sines and then
    cosines at width / 4 angular frequencies from 1 down to nearly 1/10,000. `width` is a multiple
    of 4. (The paper's code, after MAE: He et al. 2021, arXiv:2111.06377.)
    """
    rows, columns = grid
    places = torch.cartesian_prod(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64)
    )
    exponents = torch.arange(width // 4, dtype=torch.float64) / (width // 4)
    frequencies = 10_000.0**-exponents
    angles = places.flip(1)[:, :, None] * frequencies  # [h w, 2, width / 4]
    return torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1).float()
