"""Storage: whole objects or a clear line, on disk and on a real S3 server."""

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from ddpm_ray.storage import checksummed, object_store, remote_filesystem
from ddpm_ray.storage.errors import StorageError

UseS3 = Callable[[str, str], str]


@pytest.fixture(params=["disk", "bucket"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "folder")
    bucket: str = request.getfixturevalue("s3")
    return f"{bucket}/{tmp_path.name}"


def test_what_is_written_is_read_listed_and_deleted(root: str) -> None:
    url = object_store.join(root, "a/b.bin")
    assert not object_store.exists(url)
    object_store.write_bytes(url, b"one")
    object_store.write_bytes(url, b"two")
    object_store.write_bytes(object_store.join(root, "a/c d+.bin"), bytes(3_000_000))
    assert object_store.exists(url)
    assert object_store.read_bytes(url) == b"two"
    assert object_store.list_files(root) == {"a/b.bin": 3, "a/c d+.bin": 3_000_000}
    object_store.delete(url)
    object_store.delete(url)
    assert not object_store.exists(url)


@pytest.mark.parametrize("more", [-1, 0, 7])
def test_a_large_object_is_written_from_memory_in_parts(
    more: int, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Around the size from which a bucket gets parts; these are S3's smallest."""
    monkeypatch.setattr(remote_filesystem, "PART_BYTES", 5 * 2**20)
    data = np.arange(10 * 2**20 + more, dtype=np.uint32).astype(np.uint8)
    url = object_store.join(root, "large")
    object_store.write_bytes(url, data.data)
    assert object_store.read_bytes(url) == data.tobytes()


def test_a_conditional_write_keeps_what_is_there_or_owns_that_it_did_not(root: str) -> None:
    url = object_store.join(root, "once")
    object_store.write_bytes(url, b"first")
    wrote = object_store.write_new_bytes(url, b"second")
    assert object_store.read_bytes(url) == (b"second" if wrote else b"first")
    assert not (wrote and object_store.is_local(url))
    object_store.delete(url)
    assert object_store.write_new_bytes(url, b"third")
    assert abs(object_store.modified_s(url) - time.time()) < 60


def test_a_store_that_knows_the_condition_keeps_the_first(use_s3: UseS3) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    bucket = use_s3(f"http://{host}:{port}", "secret")
    s3fs.S3FileSystem().mkdir(bucket)
    wrote = [object_store.write_new_bytes(f"{bucket}/once", b"ab"[n:]) for n in (0, 1)]
    assert wrote == [True, False]
    assert object_store.read_bytes(f"{bucket}/once") == b"ab"
    server.stop()


def test_nothing_is_remembered_of_what_another_process_changes(root: str) -> None:
    url = object_store.join(root, "pointer")
    assert not object_store.exists(url)
    writer = threading.Thread(target=object_store.write_bytes, args=(url, b"1"))
    writer.start()
    writer.join()
    assert object_store.exists(url)
    assert object_store.list_files(root) == {"pointer": 1}


def test_folders_are_named_and_go_with_all_they_hold(root: str) -> None:
    assert object_store.folders(object_store.join(root, "steps")) == []
    for name in ("steps/b/x", "steps/a/y", "steps/a/deep/z", "steps/file"):
        object_store.write_bytes(object_store.join(root, name), b"1")
    assert object_store.folders(object_store.join(root, "steps")) == ["a", "b"]
    for _ in range(2):  # once more: one that is not there is fine
        object_store.delete_folder(object_store.join(root, "steps/a"))
    assert object_store.folders(object_store.join(root, "steps")) == ["b"]
    assert object_store.list_files(object_store.join(root, "steps")) == {"b/x": 1, "file": 1}


def test_what_is_not_there_is_named(root: str) -> None:
    url = object_store.join(root, "nothing")
    with pytest.raises(StorageError, match=r"nothing: no such file or object; check"):
        object_store.read_bytes(url)
    with pytest.raises(StorageError, match=r"nothing: no such file or object; check"):
        object_store.list_files(url)


def test_a_failed_write_leaves_the_old_object_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "file")
    object_store.write_bytes(url, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="file: the disk is full; free some space"):
        object_store.write_bytes(url, b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_file_system_without_hard_links_takes_each_new_object_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mounted bucket, exFAT: some say EPERM, others that they have no such call."""
    for number in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):

        def link(source: Path, target: Path, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "link", link)
        url = str(tmp_path / str(number) / "claim")
        assert object_store.write_new_bytes(url, b"first")
        assert not object_store.write_new_bytes(url, b"second")
        assert object_store.write_new_bytes(url, b"first")  # asked again, as after a lost answer
        assert [path.read_bytes() for path in Path(url).parent.iterdir()] == [b"first"]


def test_a_verified_file_is_downloaded_once_and_checked_always(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, sha256 = f"{s3}/weights.bin", hashlib.sha256(b"weights").hexdigest()
    object_store.write_bytes(url, b"weights")
    path = checksummed.fetch(url, sha256, tmp_path)
    assert path.read_bytes() == b"weights"
    object_store.delete(url)
    assert checksummed.fetch(url, sha256, tmp_path) == path  # not asked for again
    path.write_bytes(b"rotten!")
    object_store.write_bytes(url, b"weights")
    assert checksummed.fetch(url, sha256, tmp_path).read_bytes() == b"weights"
    assert checksummed.fetch(str(path), sha256, tmp_path) == path  # local: where it is
    with pytest.raises(StorageError, match=rf"sha256 is {sha256}, expected abc; fetch"):
        checksummed.fetch(url, "abc", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_who_reads_during_a_write_sees_the_old_object_whole(tmp_path: Path) -> None:
    url = tmp_path / "file"
    object_store.write_bytes(str(url), b"old and long")
    with url.open("rb") as reader:
        object_store.write_bytes(str(url), b"new")
        assert reader.read() == b"old and long"
    assert url.read_bytes() == b"new"


@pytest.mark.parametrize("expected", [1, 299_999, 300_000, 300_001, 10**7])
@pytest.mark.parametrize("where", ["s3", "local"])
def test_an_object_of_another_size_than_expected_is_read_whole(
    s3: str, tmp_path: Path, expected: int, where: str
) -> None:
    """Its sha256 then tells that it is another one."""
    data = np.random.default_rng(0).bytes(300_000)
    url = f"{s3 if where == 's3' else tmp_path}/{expected}"
    object_store.write_bytes(url, data)
    assert object_store.read_sized(url, expected) == data
    digest = hashlib.sha256(data).hexdigest()
    assert checksummed.read_verified_view(url, digest, expected) == data
    with pytest.raises(checksummed.DamagedError, match=f"sha256 is {digest[:12]}"):
        checksummed.read_verified_view(url, "0" * 64, expected)
