"""Source whose samples are single files or members of uncompressed tars."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from ddpm_ray.data.captions import caption_tuples, captions_digest
from ddpm_ray.data.samples import NamedGroup, Sample
from ddpm_ray.storage import object_store
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.storage.object_state import ObjectState

READERS = 16  # parallel reads of small remote files, which mostly wait for the network


class Member(NamedTuple):
    """A sample of a folder or tar."""

    file: str
    key: str
    label: int
    offset: int  # in the tar; -1: the file itself is the image
    size: int  # in bytes


@dataclass(frozen=True)
class FileSource:
    """Images in single files or in tars."""

    url: str
    members: tuple[Member, ...]
    label_names: tuple[str, ...]
    max_file_bytes: int
    left_out: tuple[NamedGroup, ...] = ()
    version: str = ""
    captions: pa.LargeListArray | None = None  # of each member

    @property
    def digest(self) -> str:
        """SHA-256 of the label names, members and captions; image files are not read."""
        digest = hashlib.sha256(json.dumps([self.label_names, self.members]).encode())
        if self.captions is not None:
            digest.update(captions_digest(self.captions))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.members)

    def read(self, samples: range) -> Iterator[Sample]:
        """Yield the samples in order; remote files are read ahead in parallel."""
        members = self.members[samples.start : samples.stop]
        captions: Iterator[tuple[str, ...]] = repeat(())
        if self.captions is not None:
            captions = iter(caption_tuples(self.captions[samples.start : samples.stop]))
        with ThreadPoolExecutor(1 if object_store.is_local(self.url) else READERS) as pool:
            # In runs, so that at most one run of files is in memory ahead of the reader.
            for at in range(0, len(members), 4 * READERS):
                run = members[at : at + 4 * READERS]
                for member, data in zip(run, pool.map(self._bytes, run), strict=True):
                    location = object_store.join(self.url, member.file)
                    if member.offset >= 0:
                        location = f"{location}: {member.key}"
                    yield Sample(member.key, member.label, data, location, next(captions))

    def _bytes(self, member: Member) -> bytes | None:
        if member.size > self.max_file_bytes:
            return None
        url = object_store.join(self.url, member.file)
        if member.offset < 0:
            return object_store.read_bytes(url)
        with open_object(url) as file:
            file.seek(member.offset)
            return file.read(member.size)


def version_of(files: Mapping[str, ObjectState]) -> str:
    """Return one sha256 of the names, sizes and versions of these files."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def open_object(url: str) -> BinaryIO:
    """Open an object for random access: a local file on disk, a remote one in memory.

    Remote objects are read whole, as object-store clients do not detect damage in range reads.
    Raises StorageError.
    """
    if not object_store.is_local(url):
        return io.BytesIO(_remote(url))
    try:
        return object_store.local_path(url).open("rb")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StorageError(url, reason, "check the file and its permissions") from None


@lru_cache(maxsize=1)  # consecutive samples are in the same file
def _remote(url: str) -> bytes:
    return object_store.read_bytes(url)
