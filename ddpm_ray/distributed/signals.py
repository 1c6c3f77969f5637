"""Signals that end a job: the first asks it to stop, the second ends it at once."""

import contextlib
import math
import os
import signal
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
# Ctrl-C, Ctrl-\ and a closed terminal reach each process of the terminal, local Ray's servers too.
FROM_TERMINAL = (signal.SIGHUP, signal.SIGQUIT)  # SIGINT: Ray blocks it in its servers itself
STANDARD_STREAMS = (0, 1, 2)
# `timeout` signals the process and then its group; people press Ctrl-C twice on purpose.
SENT_TWICE_S = 1.0

_last: int = signal.SIGINT  # that came


def exit_code() -> int:
    """The exit code of a process that was asked to stop: 128 + the number of the signal."""
    return 128 + _last


class Interrupts:
    """Counts the SIGNALS that come instead of dying of the first; the second ends at once.

    One that was ignored at the start stays so: `nohup` has SIGHUP ignored. SIGINT and SIGTERM are
    always counted, because a shell without job control starts what runs behind it with SIGINT
    ignored, and they are sent on purpose.
    """

    def __init__(self, most: int = 1) -> None:
        """`most`: signals that are counted; the next one raises KeyboardInterrupt."""
        self.count = 0
        self._most = most
        self._old: dict[int, Any] = {}
        self._came_s: dict[int, float] = {}  # when each last came
        self._terminals: list[int] = []

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._terminals = [fd for fd in STANDARD_STREAMS if _is_terminal(fd)]
            for number in SIGNALS:
                if number in FROM_TERMINAL and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        global _last
        now_s = time.monotonic()
        before_s, self._came_s[number] = self._came_s.get(number, -math.inf), now_s
        if number != signal.SIGINT and now_s - before_s < SENT_TWICE_S:
            return
        self.count, _last = self.count + 1, number
        if number == signal.SIGHUP:
            _redirect_to_null(self._terminals)
        if self.count > self._most:
            raise KeyboardInterrupt(signal.Signals(number).name)


def interrupt_on_first() -> Interrupts:
    """A context in which the first signal raises KeyboardInterrupt, as Ctrl-C does everywhere."""
    return Interrupts(most=0)


@contextlib.contextmanager
def block_terminal_signals() -> Iterator[None]:
    """Keeps the signals of a terminal from the processes that the body starts, and our handlers.

    The mask is inherited; a signal that comes meanwhile reaches this process after the body. Ray
    sets a handler of its own for SIGTERM, which would end the job with exit code 15.
    """
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FROM_TERMINAL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if main:
            signal.signal(signal.SIGTERM, handler)


def _is_terminal(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False


def _redirect_to_null(terminals: list[int]) -> None:
    """Send to /dev/null what is written to a terminal that is gone: it would be an error (EIO)."""
    if not terminals:
        return
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in terminals:
        os.dup2(nowhere, fd)
    os.close(nowhere)
