"""A text encoder that is trained elsewhere, as an input of a network that does not train it.

B: batch; L: tokens of a text; W: width of its vectors; E: width of the vector of the whole text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_ray.diffusion.conditioning import NO_TEXT
from ddpm_ray.models.contrastive import ContrastiveEncoders
from ddpm_ray.models.text_encoder import EncodedText, FrozenTextSpec


class FrozenText:
    """Tokens int64 [B, L] -> EncodedText, without gradients; NO_TEXT rows are the text "".

    `module` computes them from tokens of the tokenizer, in its own dtype also under autocast, or on
    a GPU in `gpu_dtype`, if that is given. It is no nn.Module itself: a network that holds it has
    it in no state_dict, and neither optimizer, EMA nor DDP see it. All copies of the network share
    it.
    """

    def __init__(
        self, module: nn.Module, spec: FrozenTextSpec, gpu_dtype: torch.dtype | None = None
    ) -> None:
        self.module = module.eval().requires_grad_(False)
        self.spec, self.gpu_dtype = spec, gpu_dtype
        self.null_tokens = torch.tensor(spec.null_tokens)  # int64 [L]

    def to(self, device: torch.device) -> None:
        """Move it to `device`."""
        if self.null_tokens.device != device:
            self.module.to(device, self.gpu_dtype if device.type == "cuda" else None)
            self.null_tokens = self.null_tokens.to(device)

    def __call__(self, tokens: Tensor) -> EncodedText:
        """Encode tokens [B, L]: float32 [B, L, W] and [B, E]; ValueError for another length."""
        self.spec.require_length(tokens)
        tokens = torch.where(tokens == NO_TEXT, self.null_tokens, tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            states, pooled = self.module(tokens)
        return EncodedText(states.float(), pooled.float())

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenText:
        return self


class ContrastiveText(nn.Module):
    """The text encoder of contrastive encoders: vectors of its tokens, and the text's embedding.

    Tokens [B, L] -> [B, L, W] and [B, E] of length 1, as `ContrastiveEncoders.embed_texts`.
    """

    def __init__(self, encoders: ContrastiveEncoders) -> None:
        super().__init__()
        self.text, self.projection = encoders.text, encoders.text_projection

    def forward(self, tokens: Tensor) -> EncodedText:
        """Encode the tokens once for both."""
        states, pooled = self.text(tokens)
        return EncodedText(states, F.normalize(self.projection(pooled).float(), dim=1))
