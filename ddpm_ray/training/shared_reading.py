"""Reads a checkpoint with all workers: each file by one of them, broadcast to the others.

A store then sends each byte once, whatever the number of workers, over the connections of several.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ddpm_ray.collectives import Workers
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.training.checkpoint_folder import (
    CheckpointError,
    decoded,
    listed_files,
    read_checkpoint,
    read_file,
)
from ddpm_ray.training.checkpoint_parts import shares
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.state import Snapshot

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Request:
    """The checkpoint that the main worker asks all workers to read."""

    url: str
    manifest_sha256: str | None


def load_newest(store: CheckpointStore, workers: Workers) -> tuple[str, Snapshot] | None:
    """`store.load()` of the main worker, on all workers; all must call it.

    The main worker decides which checkpoint is read, and which one after a damaged one. Where it
    raises, the others raise as soon as it is gone.
    """
    if workers.count == 1:
        return store.load()
    if workers.is_main:

        def read(url: str, manifest_sha256: str | None, groups: Sequence[str] | None) -> Snapshot:
            assert groups is None
            workers.gather(_Request(url, manifest_sha256))
            return read_together(url, workers, manifest_sha256)

        found = store.load(read=read)
        workers.gather(found and found[0])
        return found
    snapshot: Snapshot | None = None
    while isinstance(request := workers.gather(None)[0], _Request):
        with contextlib.suppress(CheckpointError, StorageError):  # the main worker has it as well
            snapshot = read_together(request.url, workers, request.manifest_sha256)
    return None if request is None or snapshot is None else (request, snapshot)


def read_together(url: str, workers: Workers, manifest_sha256: str | None = None) -> Snapshot:
    """`read_checkpoint` of the same folder on all workers, which must all call it.

    An error of one worker is raised on all of them.
    """
    if workers.count == 1:
        return read_checkpoint(url, manifest_sha256)
    listed = agreed(workers, lambda: listed_files(url, manifest_sha256) if workers.is_main else [])
    files = listed[0]
    readers = shares({file.name: file.size for file in files}, workers.count)
    own = [file for file in files if readers[file.name] == workers.rank]
    held = {file.name: b"" for file in own}

    def fetch() -> None:
        for file in own:
            held[file.name] = read_file(url, file)

    agreed(workers, fetch)
    return decoded(
        url,
        files,
        lambda file: workers.broadcast_bytes(
            held.pop(file.name, None), file.size, readers[file.name]
        ),
    )


def agreed(workers: Workers, act: Callable[[], Result]) -> list[Result]:
    """Results of `act` on each worker; raises the error of the first that failed, on all.

    All workers must call it.
    """
    error: Exception | None = None
    result: Result | None = None
    try:
        result = act()
    except Exception as raised:  # noqa: BLE001 - raised on all workers below
        error = raised
    outcomes = workers.gather((error, result))
    for failed, _ in outcomes:
        if failed is not None:
            raise failed
    return [value for _, value in outcomes]
