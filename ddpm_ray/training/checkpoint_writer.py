"""Saves checkpoints in a background thread."""

import threading
from functools import partial

from ddpm_ray.training.background_writer import BackgroundWriter
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.state import Snapshot


class CheckpointWriter(BackgroundWriter):
    """Saves checkpoints in a background thread, one at a time."""

    def __init__(self, store: CheckpointStore) -> None:
        super().__init__("checkpoint")
        self.store = store
        self.committed: str | None = None  # URL of the newest committed folder
        self._newest: threading.Thread | None = None  # that saves

    def submit(self, snapshot: Snapshot) -> None:
        """Start saving. Waits for the previous checkpoint and raises its error."""
        if self._thread is self._newest:  # else averages are on their way: it only follows them
            self.wait()
        self.enqueue(partial(self._save, snapshot))
        self._newest = self._thread

    def _save(self, snapshot: Snapshot) -> None:
        self.committed = self.store.save(snapshot)
