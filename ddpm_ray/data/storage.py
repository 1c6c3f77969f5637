"""Bytes in and out of any fsspec URL: a local path, s3://, gs://, https:// ...

The only module that imports fsspec. Every failure is a StorageError of one line. Buckets are set
by the environment as for any S3 tool (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...). Nothing is cached
here and nothing is listed but by `list_files`, so an object that another process wrote is seen.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import posixpath
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

CONNECT_TIMEOUT_S = 4
READ_TIMEOUT_S = 20
logging.getLogger("aiobotocore").setLevel(logging.WARNING)  # not where it found its credentials


class StorageError(RuntimeError):
    """A storage that does not do what it should; args are (url, reason, remedy), all plain."""

    def __str__(self) -> str:
        url, reason, remedy = self.args
        return f"{url}: {reason}; {remedy}"


def is_local(url: str) -> bool:
    """True for a path or a file:// URL on this machine."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """The path of a local URL."""
    return Path(url.removeprefix("file://")).expanduser()


def join(url: str, *parts: str) -> str:
    """`url` with `parts` appended, one slash between each two."""
    return posixpath.join(url.rstrip("/") or "/", *(part.strip("/") for part in parts))


def absolute(url: str, home: Path) -> str:
    """`url` itself, or the absolute path of what is relative to the folder `home`."""
    return url if "://" in url else str((home / Path(url).expanduser()).resolve())


def name_of(url: str) -> str:
    """The last part of a URL, without query: the file's name."""
    return posixpath.basename(url.split("?")[0].rstrip("/"))


def read_bytes(url: str) -> bytes:
    """The whole object. Raises StorageError."""
    with _explaining(url):
        if is_local(url):
            return local_path(url).read_bytes()
        filesystem, path = _filesystem(url)
        # s3fs would send a HEAD, then 50 MB ranges that it does not check; one GET costs 20 % less
        # CPU at 1.5 MB, and callers check the sha256 of the whole and read several at a time.
        whole = {"max_concurrency": 1} if url.startswith(("s3://", "s3a://")) else {}
        return bytes(filesystem.cat_file(path, **whole))


