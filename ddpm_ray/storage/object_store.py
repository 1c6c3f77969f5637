"""Bytes in and out of any fsspec URL: a local path, s3://, gs://, https:// ...

The only module that imports fsspec. Every failure is a StorageError of one line. Buckets are set
by the environment as for any S3 tool (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...). Nothing is cached
here and nothing is listed but by `list_files`, so an object that another process wrote is seen.
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
from ddpm_ray.storage.retry import persistently

Act = TypeVar("Act", bound=Callable[..., Any])

CONNECT_TIMEOUT_S = 4
READ_TIMEOUT_S = 8  # without a byte: a request that hangs is cut off, and tried again
# For a whole request, whose bytes may come one by one: it is cut off as well, and tried again.
REQUEST_S = 60.0
LEAST_BYTES_PER_S = 2**20  # what bodies add to it; of an object of unknown size 256 MiB are taken
UNKNOWN_BYTES = 256 * 2**20
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)  # hard ones
_patience_s = 10.0  # see be_patient


class StorageError(RuntimeError):
    """A storage that does not do what it should; args are (url, reason, remedy), all plain."""

    def __str__(self) -> str:
        url, reason, remedy = self.args
        return sanitize(f"{url}: {reason}; {remedy}")


class ObjectState(NamedTuple):
    """What a store says of an object."""

    size: int  # in bytes
    version: str  # its ETag or the time of its last write; empty where the store tells neither


class NotAnObjectError(StorageError):
    """A folder that stands where an object should be; args are (url, reason, remedy)."""


def be_patient(seconds: float) -> None:
    """How long this process tries again what fails for a while, before it is a StorageError.

    At first 10 s, for people who wait for an answer; workers in mid-run wait out an outage.
    """
    global _patience_s
    _patience_s = seconds


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
    """`url` itself, also an empty one, or the absolute path of what is relative to `home`."""
    return url if not url or "://" in url else str((home / Path(url).expanduser()).resolve())


def name_of(url: str) -> str:
    """The last part of a URL, without query: the file's name."""
    return posixpath.basename(url.split("?")[0].rstrip("/"))


def _reliably(act: Act) -> Act:
    """`act` on a URL, tried again where that may help; what goes wrong is one line."""

    @wraps(act)
    def acting(url: str, *args: Any, **kwargs: Any) -> Any:
        """`act`; a local disk is asked once: what it refuses it refuses again."""
        if not is_local(url) and has_secret(url):
            raise StorageError(redacted(url), "not asked", NO_SECRET)
        patience_s = 0.0 if is_local(url) else _patience_s
        try:
            return persistently(lambda: act(url, *args, **kwargs), url, patience_s)
        except Exception as error:  # noqa: BLE001 - each back end has its own exceptions
            raise _explained(url, error) from None  # without pages of asyncio's traces

    return cast(Act, acting)


@_reliably
def read_bytes(url: str, size_bytes: int = UNKNOWN_BYTES) -> bytes:
    """The whole object, whose size a caller that knows it should tell. Raises StorageError."""
    if is_local(url):
        return local_path(url).read_bytes()
    filesystem, path = _filesystem(url)
    # s3fs would send a HEAD, then 50 MB ranges that it does not check; one GET costs 20 % less
    # CPU at 1.5 MB, and callers check the sha256 of the whole and read several at a time.
    whole = {"max_concurrency": 1} if url.startswith(("s3://", "s3a://")) else {}
    return bytes(_ask(filesystem, "cat_file", path, body_bytes=size_bytes, **whole))


@_reliably
def write_bytes(url: str, data: bytes) -> None:
    """Write the whole object or nothing: temporary file and rename locally, one PUT elsewhere.

    Safe to repeat and to race: the last complete writer wins. Raises StorageError.
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


@_reliably
def write_new(url: str, data: bytes) -> bool:
    """Write the object where there is none; False, and nothing written, where another is.

    One of the same bytes counts as this one: the answer to a first try may have been lost.
    A store that does not know the condition (`If-None-Match: *`) writes over it and this says True:
    most S3-compatible servers, so nothing may rest on it. Raises StorageError.
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
    """Write a local file where there is none; raises FileExistsError."""
    whole = f"{url}.{uuid.uuid4().hex[:12]}.partial"
    write_bytes(whole, data)
    try:
        os.link(local_path(whole), local_path(url))
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        # A mounted bucket, exFAT: created and then filled, so that a crash may leave it short.
        with local_path(url).open("xb") as file:
            file.write(data)
    finally:
        local_path(whole).unlink()


@_reliably
def modified_s(url: str) -> float:
    """Unix time of the object's last write, by the clock of its store. Raises StorageError."""
    if is_local(url):
        return local_path(url).stat().st_mtime
    filesystem, path = _filesystem(url)
    info = _ask(filesystem, "info", path)  # where S3 says it; elsewhere its file system does
    return float((info.get("LastModified") or filesystem.modified(path)).timestamp())


@_reliably
def state(url: str) -> ObjectState:
    """Size and version of one object. Raises StorageError."""
    if is_local(url):
        status = local_path(url).stat()
        return ObjectState(status.st_size, str(status.st_mtime_ns))
    filesystem, path = _filesystem(url)
    return _state(_ask(filesystem, "info", path))


