"""Read and write objects at any fsspec URL: a local path, s3://, gs://, https:// ...

The only module that imports fsspec. Every failure is a StorageError of one line. S3 is configured
by the usual environment variables (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...). Nothing is cached, so
a reader always sees what another process wrote.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import shutil
import uuid
from collections.abc import Callable
from functools import partial, wraps
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import fsspec
import fsspec.asyn

from ddpm_ray.redaction import NO_SECRET, has_secret, redacted, sanitize
from ddpm_ray.storage.retry import retry

Act = TypeVar("Act", bound=Callable[..., Any])

CONNECT_TIMEOUT_S = 4
READ_TIMEOUT_S = 8  # without a byte; the request is then cancelled and retried
# Limit of a whole request, whose bytes may trickle in, plus size / LEAST_BYTES_PER_S.
REQUEST_S = 60.0
LEAST_BYTES_PER_S = 2**20
UNKNOWN_BYTES = 256 * 2**20  # size assumed where none is given
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)  # no hard links
_retry_timeout_s = 10.0  # see set_retry_timeout


class StorageError(RuntimeError):
    """A failed storage operation; args are the strings (url, reason, remedy)."""

    def __str__(self) -> str:
        url, reason, remedy = self.args
        return sanitize(f"{url}: {reason}; {remedy}")


class ObjectState(NamedTuple):
    """Size and version of an object."""

    size: int  # in bytes
    version: str  # its ETag or modification time; empty where the store gives neither


class NotAnObjectError(StorageError):
    """A folder where an object is expected; args are (url, reason, remedy)."""


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


def _with_retries(act: Act) -> Act:
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
            raise _storage_error(url, error) from None  # without asyncio's long traces

    return cast(Act, acting)


@_with_retries
def read_bytes(url: str, size_bytes: int = UNKNOWN_BYTES) -> bytes:
    """Read the whole object; `size_bytes`, where known, sets the time limit. StorageError."""
    if is_local(url):
        return local_path(url).read_bytes()
    filesystem, path = _filesystem(url)
    # By default s3fs sends a HEAD, then 50 MB range requests that it does not check. One GET costs
    # 20 % less CPU at 1.5 MB; callers check the sha256 and read several objects at a time.
    whole = {"max_concurrency": 1} if url.startswith(("s3://", "s3a://")) else {}
    return bytes(_ask(filesystem, "cat_file", path, body_bytes=size_bytes, **whole))


@_with_retries
def write_bytes(url: str, data: bytes) -> None:
    """Write an object atomically: temporary file and rename locally, one PUT elsewhere.

    May be repeated and called concurrently: the last complete write wins. Raises StorageError.
    """
    if not is_local(url):
        filesystem, path = _filesystem(url)
        _ask(filesystem, "pipe_file", path, data, body_bytes=len(data))
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


@_with_retries
def write_new(url: str, data: bytes) -> bool:
    """Write the object if there is none; False, and nothing written, where another exists.

    An object of the same bytes counts as written: the answer to a first try may have been lost.
    Stores without conditional writes (`If-None-Match: *`), as most S3-compatible servers are,
    overwrite and return True, so do not rely on this for correctness. Raises StorageError.
    """
    try:
        if is_local(url):
            _write_new_file(url, data)
        else:
            filesystem, path = _filesystem(url)
            _ask(filesystem, "pipe_file", path, data, body_bytes=len(data), mode="create")
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


@_with_retries
def modified_s(url: str) -> float:
    """Return the Unix time of the object's last write, by the store's clock. StorageError."""
    if is_local(url):
        return local_path(url).stat().st_mtime
    filesystem, path = _filesystem(url)
    info = _ask(filesystem, "info", path)  # S3 has LastModified; others answer `modified`
    return float((info.get("LastModified") or filesystem.modified(path)).timestamp())


@_with_retries
def state(url: str) -> ObjectState:
    """Return size and version of one object. Raises StorageError."""
    if is_local(url):
        status = local_path(url).stat()
        return ObjectState(status.st_size, str(status.st_mtime_ns))
    filesystem, path = _filesystem(url)
    return _state(_ask(filesystem, "info", path))


@_with_retries
def states(url: str) -> dict[str, ObjectState]:
    """Return size and version of every object below a remote `url`, hidden ones too, by path.

    Paths are relative. Raises StorageError where there is nothing. For local folders see
    data/packing/source_files.py.
    """
    filesystem, path = _filesystem(url)
    prefix = path.rstrip("/") + "/"
    found = _ask(filesystem, "find", path, detail=True)
    if not found:
        raise FileNotFoundError(errno.ENOENT, "nothing there")
    names = {name.removeprefix(prefix): info for name, info in found.items()}
    return {name: _state(names[name]) for name in sorted(names) if not name.endswith("/")}


@_with_retries
def exists(url: str) -> bool:
    """Return whether there is an object or a folder at `url`. Raises StorageError."""
    if is_local(url):
        return local_path(url).exists()
    filesystem, path = _filesystem(url)
    try:
        _ask(filesystem, "info", path)
    except FileNotFoundError:
        return False
    return True


@_with_retries
def delete(url: str) -> None:
    """Delete one object, if it exists. Raises StorageError."""
    if is_local(url):
        local_path(url).unlink(missing_ok=True)
        return
    filesystem, path = _filesystem(url)
    try:
        _ask(filesystem, "rm_file", path)
    except FileNotFoundError:
        return


@_with_retries
def delete_empty_folder(url: str) -> None:
    """Delete an empty local folder; does nothing in a bucket, which has no folders."""
    if is_local(url):
        local_path(url).rmdir()


@_with_retries
def folders(url: str) -> list[str]:
    """Return the names of the folders directly below `url`, sorted; empty if it does not exist."""
    return _entries(url, folders=True)


@_with_retries
def file_names(url: str) -> list[str]:
    """Return the names of the objects directly below `url`, sorted; empty if it does not exist."""
    return _entries(url, folders=False)


def _entries(url: str, folders: bool) -> list[str]:
    if is_local(url):
        root = local_path(url)
        entries = root.iterdir() if root.is_dir() else ()
        return sorted(entry.name for entry in entries if entry.is_dir() == folders)
    filesystem, path = _filesystem(url)
    try:
        found = _ask(filesystem, "ls", path, detail=True)
    except FileNotFoundError:
        return []
    return sorted(
        name_of(entry["name"]) for entry in found if (entry["type"] == "directory") == folders
    )


@_with_retries
def delete_folder(url: str) -> None:
    """Delete a folder and its content, if it exists."""
    if is_local(url):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(local_path(url))
        return
    filesystem, path = _filesystem(url)
    for name in _ask(filesystem, "find", path):
        _ask(filesystem, "rm_file", name)


@_with_retries
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
        filesystem, path = _filesystem(url)
        prefix = path.rstrip("/") + "/"
        found = _ask(filesystem, "find", path, detail=True)
        if not found:
            raise FileNotFoundError(errno.ENOENT, "nothing there")
        sizes = {name.removeprefix(prefix): info["size"] for name, info in found.items()}
    shown = (n for n in sorted(sizes) if not any(part.startswith(".") for part in n.split("/")))
    return {name: sizes[name] for name in shown}


def _ask(filesystem: Any, request: str, *args: Any, body_bytes: int = 0, **kwargs: Any) -> Any:
    """Call the file system's method `request`; raises FSTimeoutError after the deadline.

    The client's own time-outs only limit silence: a server that sent one byte a second held a
    reader for ever. Only asynchronous file systems, which all remote ones are, can be cancelled.
    """
    method = getattr(filesystem, f"_{request}", None)
    if not getattr(filesystem, "async_impl", False) or not iscoroutinefunction(method):
        return getattr(filesystem, request)(*args, **kwargs)
    deadline_s = REQUEST_S + body_bytes / LEAST_BYTES_PER_S
    return fsspec.asyn.sync(filesystem.loop, method, *args, timeout=deadline_s, **kwargs)


def _state(info: dict[str, Any]) -> ObjectState:
    keys = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
    version = next((str(info[key]) for key in keys if info.get(key)), "")
    return ObjectState(int(info["size"] or 0), version)


def _filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for `url` (one per process and options) and the path in it."""
    options: dict[str, Any] = {"use_listings_cache": False}
    if url.startswith(("s3://", "s3a://")):
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "retries": {"mode": "standard", "total_max_attempts": 1},  # retry.py does it
            # checksummed.py compares sha256; a second checksum would only cost CPU.
            "response_checksum_validation": "when_required",
        }
    filesystem, path = fsspec.core.url_to_fs(url, **options)
    filesystem.retries = 1  # s3fs's own retries pause for seconds
    if "config_kwargs" in options:
        filesystem._call_s3 = partial(_call_once, filesystem)
    return filesystem, path


