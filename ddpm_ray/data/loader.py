"""Load one worker's share of every global batch from shards, prefetched in the background.

shuffle_order.py defines the order of the samples, prefetcher.py the prefetching and its limits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ddpm_ray.data.captions import caption_tuples
from ddpm_ray.data.dataset import Dataset, DatasetError, UInt8s
from ddpm_ray.data.manifest import Manifest
from ddpm_ray.data.prefetcher import FETCHES, Prefetcher, lane_shares, overlap
from ddpm_ray.data.shard_cache import ShardCache
from ddpm_ray.data.shard_samples import gather, image_decoders
from ddpm_ray.data.shards import fetch_shard
from ddpm_ray.data.shuffle_order import Int64s, Order
from ddpm_ray.storage import object_store


class Batch(NamedTuple):
    """This worker's samples of one global batch, ordered by position."""

    images: Tensor  # uint8 [b, H, W, C]; float16 latents [b, 2, views, c, h, w], embeddings [b, E]
    labels: Tensor  # int64 [b]; -1: no label
    captions: list[tuple[str, ...]] | None = None  # b, each of 0..64; None: a set without captions
    tokens: Tensor | None = None  # int64 [b, L], of one caption each, in place of the captions
    embeddings: Tensor | None = None  # float16 [b, E], of the images as they are stored

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        return self.images, self.labels

    @property
    def inputs(self) -> tuple[Tensor | None, Tensor | None]:
        """Tokens and embeddings, which only some batches have."""
        return self.tokens, self.embeddings

    def rows(self, part: slice) -> Batch:
        """The samples at these places, without captions."""
        return self.map(lambda tensor: tensor[part])

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with each tensor changed, without captions."""
        tokens, embeddings = (None if one is None else change(one) for one in self.inputs)
        images, labels = map(change, self.tensors)
        return Batch(images, labels, tokens=tokens, embeddings=embeddings)


class ShardStream:
    """Stream of the samples at `positions` of each global batch of `global_batch_size`.

    The global batches do not depend on how positions are divided over workers, nor on the first
    step. Raises ValueError if `lanes` does not divide the batch size; `batch` raises errors of the
    background threads: ShardCorruptError or StorageError.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        global_batch_size: int,
        positions: range,
        lanes: int,
        window_samples: int,
        cache_dir: str | Path | None = None,
        cache_bytes: int = 0,
    ) -> None:
        counts = tuple(dataset.counts.tolist())
        self.order = Order(counts, seed, global_batch_size, lanes, window_samples)
        if positions.step != 1 or not 0 <= positions.start < positions.stop <= global_batch_size:
            rule = f"it must be a range of step 1 within 0..{global_batch_size}"
            raise ValueError(f"positions is {positions}; {rule}")
        self.dataset = dataset
        self.positions = positions
        self.waited_s = 0.0  # total time that batch() was blocked
        self._shape = torch.Size((len(positions), *dataset.manifest.sample_shape))
        is_pixels = dataset.manifest.codec == "pixels"
        self._dtype = torch.uint8 if is_pixels else torch.float16
        self._shares = lane_shares(self.order, positions)
        self._cache: ShardCache | None = None
        if cache_dir is not None and cache_bytes > 0 and not object_store.is_local(dataset.url):
            self._cache = ShardCache(Path(cache_dir).expanduser(), cache_bytes)
        self._prefetcher: Prefetcher | None = None
        self._next_step = 0
        self._closed = False

    def batch(self, step: int, out: Batch | None = None) -> Batch:
        """Return the samples of the 0-based `step`; prefetched if it follows the last step read.

        They are copied once: to the tensors of `out`, which the batch then holds, if their shapes
        and types are those of a batch, or else to new memory.
        """
        if self._closed:
            raise RuntimeError("this ShardStream is closed; make a new one")
        begun_s = time.perf_counter()
        if self._prefetcher is None or step != self._next_step:
            self._stop_prefetcher()
            self._prefetcher = Prefetcher(self.dataset, self.order, self._shares, step, self._cache)
        try:
            needed = self._prefetcher.wait_for(step)
        except BaseException:
            self._stop_prefetcher()
            raise
        self.waited_s += time.perf_counter() - begun_s
        found = out if out is not None and self._fits(out) else self._new_batch()
        views: list[UInt8s] = []
        for loaded, here in needed:
            views += loaded.views[here]
        np.concatenate(views, out=found.images.view(torch.uint8).view(-1).numpy())
        labels = [loaded.labels[here] for loaded, here in needed]
        np.concatenate(labels, out=found.labels.numpy())
        if self.dataset.manifest.captioned:
            texts = [one for loaded, here in needed for one in (loaded.captions or ())[here]]
            found = found._replace(captions=texts)
        self._prefetcher.release(step)
        self._next_step = step + 1
        return found

    def keys(self, step: int) -> list[str]:
        """Return the keys of the samples of batch(step). Slow: reads their shards again."""
        shard_of, row_of = (
            np.concatenate(column) for column in zip(*self._locations(step), strict=True)
        )
        names = np.empty(len(shard_of), dtype=object)
        for number in np.unique(shard_of):
            here = shard_of == number
            keys = fetch_shard(self.dataset, int(number), self._cache).keys
            names[here] = keys.take(pa.array(row_of[here])).to_pylist()
        return list(names)

    def _new_batch(self) -> Batch:
        """Return memory for a batch."""
        return Batch(
            torch.empty(self._shape, dtype=self._dtype),
            torch.empty(self._shape[:1], dtype=torch.int64),
        )

    def _fits(self, batch: Batch) -> bool:
        """Whether `batch` has the shapes and types of a batch of this stream."""
        images, labels = batch.tensors
        return (images.shape, images.dtype) == (self._shape, self._dtype) and (
            labels.shape == self._shape[:1] and images.is_contiguous() and labels.is_contiguous()
        )

    def close(self) -> None:
        """Stop the background threads; later calls of `batch` raise RuntimeError."""
        self._closed = True
        self._stop_prefetcher()

    def _locations(self, step: int) -> Iterator[tuple[Int64s, Int64s]]:
        for share in self._shares:
            low, high = share.samples_of(step)
            for block in self.order.blocks(share.lane, low):
                if block.first >= high:
                    break
                shard_of, row_of = self.order.rows(block)
                here = overlap(block, low, high)
                yield shard_of[here], row_of[here]

    def _stop_prefetcher(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None


def read_images(dataset: Dataset, shard_numbers: Iterable[int]) -> Iterator[Batch]:
    """Yield all samples, labels and captions of each of these shards, in packed order."""
    manifest = dataset.manifest
    with ThreadPoolExecutor(FETCHES) as fetchers, image_decoders(manifest) as decoders:
        numbers = iter(shard_numbers)
        ahead = deque(fetchers.submit(fetch_shard, dataset, n) for n in islice(numbers, FETCHES))
        while ahead:
            shard = ahead.popleft().result()
            ahead.extend(fetchers.submit(fetch_shard, dataset, n) for n in islice(numbers, 1))
            images = np.empty((len(shard), manifest.sample_bytes), dtype=np.uint8)
            gather(shard, np.arange(len(shard)), images, dataset, decoders)
            labels = torch.from_numpy(shard.labels.copy())
            captions = None if shard.captions is None else caption_tuples(shard.captions)
            yield Batch(_shaped(images, manifest), labels, captions)


def read_captions(dataset: Dataset, shard_numbers: Iterable[int]) -> Iterator[tuple[str, ...]]:
    """Yield the captions of each sample of these shards, in packed order; decodes no image.

    Raises DatasetError for a set without captions, and the errors of `fetch_shard`.
    """
    if not dataset.manifest.captioned:
        remedy = "pack it again from a source with captions (docs/packing.md)"
        raise DatasetError(dataset.url, "the data set has no captions", remedy)
    for number in shard_numbers:
        captions = fetch_shard(dataset, number).captions
        assert captions is not None  # as the manifest says, which the parser checks
        yield from caption_tuples(captions)


def _shaped(samples: UInt8s, manifest: Manifest) -> Tensor:
    """View the bytes of samples [b, sample_bytes] as a tensor [b, *sample_shape]."""
    values = torch.from_numpy(samples.view(manifest.sample_dtype))
    return values.view(-1, *manifest.sample_shape)