@_reliably
def states(url: str) -> dict[str, ObjectState]:
    """Size and version of every object below a remote `url`, hidden ones too, by relative name.

    Raises StorageError where there is nothing. (A local folder: data/packing/source_files.py.)
    """
    filesystem, path = _filesystem(url)
    prefix = path.rstrip("/") + "/"
    found = _ask(filesystem, "find", path, detail=True)
    if not found:
        raise FileNotFoundError(errno.ENOENT, "nothing there")
    names = {name.removeprefix(prefix): info for name, info in found.items()}
    return {name: _state(names[name]) for name in sorted(names) if not name.endswith("/")}


@_reliably
def exists(url: str) -> bool:
    """True if there is an object or a folder at `url`. Raises StorageError if nobody can say."""
    if is_local(url):
        return local_path(url).exists()
    filesystem, path = _filesystem(url)
    try:
        _ask(filesystem, "info", path)
    except FileNotFoundError:
        return False
    return True


@_reliably
def delete(url: str) -> None:
    """Remove one object; one that is not there is fine. Raises StorageError."""
    if is_local(url):
        local_path(url).unlink(missing_ok=True)
        return
    filesystem, path = _filesystem(url)
    try:
        _ask(filesystem, "rm_file", path)
    except FileNotFoundError:
        return


@_reliably
def delete_empty_folder(url: str) -> None:
    """Remove a local folder that holds nothing; a bucket has no folders: nothing to do."""
    if is_local(url):
        local_path(url).rmdir()


@_reliably
def folders(url: str) -> list[str]:
    """Names of the folders right below `url`, sorted; none where there is nothing."""
    return _entries(url, folders=True)


@_reliably
def file_names(url: str) -> list[str]:
    """Names of the objects right below `url`, sorted; none where there is nothing."""
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


@_reliably
def delete_folder(url: str) -> None:
    """Remove a folder and all that it holds; one that is not there is fine."""
    if is_local(url):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(local_path(url))
        return
    filesystem, path = _filesystem(url)
    for name in _ask(filesystem, "find", path):
        _ask(filesystem, "rm_file", name)


@_reliably
def list_files(url: str) -> dict[str, int]:
    """Paths below the folder `url`, relative to it, with their bytes, sorted; no hidden files.

    Empty for a folder without files; StorageError where there is no such folder.
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
    """What the file system's method `request` returns; FSTimeoutError after the whole deadline.

    The time-outs below us count silence alone: a server that sent one byte a second held a reader
    for ever. Only file systems that run in fsspec's own loop, all remote ones that we know, can be
    cut off.
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
    """fsspec's file system for `url` (it keeps one per process and options) and the path in it."""
    options: dict[str, Any] = {"use_listings_cache": False}
    if url.startswith(("s3://", "s3a://")):
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "retries": {"mode": "standard", "total_max_attempts": 1},  # retrying.py does it
            # Every byte that matters is checked by sha256 on our side; a second checksum costs CPU.
            "response_checksum_validation": "when_required",
        }
    filesystem, path = fsspec.core.url_to_fs(url, **options)
    filesystem.retries = 1  # s3fs's own: its pauses grow to seconds
    if "config_kwargs" in options:
        filesystem._call_s3 = partial(_call_once, filesystem)
    return filesystem, path


async def _call_once(filesystem: Any, method: str, *options: Any, **more: Any) -> Any:
    """What s3fs's `_call_s3` does, but for its loop, which pauses 0.1 s after the last try too.

    With 5 % of answers 503 that pause alone cost a quarter of the throughput.
    """
    from s3fs.errors import translate_boto_error  # half a second, for those with a bucket alone

    await filesystem.set_session()
    act = getattr(await filesystem.get_s3(more.get("Bucket")), method)
    try:
        return await act(**filesystem._get_s3_method_kwargs(act, *options, **more))
    except Exception as error:
        raise translate_boto_error(error) from error


def _explained(url: str, error: Exception) -> StorageError:
    """The error as one line: what failed, and what to do about it."""
    if isinstance(error, StorageError):
        return error
    text = " ".join((str(error) or type(error).__name__).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageError(url, "the disk is full", "free some space or choose another place")
    if isinstance(error, IsADirectoryError):
        remedy = "move it away, and put the object there if you have a copy"
        return NotAnObjectError(url, "a folder stands where an object should be", remedy)
    if isinstance(error, FileNotFoundError):
        return StorageError(url, "there is nothing at this place", "check the name and the bucket")
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        remedy = "choose another place, or have it mounted for writing"
        return StorageError(url, "this file system is read-only", remedy)
    if is_local(url) and isinstance(error, PermissionError):
        remedy = "check its owner and rights, and whether its file system allows this"
        return StorageError(url, f"not permitted ({text})", remedy)
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        remedy = "check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        return StorageError(url, f"access denied ({text})", remedy)
    if isinstance(error, (ImportError, ValueError)) and "rotocol" in text:
        return StorageError(url, text, "use a local path, s3://, https:// or what fsspec knows")
    names = " ".join(kind.__name__ for kind in type(error).__mro__)
    if isinstance(error, (ConnectionError, TimeoutError)) or "Connect" in names or "Time" in names:
        remedy = "check that the endpoint is up and that its address (AWS_ENDPOINT_URL) is right"
        return StorageError(url, f"no answer ({text})", remedy)
    remedy = "check the disk and the path" if is_local(url) else "check the address and try again"
    return StorageError(url, text, remedy)
