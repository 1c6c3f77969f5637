"""Which sample stands at which position of which batch: a pure function of the seed and the index.

In epoch e the shards are shuffled, the samples inside each shard are shuffled, and both are laid
end to end: N samples. That line is cut into L lanes; every lane gives B / L samples to each global
batch of B, lane l those at positions l * B / L to (l + 1) * B / L - 1, so that position p belongs
to lane p * L // B. A lane is cut into blocks of `window_samples / L` samples, and a block is
shuffled once more: it is what a reader holds in memory.

No sample is dropped, none is padded and each batch is full: epochs flow into one another, lane by
lane, so the batch at an epoch's end may hold samples of two epochs (of more, where N < B). Each
epoch is an exact permutation of the data set. Of N samples lane l gets N // L in epoch e, and one
more if (l + e * m) % L < m with m = N % L: the extra ones rotate, so no two lanes are ever more
than one sample apart, and the sum over epochs telescopes (`_lane_length_before`). So any step finds
its samples without a look at the steps before.

Random words are the raw stream of Philox4x64, keyed by (seed, epoch) with the purpose and two
numbers in its counter. NumPy keeps raw streams for ever; Generator.permutation may change.
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
    """What a permutation is for; part of the counter, so that no two share random words."""

    SHARDS = 1
    ROWS = 2  # of one shard
    BLOCK = 3  # of one lane


def permutation(
    count: int, seed: int, epoch: int, purpose: Shuffle, first: int = 0, second: int = 0
) -> Int64s:
    """A permutation of 0..count-1, the same for the same numbers on every machine; seed < 2^64."""
    key = np.array([seed, epoch], dtype=np.uint64)  # a list of ints would go through float64
    counter = np.array([0, purpose, first, second], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(count)
    # The low bits become the index: keys are unique then, so that any sort gives the same answer,
    # and sorting the words themselves is 4 x faster than argsort.
    bits = np.uint64(count.bit_length())
    keys = (words >> bits << bits) | np.arange(count, dtype=np.uint64)
    keys.sort()
    return (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


@dataclass(frozen=True)
class Block:
    """A run of one lane's samples that are shuffled together."""

    lane: int
    epoch: int
    number: int  # within the lane's part of the epoch
    first: int  # the lane's sample count before it, all epochs together
    start: int  # where it begins on the epoch's line
    samples: int


@dataclass(frozen=True, eq=False)
class Order:
    """The order of a data set with `counts` samples per shard, for ever and for all workers."""

    counts: tuple[int, ...]  # samples in each shard, in the order of the index
    seed: int
    global_batch_size: int
    lanes: int
    window_samples: int  # of all lanes together

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.global_batch_size % self.lanes != 0:
            raise ValueError(
                f"lanes is {self.lanes} and global_batch_size is {self.global_batch_size}; "
                "the batch must be a multiple of the lanes"
            )
        if self.samples < 1:
            raise ValueError("counts adds up to 0 samples; there must be at least 1")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be in 0..2^64-1")

    @cached_property
    def samples(self) -> int:
        """N, the samples of one epoch."""
        return sum(self.counts)

    @property
    def lane_batch(self) -> int:
        """Samples that each lane gives to each batch, B / L."""
        return self.global_batch_size // self.lanes

    @property
    def block_samples(self) -> int:
        """Samples of a whole block."""
        return max(1, self.window_samples // self.lanes)

    def blocks(self, lane: int, sample: int) -> Iterator[Block]:
        """The blocks of `lane`, without end, from the one that holds its sample number `sample`."""
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
        """The shards that a block needs, as they stand on the epoch's line."""
        shards, ends = _line(self, block.epoch)
        first, last = np.searchsorted(
            ends, [block.start, block.start + block.samples - 1], side="right"
        )
        return shards[first : last + 1]

    def rows(self, block: Block) -> tuple[Int64s, Int64s]:
        """The shard and the row in it of each sample of a block, both [block.samples], in order."""
        shards, ends = _line(self, block.epoch)
        stop, parts = block.start + block.samples, []
        place, at = int(np.searchsorted(ends, block.start, side="right")), block.start
        while at < stop:
            shard, end = int(shards[place]), int(ends[place])
            count = self.counts[shard]
            rows = permutation(count, self.seed, block.epoch, Shuffle.ROWS, shard)
            rows = rows[at - (end - count) : stop - (end - count)]
            parts.append((np.full(len(rows), shard), rows))
            place, at = place + 1, max(at, end)
        mixed = permutation(
            block.samples, self.seed, block.epoch, Shuffle.BLOCK, block.lane, block.number
        )
        shard_of, row_of = (np.concatenate(column) for column in zip(*parts, strict=True))
        return shard_of[mixed], row_of[mixed]

    def _lane_length_before(self, lane: int, epoch: int) -> int:
        """Samples of `lane` in epochs 0..epoch-1: the extras are the times that l + e * m wraps."""
        whole, m = divmod(self.samples, self.lanes)
        wraps = (lane + (epoch - 1) * m) // self.lanes - (lane - m) // self.lanes
        return epoch * whole + wraps

    def _lane_start(self, lane: int, epoch: int) -> int:
        """Where `lane` begins on the epoch's line: the lengths of the lanes before it."""
        whole, m = divmod(self.samples, self.lanes)
        turn = epoch * m % self.lanes

        def extras(stop: int) -> int:  # numbers x in 0..stop-1 with x % L < m
            return stop // self.lanes * m + min(stop % self.lanes, m)

        return lane * whole + extras(turn + lane) - extras(turn)

    def _epoch_of(self, lane: int, sample: int) -> int:
        """The epoch that holds the sample number `sample` of `lane`."""
        # A lane is never a whole sample away from epoch * N / L, so this is at most 2 too late.
        epoch = (sample + 1) * self.lanes // self.samples + 1
        while self._lane_length_before(lane, epoch) > sample:
            epoch -= 1
        return epoch


@lru_cache(maxsize=4)  # every block of an epoch asks; a million shards take 0.1 s
def _line(order: Order, epoch: int) -> tuple[Int64s, Int64s]:
    """The shuffled shards of an epoch, and where each one ends."""
    shards = permutation(len(order.counts), order.seed, epoch, Shuffle.SHARDS)
    return shards, np.cumsum(np.asarray(order.counts, dtype=np.int64)[shards])