async def _call_once(filesystem: Any, method: str, *options: Any, **more: Any) -> Any:
    """Do what s3fs's `_call_s3` does without its retry loop, which pauses 0.1 s after each error.

    With 5 % of answers 503 that pause alone cost a quarter of the throughput.
    """
    from s3fs.errors import translate_boto_error  # takes half a second: only where S3 is used

    await filesystem.set_session()
    act = getattr(await filesystem.get_s3(more.get("Bucket")), method)
    try:
        return await act(**filesystem._get_s3_method_kwargs(act, *options, **more))
    except Exception as error:
        raise translate_boto_error(error) from error


def _storage_error(url: str, error: Exception) -> StorageError:
    """Return the error with its reason and remedy in one line."""
    if isinstance(error, StorageError):
        return error
    text = " ".join((str(error) or type(error).__name__).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageError(url, "the disk is full", "free some space or choose another path")
    if isinstance(error, IsADirectoryError):
        remedy = "move the folder away, and restore the object if you have a copy"
        return NotAnObjectError(url, "a folder is where an object should be", remedy)
    if isinstance(error, FileNotFoundError):
        return StorageError(url, "no such file or object", "check the name and the bucket")
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        remedy = "choose another path, or mount it for writing"
        return StorageError(url, "this file system is read-only", remedy)
    if is_local(url) and isinstance(error, PermissionError):
        remedy = "check its owner and permissions, and whether its file system allows this"
        return StorageError(url, f"not permitted ({text})", remedy)
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        remedy = "check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        return StorageError(url, f"access denied ({text})", remedy)
    if isinstance(error, (ImportError, ValueError)) and "rotocol" in text:
        return StorageError(url, text, "use a local path, s3://, https:// or another fsspec URL")
    names = " ".join(kind.__name__ for kind in type(error).__mro__)
    if isinstance(error, (ConnectionError, TimeoutError)) or "Connect" in names or "Time" in names:
        remedy = "check that the endpoint is up and that its address (AWS_ENDPOINT_URL) is right"
        return StorageError(url, f"no answer ({text})", remedy)
    remedy = "check the disk and the path" if is_local(url) else "check the address and try again"
    return StorageError(url, text, remedy)
