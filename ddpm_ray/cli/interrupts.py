"""Ctrl-C before a job can handle it, while its modules are imported."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # exit code: 128 + SIGINT


@contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Exit with one line and code 130 on Ctrl-C, without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
