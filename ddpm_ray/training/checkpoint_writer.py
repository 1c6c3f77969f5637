"""Saves checkpoints in a background thread."""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ddpm_ray.collectives import Workers
from ddpm_ray.training import checkpoint_parts
from ddpm_ray.training.background_writer import BackgroundWriter
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.shared_writing import SharedSave
from ddpm_ray.training.state import Snapshot, TrainingState


class CheckpointWriter(BackgroundWriter):
    """Saves checkpoints in a background thread, one at a time."""

    def __init__(self, store: CheckpointStore) -> None:
        super().__init__("checkpoint")
        self.store = store
        self.committed: str | None = None  # URL of the newest committed folder
        self._newest: threading.Thread | None = None  # that saves
        self._saves = 0  # equal on all workers

    def save(
        self,
        state: TrainingState,
        unsent_rows: Sequence[Any],
        workers: Workers | None = None,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Start saving `state`; the main worker calls `then` after the commit.

        Waits for the previous checkpoint and raises its error. All workers must call it. A state
        with a group that is split (checkpoint_parts.py) is written by all of them, a smaller one by
        the main worker; so is one without a lease.
        """
        workers, files, lease = workers or Workers(), state.files(), self.store.lease
        act: Callable[[Snapshot], None] = self._save
        self._saves += 1
        if workers.count > 1 and lease is not None and checkpoint_parts.is_split(files):
            shared = SharedSave.of(lease, self._saves, state.step, files, workers.count)
            files = {name: files[name] for name in shared.files_of(workers.rank)}
            act = partial(self._save_share, shared, workers.rank)
        elif not workers.is_main:
            return
        self._wait_for_newest()  # its memory is used again
        snapshot = state.start_snapshot(list(unsent_rows), files)
        acts: list[Callable[[], None]] = [state.background_copy.finish, partial(act, snapshot)]
        self._enqueue(partial(_in_turn, [*acts, then] if then else acts))

    def submit(self, snapshot: Snapshot) -> None:
        """Start saving. Waits for the previous checkpoint and raises its error."""
        self._wait_for_newest()
        self._enqueue(partial(self._save, snapshot))

    def _wait_for_newest(self) -> None:
        if self._thread is self._newest:  # else averages are on their way: it only follows them
            self.wait()

    def _enqueue(self, act: Callable[[], None]) -> None:
        self.enqueue(act)
        self._newest = self._thread

    def _save(self, snapshot: Snapshot) -> None:
        self.committed = self.store.save(snapshot)

    def _save_share(self, shared: SharedSave, rank: int, snapshot: Snapshot) -> None:
        if rank == 0:
            self.committed = self.store.save(snapshot, shared)
        else:
            shared.write(self.store.url, rank, snapshot, self.store.check_lease)


def _in_turn(acts: Sequence[Callable[[], None]]) -> None:
    for act in acts:
        act()
