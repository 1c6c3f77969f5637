"""Prefetch the shuffle blocks of some lanes from shards in background threads.

Memory is bounded by two shuffle windows of samples, with their captions, for these lanes and one
batch, one shard per lane (the one in which its next block begins), FETCHES shards in flight and
KEPT_BYTES of shards that were used last. Raw pixels are views of their shards, which stay in memory
whole: that adds at most KEPT_BYTES (of the shards in which the lanes' oldest blocks begin; three
times as much where an epoch ends), or, of shards above KEPT_BYTES / lanes, as many bytes as the
samples have.
"""

from __future__ import annotations

import atexit
import heapq
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from weakref import WeakSet, WeakValueDictionary

import numpy as np
import pyarrow as pa

from ddpm_ray.data.captions import caption_tuples
from ddpm_ray.data.dataset import Dataset, UInt8s
from ddpm_ray.data.shard_cache import ShardCache
from ddpm_ray.data.shard_samples import image_decoders, sample_views
from ddpm_ray.data.shards import Shard, fetch_shard
from ddpm_ray.data.shuffle_order import Block, Int64s, Order

FETCHES = 4  # shards in flight at a time
# Of shards in memory: a data set that fits is fetched and hashed once, not once an epoch; and two
# lanes of which one ends and the other begins in a large shard do not each fetch it.
KEPT_BYTES = 256 * 2**20
EXIT_S = 30.0  # the end of a process waits that long for a thread that is reading
_NO_BYTES = np.empty(0, dtype=np.uint8)


@dataclass(frozen=True)
class LaneShare:
    """This worker's part of one lane: samples `low` to `high` - 1 of every `lane_batch`."""

    lane: int
    low: int
    high: int
    lane_batch: int

    def samples_of(self, step: int) -> tuple[int, int]:
        """Return the first number of the lane's samples at `step`, and that after the last."""
        return step * self.lane_batch + self.low, step * self.lane_batch + self.high


@dataclass
class LoadedBlock:
    """A block in memory. Raw pixels stay in their shards: a copy of them costs more than its bytes.

    It would go to memory that is new to the process, page by page. Few pixels of a large shard are
    copied: see `sample_views`.
    """

    block: Block
    views: list[UInt8s]  # [samples], of [sample_bytes] each, in the block's order
    labels: Int64s  # [samples]
    captions: list[tuple[str, ...]] | None  # [samples]; None: a set without captions


@dataclass(frozen=True)
class ShardPart:
    """The samples that a block takes from one shard."""

    loaded: LoadedBlock
    places: Int64s  # in the block
    rows: Int64s  # in the shard, one for each place
    shard: Future[Shard]
    is_last: bool  # part of its block


