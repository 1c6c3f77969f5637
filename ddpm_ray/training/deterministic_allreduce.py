"""A gradient whose bits do not depend on the number of workers.

The global batch is cut into S = 2^k equal slots. Each slot's gradient is computed by itself, and
the S of them are added as a balanced binary tree: (0 + 1) + (2 + 3) and so on. A worker of n = 2^j
has S / n slots next to each other, which is a subtree; the rest of the tree is j exchanges of
partial sums between pairs of workers. Every sum in it has two terms, whose order floating point
does not mind, so 1, 2, ... S workers add the same numbers in the same way.

The price: no overlap of the exchange with the backward pass, small batches, log2(S / n) + 1 copies
of the gradient in memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_ray.collectives import Workers


class DeterministicAllReduce:
    """Gradients of `slots` slots on their way into one mean, left in the leaves' `grad`."""

    def __init__(self, leaves: Sequence[Tensor], slots: int) -> None:
        self._parameters = leaves
        self._slots = slots
        self._sums: list[Tensor] = []  # of 2^i slots each, i falling
        self._count = 0

    def accumulate(self) -> None:
        """Move the gradient of one more slot out of the parameters."""
        gradient = torch.cat([_gradient(parameter).flatten() for parameter in self._parameters])
        for parameter in self._parameters:
            parameter.grad = None
        self._count += 1
        pairs = self._count
        while pairs % 2 == 0:  # as the carry of a binary counter
            gradient = self._sums.pop().add_(gradient)
            pairs //= 2
        self._sums.append(gradient)

    def all_reduce(self, workers: Workers) -> None:
        """The mean over all workers' slots becomes the parameters' gradient; all must call it."""
        (total,) = self._sums
        workers.add_in_pairs_(total).div_(self._slots)
        _split(total, self._parameters)


def mean_over_workers(leaves: Sequence[Tensor], workers: Workers) -> None:
    """Average the gradients of `leaves` over all workers, in place; all must call it."""
    if workers.count > 1:
        total = torch.cat([_gradient(leaf).flatten() for leaf in leaves])
        _split(workers.sum_(total).div_(workers.count), leaves)


def _split(gradient: Tensor, leaves: Sequence[Tensor]) -> None:
    """Write the parts of one flat gradient to the leaves' `grad`."""
    parts = torch.split(gradient, [leaf.numel() for leaf in leaves])
    for leaf, part in zip(leaves, parts, strict=True):
        # In the weights' own layout: fused Adam pairs elements by their place in memory.
        leaf.grad = torch.empty_like(leaf, requires_grad=False).copy_(part.view(leaf.shape))


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
