"""Background threads that send one run's rows, pictures and documents to MLflow.

They import MLflow too, which takes 1.2 s, so that no training step waits for it.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from PIL import Image

from ddpm_ray import fault_injection
from ddpm_ray.redaction import brief, counted, sanitize
from ddpm_ray.reporting import Row
from ddpm_ray.tracking.row_queue import RowQueue
from ddpm_ray.tracking.run_info import TrackedRun
from ddpm_ray.training.writer_lease import SupersededError

if TYPE_CHECKING:
    from ddpm_ray.tracking.run_log import RunLog

log = logging.getLogger(__name__)

RETRY_S = 5.0
FILE_TRIES = 3  # attempts to send a file that MLflow refuses while it accepts rows
REPEAT_S = 300.0  # after this time the same warning is logged again


@dataclass
class _File:
    """A picture or document to send."""

    name: str
    send: Callable[["RunLog"], None]
    failures: int = 0


class Tracker:
    """A Sink that sends rows, pictures and documents to MLflow from background threads.

    In an outage of MLflow nothing is lost and no step waits: rows stay in `unsent`, which is saved
    in every checkpoint, and are sent again every few seconds. Files have a thread of their own, so
    that a slow or refusing artifact store does not delay the rows.

    `check_lease` is called directly before each send. Once it raises SupersededError nothing more
    is sent, because another process continues the run. One batch at most, checked just before the
    takeover, is still sent: MLflow has no conditional write. Its rows have the keys of a replay, so
    MLflow stores equal rows once; only values that differ, such as rates, are stored twice.
    """

    def __init__(
        self,
        find_run: Callable[[], TrackedRun],
        flush_every_s: float,
        unsent: list[Row],
        every_steps: int = 1,
        last_step: int = 0,
        check_lease: Callable[[], None] = lambda: None,
    ) -> None:
        """`find_run` is called until it succeeds; `every_steps` and `last_step`: see RowQueue."""
        self._find_run, self._flush_every_s = find_run, flush_every_s
        self._check_lease = check_lease
        self._rows = RowQueue(unsent, every_steps, last_step)
        self._files: deque[_File] = deque()
        self._left_out: list[str] = []
        self._found: RunLog | None = None
        self._is_current = False  # whether the queue knows the rows in MLflow
        self._warned: dict[str, tuple[str, float]] = {}  # last warning of each thread, and its time
        self._closing, self._given_up = Event(), Event()
        self._superseded = Event()  # another process continues the run and sends its rows
        self._threads = [
            Thread(target=self._work, args=work, name=f"mlflow {work[0]}", daemon=True)
            for work in (
                ("rows", self._send_rows, lambda: len(self._rows)),
                ("files", self._send_files, lambda: len(self._files)),
            )
        ]
        for thread in self._threads:
            thread.start()

    def rows(self, rows: list[Row]) -> None:
        """Queue metrics."""
        self._rows.add(rows)

    def image(self, key: str, step: int, image: Image.Image) -> None:
        """Queue a picture of a step."""
        name = f"{key} of step {step}"
        self._files.append(_File(name, lambda run: run.image(key, step, image)))

    def document(self, path: str, content: dict[str, Any]) -> None:
        """Queue a JSON file for the run's artifacts."""
        self._files.append(_File(path, lambda run: run.document(path, content)))

    def unsent(self) -> list[Row]:
        """Return the rows that MLflow has not acknowledged."""
        return self._rows.rows()

    def close(self, patience_s: float) -> int:
        """Wait up to `patience_s`; returns how many rows are undelivered, to be sent on resume."""
        deadline = time.monotonic() + patience_s
        self._closing.set()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._given_up.set()
        undelivered = len(self._rows)
        if undelivered and not self._superseded.is_set():
            rows = counted(undelivered, "metric row")
            log.warning("%s undelivered; stored in the checkpoint, sent on resume", rows)
        if names := [file.name for file in list(self._files)] + self._left_out:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            log.warning("not sent to MLflow: %s", shown)
        return undelivered

    def _work(self, what: str, send: Callable[[], None], left: Callable[[], int]) -> None:
        while True:
            closing = self._closing.wait(self._flush_every_s)
            try:
                send()
                self._warned.pop(what, None)
                if closing and not left():
                    return
                pause_s = (
                    self._flush_every_s if closing else 0.0
                )  # files wait until the run is open
            except SupersededError as error:
                if not self._superseded.is_set():
                    self._superseded.set()
                    log.warning("this process sends no more to MLflow: %s", error)
                return
            except Exception as error:  # noqa: BLE001 - whatever it is, all is kept and retried
                self._warn(what, f"{what} for MLflow: {sanitize(str(error))}; kept, retrying")
                pause_s = RETRY_S
            if self._given_up.wait(pause_s):
                return

    def _send_rows(self) -> None:
        from ddpm_ray.tracking.run_log import RunLog

        if self._found is None:
            self._found = RunLog(self._find_run())
        if not self._is_current:
            self._rows.skip_stored(self._found.newest_steps())
            self._is_current = True
        while len(self._rows):
            batch, count = self._rows.batch()
            fault_injection.at("flush")
            if batch:
                self._check_lease()
                try:
                    self._found.rows(batch)
                except BaseException:
                    self._rows.doubt(count)
                    self._is_current = False  # reads what that call stored before the next batch
                    raise
            fault_injection.at("sent")
            self._rows.acknowledge(count)

    def _send_files(self) -> None:
        from ddpm_ray.tracking.errors import (
            TrackingError,
            TrackingOutageError,
            TrackingServerError,
        )

        while self._files and self._found is not None:
            file = self._files[0]
            self._check_lease()
            try:
                file.send(self._found)
            except Exception as error:
                doubtful = isinstance(error, TrackingServerError)
                if isinstance(error, TrackingOutageError) and not doubtful:
                    raise
                file.failures += 1
                final = isinstance(error, TrackingError) and not doubtful
                if not final and file.failures < FILE_TRIES:
                    raise
                if not self._left_out:  # close() lists all
                    log.warning("MLflow does not accept %s; skipped: %s", file.name, brief(error))
                self._left_out.append(file.name)
            self._files.popleft()

    def _warn(self, what: str, line: str) -> None:
        """Log a warning, but not the same one at every attempt."""
        now = time.monotonic()
        before, then = self._warned.get(what, ("", 0.0))
        if line != before or now - then >= REPEAT_S:
            self._warned[what] = line, now
            log.warning("%s", line)
