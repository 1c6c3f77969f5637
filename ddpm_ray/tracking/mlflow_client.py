"""Clients of MLflow whose calls end in time, on databases whose tables are made by one process."""

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from mlflow import MlflowClient

from ddpm_ray.tracking.tracking_uri import database_file

log = logging.getLogger(__name__)

CALL_S = 40.0  # most seconds of one call with all its tries; an answer of a server takes 0.01 to 1
FILE_S = 300.0  # of a call that sends a file
LATE_S = 5.0  # after which a line says that an answer is late
_late: set[str] = set()  # servers of which that was said


class BoundedClient:
    """An MlflowClient whose every call ends within `call_s`, or raises TimeoutError.

    MLflow's own time-outs are of the silence between two bytes: an answer of one byte a second
    would never end. The call that is given up goes on in a daemon thread.
    """

    def __init__(self, uri: str, call_s: float | None = None) -> None:
        self._uri = uri
        self._call_s = call_s = CALL_S if call_s is None else call_s
        self._is_file = uri.startswith("sqlite")  # which answers, or fails, by itself
        self._client = _opened(uri) if self._is_file else within(call_s, uri, lambda: _opened(uri))

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if not callable(method) or self._is_file:
            return method

        @wraps(method)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            return within(self._call_s, self._uri, lambda: method(*args, **kwargs))

        return bounded


def within(seconds: float, uri: str, call: Callable[[], Any]) -> Any:
    """What `call` returns or raises; TimeoutError where it does not end within `seconds`."""
    ended: dict[str, Any] = {}
    done = threading.Event()

    def work() -> None:
        """Run `call` and keep its value or error for the waiting thread."""
        try:
            ended["value"] = call()
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            ended["error"] = error
        done.set()

    began = time.monotonic()
    threading.Thread(target=work, name="mlflow call", daemon=True).start()
    if not done.wait(min(LATE_S, seconds)) and uri not in _late:
        _late.add(uri)
        log.warning("%s: MLflow has not answered for %.0f s; waiting", uri, LATE_S)
    if not done.wait(max(0.0, began + seconds - time.monotonic())):
        raise TimeoutError(f"no whole answer within {seconds:.0f} s")
    if "error" in ended:
        raise ended["error"]
    _late.discard(uri)
    return ended["value"]


def _opened(uri: str) -> MlflowClient:
    """A client of `uri`; the tables of a new database are made by one process, others wait."""
    with _alone(uri):
        return MlflowClient(tracking_uri=uri)


@contextlib.contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Hold the lock beside the SQLite database at `uri`, for what MLflow does as it opens it."""
    file = database_file(uri)
    if file is None or not file.parent.is_dir():
        yield
        return
    lock = file.with_name(f".{file.name}.lock")
    try:
        held = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError:  # a folder that is read-only: MLflow will say so
        yield
        return
    try:
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)  # and with it the lock
