"""A node's own copy of shards, shared by all processes of the node and bounded in bytes.

A file's name is its sha256, so one folder serves every data set and a name never means two things.
Readers check what they get here like anything else, so a file that rots on disk is only a miss.
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

    No lock: files appear by rename and leave by unlink, and to lose a race costs one download.
    A full or broken disk turns the cache off for that file; it never stops a run.
    """

    folder: Path
    max_bytes: int

    def get(self, sha256: str) -> bytes | None:
        """Return the unverified bytes of this name, or None; marks them as used now."""
        path = self.folder / sha256
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data

    def put(self, sha256: str, data: bytes) -> None:
        """Keep checked bytes, dropping the oldest until they fit; nothing if they never can."""
        if len(data) > self.max_bytes:
            return
        partial = self.folder / f".{sha256}.{uuid.uuid4().hex[:12]}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(len(data))
            partial.write_bytes(data)
            partial.replace(self.folder / sha256)
        except OSError:
            self._forget(partial)

    def evict(self, sha256: str) -> None:
        """Delete the file of this name, if there is one."""
        self._forget(self.folder / sha256)

    def _make_room(self, wanted_bytes: int) -> None:
        files = []
        for entry in os.scandir(self.folder):
            try:
                status = entry.stat()
            except FileNotFoundError:  # another process dropped it just now
                continue
            files.append((status.st_mtime_ns, status.st_size, entry.path))
        surplus = sum(size for _, size, _ in files) + wanted_bytes - self.max_bytes
        for _, size, path in sorted(files):
            if surplus <= 0:
                return
            self._forget(Path(path))
            surplus -= size

    @staticmethod
    def _forget(path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:  # it stays for now; the next shard makes room again
            log.warning("%s: stays in the cache (%s)", path, error)
