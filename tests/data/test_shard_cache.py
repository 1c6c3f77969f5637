"""The shard cache: bounded, least recently used is evicted first, disk errors are not raised."""

import fcntl
import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest

from ddpm_ray.data import shard_cache
from ddpm_ray.data.shard_cache import COUNTER, ShardCache
from tests.limits import ENDS_S


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {COUNTER}


def stored_bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in names(folder))


def age(folder: Path, name: str, seconds: int) -> None:
    status = (folder / name).stat()
    os.utime(folder / name, (status.st_atime - seconds, status.st_mtime - seconds))


def test_what_was_used_longest_ago_leaves_first(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, max_bytes=30)
    a, b, c, d = files = [bytes([n]) * 10 for n in range(4)]
    name = {data: sha256(data) for data in files}
    for n, data in enumerate((a, b, c)):
        cache.put(name[data], data)
        age(tmp_path, name[data], 100 - n)
    assert cache.get(name[a]) == a  # used now: b is the oldest
    cache.put(name[d], d + d[:5])
    assert names(tmp_path) == {name[a], name[d]}


def test_it_never_holds_more_than_its_bytes(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, max_bytes=100)
    for n in range(30):
        cache.put(f"{n}", bytes(1 + 7 * n % 41))
        assert stored_bytes(tmp_path) <= 100


@pytest.mark.parametrize("harm", ["none", "lost", "cut", "no locks"])
def test_the_caches_of_a_node_count_together(
    tmp_path: Path, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the counter is damaged half way, or the file system has no locks."""
    if harm == "no locks":
        monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError("ENOLCK")))
    caches = [ShardCache(tmp_path, max_bytes=100) for _ in range(3)]
    for n in range(60):
        caches[n % 3].put(f"{n}", bytes(1 + 7 * n % 41))
        assert stored_bytes(tmp_path) <= 100
        assert f"{n}" in names(tmp_path)
        if n == 30 and harm == "lost":
            (tmp_path / COUNTER).unlink()
        if n == 30 and harm == "cut":
            os.truncate(tmp_path / COUNTER, 0)


@pytest.mark.parametrize("max_bytes", [100, 100_000])
def test_caches_that_store_at_the_same_moment_count_every_file(
    tmp_path: Path, max_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight of a node: of a cache that is full after three files, and of one that never is."""
    monkeypatch.setattr(shard_cache, "LONGEST_COUNT_S", ENDS_S)
    caches = [ShardCache(tmp_path, max_bytes) for _ in range(8)]
    together = threading.Barrier(len(caches), timeout=ENDS_S)

    def put(n: int) -> None:
        together.wait()
        caches[n % 8].put(f"{n}", bytes(1 + 7 * n % 41))

    with ThreadPoolExecutor(len(caches)) as pool:
        for first in range(0, 400, 8):
            list(pool.map(put, range(first, first + 8)))
            counted, stored = int((tmp_path / COUNTER).read_text()), stored_bytes(tmp_path)
            assert stored <= counted <= max_bytes
            if max_bytes == 100_000:
                assert counted == stored == sum(1 + 7 * n % 41 for n in range(first + 8))


def test_a_file_that_is_renamed_while_a_full_cache_is_listed_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its final name once the folder was listed, and none when its size is read."""
    monkeypatch.setattr(shard_cache, "LONGEST_COUNT_S", 0.01)
    renames, goes_on, replace, scandir = (
        threading.Event(),
        threading.Event(),
        Path.replace,
        os.scandir,
    )
    ShardCache(tmp_path, max_bytes=100).put("old", bytes(60))
    other = threading.Thread(target=ShardCache(tmp_path, max_bytes=100).put, args=("b", bytes(30)))

    def delayed(file: Path, target: Path) -> Path:
        renames.set()
        assert goes_on.wait(ENDS_S)
        return replace(file, target)

    def listed(folder: Path) -> list[os.DirEntry[str]]:
        entries = list(scandir(folder))
        goes_on.set()
        other.join(ENDS_S)
        return entries

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", delayed)
        patch.setattr(os, "scandir", listed)
        other.start()
        assert renames.wait(ENDS_S)
        ShardCache(tmp_path, max_bytes=100).put("a", bytes(30))
        goes_on.set()
        other.join(ENDS_S)
    assert "b" in names(tmp_path)
    assert stored_bytes(tmp_path) <= int((tmp_path / COUNTER).read_text()) <= 100


def test_the_folder_is_not_looked_through_for_each_file(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, max_bytes=1000)
    with mock.patch.object(os, "scandir", side_effect=os.scandir) as looks:
        for n in range(500):
            cache.put(f"{n}", bytes(10))
    # At first, and for each further tenth of the cache.
    assert 40 <= looks.call_count <= 45
    assert 90 <= len(names(tmp_path)) <= 100


def test_a_frozen_process_only_delays_a_file_that_is_then_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "LONGEST_COUNT_S", 0.01)
    cache = ShardCache(tmp_path, max_bytes=100)
    with (tmp_path / COUNTER).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cache.put("a", b"1")
    assert names(tmp_path) == set()
    cache.put("a", b"1")
    assert names(tmp_path) == {"a"}


def test_what_is_larger_than_the_cache_is_not_kept(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, max_bytes=10)
    cache.put("small", bytes(10))
    cache.put("large", bytes(11))
    assert names(tmp_path) == {"small"}


def test_unknown_and_damaged_files_are_misses(tmp_path: Path) -> None:
    cache, name = ShardCache(tmp_path / "not yet there", max_bytes=10), sha256(b"1")
    assert cache.get(name) is None
    cache.put(name, b"1")
    assert cache.get(name) == b"1"
    (cache.folder / name).write_bytes(b"2")
    assert cache.get(name) is None
    assert names(cache.folder) == set()


def test_a_broken_disk_only_turns_it_off(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = ShardCache(tmp_path / "file", max_bytes=10)  # not a folder: nothing can be kept
    cache.put("x", b"1")
    assert cache.get("x") is None
