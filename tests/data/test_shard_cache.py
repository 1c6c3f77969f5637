"""The shard cache: bounded, least recently used is evicted first, disk errors are not raised."""

import fcntl
import hashlib
import os
from pathlib import Path
from unittest import mock

import pytest

from ddpm_ray.data import shard_cache
from ddpm_ray.data.shard_cache import COUNTER, ShardCache


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
