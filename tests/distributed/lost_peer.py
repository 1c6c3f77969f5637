"""Two gloo workers of which the second dies between two exchanges, once for each kind of exchange.

Run as a module it prints, for each, the error of the first, pickled, in hexadecimal.
"""

import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddpm_ray.collectives import Workers

EXCHANGES: dict[str, Callable[[Workers, nn.Module], Any]] = {
    "sum": lambda workers, network: workers.sum_(torch.ones(3)),
    "gather": lambda workers, network: workers.gather({"a": 1}),
    "pairs": lambda workers, network: workers.add_in_pairs_(torch.ones(3)),
    "gradient": lambda workers, network: network(torch.ones(1, 3)).sum().backward(),
}


def work(rank: int, meeting: str, exchange: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}-{exchange}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    network = DistributedDataParallel(nn.Linear(3, 1))
    workers = Workers(rank, 2)
    EXCHANGES[exchange](workers, network)
    if rank == 1:
        os._exit(9)
    try:
        EXCHANGES[exchange](workers, network)
    except Exception as error:  # noqa: BLE001 - it is what is asked for
        print(exchange, pickle.dumps(error).hex(), flush=True)
    os._exit(0)


if __name__ == "__main__":
    forked = multiprocessing.get_context("fork")  # torch is imported once; no thread runs yet
    processes = [
        forked.Process(target=work, args=(rank, sys.argv[1], exchange))
        for exchange in EXCHANGES
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
