"""The background half of stream.py: blocks of some lanes, read ahead from shards, bounded.

Memory: two windows of decoded samples for these lanes, a batch, one shard for each of the lanes
(the one that its next block goes on with) and the FETCHES on their way.
"""

from __future__ import annotations

import heapq
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from weakref import WeakValueDictionary

import numpy as np
import torch

from ddpm_ray.data.shard_cache import ShardCache
from ddpm_ray.data.shards import Dataset, DatasetError, Shard, UInt8s, fetch_shard
from ddpm_ray.data.shuffle_order import Block, Int64s, Order

FETCHES = 4  # shards on their way at a time


@dataclass(frozen=True)
class Share:
    """The part of one lane that this worker draws: samples `low` to `high` of its `lane_batch`."""

    lane: int
    low: int
    high: int
    lane_batch: int

    def samples(self, step: int) -> range:
        """Numbers of the lane's samples at `step`."""
        return range(step * self.lane_batch + self.low, step * self.lane_batch + self.high)


@dataclass
class Loaded:
    """A block in memory, its samples in the order in which they were gathered."""

    block: Block
    place: Int64s  # [samples]: the row below of each sample in the block's order
    images: UInt8s  # [samples, sample_bytes]
    labels: Int64s  # [samples]


@dataclass(frozen=True)
class Part:
    """What one shard gives to a block: its `rows` go to `loaded`'s rows from `at` on."""

    loaded: Loaded
    at: int
    rows: Int64s
    shard: Future[Shard]
    is_last: bool  # of its block


