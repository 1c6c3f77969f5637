"""MLflow clients with a time limit for each call; one process at a time creates a database."""

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

CALL_S = 40.0  # limit of one call with its retries; usual answers take 0.01 to 1 s
FILE_S = 300.0  # limit of a call that sends a file
LATE_S = 5.0  # a warning is logged after this time without an answer
_late: set[str] = set()  # servers that were warned of


class BoundedClient:
    """An MlflowClient whose calls raise TimeoutError after `call_s` seconds.

    MLflow's own time-outs limit the time between two bytes: an answer of one byte a second would
    never end. A call that times out goes on in a daemon thread.
    """

    def __init__(self, uri: str, call_s: float | None = None) -> None:
        self._uri = uri
        self._call_s = call_s = CALL_S if call_s is None else call_s
        self._is_file = uri.startswith("sqlite")  # needs no limit
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
    """Return `call()`; raises its error, or TimeoutError after `seconds`."""
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
        raise TimeoutError(f"no complete answer within {seconds:.0f} s")
    if "error" in ended:
        raise ended["error"]
    _late.discard(uri)
    return ended["value"]


def _opened(uri: str) -> MlflowClient:
    """Return a client of `uri`; other processes wait while one creates a new database's tables."""
    with _database_lock(uri):
        return MlflowClient(tracking_uri=uri)


@contextlib.contextmanager
def _database_lock(uri: str) -> Iterator[None]:
    """Hold a lock file next to the SQLite database at `uri`; no lock for other databases."""
    file = database_file(uri)
    if file is None or not file.parent.is_dir():
        yield
        return
    lock = file.with_name(f".{file.name}.lock")
    try:
        held = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError:  # a read-only folder: MLflow raises its own error
        yield
        return
    try:
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)  # releases the lock
