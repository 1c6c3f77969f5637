"""Disk cache of shards, shared by all processes of a node and bounded in bytes.

A file's name is its sha256, so one folder serves every data set. Readers verify cached bytes like
downloaded ones, so a file that is damaged on disk counts as a cache miss.
"""

from __future__ import annotations

import logging
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardCache:
    """LRU cache of at most `max_bytes` of files in `folder`.

    It needs no lock: files are added by rename and removed by unlink, and a lost race costs one
    download. If the disk is full or broken, the file is not cached; no error is raised.
    """

    folder: Path
    max_bytes: int

    def get(self, sha256: str) -> bytes | None:
        """Return the unverified bytes of this name, or None; updates their time of last use."""
        path = self.folder / sha256
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data

    def put(self, sha256: str, data: bytes) -> None:
        """Store verified bytes; least recently used files are deleted until they fit.

        Does nothing if they are larger than `max_bytes`.
        """
        if len(data) > self.max_bytes:
            return
        partial = self.folder / f".{sha256}.{uuid.uuid4().hex[:12]}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(len(data))
            partial.write_bytes(data)
            partial.replace(self.folder / sha256)
        except OSError:
            self._delete(partial)

    def evict(self, sha256: str) -> None:
        """Delete the file of this name, if it exists."""
        self._delete(self.folder / sha256)

    def _make_room(self, wanted_bytes: int) -> None:
        files = []
        for entry in os.scandir(self.folder):
            try:
                status = entry.stat()
            except FileNotFoundError:  # another process has just deleted it
                continue
            files.append((status.st_mtime_ns, status.st_size, entry.path))
        surplus = sum(size for _, size, _ in files) + wanted_bytes - self.max_bytes
        for _, size, path in sorted(files):
            if surplus <= 0:
                return
            self._delete(Path(path))
            surplus -= size

    @staticmethod
    def _delete(path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:  # the next call of `put` tries again
            log.warning("shard cache: cannot delete %s (%s)", path, error)
