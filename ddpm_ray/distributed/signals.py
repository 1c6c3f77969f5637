"""Signal handling: the first signal stops a job cleanly, the second ends it at once."""

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
# A terminal sends Ctrl-C, Ctrl-\ and its closing to all its processes, a local Ray's servers too.
FROM_TERMINAL = (signal.SIGHUP, signal.SIGQUIT)  # not SIGINT, which Ray blocks in its servers
STANDARD_STREAMS = (0, 1, 2)
# `timeout` signals the process and then its group. Ctrl-C is counted twice: it is deliberate.
SENT_TWICE_S = 1.0

_last: int = signal.SIGINT  # the last signal that was counted


def exit_code() -> int:
    """Exit code of a process stopped by a signal: 128 + the number of the last one."""
    return 128 + _last


class Interrupts:
    """Count SIGNALS instead of ending at the first one; the second raises KeyboardInterrupt.

    SIGHUP and SIGQUIT stay ignored if they were, as SIGHUP under `nohup`. SIGINT and SIGTERM are
    always counted: they are sent on purpose, and a shell without job control starts background jobs
    with SIGINT ignored.
    """

    def __init__(self, most: int = 1) -> None:
        """`most`: number of signals to count; the next one raises KeyboardInterrupt."""
        self.count = 0
        self._most = most
        self._old: dict[int, Any] = {}
        self._came_s: dict[int, float] = {}  # when each last arrived
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
    """Return a context in which the first signal raises KeyboardInterrupt."""
    return Interrupts(most=0)


@contextlib.contextmanager
def block_terminal_signals() -> Iterator[None]:
    """Block SIGHUP and SIGQUIT in processes that the body starts, and restore our SIGTERM handler.

    Child processes inherit the mask; this process receives a blocked signal after the body. Ray
    installs a SIGTERM handler that would end the job with exit code 15.
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
    """Redirect writes to a closed terminal to /dev/null; they would fail with EIO."""
    if not terminals:
        return
    null = os.open(os.devnull, os.O_RDWR)
    for fd in terminals:
        os.dup2(null, fd)
    os.close(null)
