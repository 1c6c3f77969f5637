"""Read and write objects at any fsspec URL: a local path, s3://, gs://, https:// ...

Every failure is a StorageError of one line. Nothing is cached, so a reader always sees what another
process wrote.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import shutil
import uuid
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from ddpm_ray.redaction import NO_SECRET, has_secret, redacted
from ddpm_ray.storage.errors import StorageError, storage_error
from ddpm_ray.storage.remote_filesystem import download, open_url, request, upload
from ddpm_ray.storage.retry import retry

Act = TypeVar("Act", bound=Callable[..., Any])

UNKNOWN_BYTES = 256 * 2**20  # size assumed where none is given
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)  # no hard links
_retry_timeout_s = 10.0  # see set_retry_timeout


def set_retry_timeout(seconds: float) -> None:
    """Set for how long this process retries transient errors before it raises StorageError.

    The default of 10 s suits a person who waits; training workers set it to outlast an outage.
    """
    global _retry_timeout_s
    _retry_timeout_s = seconds


def is_local(url: str) -> bool:
    """True for a path or a file:// URL on this machine."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """Return the path of a local URL."""
    return Path(url.removeprefix("file://")).expanduser()


def join(url: str, *parts: str) -> str:
    """Append `parts` to `url`, separated by single slashes."""
    return posixpath.join(url.rstrip("/") or "/", *(part.strip("/") for part in parts))


def absolute(url: str, home: Path) -> str:
    """Resolve a relative path against `home`; other URLs, and "", are returned unchanged."""
    return url if not url or "://" in url else str((home / Path(url).expanduser()).resolve())


def name_of(url: str) -> str:
    """Return the file name of a URL: its last part, without the query."""
    return posixpath.basename(url.split("?")[0].rstrip("/"))


def with_retries(act: Act) -> Act:
    """Decorate `act(url, ...)`: transient errors are retried, every error becomes StorageError."""

    @wraps(act)
    def acting(url: str, *args: Any, **kwargs: Any) -> Any:
        """Call `act`; without retries on a local disk, whose errors are permanent."""
        if not is_local(url) and has_secret(url):
            raise StorageError(redacted(url), "refused", NO_SECRET)
        timeout_s = 0.0 if is_local(url) else _retry_timeout_s
        try:
            return retry(lambda: act(url, *args, **kwargs), url, timeout_s)
        except Exception as error:  # noqa: BLE001 - each back end has its own exceptions
            # `from None` hides asyncio's long traces.
            raise storage_error(url, error, local=is_local(url)) from None

    return cast(Act, acting)


@with_retries
def read_bytes(url: str, size_bytes: int = UNKNOWN_BYTES) -> bytes:
    """Read the whole object; `size_bytes`, where known, sets the time limit. StorageError."""
    if is_local(url):
        return local_path(url).read_bytes()
    filesystem, path = open_url(url)
    # By default s3fs sends a HEAD, then 50 MB range requests that it does not check. One GET costs
    # 20 % less CPU at 1.5 MB; callers check the sha256 and read several objects at a time.
    whole = {"max_concurrency": 1} if url.startswith(("s3://", "s3a://")) else {}
    return bytes(request(filesystem, "cat_file", path, body_bytes=size_bytes, **whole))


@with_retries
def read_sized(url: str, size_bytes: int) -> bytes | memoryview:
    """Read the whole object, of a known size, with less CPU than `read_bytes`. StorageError.

    Nothing is checked: an object of another size is returned as it is.
    """
    if is_local(url):
        return local_path(url).read_bytes()
    return download(*open_url(url), size_bytes)


@with_retries
def write_bytes(url: str, data: bytes | memoryview) -> None:
    """Write an object atomically: temporary file and rename locally, one upload elsewhere.

    May be repeated and called concurrently: the last complete write wins. Raises StorageError.
    """
    if not is_local(url):
        filesystem, path = open_url(url)
        upload(filesystem, path, data)
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


