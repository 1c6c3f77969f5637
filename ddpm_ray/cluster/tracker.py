"""One run's rows, pictures and documents on their way to MLflow, from a thread of their own.

That thread imports MLflow too, so that no step waits for those 1.2 s.
"""

import logging
from collections import deque
from collections.abc import Callable
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any

from PIL import Image

from ddpm_ray import faults
from ddpm_ray.cluster.tracked_run import MAX_METRICS, MetricRow, TrackedRun
from ddpm_ray.telling import brief
from ddpm_ray.training.reporting import RATES, Row

if TYPE_CHECKING:
    from ddpm_ray.cluster.tracking import RunLog

log = logging.getLogger(__name__)

RETRY_S = 5.0


class Tracker:
    """A Sink that sends rows, pictures and documents to MLflow from a thread of its own.

    While MLflow is away nothing is lost and no step waits: rows stay in `unsent`, which goes into
    every checkpoint, and are tried again every few seconds.
    """

    def __init__(
        self, find_run: Callable[[], TrackedRun], flush_every_s: float, unsent: list[Row]
    ) -> None:
        """`find_run` is asked until it answers: MLflow may be away when a run starts."""
        self._find_run, self._flush_every_s = find_run, flush_every_s
        self._rows: deque[Row] = deque(unsent)
        self._files: deque[Callable[[RunLog], None]] = deque()
        self._last_rate: dict[str, int] = {}
        self._lock, self._closing, self._given_up = Lock(), Event(), Event()
        self._thread = Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def rows(self, rows: list[Row]) -> None:
        """Queue metrics."""
        with self._lock:
            self._rows.extend(rows)

    def image(self, key: str, step: int, image: Image.Image) -> None:
        """Queue a stepped picture."""
        self._files.append(lambda run: run.image(key, step, image))

    def document(self, path: str, content: dict[str, Any]) -> None:
        """Queue a JSON file below the run's artifacts."""
        self._files.append(lambda run: run.document(path, content))

    def unsent(self) -> list[Row]:
        """Rows that MLflow has not acknowledged."""
        with self._lock:
            return list(self._rows)

    def close(self, patience_s: float) -> bool:
        """Send what is left; False if that did not succeed within `patience_s`."""
        self._closing.set()
        self._thread.join(patience_s)
        self._given_up.set()
        return not self._thread.is_alive()

    def _work(self) -> None:
        found = None
        while True:
            closing = self._closing.wait(self._flush_every_s)
            try:
                found = found or self._connected()
                self._send(found)
                if closing:
                    return
            except Exception as error:  # noqa: BLE001 - whatever it is, rows are kept and retried
                log.warning("rows for MLflow: %s; kept, tried again", brief(error))
                if self._given_up.wait(RETRY_S):
                    return

    def _connected(self) -> "RunLog":
        """The way to the run, once it is known which rates its earlier lives have logged."""
        from ddpm_ray.cluster.tracking import RunLog

        found = RunLog(self._find_run())
        self._last_rate = found.last_steps(RATES)
        return found

    def _send(self, found: "RunLog") -> None:
        while self._rows:
            with self._lock:
                batch, count = self._next_batch()
            faults.at("flush")
            found.rows(batch)
            faults.at("sent")
            with self._lock:
                for _ in range(count):
                    self._rows.popleft()
        while self._files:
            self._files[0](found)
            self._files.popleft()

    def _next_batch(self) -> tuple[list[MetricRow], int]:
        """Metrics of the oldest rows, as many whole rows as one call takes, and their number."""
        metrics: list[MetricRow] = []
        count = 0
        for row in self._rows:
            own = [
                (key, value, row.step)
                for key, value in row.metrics.items()
                if row.step > self._last_rate.get(key, -1)
            ]
            if len(metrics) + len(own) > MAX_METRICS:
                break
            metrics += own
            count += 1
        return metrics, count
