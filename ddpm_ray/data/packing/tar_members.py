"""Iterate over all members of an uncompressed tar, or raise an error.

Python's tarfile stops at a damaged header as if the archive ended there, which silently loses the
members after it, and before 3.11.14 a member of negative size is an endless loop (CVE-2025-8194).
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from ddpm_ray.data.dataset import DatasetError
from ddpm_ray.storage.errors import StorageError

CHUNK = 1 << 20


def members(stream: BinaryIO, url: str) -> Iterator[tarfile.TarInfo]:
    """Yield each member. Raises DatasetError if the tar is damaged or data follows its end.

    Compressed tars are refused: members are read by their offset in the file.
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
    except Exception as error:  # tarfile raises IndexError and others for damaged headers
        text = " ".join(str(error).split()) or type(error).__name__
        remedy = "write it again, without compression"
        raise DatasetError(url, f"not a readable tar ({text})", remedy) from error


def _check_end(stream: BinaryIO, end: int) -> None:
    """Raise ReadError unless only zeros follow `end`, where reading stopped."""
    stream.seek(end)
    where, first = end, True
    while chunk := stream.read(CHUNK):
        if rest := len(chunk.lstrip(b"\0")):
            where += len(chunk) - rest
            if first and where - end < tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"its header at byte {end} is damaged")
            problem = f"it ends at byte {end}, but data follows at byte {where}"
            raise tarfile.ReadError(f"{problem}, as in two concatenated tars")
        where, first = where + len(chunk), False
