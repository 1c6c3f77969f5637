"""Samples and data as sets of features: how much of each the other covers, and how sure a class is.

N, M: vectors in a set; D: features in a vector; K: classes. Distances are Euclidean.
"""

import torch
from torch import Tensor

from ddpm_ray.redaction import counted

NEIGHBOURS = 3  # k of the paper's tables
CHUNK = 1024  # vectors whose distances are held at once


def precision_recall(
    data: Tensor, samples: Tensor, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Shares of samples [M, D] that lie in the data's manifold, and of data [N, D] in the samples'.

    A set's manifold is the union of balls around its members, each reaching its k-th nearest other
    member (Kynkaanniemi et al. 2019, arXiv:1904.06991, eq. 1 and 2). Raises ValueError where a set
    has no k other members.
    """
    for name, features in (("data", data), ("samples", samples)):
        if len(features) <= neighbours:
            raise ValueError(
                f"{name} has {counted(len(features), 'vector')}; a radius to neighbour "
                f"number {neighbours} needs {neighbours + 1}: take more images"
            )
    radius_of_data, radius_of_samples = _radii(data, neighbours), _radii(samples, neighbours)
    precise, recalled = 0, torch.zeros(len(data), dtype=torch.bool, device=data.device)
    parts = torch.split(samples, CHUNK), torch.split(radius_of_samples, CHUNK)
    for part, radius in zip(*parts, strict=True):
        distance = _distances(part, data)
        precise += int((distance <= radius_of_data).any(1).sum())
        recalled |= (distance <= radius.unsqueeze(1)).any(0)
    return precise / len(samples), float(recalled.double().mean())


def inception_score(probability: Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and deviation over `splits` of exp(E[KL(p(y | x) || p(y))]), of p(y | x) [N, K].

    1 where all images look alike, K where each is one class and all are as frequent (Salimans et
    al. 2016, arXiv:1606.03498, section 4). Raises ValueError for fewer images than splits.
    """
    if len(probability) < splits:
        raise ValueError(
            f"{counted(len(probability), 'image')} for {counted(splits, 'split')}; draw more"
        )
    scores = []
    for part in probability.double().tensor_split(splits):
        mean = part.mean(0)
        divergence = torch.special.xlogy(part, part) - torch.special.xlogy(part, mean)
        scores.append(divergence.sum(1).mean().exp())
    found = torch.stack(scores)
    return float(found.mean()), float(found.std(correction=0))


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """The distance [N] from each vector to its k-th nearest other."""
    parts = [
        # The nearest of all is the vector itself. Not kthvalue: not deterministic on CUDA.
        _distances(part, features).topk(neighbours + 1, dim=1, largest=False).values[:, -1]
        for part in torch.split(features, CHUNK)
    ]
    return torch.cat(parts)


def _distances(one: Tensor, other: Tensor) -> Tensor:
    """Between each pair, [n, m], exact: a difference of large squares would not be 0 for copies."""
    return torch.cdist(one.double(), other.double(), compute_mode="donot_use_mm_for_euclid_dist")