class Prefetcher:
    """Read the blocks of some lanes from `step` on, in the order in which batches need them."""

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        shares: list[LaneShare],
        step: int,
        cache: ShardCache | None,
    ) -> None:
        self._dataset, self._order, self._cache = dataset, order, cache
        self._shares, self._step = shares, step
        self._changed = threading.Condition()
        # Guarded by `_changed`:
        self._ready: dict[int, deque[LoadedBlock]] = {share.lane: deque() for share in shares}
        self._lanes = [(share, self._ready[share.lane]) for share in shares]
        self._held_samples = 0  # in blocks that are being read or not yet released
        self._failure: BaseException | None = None
        self._closed = False
        # A small data set does not fill its blocks, and hundreds of its epochs need no prefetching.
        block_samples = min(order.block_samples, -(-order.samples // order.lanes))
        # Two blocks per lane, one in use and one prefetched, and one batch, which may span many
        # small blocks: without it a batch larger than the window would never be complete.
        self._max_samples = len(shares) * (2 * block_samples + order.lane_batch)
        # A shard that a lane still holds is not fetched again.
        self._held_shards: WeakValueDictionary[int, Future[Shard]] = WeakValueDictionary()
        self._kept: OrderedDict[int, tuple[int, Future[Shard]]] = OrderedDict()  # with its bytes
        self._kept_bytes = 0
        # Of a shard that views of few samples keep in memory. A lane's blocks in memory follow each
        # other, and the shard of the newest is held for the next: only that of the oldest counts.
        self._max_held_bytes = KEPT_BYTES // max(1, len(shares))
        self._fetchers = ThreadPoolExecutor(FETCHES, "shard-fetch")
        self._decoders = image_decoders(dataset.manifest)
        self._thread = threading.Thread(target=self._run, name="shard-stream", daemon=True)
        self._thread.start()
        _prefetchers.add(self)

    def wait_for(self, step: int) -> list[tuple[LoadedBlock, slice]]:
        """Wait for the samples of all shares at `step`; return their blocks with the slices.

        They are ordered by position. Only this thread takes blocks out, so the lock is needed only
        to wait: taken for each lane of each step, it cost a quarter of the time of a batch.
        """
        found = []
        for share, ready in self._lanes:
            low, high = share.samples_of(step)
            if self._failure is not None or not ready or _end(ready[-1].block) < high:
                self._wait_until(ready, high)
            for loaded in list(ready):  # a copy: the other thread appends to it
                first, end = loaded.block.first, _end(loaded.block)
                if low < end:
                    found.append((loaded, slice(max(low - first, 0), min(high, end) - first)))
                if high <= end:
                    break
        return found

    def release(self, step: int) -> None:
        """Release the blocks that hold no sample of the shares after `step`."""
        for share, ready in self._lanes:
            first = share.samples_of(step + 1)[0]
            while ready and _end(ready[0].block) <= first:
                with self._changed:
                    loaded = ready.popleft()
                    self._held_samples -= loaded.block.samples
                    self._changed.notify_all()

    def _wait_until(self, ready: deque[LoadedBlock], high: int) -> None:
        """Wait for the blocks of a lane up to its sample `high` - 1; raises the reader's errors."""

        def arrived() -> bool:
            if self._failure is not None:
                raise self._failure
            return bool(ready) and _end(ready[-1].block) >= high

        with self._changed:
            self._changed.wait_for(arrived)

    def close(self) -> None:
        """Stop the threads and release their shards."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._decoders.close()

    def _run(self) -> None:
        try:
            self._read()
        except BaseException as error:  # noqa: BLE001 - wait_for raises it in the main thread
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _read(self) -> None:
        waiting: deque[ShardPart] = deque()  # parts whose shards are in flight
        # The last shard of each lane, held because the lane's next block may begin in it.
        last_shards: dict[int, Future[Shard]] = {}
        for block in self._blocks():
            if not self._has_room(block):
                while waiting:
                    self._fill(waiting.popleft())
            with self._changed:
                self._changed.wait_for(partial(self._can_start, block))
                if self._closed:
                    return
                self._held_samples += block.samples
            for part in self._parts(block):
                last_shards[block.lane] = part.shard
                waiting.append(part)
                if len(waiting) > FETCHES:
                    self._fill(waiting.popleft())

    def _blocks(self) -> Iterator[Block]:
        """Yield the blocks of all lanes, ordered by the step that first needs them."""
        lanes = []
        for share in self._shares:
            blocks = self._order.blocks(share.lane, share.samples_of(self._step)[0])
            lanes.append((b.first // share.lane_batch, b.lane, b.first, b) for b in blocks)
        return (block for *_, block in heapq.merge(*lanes))

    def _can_start(self, block: Block) -> bool:
        return self._closed or self._has_room(block)

    def _has_room(self, block: Block) -> bool:
        return self._held_samples + block.samples <= self._max_samples

    def _parts(self, block: Block) -> Iterator[ShardPart]:
        """Start the downloads of a block's shards; yield the part that each one fills."""
        shard_of, row_of = self._order.rows(block)
        by_shard = np.argsort(shard_of, kind="stable")
        views = [_NO_BYTES] * block.samples
        captions: list[tuple[str, ...]] | None = None
        if self._dataset.manifest.captioned:
            captions = [()] * block.samples
        loaded = LoadedBlock(block, views, np.empty(block.samples, dtype=np.int64), captions)
        shard_of, row_of = shard_of[by_shard], row_of[by_shard]
        numbers = self._order.shards(block).tolist()
        for number in numbers:
            shard = self._held_shards.get(number)
            if shard is None:
                shard = self._fetchers.submit(fetch_shard, self._dataset, number, self._cache)
                self._held_shards[number] = shard
            self._keep(number, shard)
            at, end = np.searchsorted(shard_of, [number, number + 1])
            places = by_shard[at:end]
            yield ShardPart(loaded, places, row_of[at:end], shard, number == numbers[-1])

    def _keep(self, number: int, shard: Future[Shard]) -> None:
        """Hold on to a shard until KEPT_BYTES of others have been used."""
        if number not in self._kept:
            size = self._dataset.index.column("stored_bytes")[number].as_py()
            self._kept[number] = size, shard
            self._kept_bytes += size
        self._kept.move_to_end(number)
        while self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= self._kept.popitem(last=False)[1][0]

    def _fill(self, part: ShardPart) -> None:
        """Put a part's samples into its block; publish the block after its last part."""
        shard, loaded = part.shard.result(), part.loaded
        views = sample_views(shard, part.rows, self._dataset, self._decoders, self._max_held_bytes)
        for place, view in zip(part.places.tolist(), views, strict=True):
            loaded.views[place] = view
        loaded.labels[part.places] = shard.labels[part.rows]
        if loaded.captions is not None and shard.captions is not None:
            captions = caption_tuples(shard.captions.take(pa.array(part.rows)))
            for place, texts in zip(part.places.tolist(), captions, strict=True):
                loaded.captions[place] = texts
        if part.is_last:
            with self._changed:
                self._ready[loaded.block.lane].append(loaded)
                self._changed.notify_all()


def lane_shares(order: Order, positions: range) -> list[LaneShare]:
    """Return the part of each lane that `positions` of the global batch cover."""
    size = order.lane_batch
    lanes = range(positions.start // size, (positions.stop - 1) // size + 1)
    return [
        LaneShare(
            lane,
            max(positions.start - lane * size, 0),
            min(positions.stop - lane * size, size),
            size,
        )
        for lane in lanes
    ]


def overlap(block: Block, low: int, high: int) -> slice:
    """Return the slice of a block with its lane's samples `low` to `high` - 1; may be empty."""
    return slice(max(low - block.first, 0), min(max(high - block.first, 0), block.samples))


def _end(block: Block) -> int:
    return block.first + block.samples


_prefetchers: WeakSet[Prefetcher] = WeakSet()  # of this process; also those that were closed


@atexit.register
def _end_threads() -> None:
    """End the threads at the exit of the process, which an open stream must not prevent.

    Python ends a daemon thread where it next takes the interpreter's lock: if that is inside the
    C++ of torch or pyarrow, the process aborts with "terminate called without an active exception".
    """
    for one in list(_prefetchers):
        if one._thread.is_alive():  # a fork has no such thread, and has the parent's decoders
            one.close()
            one._thread.join(EXIT_S)