@with_retries
def write_new_bytes(url: str, data: bytes) -> bool:
    """Write the object if there is none; False, and nothing written, where another exists.

    An object of the same bytes counts as written: the answer to a first try may have been lost.
    Stores without conditional writes (`If-None-Match: *`), as most S3-compatible servers are,
    overwrite and return True, so do not rely on this for correctness. Raises StorageError.
    """
    try:
        if is_local(url):
            _write_new_file(url, data)
        else:
            filesystem, path = open_url(url)
            request(filesystem, "pipe_file", path, data, body_bytes=len(data), mode="create")
    except FileExistsError:
        return read_bytes(url) == data
    return True


def _write_new_file(url: str, data: bytes) -> None:
    """Write a local file that must not exist yet; raises FileExistsError."""
    complete = f"{url}.{uuid.uuid4().hex[:12]}.partial"
    write_bytes(complete, data)
    try:
        os.link(local_path(complete), local_path(url))
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        # No hard links (mounted bucket, exFAT): create, then fill; a crash may leave it short.
        with local_path(url).open("xb") as file:
            file.write(data)
    finally:
        local_path(complete).unlink()


@with_retries
def modified_s(url: str) -> float:
    """Return the Unix time of the object's last write, by the store's clock. StorageError."""
    if is_local(url):
        return local_path(url).stat().st_mtime
    filesystem, path = open_url(url)
    info = request(filesystem, "info", path)  # S3 has LastModified; others answer `modified`
    return float((info.get("LastModified") or filesystem.modified(path)).timestamp())


@with_retries
def exists(url: str) -> bool:
    """Return whether there is an object or a folder at `url`. Raises StorageError."""
    if is_local(url):
        return local_path(url).exists()
    filesystem, path = open_url(url)
    try:
        request(filesystem, "info", path)
    except FileNotFoundError:
        return False
    return True


@with_retries
def delete(url: str) -> None:
    """Delete one object, if it exists. Raises StorageError."""
    if is_local(url):
        local_path(url).unlink(missing_ok=True)
        return
    filesystem, path = open_url(url)
    try:
        request(filesystem, "rm_file", path)
    except FileNotFoundError:
        return


@with_retries
def delete_empty_folder(url: str) -> None:
    """Delete an empty local folder; does nothing in a bucket, which has no folders."""
    if is_local(url):
        local_path(url).rmdir()


@with_retries
def folders(url: str) -> list[str]:
    """Return the names of the folders directly below `url`, sorted; empty if it does not exist."""
    return _entries(url, folders=True)


@with_retries
def file_names(url: str) -> list[str]:
    """Return the names of the objects directly below `url`, sorted; empty if it does not exist."""
    return _entries(url, folders=False)


def _entries(url: str, folders: bool) -> list[str]:
    if is_local(url):
        root = local_path(url)
        entries = root.iterdir() if root.is_dir() else ()
        return sorted(entry.name for entry in entries if entry.is_dir() == folders)
    filesystem, path = open_url(url)
    try:
        found = request(filesystem, "ls", path, detail=True)
    except FileNotFoundError:
        return []
    return sorted(
        name_of(entry["name"]) for entry in found if (entry["type"] == "directory") == folders
    )


@with_retries
def delete_folder(url: str) -> None:
    """Delete a folder and its content, if it exists."""
    if is_local(url):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(local_path(url))
        return
    filesystem, path = open_url(url)
    for name in request(filesystem, "find", path):
        request(filesystem, "rm_file", name)


@with_retries
def list_files(url: str) -> dict[str, int]:
    """Return the size in bytes of each file below the folder `url`, by relative path, sorted.

    Hidden files are left out. Raises StorageError where there is no such folder.
    """
    if is_local(url):
        root = local_path(url)
        if not root.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no such folder")
        files = (path for path in root.rglob("*") if path.is_file())
        sizes = {file.relative_to(root).as_posix(): file.stat().st_size for file in files}
    else:
        filesystem, path = open_url(url)
        prefix = path.rstrip("/") + "/"
        found = request(filesystem, "find", path, detail=True)
        if not found:
            raise FileNotFoundError(errno.ENOENT, "nothing there")
        sizes = {name.removeprefix(prefix): info["size"] for name, info in found.items()}
    shown = (n for n in sorted(sizes) if not any(part.startswith(".") for part in n.split("/")))
    return {name: sizes[name] for name in shown}
