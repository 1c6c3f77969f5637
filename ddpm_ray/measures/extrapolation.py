"""A score of infinitely many samples, from scores of finitely many."""

from collections.abc import Sequence

import torch


def extrapolated(counts: Sequence[int], scores: Sequence[float]) -> tuple[float, float]:
    """The score at infinity and its standard error, by a straight line in 1 / count.

    The Frechet distance of N samples is too large by about a constant over N (Chong and Forsyth
    2020, arXiv:1911.07023, section 3). The error is that of the line's fit; scores of nested sets
    stray less from it than independent ones would. Raises ValueError for fewer than 3 counts.
    """
    if len(counts) < 3 or len(set(counts)) < len(counts):
        raise ValueError(f"counts are {list(counts)}; a line and its error need 3 different ones")
    x = 1 / torch.tensor(counts, dtype=torch.float64)
    y = torch.tensor(scores, dtype=torch.float64)
    design = torch.stack([torch.ones_like(x), x], 1)
    inverse = torch.linalg.inv(design.T @ design)
    line = inverse @ design.T @ y
    variance = (y - design @ line).square().sum() / (len(counts) - 2)
    return float(line[0]), float((variance * inverse[0, 0]).sqrt())
