"""Choice of one caption for each sample of a training step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_ray.counter_rng import Purpose, Step, uniform_int


def choose(
    captions: Sequence[Sequence[str]], seed: int, step: Step, positions: Tensor
) -> list[str]:
    """Return one caption of each sample, drawn uniformly; "" for a sample that has none.

    Sample i has `captions[i]` and stands at position positions[i], int64 [B], of the global batch
    `step`. Its caption is a function of (seed, step, position) and its captions alone.
    """
    positions = positions.cpu()
    counts = torch.tensor([len(texts) for texts in captions], dtype=torch.int64)
    chosen = uniform_int(seed, Purpose.CAPTION, step, positions, counts).tolist()
    return [texts[at] if texts else "" for texts, at in zip(captions, chosen, strict=True)]
