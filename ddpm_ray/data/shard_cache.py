"""Disk cache of shards, shared by all processes of a node and bounded in bytes.

A file's name is its sha256, so one folder serves every data set. Cached bytes are hashed each time
they are read, so a file that is damaged on disk counts as a cache miss.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

# File with the sum of the sizes of the others; its lock is held to change it, and to rename them.
COUNTER = ".bytes"
LONGEST_COUNT_S = 2.0  # wait for that lock; then a file is not cached
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.001, 0.02  # between looks at what another process downloads
# Then a shard is downloaded a second time: the process that holds its lock may be frozen.
LONGEST_WAIT_S = 30.0


class ShardCache:
    """LRU cache of at most `max_bytes` of files in `folder`; each shard is downloaded once.

    Files are added by rename and removed by unlink. A lost race costs one download. If the disk is
    full or broken, the file is not cached; no error is raised.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._keeps = True  # the last call of `put` stored its file

    def load(
        self, sha256: str, size_bytes: int, download: Callable[[], bytes | memoryview]
    ) -> bytes | memoryview:
        """Return the bytes of this sha256 from the cache, or call `download` and store them.

        Of the processes of a node that need a file at once, one downloads it and the others wait
        for it. The kernel releases the lock of a killed process; a frozen one is waited for
        LONGEST_WAIT_S. `size_bytes`: of the file. `download` must verify what it returns.
        """
        began_s, pause_s = time.monotonic(), FIRST_PAUSE_S
        data: bytes | memoryview | None
        while (data := self.get(sha256)) is None:
            with self._lock(sha256, size_bytes) as is_mine:
                if is_mine:
                    # Another process may have stored it since the first look.
                    return self.get(sha256) or self._stored(sha256, download())
            waited_s = time.monotonic() - began_s
            if waited_s > LONGEST_WAIT_S:
                log.warning(
                    "shard cache: another process has held %s in %s for %.0f s; downloading it "
                    "here as well",
                    sha256[:12],
                    self.folder,
                    waited_s,
                )
                return self._stored(sha256, download())
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return data

    def get(self, sha256: str) -> bytes | None:
        """Return the bytes of this sha256, or None; updates their time of last use.

        A file of other bytes is deleted.
        """
        path = self.folder / sha256
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() != sha256:
            self._delete(path)
            return None
        return data

    def put(self, sha256: str, data: bytes | memoryview) -> None:
        """Store verified bytes; least recently used files are deleted until they fit.

        Does nothing if they are larger than `max_bytes`.
        """
        if len(data) > self.max_bytes:
            return
        partial = self.folder / f".{sha256}.{uuid.uuid4().hex[:12]}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._reserve(partial, len(data))
            with partial.open("r+b") as file:
                file.write(data)
            # A rename while _make_room of another process lists the folder may hide the file there.
            with self._locked_counter():
                partial.replace(self.folder / sha256)
            self._keeps = True
        except OSError:
            self._keeps = False
            self._delete(partial)

    def lock_path(self, sha256: str) -> Path:
        """Return the file whose lock a process holds while it downloads this sha256."""
        return self.folder / f".{sha256}.lock"

    @contextlib.contextmanager
    def _lock(self, sha256: str, size_bytes: int) -> Iterator[bool]:
        """Lock the download of this sha256; yields False if another process or thread holds it.

        Yields True without a lock where the file cannot be stored for the others to read.
        """
        path = self.lock_path(sha256)
        try:
            if size_bytes > self.max_bytes or not self._keeps:
                raise OSError("the cache does not keep it")
            self.folder.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        except OSError:
            yield True
            return
        with file:
            is_mine = _is_locked(file.fileno(), path)
            try:
                yield is_mine
            finally:
                if is_mine:
                    self._delete(path)

    def _stored(self, sha256: str, data: bytes | memoryview) -> bytes | memoryview:
        self.put(sha256, data)
        return data

    def _reserve(self, partial: Path, size_bytes: int) -> None:
        """Create the file `partial` of this size and count it in. Raises OSError.

        The folder is looked through only when the count exceeds `max_bytes`: with 5,000 files that
        takes 20 ms of CPU, a download 3. A killed process and a damaged file leave too high a
        count, never one too low.
        """
        with self._locked_counter() as (counter, is_locked):
            counter.seek(0)
            text = counter.read()  # b"" after a crash between the next lines, or if it is new
            used = int(text) if is_locked and text.isdigit() else self.max_bytes
            if used + size_bytes > self.max_bytes:
                used = self._make_room(size_bytes)
            counter.truncate(0)
            counter.write(b"%d" % (used + size_bytes))
            with partial.open("xb") as file:
                file.truncate(size_bytes)  # so that _make_room of another process counts it

    @contextlib.contextmanager
    def _locked_counter(self) -> Iterator[tuple[BinaryIO, bool]]:
        """Open the file with the count and lock it; False on a file system without locks."""
        with (self.folder / COUNTER).open("a+b") as counter:
            yield counter, _lock_soon(counter.fileno())

    def _make_room(self, wanted_bytes: int) -> int:
        """Delete files for `wanted_bytes` or a tenth of the cache; return the sum of the others."""
        files = []
        for entry in os.scandir(self.folder):
            try:
                status = entry.stat()
            except FileNotFoundError:  # another process has just deleted it
                continue
            if entry.name != COUNTER:
                files.append((status.st_mtime_ns, status.st_size, entry.path))
        used = sum(size for _, size, _ in files)
        if used + wanted_bytes <= self.max_bytes:
            return used
        for _, size, path in sorted(files):
            if used <= self.max_bytes - max(wanted_bytes, self.max_bytes // 10):
                break
            self._delete(Path(path))
            used -= size
        return used

    @staticmethod
    def _delete(path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:  # the next call of `put` tries again
            log.warning("shard cache: cannot delete %s (%s)", path, error)


def _lock_soon(file: int) -> bool:
    """Lock the open `file`; False on a file system without locks.

    Raises BlockingIOError if it stays locked: its holder may be frozen.
    """
    began_s = time.monotonic()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - began_s > LONGEST_COUNT_S:
                raise
            time.sleep(FIRST_PAUSE_S)
        except OSError:
            return False
        else:
            return True


def _is_locked(file: int, path: Path) -> bool:
    """Lock the open `file` without waiting; False if it is held, or no longer the one at `path`.

    A file system without locks counts as locked: each process then downloads for itself.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOLCK, ENOSYS: a network file system
        return True
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:  # the holder finished, and deleted it
        return False
