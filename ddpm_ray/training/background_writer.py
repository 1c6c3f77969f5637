"""A background thread that runs tasks one at a time and raises their errors in the caller."""

import threading
from collections.abc import Callable


class BackgroundWriter:
    """Runs tasks in order, one at a time."""

    def __init__(self, name: str) -> None:
        self._name = name  # of the threads
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, act: Callable[[], None]) -> None:
        """Wait for earlier tasks, raise their error if any, then start `act()`."""
        self.wait()
        self.enqueue(act)

    def enqueue(self, act: Callable[[], None]) -> None:
        """Queue `act()` after the earlier tasks, without waiting.

        It is not run if an earlier task raised, because it may depend on that task.
        """
        before = self._thread
        self._thread = threading.Thread(target=self._do, args=(act, before), name=self._name)
        self._thread.start()

    def wait(self) -> None:
        """Wait for all tasks. Raises the error of the task that failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _do(self, act: Callable[[], None], before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        if self._error is not None:
            return
        try:
            act()
        except Exception as error:  # noqa: BLE001 - raised in the caller's thread
            self._error = error
