"""Rank, data share and collectives of one worker.

Without a process group (a notebook, a unit test) there is one worker, and collectives return its
own values.
"""

import io
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ddpm_ray import fault_injection

BROADCAST_BYTES = 16 * 2**20  # at a time, on the device


@dataclass(frozen=True)
class Workers:
    """One of `count` workers; rank 0, the main worker, also writes and reports for all."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this worker (rank 0) writes checkpoints, images and metrics for all."""
        return self.rank == 0

    def share(self, items: int) -> range:
        """Contiguous share of 0..items-1 of this worker; shares differ by at most one in length."""
        return range(self.rank * items // self.count, (self.rank + 1) * items // self.count)

    def sum_(self, tensor: Tensor) -> Tensor:
        """All-reduce: sum `tensor` over all workers, in place. All workers must call it."""
        with fault_injection.during("reduce"):
            if self.count > 1:
                on_device = tensor.to(self.device)  # NCCL reduces tensors on its GPU alone
                dist.all_reduce(on_device)
                tensor.copy_(on_device)
        return tensor

    def add_in_pairs_(self, tensor: Tensor) -> Tensor:
        """All-reduce by recursive doubling: sum `tensor` over all workers, in place.

        The order of additions does not depend on the number of workers, a power of 2. `tensor` is
        on the worker's device. All workers must call it.
        """
        other = torch.empty_like(tensor)
        for distance in (1 << level for level in range(self.count.bit_length() - 1)):
            peer = self.rank ^ distance
            exchange = [dist.P2POp(dist.isend, tensor, peer), dist.P2POp(dist.irecv, other, peer)]
            for request in dist.batch_isend_irecv(exchange):
                request.wait()
            tensor += other
        return tensor

    def gather_rows(self, rows: Tensor) -> Tensor:
        """All-gather: `rows` [n, ...] of each worker in rank order, [count * n, ...].

        `rows` is on the worker's device and n equal on all workers, all of which must call it.
        """
        if self.count == 1:
            return rows
        gathered = rows.new_empty(self.count * len(rows), *rows.shape[1:])
        dist.all_gather_single(gathered, rows.contiguous())
        return gathered

    def gather(self, value: Any) -> list[Any]:
        """All-gather: the `value` of each worker, in rank order. All workers must call it."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def broadcast_bytes(self, data: bytes | None, size: int, source: int) -> bytes:
        """Broadcast: the `size` bytes that the worker `source` has. All workers must call it."""
        received = io.BytesIO()
        for begin in range(0, size if self.count > 1 else 0, BROADCAST_BYTES):
            end = min(size, begin + BROADCAST_BYTES)
            if data is None:
                part = torch.empty(end - begin, dtype=torch.uint8, device=self.device)
            else:
                part = torch.frombuffer(bytearray(memoryview(data)[begin:end]), dtype=torch.uint8)
                part = part.to(self.device)
            dist.broadcast(part, source)
            if data is None:
                received.write(part.cpu().numpy().data)
        return received.getvalue() if data is None else data
