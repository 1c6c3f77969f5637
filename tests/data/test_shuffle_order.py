"""The shuffle order: an exact permutation per epoch, equal from any starting step."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_ray.data.shuffle_order import Order, Shuffle, permutation

Sample = tuple[int, int]  # shard, row


@st.composite
def orders(draw: st.DrawFn) -> Order:
    lanes = draw(st.integers(1, 6))
    return Order(
        counts=tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any))),
        seed=draw(st.integers(0, 2**64 - 1)),
        global_batch_size=lanes * draw(st.integers(1, 5)),
        lanes=lanes,
        window_samples=draw(st.integers(0, 40)),
    )


def lane_samples(order: Order, lane: int, count: int, start: int = 0) -> list[tuple[int, Sample]]:
    """Return the (epoch, sample) pairs of a lane from its sample number `start` on."""
    found: list[tuple[int, Sample]] = []
    for block in order.blocks(lane, start):
        shards, rows = order.rows(block)
        pairs = [(block.epoch, pair) for pair in zip(shards.tolist(), rows.tolist(), strict=True)]
        found += pairs[max(0, start - block.first) :]
        if len(found) >= count:
            return found[:count]
    raise AssertionError("the blocks of a lane never end")


@given(orders())
def test_each_epoch_is_an_exact_permutation_of_all_samples(order: Order) -> None:
    epochs: dict[int, list[Sample]] = {0: [], 1: [], 2: []}
    for lane in range(order.lanes):
        for block in itertools.takewhile(lambda b: b.epoch < 3, order.blocks(lane, 0)):
            shards, rows = order.rows(block)
            epochs[block.epoch] += zip(shards.tolist(), rows.tolist(), strict=True)
    everything = sorted((s, r) for s, count in enumerate(order.counts) for r in range(count))
    assert [sorted(samples) for samples in epochs.values()] == [everything] * 3


@given(orders(), st.integers(0, 200))
def test_a_lane_read_from_anywhere_continues_the_lane_read_from_zero(
    order: Order, start: int
) -> None:
    for lane in range(order.lanes):
        whole = lane_samples(order, lane, start + 20)
        assert lane_samples(order, lane, 20, start) == whole[start:]


@given(orders())
def test_blocks_follow_each_other_and_none_is_larger_than_the_window(order: Order) -> None:
    for lane in range(order.lanes):
        at = 0
        for block in itertools.islice(order.blocks(lane, 0), 30):
            assert block.first == at
            assert 1 <= block.samples <= max(1, order.window_samples // order.lanes)
            at += block.samples


@given(orders())
def test_no_two_lanes_are_ever_more_than_a_sample_apart(order: Order) -> None:
    """Batches stay full without padding: after e epochs each lane has e * N / L samples, +- 1."""
    ends = []
    for lane in range(order.lanes):
        blocks = itertools.takewhile(lambda b: b.epoch < 40, order.blocks(lane, 0))
        counts = Counter(dict.fromkeys(range(40), 0))
        for block in blocks:
            counts[block.epoch] += block.samples
        ends.append(np.cumsum([counts[epoch] for epoch in range(40)]))
    assert np.ptp(np.stack(ends), axis=0).max() <= 1


@given(orders())
def test_the_shards_of_a_block_are_those_of_its_rows(order: Order) -> None:
    for block in itertools.islice(order.blocks(order.lanes - 1, 0), 20):
        named = [shard for shard in order.shards(block).tolist() if order.counts[shard]]
        assert sorted(named) == np.unique(order.rows(block)[0]).tolist()


def test_a_far_step_is_found_at_once() -> None:
    order = Order((10,) * 7, seed=1, global_batch_size=12, lanes=3, window_samples=9)
    block = next(order.blocks(2, 10**12))
    assert block.first <= 10**12 < block.first + block.samples
    assert block.epoch == pytest.approx(3 * 10**12 / 70, abs=1)


def test_neither_shards_nor_classes_show_in_the_order() -> None:
    """A set sorted by class is mixed: position in the batch order is uncorrelated with disk."""
    order = Order((100,) * 50, seed=3, global_batch_size=64, lanes=8, window_samples=400)
    epoch = [sample for lane in range(8) for _, sample in lane_samples(order, lane, 625)]
    place = np.array([shard * 100 + row for shard, row in epoch])
    assert abs(np.corrcoef(np.arange(5000), place)[0, 1]) < 0.3  # 50 shards: sigma is 0.14
    row = place % 100  # within a shard the mixing is complete: sigma is 0.014
    assert abs(np.corrcoef(np.arange(5000), row)[0, 1]) < 0.06
    assert abs(np.corrcoef(row[:-1], row[1:])[0, 1]) < 0.06


def test_seeds_epochs_and_purposes_give_different_permutations() -> None:
    keys = [(0, 0, Shuffle.ROWS), (1, 0, Shuffle.ROWS), (0, 1, Shuffle.ROWS), (0, 0, Shuffle.BLOCK)]
    found = {tuple(permutation(20, *key, number)) for key in keys for number in range(3)}
    assert len(found) == 12


@settings(max_examples=30)
@given(st.integers(0, 3000), st.integers(0, 2**64 - 1))
def test_permutation_holds_each_number_once(count: int, seed: int) -> None:
    assert sorted(permutation(count, seed, 5, Shuffle.SHARDS).tolist()) == list(range(count))


def test_each_of_the_six_orders_of_three_is_as_likely() -> None:
    seen = Counter(tuple(permutation(3, seed, 0, Shuffle.ROWS)) for seed in range(6000))
    assert len(seen) == 6
    assert all(abs(count - 1000) < 150 for count in seen.values())  # sigma is 29


def test_the_permutation_sorts_the_words_of_the_published_generator() -> None:
    """Philox4x64-10 as in Salmon et al. 2011: later versions must keep the same order.

    Counter words: block of four (from 1), purpose, first, second.
    """
    words = [w for block in (1, 2) for w in philox([block, Shuffle.ROWS, 7, 0], [2024, 3])]
    expected = sorted(range(8), key=lambda n: words[n])
    assert permutation(8, 2024, 3, Shuffle.ROWS, 7).tolist() == expected == [5, 1, 6, 4, 2, 7, 0, 3]


def philox(counter: list[int], key: list[int]) -> list[int]:
    mask = 2**64 - 1
    for number in range(10):
        k0 = (key[0] + number * 0x9E3779B97F4A7C15) & mask
        k1 = (key[1] + number * 0xBB67AE8584CAA73B) & mask
        p0, p1 = counter[0] * 0xD2E7470EE14C6C93, counter[2] * 0xCA5A826395121157
        counter = [p1 >> 64 ^ counter[1] ^ k0, p1 & mask, p0 >> 64 ^ counter[3] ^ k1, p0 & mask]
    return counter


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lanes": 5}, "lanes is 5 and global_batch_size is 12"),
        ({"lanes": 0}, "lanes is 0"),
        ({"counts": (0,)}, "counts has 0 samples in total"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "it must be in 0"),
    ],
)
def test_an_impossible_order_is_refused(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "counts": (3, 4),
        "seed": 0,
        "global_batch_size": 12,
        "lanes": 4,
        "window_samples": 8,
    }
    with pytest.raises(ValueError, match=message):
        Order(**{**good, **change})  # type: ignore[arg-type]