def write_bytes(url: str, data: bytes) -> None:
    """Write the whole object or nothing: temporary file and rename locally, one PUT elsewhere.

    Safe to repeat and to race: the last complete writer wins. Raises StorageError.
    """
    with _explaining(url):
        if not is_local(url):
            filesystem, path = _filesystem(url)
            filesystem.pipe_file(path, data)
            return
        target = local_path(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def write_new(url: str, data: bytes) -> bool:
    """Write the object where there is none; False, and nothing written, where there is one.

    A store that does not know the condition (`If-None-Match: *`) writes over it and this says True:
    most S3-compatible servers, so nothing may rest on it. Raises StorageError.
    """
    with _explaining(url):
        try:
            if is_local(url):
                with local_path(url).open("xb") as file:
                    file.write(data)
            else:
                filesystem, path = _filesystem(url)
                filesystem.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        return True


def modified_s(url: str) -> float:
    """Unix time of the object's last write, by the clock of its store. Raises StorageError."""
    with _explaining(url):
        if is_local(url):
            return local_path(url).stat().st_mtime
        filesystem, path = _filesystem(url)
        return float(filesystem.modified(path).timestamp())


def exists(url: str) -> bool:
    """True if there is an object or a folder at `url`. Raises StorageError if nobody can say."""
    with _explaining(url):
        if is_local(url):
            return local_path(url).exists()
        filesystem, path = _filesystem(url)
        try:
            filesystem.info(path)
        except FileNotFoundError:
            return False
        return True


def delete(url: str) -> None:
    """Remove one object; one that is not there is fine. Raises StorageError."""
    with _explaining(url):
        if is_local(url):
            local_path(url).unlink(missing_ok=True)
            return
        filesystem, path = _filesystem(url)
        try:
            filesystem.rm_file(path)
        except FileNotFoundError:
            return


def delete_empty_folder(url: str) -> None:
    """Remove a local folder that holds nothing; a bucket has no folders: nothing to do."""
    with _explaining(url):
        if is_local(url):
            local_path(url).rmdir()


def list_files(url: str) -> dict[str, int]:
    """Paths below the folder `url`, relative to it, with their bytes, sorted; no hidden files.

    Empty for a folder without files; StorageError where there is no such folder.
    """
    with _explaining(url):
        if is_local(url):
            root = local_path(url)
            if not root.is_dir():
                raise FileNotFoundError(errno.ENOENT, "no such folder")
            files = (path for path in root.rglob("*") if path.is_file())
            sizes = {file.relative_to(root).as_posix(): file.stat().st_size for file in files}
        else:
            filesystem, path = _filesystem(url)
            prefix = path.rstrip("/") + "/"
            found = filesystem.find(path, detail=True)
            if not found:
                raise FileNotFoundError(errno.ENOENT, "nothing there")
            sizes = {name.removeprefix(prefix): info["size"] for name, info in found.items()}
    shown = (n for n in sorted(sizes) if not any(part.startswith(".") for part in n.split("/")))
    return {name: sizes[name] for name in shown}


def fetch_verified(url: str, sha256: str, cache_dir: str | Path) -> Path:
    """A local path of the file at `url` whose sha256 is as told; raises StorageError otherwise.

    A local file is checked where it is. Another is downloaded once into `cache_dir`, under a name
    that holds its hash, and is checked again at each call.
    """
    if is_local(url):
        path, found = local_path(url), hashlib.sha256(read_bytes(url)).hexdigest()
    else:
        path = Path(cache_dir).expanduser() / f"{sha256[:16]}-{name_of(url)}"
        if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            return path
        data = read_bytes(url)
        found = hashlib.sha256(data).hexdigest()
        if found == sha256:
            write_bytes(str(path), data)
    if found != sha256:
        remedy = "fetch the file again, or correct the sha256 if the file is the one you mean"
        raise StorageError(url, f"sha256 is {found}, expected {sha256}", remedy)
    return path


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for `url` (it keeps one per process and options) and the path in it."""
    options: dict[str, Any] = {"use_listings_cache": False}
    if url.startswith(("s3://", "s3a://")):
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "retries": {"mode": "standard", "max_attempts": 3},
            # Every byte that matters is checked by sha256 on our side; a second checksum costs CPU.
            "response_checksum_validation": "when_required",
        }
    filesystem, path = fsspec.core.url_to_fs(url, **options)
    return filesystem, path


@contextmanager
def _explaining(url: str) -> Iterator[None]:
    """Whatever goes wrong in the body becomes a StorageError of one line."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - each back end has its own exceptions
        raise _explained(url, error) from None  # without pages of asyncio's traces


def _explained(url: str, error: Exception) -> StorageError:
    """The error as one line: what failed, and what to do about it."""
    if isinstance(error, StorageError):
        return error
    text = " ".join((str(error) or type(error).__name__).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageError(url, "the disk is full", "free some space or choose another place")
    if isinstance(error, FileNotFoundError):
        return StorageError(url, "there is nothing at this place", "check the name and the bucket")
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        remedy = "check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or file rights"
        return StorageError(url, f"access denied ({text})", remedy)
    if isinstance(error, (ImportError, ValueError)) and "rotocol" in text:
        return StorageError(url, text, "use a local path, s3://, https:// or what fsspec knows")
    names = " ".join(kind.__name__ for kind in type(error).__mro__)
    if isinstance(error, (ConnectionError, TimeoutError)) or "Connect" in names or "Time" in names:
        remedy = "check that the endpoint is up and that its address (AWS_ENDPOINT_URL) is right"
        return StorageError(url, f"no answer ({text})", remedy)
    return StorageError(url, text, "check the address and try again")
