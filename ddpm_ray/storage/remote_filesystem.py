"""Remote file systems by fsspec: one client per process, a deadline for each request, no retries.

The only module that imports fsspec. S3 is configured by the usual environment variables
(AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...). Nothing is cached, so a reader always sees what another
process wrote. Errors are the back end's own; object_store.py retries and translates them.
"""

from collections.abc import Callable
from functools import partial
from inspect import iscoroutinefunction
from typing import Any

import fsspec
import fsspec.asyn
import numpy as np

CONNECT_TIMEOUT_S = 4
READ_TIMEOUT_S = 8  # without a byte; the request is then cancelled and retried
# Limit of a whole request, whose bytes may trickle in, plus size / LEAST_BYTES_PER_S.
REQUEST_S = 60.0
LEAST_BYTES_PER_S = 2**20
# A larger object goes to S3 in parts, several at a time; each is copied when it is sent.
PART_BYTES, UPLOADS = 8 * 2**20, 4
MOST_PARTS = 10_000  # S3's limit


def open_url(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for `url` (one per process and options) and the path in it."""
    options: dict[str, Any] = {"use_listings_cache": False}
    if url.startswith(("s3://", "s3a://")):
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "retries": {"mode": "standard", "total_max_attempts": 1},  # retry.py does it
            # checksummed.py compares sha256; a second checksum would only cost CPU.
            "response_checksum_validation": "when_required",
            # botocore composes its own anew for each request: 7 % of the CPU of one.
            "user_agent": "ddpm-ray",
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


def request(filesystem: Any, name: str, *args: Any, body_bytes: int = 0, **kwargs: Any) -> Any:
    """Call the file system's method `name`; raises FSTimeoutError after the deadline.

    The client's own time-outs limit the time between two bytes: a server that sent one byte a
    second held a reader for ever. Only asynchronous file systems, which all remote ones are, can be
    cancelled.
    """
    method = getattr(filesystem, f"_{name}", None)
    if not getattr(filesystem, "async_impl", False) or not iscoroutinefunction(method):
        return getattr(filesystem, name)(*args, **kwargs)
    return _before_deadline(filesystem, method, *args, body_bytes=body_bytes, **kwargs)


def _before_deadline(
    filesystem: Any, method: Callable[..., Any], *args: Any, body_bytes: int, **kwargs: Any
) -> Any:
    """Await `method` on the file system's event loop; raises FSTimeoutError."""
    deadline_s = REQUEST_S + body_bytes / LEAST_BYTES_PER_S
    return fsspec.asyn.sync(filesystem.loop, method, *args, timeout=deadline_s, **kwargs)


def download(filesystem: Any, path: str, size_bytes: int) -> bytes | memoryview:
    """Return the whole object `path` by one GET; `size_bytes` is the expected size.

    s3fs collects the parts of a body, then joins them: twice the memory, and each page of it is new
    to the process. From S3 each part is copied to its place when it arrives.
    """
    if "s3" not in _protocols(filesystem):
        return bytes(request(filesystem, "cat_file", path, body_bytes=size_bytes))
    read = partial(_read_sized, filesystem, path, size_bytes)
    found: bytes | memoryview = _before_deadline(filesystem, read, body_bytes=size_bytes)
    return found


async def _read_sized(filesystem: Any, path: str, size_bytes: int) -> bytes | memoryview:
    """Read the object `path` into memory of the expected size; into more if it is larger."""
    from s3fs.errors import translate_boto_error

    # Allocated in this thread, which always is the same: memory that it freed is used again. From
    # 4 MB on NumPy asks for huge pages.
    memory = np.empty(size_bytes, dtype=np.uint8).data
    file, size = await filesystem.open_async(path), 0
    try:
        while size < len(memory) and (part := await file.read(len(memory) - size)):
            memory[size : size + len(part)] = part
            size += len(part)
        surplus = await file.read()
    except Exception as error:
        raise translate_boto_error(error) from error
    finally:
        if file.r is not None:
            file.r.close()
    return bytes(memory) + surplus if surplus else memory[:size]


def upload(filesystem: Any, path: str, data: bytes | memoryview) -> None:
    """Write the object `path`, from PART_BYTES on by S3's multipart upload, without a whole copy.

    Readers see all of it or nothing. Other file systems get one request and a copy.
    """
    size, parts = len(data), {}
    if size >= 2 * PART_BYTES and "s3" in _protocols(filesystem):
        body: Any = _Parts(memoryview(data))
        parts = {"chunksize": max(PART_BYTES, -(-size // MOST_PARTS)), "max_concurrency": UPLOADS}
    else:
        body = bytes(data)
    request(filesystem, "pipe_file", path, body, body_bytes=size, **parts)


def _protocols(filesystem: Any) -> tuple[str, ...]:
    """Names of URLs that the file system reads."""
    named = filesystem.protocol
    return (named,) if isinstance(named, str) else tuple(named)


class _Parts:
    """Bytes for s3fs, which asks for their length and for slices; only slices are copied."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, part: slice) -> bytes:
        return bytes(self._data[part])
