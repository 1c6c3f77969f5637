"""The members of an uncompressed tar, every one of them or an error.

Python's tarfile ends at a damaged header as if the archive ended there, so what follows would be
lost in silence, and before 3.11.14 it reads a member of negative size for ever (CVE-2025-8194).
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from ddpm_ray.data.shards import DatasetError
from ddpm_ray.storage.object_store import StorageError

CHUNK = 1 << 20


def members(stream: BinaryIO, url: str) -> Iterator[tarfile.TarInfo]:
    """Each member in turn. Raises DatasetError where the tar is damaged or goes on behind its end.

    Nothing is unpacked, and no compressed tar is read: its offsets are those of what it unpacks to.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            last = -1
            for info in archive:
                if info.size < 0 or info.offset <= last:
                    raise tarfile.ReadError(f"{info.name!r:.80} has {info.size} bytes")
                last = info.offset
                yield info
            _check_end(stream, archive.offset)
    except (DatasetError, StorageError):
        raise
    except Exception as error:  # tarfile raises IndexError and others at damaged headers
        text = " ".join(str(error).split()) or type(error).__name__
        remedy = "write it again, without compression"
        raise DatasetError(url, f"not a readable tar ({text})", remedy) from error


def _check_end(stream: BinaryIO, end: int) -> None:
    """Raise ReadError unless nothing but zeros lies at `end`, where reading stopped."""
    stream.seek(end)
    where, first = end, True
    while chunk := stream.read(CHUNK):
        if rest := len(chunk.lstrip(b"\0")):
            where += len(chunk) - rest
            if first and where - end < tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"its header at byte {end} is damaged")
            problem = f"at byte {end} it ends, and more follows at byte {where}"
            raise tarfile.ReadError(f"{problem}, as where two tars were joined")
        where, first = where + len(chunk), False
