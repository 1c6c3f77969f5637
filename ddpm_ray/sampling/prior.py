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

    def draw(self, prompts: Sequence[str], indices: range, seed: int) -> Tensor:
        """Draw the embeddings `indices`: float32 [N, D], of any length; i has prompt i % n.

        Embedding i is a function of (seed, i, its prompt). Raises ValueError for no prompt.
        """
        if not prompts:
            raise ValueError("prompts is empty; a prior draws the embedding that fits a text")
        settings = replace(self.settings, prompts=tuple(prompts), seed=seed)
        plan = sampling_plan(settings, self.denoiser.schedule)
        parts = torch.split(torch.tensor(indices), self.settings.batch_size)
        found = [draw(self.denoiser, plan, part, NO_IMAGE, self.device) for part in parts]
        return self.codec.embeddings(torch.cat(found))

    def embeddings(
        self, prompts: Sequence[str], indices: range, seed: int, candidates: int = CANDIDATES
    ) -> Tensor:
        """Draw the embeddings `indices`, [N, D] of length 1: each the best of its `candidates`.

        Embedding i has prompt i % n. The best has the largest dot product with the embedding of its
        prompt. (Section 2.2.)
        """
        repeated = [prompt for prompt in prompts for _ in range(candidates)]
        numbers = range(indices.start * candidates, indices.stop * candidates)
        drawn = F.normalize(self.draw(repeated, numbers, seed), dim=1)
        drawn = drawn.reshape(len(indices), candidates, -1)
        if candidates == 1:
            return drawn[:, 0]
        texts = self.texts.text_embeddings([prompts[i % len(prompts)] for i in indices])
        near = torch.einsum("ncd,nd->nc", drawn, texts.to(drawn))
        return drawn[torch.arange(len(indices)), near.argmax(1)]
