"""CLIP's text encoder: a causal transformer (Radford et al. 2021, arXiv:2103.00020).

It has the function and the sizes of `CLIPTextModel` of transformers, so that its weights can be
taken from such a model and given back. B: batch; L: tokens; W: width of their vectors; E: width of
the vector of the whole text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_ray.diffusion.conditioning import NO_TEXT, Conditioning
from ddpm_ray.models.layers import dense, in_heads, zero_init


class EncodedText(NamedTuple):
    """Texts as a network takes them."""

    states: Tensor  # [B, L, W], one vector for each token
    pooled: Tensor  # [B, E], the vector of the whole text; ours is that of its end token, E = W


@dataclass(frozen=True)
class TextEncoderSpec:
    """Sizes of a text encoder."""

    vocabulary: int  # number of tokens
    end_token: int  # number of the token that ends each text
    null_tokens: tuple[int, ...]  # [L], the text "" as the tokenizer writes it
    width: int = 256  # W
    depth: int = 4  # number of blocks
    heads: int = 4
    mlp_width: int = 0  # inside each MLP; 0: four times the width
    quick_gelu: bool = False  # CLIP's activation, x sigmoid(1.702 x); else GELU
    norm_eps: float = 1e-5

    @property
    def length(self) -> int:
        """L, the number of tokens of each text."""
        return len(self.null_tokens)

    @property
    def pooled_width(self) -> int:
        """E."""
        return self.width

    def require_consistent(self) -> None:
        """Validate the sizes and token numbers. Raises ValueError."""
        if min(self.width, self.depth, self.heads) < 1 or self.width % self.heads:
            raise ValueError(
                f"the text encoder's width is {self.width}, depth {self.depth} and heads "
                f"{self.heads}; each must be at least 1, and width a multiple of heads"
            )
        numbers = (*self.null_tokens, self.end_token)
        if self.end_token not in self.null_tokens or not (
            0 <= min(numbers) <= max(numbers) < self.vocabulary
        ):
            raise ValueError(
                f"null_tokens are {list(self.null_tokens)} and end_token is {self.end_token}; "
                f"null_tokens must hold end_token, and all lie in 0..{self.vocabulary - 1}"
            )


@dataclass(frozen=True)
class FrozenTextSpec:
    """Sizes of a text encoder that is trained elsewhere (frozen_text.py)."""

    width: int  # W
    pooled_width: int  # E
    null_tokens: tuple[int, ...]  # [L], the text "" as the tokenizer writes it

    def require_length(self, tokens: Tensor) -> None:
        """Raise ValueError unless tokens are [B, L]."""
        _require_length(tokens, len(self.null_tokens))


class EncodesText(Protocol):
    """Encodes the texts of a network."""

    @property
    def null_tokens(self) -> Tensor:
        """int64 [L], the text ""."""
        ...

    def __call__(self, tokens: Tensor) -> EncodedText:
        """Encode tokens [B, L]."""
        ...

    def to(self, device: torch.device) -> object:
        """Move it to `device`."""
        ...


class TextEncoder(nn.Module):
    """Tokens int64 [B, L] -> EncodedText; NO_TEXT rows are encoded as the text "".

    Each vector depends on its own token and those before it. Raises ValueError for an inconsistent
    spec.
    """

    null_tokens: Tensor  # int64 [L]

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        spec.require_consistent()
        self.spec = spec
        self.token = nn.Embedding(spec.vocabulary, spec.width)
        self.position = nn.Embedding(spec.length, spec.width)
        self.blocks = nn.ModuleList(TextBlock(spec) for _ in range(spec.depth))
        self.norm_out = nn.LayerNorm(spec.width, eps=spec.norm_eps)
        # Not in the state_dict: it is a function of the spec.
        self.register_buffer("null_tokens", torch.tensor(spec.null_tokens), persistent=False)
        nn.init.normal_(self.token.weight, std=0.02)  # CLIP's, as below
        nn.init.normal_(self.position.weight, std=0.01)

    def forward(self, tokens: Tensor) -> EncodedText:
        """Encode tokens [B, L]. Raises ValueError for another length than the spec's."""
        _require_length(tokens, self.spec.length)
        tokens = torch.where(tokens == NO_TEXT, self.null_tokens, tokens)
        h = self.token(tokens) + self.position.weight
        for block in self.blocks:
            h = block(h)
        states: Tensor = self.norm_out(h)
        # The first end token: those after it fill the row.
        ends = (tokens == self.spec.end_token).to(torch.uint8).argmax(dim=1)
        return EncodedText(states, states[torch.arange(len(states), device=states.device), ends])


