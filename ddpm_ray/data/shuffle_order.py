"""The sample at each position of each batch: a pure function of the seed and the index.

In epoch e the shards are shuffled, the samples inside each shard are shuffled, and the shards are
concatenated: a sequence of N samples. The sequence is split into L lanes. Each lane supplies B / L
samples of every global batch of B: lane l supplies positions l * B / L to (l + 1) * B / L - 1, so
position p belongs to lane p * L // B. A lane is split into blocks of `window_samples / L` samples,
and each block is shuffled again; a worker holds whole blocks in memory.

No sample is dropped or padded and every batch is full: each lane continues with the next epoch
where the last one ended, so a batch may hold samples of two epochs (of more, if N < B). Each epoch
is an exact permutation of the data set. In epoch e lane l has N // L samples, and one more if
(l + e * m) % L < m with m = N % L: the extra samples rotate over the lanes, so that two lanes
never differ by more than one sample, and the sum over epochs has a closed form
(`_lane_length_before`). Any step therefore finds its samples without computing earlier steps.

Random words are the raw stream of Philox4x64, keyed by (seed, epoch), with the purpose and two
numbers in its counter. NumPy guarantees raw streams across versions, but not Generator.permutation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]


class Shuffle(IntEnum):
    """Purpose of a permutation; part of the counter, so that no two share random words."""

    SHARDS = 1
    ROWS = 2  # of one shard
    BLOCK = 3  # of one lane


def permutation(
    count: int, seed: int, epoch: int, purpose: Shuffle, first: int = 0, second: int = 0
) -> Int64s:
    """Return a permutation of 0..count-1 that is equal on every machine; seed < 2^64."""
    key = np.array([seed, epoch], dtype=np.uint64)  # a list of ints would go through float64
    counter = np.array([0, purpose, first, second], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(count)
    # The low bits are replaced by the index: keys are then unique, so that every sorting algorithm
    # gives the same result, and sorting the words themselves is 4 x faster than argsort.
    bits = np.uint64(count.bit_length())
    keys = (words >> bits << bits) | np.arange(count, dtype=np.uint64)
    keys.sort()
    return (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


@dataclass(frozen=True)
class Block:
    """Consecutive samples of one lane that are shuffled together."""

    lane: int
    epoch: int
    number: int  # within the lane's part of the epoch
    first: int  # number of its first sample in the lane, counted over all epochs
    start: int  # its first index in the epoch's sequence
    samples: int


@dataclass(frozen=True, eq=False)
class Order:
    """The order of a data set with `counts` samples per shard, for all steps and workers."""

    counts: tuple[int, ...]  # samples in each shard, in the order of the index
    seed: int
    global_batch_size: int
    lanes: int
    window_samples: int  # of all lanes together

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.global_batch_size % self.lanes != 0:
            raise ValueError(
                f"lanes is {self.lanes} and global_batch_size is {self.global_batch_size}; "
                "global_batch_size must be a multiple of lanes"
            )
        if self.samples < 1:
            raise ValueError("counts has 0 samples in total; there must be at least 1")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be in 0..2^64-1")

    @cached_property
    def samples(self) -> int:
        """Samples in one epoch, N."""
        return sum(self.counts)

    @property
    def lane_batch(self) -> int:
        """Samples of each batch that one lane supplies, B / L."""
        return self.global_batch_size // self.lanes

    @property
    def block_samples(self) -> int:
        """Samples of a full block."""
        return max(1, self.window_samples // self.lanes)

    def blocks(self, lane: int, sample: int) -> Iterator[Block]:
        """Yield the blocks of `lane` without end, from the one with its sample `sample` on."""
        epoch = self._epoch_of(lane, sample)
        inside = sample - self._lane_length_before(lane, epoch)
        while True:
            before = self._lane_length_before(lane, epoch)
            length = self._lane_length_before(lane, epoch + 1) - before
            start, size = self._lane_start(lane, epoch), self.block_samples
            for number in range(inside // size, -(-length // size)):
                at = number * size
                yield Block(lane, epoch, number, before + at, start + at, min(size, length - at))
            epoch, inside = epoch + 1, 0

    def shards(self, block: Block) -> Int64s:
        """Return the shards of a block, in the order of the epoch's sequence."""
        shards, ends = _sequence(self, block.epoch)
        first, last = np.searchsorted(
            ends, [block.start, block.start + block.samples - 1], side="right"
        )
        return shards[first : last + 1]

    def rows(self, block: Block) -> tuple[Int64s, Int64s]:
        """Return the shard and row of each sample of a block, both [block.samples], in order."""
        shards, ends = _sequence(self, block.epoch)
        stop, parts = block.start + block.samples, []
        index, at = int(np.searchsorted(ends, block.start, side="right")), block.start
        while at < stop:
            shard, end = int(shards[index]), int(ends[index])
            count = self.counts[shard]
            rows = _shard_rows(count, self.seed, block.epoch, shard)
            rows = rows[at - (end - count) : stop - (end - count)]
            parts.append((np.full(len(rows), shard), rows))
            index, at = index + 1, max(at, end)
        mixed = permutation(
            block.samples, self.seed, block.epoch, Shuffle.BLOCK, block.lane, block.number
        )
        shard_of, row_of = (np.concatenate(column) for column in zip(*parts, strict=True))
        return shard_of[mixed], row_of[mixed]

    def _lane_length_before(self, lane: int, epoch: int) -> int:
        """Samples of `lane` in epochs 0..epoch-1; one extra each time l + e * m wraps mod L."""
        whole, m = divmod(self.samples, self.lanes)
        wraps = (lane + (epoch - 1) * m) // self.lanes - (lane - m) // self.lanes
        return epoch * whole + wraps

    def _lane_start(self, lane: int, epoch: int) -> int:
        """First index of `lane` in the epoch's sequence: the total length of lanes 0..lane-1."""
        whole, m = divmod(self.samples, self.lanes)
        offset = epoch * m % self.lanes

        def extras(stop: int) -> int:  # numbers x in 0..stop-1 with x % L < m
            return stop // self.lanes * m + min(stop % self.lanes, m)

        return lane * whole + extras(offset + lane) - extras(offset)

    def _epoch_of(self, lane: int, sample: int) -> int:
        """The epoch that holds the sample number `sample` of `lane`."""
        # A lane's length differs from epoch * N / L by less than 1, so this is at most 2 too large.
        epoch = (sample + 1) * self.lanes // self.samples + 1
        while self._lane_length_before(lane, epoch) > sample:
            epoch -= 1
        return epoch


@lru_cache(maxsize=16)  # several blocks of a lane lie in one shard
def _shard_rows(count: int, seed: int, epoch: int, shard: int) -> Int64s:
    """Return the shuffled rows of a shard; not to be changed."""
    return permutation(count, seed, epoch, Shuffle.ROWS, shard)


@lru_cache(maxsize=4)  # used by every block of an epoch; takes 0.1 s for a million shards
def _sequence(order: Order, epoch: int) -> tuple[Int64s, Int64s]:
    """Return the shuffled shards of an epoch, and the end of each in the epoch's sequence."""
    shards = permutation(len(order.counts), order.seed, epoch, Shuffle.SHARDS)
    return shards, np.cumsum(np.asarray(order.counts, dtype=np.int64)[shards])
