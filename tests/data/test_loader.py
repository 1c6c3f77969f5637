"""Global batches do not depend on how they are divided over workers; errors are clear."""

import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddpm_ray.data import image_decoders, prefetcher
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.data.loader import Batch, ShardStream, read_images
from ddpm_ray.data.shard_cache import COUNTER
from ddpm_ray.data.shard_samples import sample_views
from ddpm_ray.data.shards import Shard, ShardCorruptError, fetch_shard
from ddpm_ray.data.shuffle_order import Block
from ddpm_ray.storage import object_store
from ddpm_ray.storage.errors import StorageError
from tests.limits import ENDS_S

MakeDataset = Callable[..., Dataset]
NumbersOf = Callable[[torch.Tensor], list[int]]


def open_stream(
    dataset: Dataset, positions: range = range(12), window_samples: int = 33, lanes: int = 3
) -> ShardStream:
    return ShardStream(
        dataset,
        seed=7,
        global_batch_size=12,
        positions=positions,
        lanes=lanes,
        window_samples=window_samples,
    )


@settings(
    max_examples=12,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_any_division_and_any_start_give_the_same_batches(
    make_dataset: MakeDataset, numbers_of: NumbersOf, data: st.DataObject
) -> None:
    """Also for tiny sets (epochs within a batch) and windows of one sample or the whole set."""
    samples = data.draw(st.integers(1, 60))
    dataset = make_dataset(samples, data.draw(st.integers(1, 20)))
    window_samples = data.draw(st.sampled_from([1, 6, 33, 10_000]))
    cuts = sorted(data.draw(st.sets(st.integers(1, 11))))
    runs = [range(a, b) for a, b in zip([0, *cuts], [*cuts, 12], strict=True)]
    first = data.draw(st.integers(0, 9))
    whole = open_stream(dataset, window_samples=window_samples)
    batches = [numbers_of(whole.batch(step).images) for step in range(first + 3)]
    whole.close()
    parts = [open_stream(dataset, run, window_samples) for run in runs]
    for step in range(first, first + 3):
        joined = [n for part in parts for n in numbers_of(part.batch(step).images)]
        assert joined == batches[step]
    for part in parts:
        part.close()
    flat = [n for batch in batches for n in batch]
    assert len(flat) == 12 * len(batches)
    counts = Counter(flat)  # lanes are at most a sample apart, so epochs overlap by 3 x 2 at most
    assert max(counts.values()) <= len(flat) // samples + 2


def test_an_epoch_holds_each_sample_once_with_its_own_label_and_key(
    make_dataset: MakeDataset, numbers_of: NumbersOf
) -> None:
    stream = open_stream(make_dataset(60, 7))
    seen: list[int] = []
    for step in range(5):  # 5 x 12 = 60: an epoch
        batch = stream.batch(step)
        numbers = numbers_of(batch.images)
        assert batch.images.shape == (12, 2, 3, 1)
        assert batch.images.dtype == torch.uint8
        assert batch.labels.tolist() == [n % 7 for n in numbers]
        assert stream.keys(step) == [f"n-{n:06d}" for n in numbers]
        seen += numbers
    assert sorted(seen) == list(range(60))
    again = [numbers_of(stream.batch(step).images) for step in range(5, 10)]
    stream.close()
    assert sorted(n for batch in again for n in batch) == list(range(60))
    assert [n for batch in again for n in batch] != seen


def test_a_jump_gives_what_a_straight_way_gives(
    make_dataset: MakeDataset, numbers_of: NumbersOf
) -> None:
    dataset = make_dataset(60, 7)
    straight, jumping = open_stream(dataset), open_stream(dataset)
    batches = [numbers_of(straight.batch(step).images) for step in range(20)]
    for step in (11, 3, 4, 5, 5, 19, 0):
        assert numbers_of(jumping.batch(step).images) == batches[step]
    straight.close()
    jumping.close()


def test_a_batch_stays_as_it_was_given(make_dataset: MakeDataset, numbers_of: NumbersOf) -> None:
    """A batch must not share memory with the prefetcher's buffers."""
    stream = open_stream(make_dataset(60, 7))
    first = stream.batch(0)
    numbers = numbers_of(first.images)
    for step in range(1, 30):
        stream.batch(step)
    assert numbers_of(first.images) == numbers
    stream.close()


def test_each_shard_is_fetched_once_an_epoch_but_at_the_cuts(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a data set that is larger than what is kept in memory."""
    monkeypatch.setattr(prefetcher, "KEPT_BYTES", 0)
    dataset = make_dataset(600, 20)  # 30 shards in 3 lanes: 2 cuts, and lanes begin or end there
    with mock.patch.object(prefetcher, "fetch_shard", wraps=fetch_shard) as fetch:
        stream = open_stream(dataset, window_samples=100)
        for step in range(50):
            stream.batch(step)
        stream.close()
    ahead = (
        3 * 2 * 100 // (20 * 3) + prefetcher.FETCHES
    )  # two blocks of each lane, and on their way
    assert 30 <= fetch.call_count <= 30 + 2 + ahead


@pytest.mark.parametrize("shards_kept", [30, 11, 1])
def test_shards_that_fit_are_kept_and_no_more(
    make_dataset: MakeDataset, shards_kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set that fits is fetched once, however many epochs are read."""
    dataset, kept = make_dataset(600, 20), set()
    sizes = dataset.index.column("stored_bytes").to_pylist()
    most_bytes = sum(sorted(sizes)[-shards_kept:])
    monkeypatch.setattr(prefetcher, "KEPT_BYTES", most_bytes)
    keep = prefetcher.Prefetcher._keep

    def watched(self: prefetcher.Prefetcher, number: int, shard: Future[Shard]) -> None:
        keep(self, number, shard)
        assert self._kept_bytes == sum(sizes[n] for n in self._kept)
        kept.add(self._kept_bytes)

    monkeypatch.setattr(prefetcher.Prefetcher, "_keep", watched)
    with mock.patch.object(prefetcher, "fetch_shard", wraps=fetch_shard) as fetch:
        stream = open_stream(dataset, window_samples=100)
        for step in range(200):  # four epochs
            stream.batch(step)
        stream.close()
    assert max(kept) <= most_bytes
    assert fetch.call_count == 30 if shards_kept == 30 else fetch.call_count > 60


def test_memory_is_bounded_by_two_windows_and_a_batch(make_dataset: MakeDataset) -> None:
    dataset, held_samples = make_dataset(600, 20), set()
    has_room = prefetcher.Prefetcher._has_room

    def watched(self: prefetcher.Prefetcher, block: Block) -> bool:
        held_samples.add(self._held_samples)
        return has_room(self, block)

    with mock.patch.object(prefetcher.Prefetcher, "_has_room", watched):
        stream = open_stream(dataset, window_samples=100)
        for step in range(100):
            stream.batch(step)
        stream.close()
    assert 100 <= max(held_samples) <= 2 * 100 + 12


@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_samples_are_views_only_where_these_keep_little_else_in_memory(
    make_dataset: MakeDataset, data: st.DataObject
) -> None:
    """Of a shard within the limit, or of which at least half is needed anyway."""
    count = data.draw(st.integers(1, 40))
    dataset = make_dataset(count, count)
    shard = fetch_shard(dataset, 0)
    assert isinstance(shard.images, np.ndarray)
    picked = data.draw(st.lists(st.integers(0, count - 1), unique=True, min_size=1))
    rows, most_bytes = np.array(picked), data.draw(st.integers(0, 300))
    decoders = image_decoders.ImageDecoders("raw", dataset.manifest.image_shape, 1)
    samples = sample_views(shard, rows, dataset, decoders, most_bytes)
    decoders.close()
    assert all(map(np.array_equal, samples, shard.images[rows].reshape(len(rows), -1)))
    held = [np.shares_memory(sample, shard.images) for sample in samples]
    kept_bytes = count * 6 if any(held) else len(rows) * 6
    assert kept_bytes <= max(most_bytes, 2 * len(rows) * 6)
    assert all(held) or (count * 6 > most_bytes and not any(held))


@pytest.mark.parametrize("kept_bytes, held", [(3 * 1200, True), (3 * 1200 - 1, False)])
def test_blocks_of_large_shards_do_not_keep_them_in_memory(
    make_dataset: MakeDataset, kept_bytes: int, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of 1,200 bytes, of which each block of one of 3 lanes takes 66."""
    dataset, shards = make_dataset(600, 200), []
    expected = open_stream(dataset)
    monkeypatch.setattr(prefetcher, "KEPT_BYTES", kept_bytes)

    def fetch(*args: Any) -> Shard:
        shards.append(fetch_shard(*args))
        return shards[-1]

    monkeypatch.setattr(prefetcher, "fetch_shard", fetch)
    stream, found = open_stream(dataset), set()
    for step in range(12):
        assert torch.equal(stream.batch(step).images, expected.batch(step).images)
        assert stream._prefetcher is not None
        blocks = [loaded for _, ready in stream._prefetcher._lanes for loaded in list(ready)]
        found |= {
            any(np.shares_memory(view, shard.images) for shard in list(shards))
            for loaded in blocks
            for view in loaded.views
        }
    assert found == {held}
    stream.close()
    expected.close()


READS_AT_EXIT = """
import sys, threading, torch
from ddpm_ray.data import prefetcher, shard_samples
from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.data.loader import ShardStream

reads = threading.Event()

def sample_views(*given):
    reads.set()
    for _ in range(50_000):
        torch.ones(1).add_(1)
    return shard_samples.sample_views(*given)

prefetcher.sample_views = sample_views
stream = ShardStream(
    open_dataset(sys.argv[1]),
    seed=7, global_batch_size=12, positions=range(12), lanes=3, window_samples=33,
)
opened = prefetcher.Prefetcher(stream.dataset, stream.order, stream._shares, 0, None)
assert reads.wait()
if sys.argv[2] == "closed":
    opened.close()
"""


@pytest.mark.parametrize("how", ["open", "closed"])
def test_a_process_ends_while_its_stream_is_being_read(make_dataset: MakeDataset, how: str) -> None:
    """Its thread is inside torch, where the end of a daemon thread aborts the process."""
    dataset = make_dataset(60, 60)
    command = [sys.executable, "-c", READS_AT_EXIT, dataset.url, how]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=ENDS_S, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_waiting_is_counted_and_reading_ahead_removes_it(make_dataset: MakeDataset) -> None:
    arrived = threading.Event()

    def slow(*args: object) -> object:
        assert arrived.wait(ENDS_S)
        return fetch_shard(*args)  # type: ignore[arg-type]

    with mock.patch.object(prefetcher, "fetch_shard", slow):
        stream = open_stream(make_dataset(60, 7))
        threading.Timer(0.2, arrived.set).start()
        stream.batch(0)
        assert 0.15 < stream.waited_s < 5
    stream.close()


def test_read_images_gives_the_packed_order(
    make_dataset: MakeDataset, numbers_of: NumbersOf
) -> None:
    dataset = make_dataset(60, 7)
    found = [numbers_of(batch.images) for batch in read_images(dataset, [0, 8, 3])]
    assert found == [list(range(7)), list(range(56, 60)), list(range(21, 28))]


def epoch_of(stream: ShardStream) -> None:
    for step in range(5):
        stream.batch(step)


def damage(dataset: Dataset, number: int, how: str) -> None:
    path = Path(dataset.url) / f"shard-{number:05d}.arrow"
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[: len(data) // 2] if how == "truncated" else data)
    if how == "missing":
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "truncated"])
def test_a_damaged_shard_is_never_used(make_dataset: MakeDataset, how: str) -> None:
    dataset = make_dataset(60, 7)
    damage(dataset, 4, how)
    stream = open_stream(dataset, window_samples=1)
    with pytest.raises(ShardCorruptError, match=r"shard-00004.arrow: sha256 .* 5 downloads; write"):
        epoch_of(stream)
    stream.close()


def test_a_missing_shard_is_named(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(60, 7)
    damage(dataset, 4, "missing")
    stream = open_stream(dataset)
    with pytest.raises(StorageError, match=r"shard-00004.arrow: no such file or object"):
        epoch_of(stream)
    stream.close()


def test_a_download_that_went_wrong_once_is_repeated(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(60, 7)
    whole = object_store.read_bytes(f"{dataset.url}/shard-00002.arrow")
    with mock.patch.object(object_store, "read_bytes", side_effect=[whole[:-1], b"", whole]):
        assert len(fetch_shard(dataset, 2)) == 7


def test_a_closed_stream_says_so(make_dataset: MakeDataset) -> None:
    stream = open_stream(make_dataset(60, 7))
    stream.batch(0)
    stream.close()
    with pytest.raises(RuntimeError, match="this ShardStream is closed"):
        stream.batch(1)


@pytest.mark.parametrize(
    "positions", [range(0), range(4, 13), range(-1, 3), range(0, 12, 2), range(5, 5)]
)
def test_positions_outside_the_batch_are_refused(
    make_dataset: MakeDataset, positions: range
) -> None:
    with pytest.raises(ValueError, match=r"positions is range\(.*within 0..12"):
        open_stream(make_dataset(60, 7), positions)


def equal(one: Batch, other: Batch) -> bool:
    """Whether both hold the same samples and labels."""
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def test_a_batch_is_put_into_memory_of_its_shape(make_dataset: MakeDataset) -> None:
    stream = open_stream(make_dataset(30, 7), window_samples=8)
    for step in range(12):
        wanted = stream.batch(step)
        memory = wanted.map(lambda part: torch.full_like(part, 99))
        assert stream.batch(step, memory) is memory
        assert equal(memory, wanted)
    smaller = wanted.rows(slice(1, None))
    assert equal(stream.batch(step, smaller), wanted)
    stream.close()


def test_from_a_bucket_through_the_cache(
    make_dataset: MakeDataset, numbers_of: NumbersOf, s3: str, tmp_path: Path
) -> None:
    """A second epoch reads no shard from the bucket; a damaged cached file is fetched again."""
    dataset = make_dataset(60, 7, f"{s3}/streamed")
    cache = tmp_path / "cache"
    options = {"seed": 7, "global_batch_size": 12, "lanes": 3, "window_samples": 5}

    def epoch() -> list[int]:
        stream = ShardStream(
            dataset, positions=range(12), cache_dir=cache, cache_bytes=10**6, **options
        )
        found = [n for step in range(5) for n in numbers_of(stream.batch(step).images)]
        stream.close()
        return found

    first = epoch()
    assert sorted(first) == list(range(60))
    shards = sorted(path for path in cache.iterdir() if path.name != COUNTER)
    assert len(shards) == 9
    rotten = shards[0]
    rotten.write_bytes(b"rot" + rotten.read_bytes()[3:])
    with mock.patch.object(object_store, "read_sized", wraps=object_store.read_sized) as read:
        assert epoch() == first
    assert read.call_count == 1


@pytest.fixture(params=[1, 3, 5])
def torch_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Set torch's threads as a worker with that many CPUs does."""
    before, count = torch.get_num_threads(), int(request.param)
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(before)


@pytest.mark.parametrize("way", ["steps", "all"])
def test_a_worker_decodes_on_its_own_cpus_alone_on_any_system(
    make_dataset: MakeDataset,
    numbers_of: NumbersOf,
    torch_threads: int,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Images are decoded in as many processes as torch has threads; macOS has no CPU affinity."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    dataset = make_dataset(60, 60, encoding="png")
    started: list[image_decoders.ImageDecoders] = []
    decode = image_decoders.ImageDecoders.decode

    def decoded(self: image_decoders.ImageDecoders, *args: Any) -> None:
        decode(self, *args)
        assert len(self.pids) == torch_threads
        started.append(self)

    monkeypatch.setattr(image_decoders.ImageDecoders, "decode", decoded)
    if way == "all":
        found = [n for batch in read_images(dataset, [0]) for n in numbers_of(batch.images)]
    else:
        stream = open_stream(dataset, window_samples=1_666, lanes=1)
        found = [n for step in range(5) for n in numbers_of(stream.batch(step).images)]
        stream.close()
    assert sorted(found) == list(range(60))
    assert started
    assert not started[0].pids
