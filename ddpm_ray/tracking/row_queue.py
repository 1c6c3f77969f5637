"""Queue of metric rows for MLflow: averaged over windows, each row sent once, in order."""

from collections import deque
from collections.abc import Iterable, Mapping
from itertools import islice
from threading import Lock

from ddpm_ray.reporting import Row
from ddpm_ray.tracking.run_info import MAX_METRICS, MetricRow

AVERAGED = ("train/loss", "train/grad_norm", "train/lr")  # one value a step
COUNTED = "train/skipped"  # 1 for each skipped step; summed
# For each duplicate metric MLflow on SQLite scans the run: a batch of 999 duplicates took 12 s at
# 200,000 steps, longer than the client's time-out; new metrics take 0.3 s.
MAX_DUPLICATES = 50


class RowQueue:
    """Rows that MLflow has not acknowledged, oldest first; thread-safe.

    With `every_steps` above 1 the metrics of single steps are averaged over windows that end at its
    multiples and at `last_step`. Rows of an incomplete window are part of `rows()` and so of every
    checkpoint: a resumed run averages over the same steps as an uninterrupted one.
    """

    def __init__(self, rows: Iterable[Row], every_steps: int = 1, last_step: int = 0) -> None:
        self._every_steps, self._last_step = every_steps, last_step
        self._complete: deque[Row] = deque()
        self._window: list[Row] = []
        self._stored: Mapping[str, int] = {}
        self._doubtful = 0  # number of oldest rows that a failed call may have stored
        self._lock = Lock()
        self.add(rows)

    def add(self, rows: Iterable[Row]) -> None:
        """Queue rows, for each key in order of steps."""
        with self._lock:
            for row in rows:
                self._add(row)

    def rows(self) -> list[Row]:
        """Return all rows that are not acknowledged."""
        with self._lock:
            return [*self._complete, *self._window]

    def __len__(self) -> int:
        """Return how many rows can be sent: those of an incomplete window do not count."""
        with self._lock:
            return len(self._complete)

    def skip_stored(self, newest: Mapping[str, int]) -> None:
        """Skip rows that MLflow stores: for each key, those up to its newest step.

        This loses no row: rows of a key are sent in order of steps, and a run that is resumed has
        all unacknowledged rows in its checkpoint.
        """
        with self._lock:
            self._stored = newest

    def batch(self) -> tuple[list[MetricRow], int]:
        """Return the metrics of the oldest rows for one call, and the number of those rows."""
        metrics: list[MetricRow] = []
        count = 0
        with self._lock:
            most = MAX_DUPLICATES if self._doubtful else MAX_METRICS
            for row in self._complete:
                own = [
                    (key, value, row.step)
                    for key, value in row.metrics.items()
                    if row.step > self._stored.get(key, -1)
                ]
                if metrics and len(metrics) + len(own) > most:
                    break
                metrics += own
                count += 1
        return metrics, count

    def acknowledge(self, count: int) -> None:
        """Remove the oldest `count` rows: MLflow stores them."""
        with self._lock:
            for _ in range(count):
                self._complete.popleft()
            self._doubtful = max(0, self._doubtful - count)

    def doubt(self, count: int) -> None:
        """Mark the oldest `count` rows as possibly stored: their call failed."""
        with self._lock:
            self._doubtful = max(self._doubtful, count)

    def _add(self, row: Row) -> None:
        if self._every_steps == 1:
            self._complete += _small(row)
            return
        each_step = {k: v for k, v in row.metrics.items() if k in AVERAGED or k == COUNTED}
        others = {key: value for key, value in row.metrics.items() if key not in each_step}
        if each_step:
            if self._window and self._end(self._window[0].step) != self._end(row.step):
                self._close_window()
            self._window.append(Row(row.step, each_step))
        self._complete += _small(Row(row.step, others)) if others else []
        if each_step and row.step == self._end(row.step):
            self._close_window()

    def _end(self, step: int) -> int:
        """Return the last step of the window of `step`."""
        end = -(-step // self._every_steps) * self._every_steps
        return min(end, self._last_step) if step <= self._last_step else end

    def _close_window(self) -> None:
        by_key: dict[str, list[float]] = {}
        for row in self._window:
            for key, value in row.metrics.items():
                by_key.setdefault(key, []).append(value)
        means = {
            key: sum(values) / (1 if key == COUNTED else len(values))
            for key, values in by_key.items()
        }
        self._complete.append(Row(self._end(self._window[0].step), means))
        self._window.clear()


def _small(row: Row) -> list[Row]:
    """Split `row` into rows of at most MAX_METRICS metrics."""
    if len(row.metrics) <= MAX_METRICS:
        return [row]
    remaining = iter(row.metrics.items())
    parts = iter(lambda: dict(islice(remaining, MAX_METRICS)), {})
    return [Row(row.step, part) for part in parts]
