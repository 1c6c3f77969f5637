"""Scores of an image and a text encoder: retrieval both ways, and zero-shot accuracy."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ddpm_ray.evaluation.confidence_interval import interval_of_mean

RANKS = (1, 5, 10)  # k of recall at k
ROWS = 1024  # queries compared at once


def retrieval_ranks(queries: Tensor, candidates: Tensor, pairs: Tensor) -> Tensor:
    """The rank, from 1, of the nearest right candidate of each query, int64 [n].

    Queries [n, E] and candidates [m, E] have length 1. Row (i, j) of `pairs`, int64 [P, 2], means
    that candidate j is right for query i; each query is in one row at least. Wrong candidates that
    are as near stand before it, and so do all if a cosine is NaN: embeddings that are equal or not
    finite score nothing.
    """
    found = []
    for start in range(0, len(queries), ROWS):  # not all at once: n * m cosines
        cosines = queries[start : start + ROWS] @ candidates.T
        of_rows = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < start + ROWS)]
        fits = torch.zeros_like(cosines, dtype=torch.bool)
        fits[of_rows[:, 0] - start, of_rows[:, 1]] = True
        best = cosines.masked_fill(~fits, -torch.inf).amax(1, keepdim=True)
        found.append(1 + (~fits & ~(cosines < best)).sum(1))
    return torch.cat(found)


def retrieval_metrics(images: Tensor, texts: Tensor, pairs: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 of images [N, E] and distinct captions [M, E], with 95 % intervals.

    Row (i, j) of `pairs`, int64 [P, 2], means that image i has caption j; each image and caption is
    in one row at least. image_to_text: the fraction of images with one of their captions among the
    k nearest of all captions; text_to_image: the other way round. The intervals are Student's, over
    the queries. Raises ValueError for fewer than 2 images or captions.
    """
    metrics: dict[str, float] = {}
    for way, ranks in (
        ("image_to_text", retrieval_ranks(images, texts, pairs)),
        ("text_to_image", retrieval_ranks(texts, images, pairs.flip(1))),
    ):
        for most in RANKS:
            metrics |= _fraction(f"eval/{way}_r{most}", ranks <= most)
    return metrics


def zero_shot_metrics(images: Tensor, names: Tensor, labels: Tensor) -> dict[str, float]:
    """Zero-shot accuracy of images [N, E]: the nearest of the class names [K, E] is the label's.

    (Radford et al. 2021, arXiv:2103.00020, section 3.1.2, with the name alone as the text.)
    `labels` are int64 [N]; images with -1 have none and are left out. Wrong names that are as
    near come first. Empty for fewer than 2.
    """
    known = labels >= 0
    if int(known.sum()) < 2:
        return {}
    own = torch.arange(int(known.sum()), device=labels.device)
    ranks = retrieval_ranks(images[known], names, torch.stack([own, labels[known]], 1))
    return _fraction("eval/zero_shot_accuracy", ranks == 1)


def _fraction(name: str, hits: Tensor) -> dict[str, float]:
    """The mean of bool [n] with its interval, which lies in 0..1."""
    hit = float(hits.sum())
    mean, low, high = interval_of_mean(len(hits), hit, hit)
    return dict(_ends(name, mean, max(low, 0.0), min(high, 1.0)))


def _ends(name: str, mean: float, low: float, high: float) -> Iterator[tuple[str, float]]:
    yield from zip((name, f"{name}_low", f"{name}_high"), (mean, low, high), strict=True)
