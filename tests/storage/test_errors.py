"""Storage errors: one line with the reason and what to do, on disk and on S3."""

import errno
import os
import pickle
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ddpm_ray.storage import object_store
from ddpm_ray.storage.errors import StorageError

UseS3 = Callable[[str, str], str]


def test_a_dead_endpoint_is_reported_within_seconds(use_s3: UseS3) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    bucket = use_s3(f"http://127.0.0.1:{port}", "secret")
    begun_s = time.monotonic()
    with pytest.raises(StorageError, match=r"no answer .*AWS_ENDPOINT_URL"):
        object_store.read_bytes(f"{bucket}/x")
    assert time.monotonic() - begun_s < 20


@pytest.mark.parametrize(
    "number, reported",
    [
        (
            errno.EROFS,
            "this file system is read-only; choose another path, or mount it",
        ),
        (errno.EACCES, r"not permitted \(.*\); check its owner and permissions"),
        (errno.EPERM, r"not permitted \(.*\); check its owner and permissions"),
        (errno.EIO, "Input/output error.*; check the disk and the path"),
    ],
)
def test_what_a_local_disk_refuses_is_reported_without_talk_of_buckets(
    number: int, reported: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match=reported) as refused:
        object_store.write_bytes(str(tmp_path / "file"), b"new")
    assert "AWS" not in str(refused.value)


def test_wrong_credentials_are_reported(s3_server: str, use_s3: UseS3) -> None:
    bucket = use_s3(s3_server, "wrong")
    for act in (object_store.read_bytes, object_store.exists):
        with pytest.raises(StorageError, match=r"access denied .*AWS_SECRET_ACCESS_KEY"):
            act(f"{bucket}/x")


def test_a_missing_bucket_is_reported(s3: str) -> None:
    with pytest.raises(StorageError, match=r"s3://elsewhere/x: .*check the name and the bucket"):
        object_store.read_bytes("s3://elsewhere/x")


def test_an_unknown_protocol_is_reported() -> None:
    with pytest.raises(StorageError, match=r"ftq://x/y: .*use a local path, s3://"):
        object_store.read_bytes("ftq://x/y")


def test_errors_are_one_line_and_survive_pickle() -> None:
    error = StorageError("s3://b/x", "no answer", "check the endpoint")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == "s3://b/x: no answer; check the endpoint"
