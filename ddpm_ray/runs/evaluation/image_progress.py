"""Progress of a job that scores a model, counted in images."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from torch import Tensor

from ddpm_ray.collectives import Workers
from ddpm_ray.reporting import Progress

REPORT_EVERY_S = 1.0

Batch = TypeVar("Batch", bound=tuple[Tensor, ...])


class ImageProgress:
    """Counts the images that this worker has finished; the main worker reports for all.

    Shares differ by at most one image, so the other workers are assumed to be as far.
    """

    def __init__(self, total: int, workers: Workers, report: Callable[[Progress], object]) -> None:
        self._total, self._workers, self._report = total, workers, report
        self._done, self._began_s, self._reported_s = 0, math.nan, -math.inf

    def counted(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches; count the images of each, its first tensor's length, after its use."""
        if math.isnan(self._began_s):
            self._began_s = time.monotonic()
        for batch in batches:
            yield batch
            self._done = min(self._total, self._done + len(batch[0]) * self._workers.count)
            if time.monotonic() - self._reported_s >= REPORT_EVERY_S:
                self._send()

    def finish(self) -> None:
        """Report that all images are done."""
        self._done = self._total
        self._send()

    def _send(self) -> None:
        if self._workers.is_main:
            self._reported_s = now = time.monotonic()
            rate = self._done / max(now - self._began_s, 1e-9)
            self._report(Progress(self._done, self._total, math.nan, rate))