class TextInput(nn.Module):
    """The text of a network: its vectors, and what is added to the embedding of t.

    The pooled text is projected and added to the embedding of t (Nichol et al. 2021, "GLIDE",
    arXiv:2112.10741, section 2.3). The projection is 0 at first, so that a network that was trained
    without text can continue with it. Without `pools`, nothing is added. With a FrozenTextSpec it
    has no encoder until `bind`.
    """

    encoder: EncodesText | None
    pooled: nn.Linear | None

    def __init__(
        self, spec: TextEncoderSpec | FrozenTextSpec, embedding_width: int, *, pools: bool = True
    ) -> None:
        super().__init__()
        self.encoder = TextEncoder(spec) if isinstance(spec, TextEncoderSpec) else None
        self.pooled = nn.Linear(spec.pooled_width, embedding_width) if pools else None
        if self.pooled is not None:
            zero_init(self.pooled)
        else:  # with an encoder that is trained elsewhere there is no other tensor
            self.register_buffer("on_device", torch.zeros(1), persistent=False)

    def bind(self, encoder: EncodesText) -> None:
        """Encode texts by `encoder`, which is trained elsewhere and no part of the network."""
        self.encoder = encoder
        encoder.to(self._place.device)

    @property
    def _place(self) -> Tensor:
        """A tensor on the network's device, in bfloat16 if its weights are."""
        return self.get_buffer("on_device") if self.pooled is None else self.pooled.weight

    def encode(self, tokens: Tensor | None, batch_size: int) -> EncodedText:
        """Encode tokens [B, L], in the dtype of the weights; without tokens, B times ""."""
        if self.encoder is None:
            raise ValueError("this network has no text encoder yet: bind the one of its run")
        if tokens is None:
            tokens = self.encoder.null_tokens.expand(batch_size, -1)
        states, pooled = self.encoder(tokens)
        dtype = self._place.dtype
        if dtype == torch.bfloat16:
            states, pooled = states.to(dtype), pooled.to(dtype)
        return EncodedText(states, pooled)

    def encoded(self, conditioning: Conditioning) -> Conditioning:
        """`conditioning` with its texts encoded, for many calls with the same texts."""
        tokens = conditioning.tokens
        if tokens is None:
            return conditioning
        states, pooled = self.encode(tokens, len(tokens))
        return replace(conditioning, tokens=None, text_states=states, text_pooled=pooled)

    def forward(self, conditioning: Conditioning, batch_size: int) -> tuple[Tensor, Tensor | None]:
        """The vectors [B, L, W] and the projected pooled text, if any; without a text: of ""."""
        states, pooled = conditioning.text_states, conditioning.text_pooled
        if states is None or pooled is None:
            states, pooled = self.encode(conditioning.tokens, batch_size)
        return states, None if self.pooled is None else self.pooled(pooled)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move an encoder that is no part of the network with it; its dtype stays."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's stubs
        if self.encoder is not None and not isinstance(self.encoder, nn.Module):
            self.encoder.to(self._place.device)
        return self


def _require_length(tokens: Tensor, length: int) -> None:
    """Raise ValueError unless tokens are [B, length]."""
    if tokens.ndim != 2 or tokens.shape[1] != length:
        raise ValueError(f"tokens are {list(tokens.shape)}; this text encoder takes [B, {length}]")


class BlockSizes(Protocol):
    """Sizes of a TextBlock; a TextEncoderSpec is one."""

    @property
    def width(self) -> int:
        """W."""
        ...

    @property
    def depth(self) -> int:
        """Number of blocks of the transformer, on which the initial weights depend."""
        ...

    @property
    def heads(self) -> int:
        """Heads of the attention."""
        ...

    @property
    def mlp_width(self) -> int:
        """Width inside the MLP; 0: four times W."""
        ...

    @property
    def quick_gelu(self) -> bool:
        """Whether the activation is x sigmoid(1.702 x) in place of GELU."""
        ...

    @property
    def norm_eps(self) -> float:
        """Added to the variance by each norm."""
        ...


class TextBlock(nn.Module):
    """A transformer block with causal attention and the norms first: [B, L, W] -> [B, L, W]."""

    def __init__(self, spec: BlockSizes) -> None:
        super().__init__()
        width, inner = spec.width, spec.mlp_width or 4 * spec.width
        self.num_heads, self.quick_gelu = spec.heads, spec.quick_gelu
        self.norm_1 = nn.LayerNorm(width, eps=spec.norm_eps)
        self.query_key_value = nn.Linear(width, 3 * width)  # rows: query, key, value
        self.attention_out = dense(width, width)
        self.norm_2 = nn.LayerNorm(width, eps=spec.norm_eps)
        self.mlp_in = dense(width, inner)
        self.mlp_out = dense(inner, width)
        # CLIP's code: the residual branches of all blocks together start with a variance of 1.
        residual = width**-0.5 * (2 * spec.depth) ** -0.5
        for layer, deviation in (
            (self.query_key_value, width**-0.5),
            (self.attention_out, residual),
            (self.mlp_in, (2 * width) ** -0.5),
            (self.mlp_out, residual),
        ):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Add the attention to x, then the MLP of that sum."""
        query, key, value = in_heads(self.query_key_value(self.norm_1(x)), self.num_heads)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).flatten(2))
        h = self.mlp_in(self.norm_2(x))
        h = h * torch.sigmoid(1.702 * h) if self.quick_gelu else F.gelu(h)
        result: Tensor = x + self.mlp_out(h)
        return result
