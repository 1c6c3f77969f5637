"""Saves checkpoints in a background thread."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from ddpm_ray.training.background_writer import BackgroundWriter
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.state import Snapshot, TrainingState


class CheckpointWriter(BackgroundWriter):
    """Saves checkpoints in a background thread, one at a time."""

    def __init__(self, store: CheckpointStore) -> None:
        super().__init__("checkpoint")
        self.store = store
        self.committed: str | None = None  # URL of the newest committed folder
        self._newest: threading.Thread | None = None  # that saves

    def save(
        self,
        state: TrainingState,
        unsent_rows: list[Any],
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Start saving `state`; `then` is called after the commit.

        Waits for the previous checkpoint and raises its error.
        """
        self._wait_for_newest()  # its memory is used again
        self._enqueue(state.start_snapshot(unsent_rows), state.background_copy.finish, then)

    def submit(self, snapshot: Snapshot) -> None:
        """Start saving. Waits for the previous checkpoint and raises its error."""
        self._wait_for_newest()
        self._enqueue(snapshot, lambda: None)

    def _wait_for_newest(self) -> None:
        if self._thread is self._newest:  # else averages are on their way: it only follows them
            self.wait()

    def _enqueue(
        self,
        snapshot: Snapshot,
        finish: Callable[[], None],
        then: Callable[[], None] = lambda: None,
    ) -> None:
        self.enqueue(partial(self._save, snapshot, finish, then))
        self._newest = self._thread

    def _save(
        self, snapshot: Snapshot, finish: Callable[[], None], then: Callable[[], None]
    ) -> None:
        finish()
        self.committed = self.store.save(snapshot)
        then()
