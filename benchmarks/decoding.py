"""Small operations of the launching thread while images are decoded for it.

    python benchmarks/decoding.py [rounds]

A training loop takes a batch of 50 PNG images of 128 x 128 from the stream every tenth of a second
and calls small operations until the next is due: 500 images per second are decoded meanwhile, as
they would for a GPU. The same loop without batches takes turns with it. `slowed` is the
time of an operation in the first over that in the second, the median of the rounds with the least
and the greatest: 1 is no loss. It counts the wall time of the operations alone, so that waiting for
a batch (`waited`) and processors that are taken by the decoders show apart. One thread for torch;
needs a second core for the decoders.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image

from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.data.loader import ShardStream
from ddpm_ray.runs.pack import pack_dataset

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 7
IMAGES, SIDE, BATCH, TICK_S, TICKS, CALLS = 2000, 128, 50, 0.1, 40, 100


def write_images(folder: str) -> None:
    """Smooth pictures, which PNG compresses as it does drawings."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (IMAGES, 8, 8, 3), dtype=np.uint8)
    for number, pixels in enumerate(small):
        picture = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        picture.save(f"{folder}/{number:05d}.png")


def seconds_per_call(take: Callable[[int], object], begin: int = 0) -> tuple[float, float]:
    """Mean wall time of a small operation, and seconds waited for batches, in one round."""
    x, calls, waited = torch.zeros(64), list[float](), 0.0
    began = time.perf_counter()
    for tick in range(TICKS):
        asked = time.perf_counter()
        take(begin + tick)
        waited += time.perf_counter() - asked
        while time.perf_counter() < began + (tick + 1) * TICK_S:
            start = time.perf_counter()
            for _ in range(CALLS):
                x.add_(1)
            calls.append((time.perf_counter() - start) / CALLS)
    return statistics.fmean(calls), waited


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "png").mkdir()
        write_images(f"{folder}/png")
        pack_dataset(
            f"{folder}/png", f"{folder}/data", PackConfig(encoding="png", shard_bytes=2**27)
        )
        dataset = open_dataset(f"{folder}/data")
        slowed, waits = list[float](), list[float]()
        for round_ in range(ROUNDS + 1):  # the first one starts the decoders
            stream = ShardStream(
                dataset,
                seed=round_,
                global_batch_size=BATCH,
                positions=range(BATCH),
                lanes=2,
                window_samples=500,
            )
            stream.batch(0)
            decoding, waited = seconds_per_call(stream.batch, begin=1)
            stream.close()
            alone, _ = seconds_per_call(lambda _: None)
            if round_:
                slowed.append(decoding / alone)
                waits.append(waited / TICKS)
        print(
            f"slowed {statistics.median(slowed):.2f} ({min(slowed):.2f}..{max(slowed):.2f})   "
            f"waited {1e3 * statistics.median(waits):.1f} ms for each batch of {BATCH}"
        )


if __name__ == "__main__":
    main()
