"""A trained prior: from prompts to the embeddings of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.data.embedding_codec import EmbeddingCodec
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.sampling import draw, sampling_plan

CANDIDATES = 2  # embeddings per image, of which the nearest to the text is taken (section 2.2)
NO_IMAGE = ImageShape(1, 1, 1)  # embeddings have one shape, whatever the images


class TextEmbedder(Protocol):
    """The encoder of texts in the space of the image embeddings; TrainedEncoders is one."""

    def text_embeddings(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [n, D] of length 1 of n prompts."""
        ...


@dataclass(frozen=True, eq=False)
class TrainedPrior:
    """A prior with the settings of its run: it draws an embedding for each prompt."""

    denoiser: Denoiser  # network in eval mode on `device`
    codec: EmbeddingCodec
    texts: TextEmbedder
    provenance: dict[str, Any]  # config, step and sha256 of the weights
    device: torch.device | str = "cpu"
    settings: SamplingSettings = field(default_factory=SamplingSettings)

    def __repr__(self) -> str:
        """Checkpoint, step and width of the embeddings, in one line."""
        where, step = self.provenance["checkpoint"], self.provenance["step"]
        return f"TrainedPrior({where}, step {step}, width {self.codec.width})"

    def draw(self, prompts: Sequence[str], count: int, seed: int) -> Tensor:
        """Draw `count` embeddings float32 [count, D], of any length; number i has prompt i % n.

        Number i is a function of (seed, i, its prompt). Raises ValueError for no prompt.
        """
        if not prompts:
            raise ValueError("prompts is empty; a prior draws the embedding that fits a text")
        settings = replace(self.settings, prompts=tuple(prompts), seed=seed)
        plan = sampling_plan(settings, self.denoiser.schedule)
        parts = torch.split(torch.arange(count), self.settings.batch_size)
        found = [draw(self.denoiser, plan, part, NO_IMAGE, self.device) for part in parts]
        return self.codec.embeddings(torch.cat(found))

    def embeddings(
        self, prompts: Sequence[str], count: int, seed: int, candidates: int = CANDIDATES
    ) -> Tensor:
        """Draw `count` embeddings [count, D] of length 1: the best of `candidates` for each.

        The best has the largest dot product with the embedding of its prompt. (Section 2.2.)
        """
        each = [prompts[i % len(prompts)] for i in range(count)] if prompts else []
        texts = self.texts.text_embeddings(each) if candidates > 1 and each else None
        repeated = [prompt for prompt in each for _ in range(candidates)]
        drawn = self.draw(repeated, count * candidates, seed)
        drawn = F.normalize(drawn, dim=1).reshape(count, candidates, -1)
        if texts is None:
            return drawn[:, 0]
        near = torch.einsum("ncd,nd->nc", drawn, texts.to(drawn))
        return drawn[torch.arange(count), near.argmax(1)]
