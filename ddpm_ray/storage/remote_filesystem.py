"""Remote file systems by fsspec: one client per process, a deadline for each request, no retries.

The only module that imports fsspec. S3 is configured by the usual environment variables
(AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...). Nothing is cached, so a reader always sees what another
process wrote. Errors are the back end's own; object_store.py retries and translates them.
"""

from functools import partial
from inspect import iscoroutinefunction
from typing import Any

import fsspec
import fsspec.asyn

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
    deadline_s = REQUEST_S + body_bytes / LEAST_BYTES_PER_S
    return fsspec.asyn.sync(filesystem.loop, method, *args, timeout=deadline_s, **kwargs)


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