class Reader:
    """Reads the blocks of some lanes from `step` on, in the order in which batches need them."""

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        shares: list[Share],
        step: int,
        cache: ShardCache | None,
    ) -> None:
        self._dataset, self._order, self._cache = dataset, order, cache
        self._shares, self._step = shares, step
        self._changed = threading.Condition()
        # Guarded by `_changed`:
        self._ready: dict[int, deque[Loaded]] = {share.lane: deque() for share in shares}
        self._held_samples = 0  # in blocks that were begun and not yet released
        self._failure: BaseException | None = None
        self._closed = False
        self._spare: list[UInt8s] = []  # memory of released blocks
        # A small set does not fill its blocks; to read hundreds of its epochs ahead is no use.
        self._block_samples = min(order.block_samples, -(-order.samples // order.lanes))
        # Two blocks a lane, one in use and one ahead; and a batch, which may span many small blocks
        # (without it a batch larger than the window would wait for ever).
        self._most_samples = len(shares) * (2 * self._block_samples + order.lane_batch)
        # A shard that some lane still holds is not fetched again.
        self._alive: WeakValueDictionary[int, Future[Shard]] = WeakValueDictionary()
        self._fetchers = ThreadPoolExecutor(FETCHES, "shard-fetch")
        # A worker's share of its node, cluster.cpus_per_worker; in a notebook, the cores.
        self._decoders = ThreadPoolExecutor(torch.get_num_threads(), "image-decode")
        threading.Thread(target=self._run, name="shard-stream", daemon=True).start()

    def wait_for(self, share: Share, step: int) -> list[tuple[Loaded, slice]]:
        """The loaded blocks that hold the share's samples at `step`, and where in each."""
        wanted, ready = share.samples(step), self._ready[share.lane]

        def arrived() -> bool:
            if self._failure is not None:
                raise self._failure
            return bool(ready) and _end(ready[-1].block) >= wanted.stop

        with self._changed:
            self._changed.wait_for(arrived)
            held = [(loaded, inside(loaded.block, wanted)) for loaded in ready]
        return [(loaded, here) for loaded, here in held if here.start < here.stop]

    def release(self, share: Share, step: int) -> None:
        """Let go of blocks that hold no sample of the share after `step`."""
        ready = self._ready[share.lane]
        with self._changed:
            while ready and _end(ready[0].block) <= share.samples(step + 1).start:
                loaded = ready.popleft()
                self._held_samples -= loaded.block.samples
                if loaded.block.samples == self._block_samples:
                    self._spare.append(loaded.images)
            self._changed.notify_all()

    def close(self) -> None:
        """End the threads and let go of what they read."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for pool in (self._fetchers, self._decoders):
            pool.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        try:
            self._read()
        except BaseException as error:  # noqa: BLE001 - wait_for raises it where it is seen
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _read(self) -> None:
        waiting: deque[Part] = deque()  # parts whose shards are on their way
        cut: dict[int, Future[Shard]] = {}  # lane: its last shard, which its next block may go on
        for block in self._blocks():
            if not self._has_room(block):
                while waiting:
                    self._fill(waiting.popleft())
            with self._changed:
                self._changed.wait_for(partial(self._may_go_on, block))
                if self._closed:
                    return
                self._held_samples += block.samples
            for part in self._parts(block):
                cut[block.lane] = part.shard
                waiting.append(part)
                if len(waiting) > FETCHES:
                    self._fill(waiting.popleft())

    def _blocks(self) -> Iterator[Block]:
        """Blocks of all lanes, first needed first."""
        lanes = []
        for share in self._shares:
            blocks = self._order.blocks(share.lane, share.samples(self._step).start)
            lanes.append((b.first // share.lane_batch, b.lane, b.first, b) for b in blocks)
        return (block for *_, block in heapq.merge(*lanes))

    def _may_go_on(self, block: Block) -> bool:
        return self._closed or self._has_room(block)

    def _has_room(self, block: Block) -> bool:
        return self._held_samples + block.samples <= self._most_samples

    def _parts(self, block: Block) -> Iterator[Part]:
        """A new block in memory, as its parts by shard; their downloads begin here."""
        shard_of, row_of = self._order.rows(block)
        gathered = np.argsort(shard_of, kind="stable")
        place = np.empty_like(gathered)
        place[gathered] = np.arange(block.samples)
        images = self._memory(block.samples)
        loaded = Loaded(block, place, images, np.empty(block.samples, dtype=np.int64))
        shard_of, row_of = shard_of[gathered], row_of[gathered]
        numbers = self._order.shards(block).tolist()
        for number in numbers:
            shard = self._alive.get(number)
            if shard is None:
                shard = self._fetchers.submit(fetch_shard, self._dataset, number, self._cache)
                self._alive[number] = shard
            at, end = np.searchsorted(shard_of, [number, number + 1])
            yield Part(loaded, int(at), row_of[at:end], shard, number == numbers[-1])

    def _memory(self, samples: int) -> UInt8s:
        """Room for a block, [samples, sample_bytes]: a released one's, as new pages cost more."""
        with self._changed:
            if samples == self._block_samples and self._spare:
                return self._spare.pop()
        return np.empty((samples, self._dataset.manifest.sample_bytes), dtype=np.uint8)

    def _fill(self, part: Part) -> None:
        """Copy a part's samples into its block, and hand the block over where it is the last."""
        shard, loaded = part.shard.result(), part.loaded
        out = slice(part.at, part.at + len(part.rows))
        gather(shard, part.rows, loaded.images[out], self._dataset, self._decoders)
        loaded.labels[out] = shard.labels[part.rows]
        if part.is_last:
            with self._changed:
                self._ready[loaded.block.lane].append(loaded)
                self._changed.notify_all()


def gather(
    shard: Shard, rows: Int64s, out: UInt8s, dataset: Dataset, decoders: ThreadPoolExecutor
) -> None:
    """Put the images of these rows of a shard into `out` [rows, sample_bytes]."""
    if isinstance(shard.images, np.ndarray):
        # mode="clip": the default copies through a buffer. The rows are in range.
        flat = shard.images.reshape(len(shard), -1)
        np.take(flat, rows, axis=0, out=out, mode="clip")
        return
    from ddpm_ray.data.packing.image_files import (  # Pillow, for encoded images alone
        BadImageError,
        decoded,
    )

    manifest = dataset.manifest

    def image(row: int) -> UInt8s:
        """The pixels of one encoded image."""
        file, place = shard.images[row].as_buffer(), f"{dataset.url}: {shard.keys[row]}"
        try:
            return decoded(file, manifest.encoding, manifest.image_shape, place)
        except BadImageError as error:  # a restarted worker would meet it again
            raise DatasetError(*error.args) from None

    for at, pixels in enumerate(decoders.map(image, rows.tolist())):
        out[at] = pixels.reshape(-1)


def shares(order: Order, positions: range) -> list[Share]:
    """The lanes that a run of positions of the global batch touches, and which part of each."""
    size = order.lane_batch
    lanes = range(positions.start // size, (positions.stop - 1) // size + 1)
    return [
        Share(
            lane,
            max(positions.start - lane * size, 0),
            min(positions.stop - lane * size, size),
            size,
        )
        for lane in lanes
    ]


def inside(block: Block, samples: range) -> slice:
    """Where in a block these numbers of its lane's samples are; may be empty."""
    low, high = samples.start - block.first, samples.stop - block.first
    return slice(max(low, 0), min(max(high, 0), block.samples))


def _end(block: Block) -> int:
    return block.first + block.samples
