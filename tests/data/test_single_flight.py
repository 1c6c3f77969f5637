"""The processes of a node fetch each shard from the store once, whatever happens to one of them."""

import fcntl
import hashlib
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from ddpm_ray.data import shard_cache
from ddpm_ray.data.dataset import Dataset, open_dataset
from ddpm_ray.data.shard_cache import COUNTER, ShardCache
from ddpm_ray.data.shards import fetch_shard
from tests.data.conftest import MakeDataset
from tests.fixtures.forkserver import FORKSERVER
from tests.limits import ENDS_S

PROCESSES, SHARDS = 8, 9


class CountingStore:
    """An HTTP server over a folder that counts the requests for each shard and can hold them up."""

    def __init__(self, folder: Path) -> None:
        self.requests: Counter[str] = Counter()
        self.asked, self.answers = threading.Semaphore(0), threading.Event()
        self.answers.set()
        store = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args, directory=str(folder))

            def do_GET(self) -> None:
                if "shard-" in self.path:
                    store.requests[self.path] += 1
                    store.asked.release()
                    store.answers.wait(ENDS_S)
                super().do_GET()

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/set"

    def close(self) -> None:
        self.answers.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def store(make_dataset: MakeDataset, tmp_path: Path) -> Iterator[CountingStore]:
    """A set of 60 images in 9 shards, served over HTTP."""
    make_dataset(60, 7)
    found = CountingStore(tmp_path)
    yield found
    found.close()


def fetch_all(url: str, cache_dir: Path, together: Any, found: Any) -> None:
    """Fetch every shard in the same order as the other processes; report a digest of the images."""
    dataset, cache, digest = open_dataset(url), ShardCache(cache_dir, 10**6), hashlib.sha256()
    together.wait(ENDS_S)
    for number in range(SHARDS):
        digest.update(np.asarray(fetch_shard(dataset, number, cache).images).tobytes())
    found.put(digest.hexdigest())


def fetch_first(url: str, cache_dir: Path) -> None:
    fetch_shard(open_dataset(url), 0, ShardCache(cache_dir, 10**6))


def test_eight_processes_fetch_each_shard_once(store: CountingStore, tmp_path: Path) -> None:
    found, together = FORKSERVER.Queue(), FORKSERVER.Barrier(PROCESSES)
    running = [
        FORKSERVER.Process(target=fetch_all, args=(store.url, tmp_path / "cache", together, found))
        for _ in range(PROCESSES)
    ]
    for process in running:
        process.start()
    digests = {found.get(timeout=ENDS_S) for _ in running}
    for process in running:
        process.join(ENDS_S)
    assert len(digests) == 1
    assert sorted(store.requests.values()) == [1] * SHARDS
    assert len(list((tmp_path / "cache").iterdir())) == SHARDS + 1  # the counter; no lock is left


def test_a_fetch_killed_half_way_is_taken_over(store: CountingStore, tmp_path: Path) -> None:
    """The kernel releases the dead process's lock; another one fetches at once."""
    store.answers.clear()
    arguments = store.url, tmp_path / "cache"
    first = FORKSERVER.Process(target=fetch_first, args=arguments)
    first.start()
    assert store.asked.acquire(timeout=ENDS_S)
    second = FORKSERVER.Process(target=fetch_first, args=arguments)
    second.start()
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    first.join(ENDS_S)
    assert store.asked.acquire(timeout=ENDS_S)  # by the second process
    store.answers.set()
    second.join(ENDS_S)
    assert second.exitcode == 0
    assert sum(store.requests.values()) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2  # with the counter


def test_a_frozen_holder_delays_a_fetch_by_the_time_limit_alone(
    store: CountingStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    dataset, cache = open_dataset(store.url), ShardCache(tmp_path / "cache", 10**6)
    sha256 = dataset.index.column("sha256")[0].as_py()
    monkeypatch.setattr(shard_cache, "LONGEST_WAIT_S", 0.05)
    with held_lock(cache, sha256):
        assert len(fetch_shard(dataset, 0, cache)) == 7
    assert f"another process has held {sha256[:12]}" in caplog.text
    assert "for 0 s; downloading it here as well" in caplog.text


def held_lock(cache: ShardCache, sha256: str) -> Any:
    """Hold the lock of a shard as another process would: by another open file."""
    cache.folder.mkdir(exist_ok=True)
    file = cache.lock_path(sha256).open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def test_a_lock_file_left_by_a_killed_process_is_no_lock(
    store: CountingStore, tmp_path: Path
) -> None:
    dataset, cache = open_dataset(store.url), ShardCache(tmp_path / "cache", 10**6)
    sha256 = dataset.index.column("sha256")[0].as_py()
    held_lock(cache, sha256).close()
    assert len(fetch_shard(dataset, 0, cache)) == 7
    assert {path.name for path in cache.folder.iterdir()} == {sha256, COUNTER}


@pytest.mark.parametrize("what", ["no place", "too large"])
def test_what_the_cache_cannot_keep_is_not_waited_for(
    store: CountingStore, tmp_path: Path, what: str
) -> None:
    """Otherwise the processes would download one after another."""
    dataset = open_dataset(store.url)
    cache = ShardCache(tmp_path / "cache", 10 if what == "too large" else 10**6)
    if what == "no place":
        with mock.patch.object(Path, "replace", side_effect=OSError("the disk is full")):
            cache.put("any", b"1")
    with held_lock(cache, dataset.index.column("sha256")[0].as_py()):
        assert len(fetch_shard(dataset, 0, cache)) == 7


def test_a_failed_fetch_releases_its_lock(
    make_dataset: Callable[..., Dataset], store: CountingStore, tmp_path: Path
) -> None:
    dataset, cache = open_dataset(store.url), ShardCache(tmp_path / "cache", 10**6)
    shard = tmp_path / "set" / "shard-00000.arrow"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(RuntimeError, match="the index says"):
        fetch_shard(dataset, 0, cache)
    shard.write_bytes(data)
    assert len(fetch_shard(dataset, 0, cache)) == 7
