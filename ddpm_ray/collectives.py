"""The workers of one run as each of them sees the others: its rank, its share, sums over all.

Outside a process group (a notebook, a unit test) there is one worker and every sum is its own.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ddpm_ray import fault_injection


@dataclass(frozen=True)
class Workers:
    """One worker's place among `count`; `rank` 0 also writes and reports for all."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        """Whether this worker writes checkpoints, pictures and metrics for all."""
        return self.rank == 0

    def share(self, items: int) -> range:
        """This worker's contiguous part of 0..items-1; parts differ in length by at most one."""
        return range(self.rank * items // self.count, (self.rank + 1) * items // self.count)

    def sum_(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over all workers, in place, equal on each; all must call it."""
        with fault_injection.during("reduce"):
            if self.count > 1:
                on_device = tensor.to(self.device)  # NCCL sums only what lies on its GPU
                dist.all_reduce(on_device)
                tensor.copy_(on_device)
        return tensor

    def add_in_pairs_(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over all workers, in place, in the same order for any 2^j of them.

        It lies on the workers' device; all must call it.
        """
        other = torch.empty_like(tensor)
        for distance in (1 << level for level in range(self.count.bit_length() - 1)):
            peer = self.rank ^ distance
            exchange = [dist.P2POp(dist.isend, tensor, peer), dist.P2POp(dist.irecv, other, peer)]
            for request in dist.batch_isend_irecv(exchange):
                request.wait()
            tensor += other
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every worker's `value` in rank order, on each of them; all must call it."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values
