"""The nearest of many vectors to each of a few, exactly, in bounded memory.

N: vectors whose neighbours are looked for; M: the many; D: numbers in a vector; k: neighbours.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = 1 << 23  # numbers of a block that is held in float64: 64 MiB


def nearest_squares(vectors: Tensor, others: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Squared distances float64 and places int64, [N, min(k, M)] each, of the nearest of `others`.

    Nearest first, and of equally near ones the first; `vectors` are [N, D] and `others` [M, D] of
    any type. Distances of whole numbers, as pixels are, are exact; others are good to 1e-15 of the
    vectors' squared lengths.
    """
    rows = []
    for one, _ in _blocks(vectors):
        square = torch.empty(len(one), 0, dtype=torch.float64, device=vectors.device)
        place = torch.empty(len(one), 0, dtype=torch.int64, device=vectors.device)
        for other, first in _blocks(others):
            between = other.square().sum(1) + one.square().sum(1, keepdim=True)
            between.addmm_(one, other.T, alpha=-2).clamp_(min=0)
            values, indices = _first_of(between, min(k, len(other)))
            found = torch.cat([square, values], 1), torch.cat([place, first + indices], 1)
            order = first_by(*found, k)
            square, place = (part.gather(1, order) for part in found)
        rows.append((square, place))
    squares, places = zip(*rows, strict=True)
    return torch.cat(squares), torch.cat(places)


def first_by(squares: Tensor, places: Tensor, k: int) -> Tensor:
    """Columns [N, k] of the smallest squares of each row, rising; equal ones by place."""
    by_place = places.argsort(dim=1)
    by_square = squares.gather(1, by_place).argsort(dim=1, stable=True)
    return by_place.gather(1, by_square)[:, :k]


def _first_of(between: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row, and where; sorts only rows where topk chose among equal ones."""
    near = between.topk(k, largest=False)
    values, indices = near.values, near.indices
    tied = (between <= values[:, -1:]).sum(1) > k
    if tied.any():
        ordered = between[tied].sort(dim=1, stable=True)
        values[tied], indices[tied] = ordered.values[:, :k], ordered.indices[:, :k]
    return values, indices


def _blocks(vectors: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Parts of vectors [N, D] in float64, and where each begins."""
    size = max(1, min(4096, _BLOCK // vectors.shape[1]))
    for first in range(0, len(vectors), size):
        yield vectors[first : first + size].double(), first
