"""Workers that are threads of one process, for what they only gather and sum."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_ray.collectives import Workers
from tests.limits import ENDS_S


@dataclass
class Table:
    """Where the workers of one test meet; a worker that does not come breaks the test in 20 s."""

    barrier: threading.Barrier
    values: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class ThreadedWorkers(Workers):
    """gather and sum_ as all_gather and all_reduce would do them."""

    table: Table = field(default_factory=lambda: Table(threading.Barrier(1)))

    def gather(self, value: Any) -> list[Any]:
        self.table.values[self.rank] = value
        self.table.barrier.wait(ENDS_S)
        values = list(self.table.values)
        self.table.barrier.wait(ENDS_S)
        return values

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self.gather(tensor.clone())).sum(0))


OnWorkers = Callable[[int, Callable[[Workers], Any]], list[Any]]


@pytest.fixture
def on_workers() -> OnWorkers:
    """Run `work(workers)` on so many workers at once; what each of them returned."""

    def run(count: int, work: Callable[[Workers], Any]) -> list[Any]:
        table = Table(threading.Barrier(count), [None] * count)
        with ThreadPoolExecutor(count) as pool:
            return list(
                pool.map(work, [ThreadedWorkers(i, count, table=table) for i in range(count)])
            )

    return run
