"""Writes a checkpoint with all workers: each file by one of them, the manifest by the main worker.

    <url>/step-00000500-00000007-3f2a91c4/
        optimizer-00002-of-00004.safetensors    a file of worker 3
        written-00003.json                      checksummed JSON: size and sha256 of worker 3's
                                                files, written after them; or why it failed
        manifest.json                           written once the main worker has all of these

The workers exchange these objects alone: their background threads cannot take part in collectives,
whose order is that of the training threads. The folder's name is known to all of them without any
exchange, and no other start can have it. A worker that is lost on the way leaves a folder without
manifest, which no reader takes for a checkpoint and the next start deletes.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ddpm_ray import fault_injection
from ddpm_ray.redaction import sanitize
from ddpm_ray.storage import checksummed_json, object_store
from ddpm_ray.storage.errors import PermanentStorageError, StorageError
from ddpm_ray.training.checkpoint_folder import TENSORS, Entries, write_tensors
from ddpm_ray.training.checkpoint_parts import shares, size_of
from ddpm_ray.training.checkpoint_pointers import PREFIX
from ddpm_ray.training.optimizer_moments import Tensors
from ddpm_ray.training.state import Snapshot
from ddpm_ray.training.writer_lease import Lease

WAIT_S = 1800.0  # for files of other workers; heartbeats and collectives notice a lost one sooner
FIRST_POLL_S, LAST_POLL_S = 0.05, 1.0  # pauses between two listings of the folder; they double
FAILURE = "failure"  # key of a record without files; no file has this name


@dataclass(frozen=True)
class SharedSave:
    """One save by all workers; equal on all of them."""

    folder: str
    writers: Mapping[str, int]  # worker by file, named without suffix

    @classmethod
    def of(
        cls, lease: Lease, number: int, step: int, files: Mapping[str, Tensors], workers: int
    ) -> "SharedSave":
        """The save that is `number` of the start with this lease, by so many workers."""
        unique = hashlib.sha256(f"{lease.token} {number}".encode()).hexdigest()[:8]
        folder = f"{PREFIX}{step:08d}-{lease.epoch:08d}-{unique}"
        sizes = {name: size_of(tensors) for name, tensors in files.items()}
        return cls(folder, shares(sizes, workers))

    def files_of(self, rank: int) -> list[str]:
        """Names, without suffix, of the files that worker `rank` writes."""
        return [name for name, writer in self.writers.items() if writer == rank]

    def write(self, url: str, rank: int, snapshot: Snapshot, check: Callable[[], None]) -> None:
        """Write the files of worker `rank`, which `snapshot` has, to the folder below `url`.

        `check` raises once a later start has taken over the run. Raises StorageError; the main
        worker reads any error but that of `check` in the record, and raises it as well.
        """
        where = object_store.join(url, self.folder)
        check()
        try:
            entries = write_tensors(where, snapshot.tensors)
            fault_injection.at("manifest")
            checksummed_json.write(object_store.join(where, _record(rank)), entries)
        except Exception as error:
            _record_failure(where, rank, error)
            raise

    def wait(self, url: str, check: Callable[[], None]) -> Entries:
        """Wait for the files of the other workers; return their entries for the manifest.

        Sizes are compared with those in the storage. Raises StorageError, also after WAIT_S, the
        error of another worker as soon as that has recorded it, and what `check` raises.
        """
        try:
            return self._collect(object_store.join(url, self.folder), check)
        except StorageError:
            check()  # a later start deletes folders without manifest
            raise

    def _collect(self, where: str, check: Callable[[], None]) -> Entries:
        awaited = {rank: self._listed(rank) for rank in sorted({*self.writers.values()} - {0})}
        sizes = self._listing(where, awaited, check)
        found: Entries = {}
        for rank, names in awaited.items():
            entries = _recorded(where, rank)
            written = {name: entry["bytes"] for name, entry in entries.items()}
            if written != {name: sizes[name] for name in names if name != _record(rank)}:
                reason = f"worker {rank} wrote other files than it should: {written}"
                raise StorageError(where, reason, "start the run again")
            found |= entries
        return found

    def _listed(self, rank: int) -> list[str]:
        """Objects that worker `rank` writes."""
        return [*(f"{name}{TENSORS}" for name in self.files_of(rank)), _record(rank)]

    def _listing(
        self, where: str, awaited: Mapping[int, list[str]], check: Callable[[], None]
    ) -> dict[str, int]:
        """Sizes of the objects in the folder `where`, once it has all that are awaited.

        Raises the error of a worker that recorded one.
        """
        deadline_s, pause_s = time.monotonic() + WAIT_S, FIRST_POLL_S
        while True:
            sizes = object_store.list_files(where)
            late = [rank for rank, names in awaited.items() if not sizes.keys() >= {*names}]
            if not late:
                return sizes
            for rank in late:
                if _record(rank) in sizes:
                    _recorded(where, rank)
            check()
            if time.monotonic() > deadline_s:
                reason = f"worker {late[0]} has not written its files within {WAIT_S:.0f} s"
                raise StorageError(where, reason, "start the run again")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_POLL_S)


def _record(rank: int) -> str:
    return f"written-{rank:05d}.json"


def _record_failure(where: str, rank: int, error: Exception) -> None:
    """Write `error` as the record of worker `rank`, best effort: its storage has just failed."""
    url, reason, remedy = where, f"{type(error).__name__}: {error}", "start the run again"
    if isinstance(error, StorageError):
        url, reason, remedy = error.args
    failure = {
        "url": sanitize(url),
        "reason": sanitize(reason),
        "remedy": sanitize(remedy),
        "permanent": isinstance(error, PermanentStorageError),
    }
    # The worker raises it at its next save, with or without a record.
    with contextlib.suppress(StorageError):
        checksummed_json.write(object_store.join(where, _record(rank)), {FAILURE: failure})


def _recorded(where: str, rank: int) -> Entries:
    """Entries that worker `rank` recorded. Raises its error, if it recorded one instead."""
    found: Entries = checksummed_json.read(object_store.join(where, _record(rank)))
    if failure := found.get(FAILURE):
        kind = PermanentStorageError if failure["permanent"] else StorageError
        raise kind(failure["url"], f"worker {rank} failed: {failure['reason']}", failure["remedy"])
    return found
