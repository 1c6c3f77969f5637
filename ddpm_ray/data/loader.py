"""One worker's share of every global batch, read ahead from shards in the background.

The order is order.py's, the reading ahead and its bounds are reader.py's.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ddpm_ray.data.prefetcher import FETCHES, Reader, gather, inside, shares
from ddpm_ray.data.shard_cache import ShardCache
from ddpm_ray.data.shards import Dataset, fetch_shard
from ddpm_ray.data.shuffle_order import Int64s, Order
from ddpm_ray.storage import object_store


class Batch(NamedTuple):
    """This worker's samples of one global batch, in the order of their positions."""

    images: Tensor  # uint8 [b, H, W, C]
    labels: Tensor  # int64 [b]; -1 where the data set has no labels


class ShardStream:
    """The samples at `positions` of each global batch of `global_batch_size`.

    Any division of the positions over workers, and any first step, gives the same global batches.
    Raises ValueError where `lanes` does not divide the batch; `batch` raises what went wrong in
    the background: ShardCorruptError or StorageError.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        global_batch_size: int,
        positions: range,
        lanes: int,
        window_bytes: int,
        cache_dir: str | Path | None = None,
        cache_bytes: int = 0,
    ) -> None:
        window_samples = window_bytes // dataset.manifest.sample_bytes
        counts = tuple(dataset.counts.tolist())
        self.order = Order(counts, seed, global_batch_size, lanes, window_samples)
        if positions.step != 1 or not 0 <= positions.start < positions.stop <= global_batch_size:
            rule = f"it must be a run of numbers below {global_batch_size}"
            raise ValueError(f"positions is {positions}; {rule}")
        self.dataset = dataset
        self.positions = positions
        self.waited_s = 0.0  # how long batch() was blocked, in all
        self._shares = shares(self.order, positions)
        self._cache: ShardCache | None = None
        if cache_dir is not None and cache_bytes > 0 and not object_store.is_local(dataset.url):
            self._cache = ShardCache(Path(cache_dir).expanduser(), cache_bytes)
        self._reader: Reader | None = None
        self._next_step = 0
        self._closed = False

    def batch(self, step: int) -> Batch:
        """The samples of 0-based `step`: read ahead where it follows the last one asked for."""
        if self._closed:
            raise RuntimeError("this stream is closed; make a new one")
        begun_s = time.perf_counter()
        if self._reader is None or step != self._next_step:
            self._stop_reading()
            self._reader = Reader(self.dataset, self.order, self._shares, step, self._cache)
        try:
            needed = [self._reader.wait_for(share, step) for share in self._shares]
        except BaseException:
            self._stop_reading()
            raise
        self.waited_s += time.perf_counter() - begun_s
        manifest = self.dataset.manifest
        images = np.empty((len(self.positions), manifest.sample_bytes), dtype=np.uint8)
        labels, at = np.empty(len(self.positions), dtype=np.int64), 0
        for loaded, here in (piece for pieces in needed for piece in pieces):
            rows = loaded.place[here]
            out = slice(at, at + len(rows))
            # mode="clip": the default would go through a buffer. The rows are in range.
            np.take(loaded.images, rows, axis=0, out=images[out], mode="clip")
            labels[out] = loaded.labels[rows]
            at += len(rows)
        for share in self._shares:
            self._reader.release(share, step)
        self._next_step = step + 1
        shaped = torch.from_numpy(images).view(-1, *manifest.image_shape)
        return Batch(shaped, torch.from_numpy(labels))

    def keys(self, step: int) -> list[str]:
        """The keys of the samples that batch(step) gives. Slow: reads their shards once more."""
        shard_of, row_of = (
            np.concatenate(column) for column in zip(*self._places(step), strict=True)
        )
        names = np.empty(len(shard_of), dtype=object)
        for number in np.unique(shard_of):
            here = shard_of == number
            keys = fetch_shard(self.dataset, int(number), self._cache).keys
            names[here] = keys.take(pa.array(row_of[here])).to_pylist()
        return list(names)

    def close(self) -> None:
        """End the background threads; `batch` raises RuntimeError from now on."""
        self._closed = True
        self._stop_reading()

    def _places(self, step: int) -> Iterator[tuple[Int64s, Int64s]]:
        for share in self._shares:
            wanted = share.samples(step)
            for block in self.order.blocks(share.lane, wanted.start):
                if block.first >= wanted.stop:
                    break
                shard_of, row_of = self.order.rows(block)
                here = inside(block, wanted)
                yield shard_of[here], row_of[here]

    def _stop_reading(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def read_images(dataset: Dataset, shard_numbers: Iterable[int]) -> Iterator[Batch]:
    """All images and labels of each of these shards, in the order in which they were packed."""
    shape, threads = dataset.manifest.image_shape, torch.get_num_threads()
    with ThreadPoolExecutor(FETCHES) as fetchers, ThreadPoolExecutor(threads) as decoders:
        numbers = iter(shard_numbers)
        ahead = deque(fetchers.submit(fetch_shard, dataset, n) for n in islice(numbers, FETCHES))
        while ahead:
            shard = ahead.popleft().result()
            ahead.extend(fetchers.submit(fetch_shard, dataset, n) for n in islice(numbers, 1))
            images = np.empty((len(shard), math.prod(shape)), dtype=np.uint8)
            gather(shard, np.arange(len(shard)), images, dataset, decoders)
            labels = torch.from_numpy(shard.labels.copy())
            yield Batch(torch.from_numpy(images).view(-1, *shape), labels)
