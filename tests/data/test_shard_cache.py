"""The shard cache: bounded, least recently used is evicted first, disk errors are not raised."""

import hashlib
import os
from pathlib import Path

from ddpm_ray.data.shard_cache import ShardCache


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def age(folder: Path, name: str, seconds: int) -> None:
    status = (folder / name).stat()
    os.utime(folder / name, (status.st_atime - seconds, status.st_mtime - seconds))


def test_what_was_used_longest_ago_leaves_first(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, max_bytes=30)
    a, b, c, d = files = [bytes([n]) * 10 for n in range(4)]
    names = {data: sha256(data) for data in files}
    for n, data in enumerate((a, b, c)):
        cache.put(names[data], data)
        age(tmp_path, names[data], 100 - n)
    assert cache.get(names[a]) == a  # used now: b is the oldest
    cache.put(names[d], d + d[:5])
    assert {path.name for path in tmp_path.iterdir()} == {names[a], names[d]}


def test_it_never_holds_more_than_its_bytes(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, max_bytes=100)
    for n in range(30):
        cache.put(f"{n}", bytes(1 + 7 * n % 41))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 100


def test_what_is_larger_than_the_cache_is_not_kept(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, max_bytes=10)
    cache.put("small", bytes(10))
    cache.put("large", bytes(11))
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_unknown_and_damaged_files_are_misses(tmp_path: Path) -> None:
    cache, name = ShardCache(tmp_path / "not yet there", max_bytes=10), sha256(b"1")
    assert cache.get(name) is None
    cache.put(name, b"1")
    assert cache.get(name) == b"1"
    (cache.folder / name).write_bytes(b"2")
    assert cache.get(name) is None
    assert list(cache.folder.iterdir()) == []


def test_a_broken_disk_only_turns_it_off(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = ShardCache(tmp_path / "file", max_bytes=10)  # not a folder: nothing can be kept
    cache.put("x", b"1")
    assert cache.get("x") is None
