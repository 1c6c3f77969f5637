"""Score how well samples fit their prompts: cosines of their embeddings by a contrastive model.

The score depends on that model: it is no CLIP score (Hessel et al. 2021, arXiv:2104.08718) unless
CLIP made the embeddings, and it compares models under one encoder alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ddpm_ray.collectives import Workers
from ddpm_ray.evaluation.confidence_interval import interval_of_mean
from ddpm_ray.sampling.image_text import TrainedEncoders


@dataclass
class Alignment:
    """The cosines of a worker's samples, collected as the batches of a score pass by."""

    encoders: TrainedEncoders
    prompts: Sequence[str]  # sample i has prompts[i % len(prompts)]
    _cosines: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, encoders: TrainedEncoders | None, prompts: Sequence[str]) -> Alignment | None:
        """The score of one evaluation of samples with `prompts`; None without encoders."""
        return None if encoders is None else cls(encoders, prompts)

    @property
    def facts(self) -> dict[str, Any]:
        """All that the score depends on other than the samples, as plain JSON."""
        return {"model_sha256": self.encoders.sha256, "captions": "the prompts of the samples"}

    def watched(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of indices [n] and images uint8 [n, H, W, C], and note their cosines."""
        for index, images in batches:
            texts = [self.prompts[i % len(self.prompts)] for i in index.tolist()]
            of_images = self.encoders.image_embeddings(images.cpu())
            of_texts = self.encoders.text_embeddings(texts)
            self._cosines.append((of_images * of_texts).sum(1).double().cpu())
            yield index, images

    def metrics(self, workers: Workers) -> dict[str, float]:
        """The mean cosine of all workers' samples and its 95 % interval; all workers call it.

        Values are added in the order of the samples, so the result does not depend on the number of
        workers. Raises ValueError for fewer than 2 samples.
        """
        mine = torch.cat([torch.empty(0, dtype=torch.float64), *self._cosines])
        found = [one for part in workers.gather(mine.tolist()) for one in part]
        values = torch.tensor(found, dtype=torch.float64)
        total, squares = float(values.sum()), float(values.square().sum())
        mean, low, high = interval_of_mean(len(values), total, squares)
        return {
            "eval/alignment": mean,
            "eval/alignment_low": max(low, -1.0),
            "eval/alignment_high": min(high, 1.0),
        }
