"""Ctrl-C and SIGTERM: once asks to stop, twice ends at once."""

import signal
import threading
import types
from typing import Any

_last: int = signal.SIGINT  # that came


def exit_code() -> int:
    """What a process returns that was asked to stop: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + _last


class Interrupts:
    """Counts SIGINT and SIGTERM in place of dying of the first; the second one ends at once."""

    def __init__(self) -> None:
        self.count = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        global _last
        self.count, _last = self.count + 1, number
        if self.count > 1:
            raise KeyboardInterrupt
