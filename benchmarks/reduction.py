"""The cost of `training.reduction=elastic`, relative to `mean`, with two workers.

    python benchmarks/reduction.py [rounds]

The 2.2 M-parameter U-Net on 3x32x32 images, two processes of one thread, gloo. Every kind takes a
step in turn, with a network of its own: loss, gradient, sum, clip, Adam. Read in seconds of the
wall from a barrier to the next, as the wait for the other worker is part of the price; ratios are
within a round. `elastic, 2 slots` has batches as large as `mean` has, and so is the price of the
sum alone; more slots have smaller ones.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from ddpm_ray.assembly import diffusion, training_run
from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.loader import Batch

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 12
WORKERS, BATCH = 2, 32
MODEL = "model.base_channels=32", "model.groups=8", f"training.global_batch_size={BATCH}"
KINDS = {
    "mean": ("training.reduction=mean",),
    **{
        f"elastic, {slots} slots": (
            "training.reduction=elastic",
            f"training.reduction_slots={slots}",
        )
        for slots in (2, 4, 8)
    },
}


def stepping(keys: tuple[str, ...], workers: Workers) -> Callable[[int], None]:
    """A training step of that kind."""
    config = load_config(RunConfig, None, ["name=bench", "data.url=none", *MODEL, *keys])
    state = training_run.training_state(config, ImageShape(32, 32, 3), workers.device, {})
    objective = diffusion.objective(config, state, workers.device)
    network = state.model if objective.slots else DistributedDataParallel(state.model)
    share = BATCH // workers.count
    images = torch.randint(0, 256, (share, 32, 32, 3), dtype=torch.uint8)
    batch = Batch(images, torch.full((share,), -1))

    def step(number: int) -> None:
        objective.backward(network, batch, number, workers, BATCH)
        clip_grad_norm_(network.parameters(), 1.0, foreach=True)
        state.optimizer.step()
        state.optimizer.zero_grad()

    return step


def work(rank: int, meeting: str, results: str) -> None:
    """One worker; the first leaves seconds by kind, round by round, in `results`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORKERS)
    steps = {name: stepping(keys, Workers(rank, WORKERS)) for name, keys in KINDS.items()}
    took_s: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(1 + ROUNDS):
        for name, step in steps.items():
            dist.barrier()
            began_s = time.perf_counter()
            step(number)
            dist.barrier()
            if number:  # the first warms up
                took_s[name].append(time.perf_counter() - began_s)
    if rank == 0:
        Path(results).write_text(json.dumps(took_s))
    dist.destroy_process_group()


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        results = f"{scratch}/results.json"
        spawn(work, (f"file://{scratch}/meeting", results), nprocs=WORKERS)
        took_s: dict[str, list[float]] = json.loads(Path(results).read_text())
    print(f"batch {BATCH}, {WORKERS} workers, {ROUNDS} rounds; median (min .. max)")
    costs = {}
    for name, seconds in took_s.items():
        ratios = [one / mean for one, mean in zip(seconds, took_s["mean"], strict=True)]
        costs[name] = median(ratios)
        print(
            f"{name:<18} {median(seconds) * 1e3:8.1f} ms   x {median(ratios):.3f} "
            f"({min(ratios):.3f} .. {max(ratios):.3f})"
        )
    print(json.dumps(costs))


if __name__ == "__main__":
    main()
