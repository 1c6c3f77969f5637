"""Writing off the step path: a thread, one thing at a time, whose errors are the caller's."""

import threading
from collections.abc import Callable


class Background:
    """Does what it is given in the order in which it is given."""

    def __init__(self, name: str) -> None:
        self._name = name  # of the threads
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, act: Callable[[], None]) -> None:
        """Begin `act()`, once what was begun before is done; raises what that one raised."""
        self.wait()
        self.follow(act)

    def follow(self, act: Callable[[], None]) -> None:
        """Begin `act()` once what was begun before is done, without waiting for that.

        It is left out where that raises: what comes after may rest on what came before.
        """
        before = self._thread
        self._thread = threading.Thread(target=self._do, args=(act, before), name=self._name)
        self._thread.start()

    def wait(self) -> None:
        """Return once all that was begun is done; raises what the last of it raised."""
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
        except Exception as error:  # noqa: BLE001 - handed to the caller's thread, whole
            self._error = error
