"""Buffer of per-step metrics on the device, summed over workers about once a second into rows.

The host waits for the device once for all steps since the last time: in `StepLog.read`.

A row is a pure function of the steps it covers, so a replayed step gives the same row. Only the
rates (`train/images_per_s`, `train/data_wait_share`) and `train/core_seconds` depend on the clock.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ddpm_ray.collectives import Workers
from ddpm_ray.core_clock import core_clock
from ddpm_ray.reporting import RATES, Row
from ddpm_ray.training.throughput import DeviceUse

# Band edges in log-SNR. The linear schedule of Ho et al. spans -10.1 to 9.2 at T = 1000.
BAND_EDGES = (-8.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0)
BANDS = (
    "below_-8",
    "-8_to_-6",
    "-6_to_-4",
    "-4_to_-2",
    "-2_to_0",
    "0_to_2",
    "2_to_4",
    "4_to_6",
    "6_to_8",
    "above_8",
)
SUMS = (2, len(BANDS))  # shape of a step's sums and counts of losses by band


class Terms(Protocol):
    """Metrics of an objective without noise levels, in place of losses by log-SNR."""

    count: int  # number of terms of an image

    def metrics(self, means: Tensor, step: int) -> dict[str, float]:
        """Metrics of `step`, from the terms' means [count] float64 over the global batch."""
        ...

    def end_window(self, step: int, row: dict[str, float], *, is_main: bool) -> None:
        """React to the row of the last step of a window; the main worker may log."""
        ...


class Decision(NamedTuple):
    """The decision of the device on a step."""

    grad_norm: float
    accepted: bool
    losses: Tensor  # [b] of this worker's images, on the device


class StepLog:
    """Sums of losses by band since the last `collect`, on the device, one row per step.

    With `terms` the losses have no noise levels, and rows hold their metrics instead of bands.
    """

    def __init__(
        self,
        workers: Workers,
        rows_every_steps: int,
        terms: Terms | None = None,
        use: DeviceUse | None = None,
    ) -> None:
        """`use`: of the main worker's device, for its metrics in the last row of a window."""
        self.use = use
        self._workers, self._window_steps, self._terms = workers, rows_every_steps, terms
        self._width = math.prod(SUMS) + (terms.count if terms else 0)
        self._edges = torch.tensor(BAND_EDGES, dtype=torch.float64, device=workers.device)
        # Of steps not yet read, float64 on the device: SUMS, the sums of terms, norm, accepted.
        self._unread: list[Tensor] = []
        self._losses: list[Tensor] = []  # [b] of these steps
        self._lines: list[Tensor] = []  # of steps read but not collected
        self._rates: list[float] = []  # of both
        self._bands = torch.zeros(SUMS, dtype=torch.float64)  # sums, counts of the window
        self._clock, self._images, self._waited_s = time.perf_counter(), 0.0, 0.0
        self._window_start = (self._clock, 0.0, 0.0)
        self._core_clock, self._uncollected_s = core_clock(workers.device.type), 0.0
        self.core_s = 0.0  # core-seconds of all workers' timed steps, as collected

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the core-seconds of the `with` block, a training step."""
        began = self._core_clock()
        yield
        self._uncollected_s += self._core_clock() - began

    def record(
        self,
        losses: Tensor,
        log_snr: Tensor | None,
        terms: Tensor | None = None,
        *,
        grad_norm: Tensor,
        accepted: Tensor,
        learning_rate: float,
    ) -> None:
        """Record one step: losses [b] float32 and log-SNR [b] float64 of this worker's images.

        Instead of log-SNR: `terms` [b, n] float32, in the order of the objective's `Terms`. Of a
        step that is not `accepted`, bool [], no losses are kept: they may be NaN.
        """
        line = torch.zeros(self._width + 2, dtype=torch.float64, device=losses.device)
        sums = line[: math.prod(SUMS)].view(SUMS)
        if log_snr is None:
            sums[0, 0] = _to_grid(losses).sum()
            sums[1, 0].fill_(len(losses))  # an assignment would wait for the device
        else:
            band = torch.bucketize(log_snr, self._edges)
            sums[0].index_add_(0, band, _to_grid(losses))
            sums[1].index_add_(0, band, torch.ones_like(log_snr))
        if self._terms is not None and terms is not None:
            line[math.prod(SUMS) : self._width] = _to_grid(terms, bits=30).sum(0)
        line[: self._width].masked_fill_(~accepted, 0.0)
        line[-2].copy_(grad_norm)
        line[-1].copy_(accepted)
        self._unread.append(line)
        self._losses.append(losses)
        self._rates.append(learning_rate)

    def read(self) -> list[Decision]:
        """Wait for the device; return the decisions on the steps recorded since the last call."""
        if not self._unread:
            return []
        lines = torch.stack(self._unread).cpu()  # one copy
        of_steps = zip(lines[:, -2:].tolist(), self._losses, strict=True)
        decisions = [
            Decision(norm, bool(accepted), losses) for (norm, accepted), losses in of_steps
        ]
        self._lines.extend(lines)
        self._unread.clear()
        self._losses.clear()
        return decisions

    def forget(self, steps: int) -> None:
        """Drop the newest `steps` steps, which were read."""
        kept = len(self._lines) - steps
        del self._lines[kept:], self._rates[kept:]

    def collect(self, step: int, waited_s: float) -> list[Row]:
        """Return the rows of the recorded steps, which end at `step`, the same on all workers.

        All workers must call it. `waited_s`: seconds this worker has waited for data since its
        start. Returns no rows if no step was recorded since the last call.
        """
        self.read()
        if not self._lines:  # the same on all workers
            return []
        spent = torch.zeros(1, self._width, dtype=torch.float64)
        spent[0, 0], self._uncollected_s = self._uncollected_s, 0.0
        read = torch.stack(self._lines)
        norms = read[:, -2].tolist()  # equal on all workers
        lines = self._workers.sum_(torch.cat([read[:, : self._width], spent]))
        self.core_s += float(lines[-1, 0])
        lines = lines[:-1]  # [steps, width]
        now, first = time.perf_counter(), step - len(self._lines) + 1
        of_bands = lines[:, : math.prod(SUMS)].view(-1, *SUMS)
        self._images += float(of_bands[:, 1].sum())
        rows = []
        for offset, (sums, counts) in enumerate(of_bands):
            row = {"train/skipped": 1.0}
            if counts.sum():
                row = {
                    "train/loss": float(sums.sum() / counts.sum()),
                    "train/grad_norm": norms[offset],
                    "train/lr": self._rates[offset],
                }
                if self._terms is not None:
                    means = lines[offset, math.prod(SUMS) :] / counts.sum()
                    row |= self._terms.metrics(means, first + offset)
            self._bands += of_bands[offset]
            if (first + offset) % self._window_steps == 0:
                row |= dict(self._of_window(now, waited_s))
                if self._terms is not None:
                    self._terms.end_window(first + offset, row, is_main=self._workers.is_main)
            rows.append(Row(first + offset, row))
        self._lines.clear()
        self._rates.clear()
        return rows

    def window(self) -> list[list[float]]:
        """Return sums and counts per band of the incomplete window, for a checkpoint."""
        sums: list[list[float]] = self._bands.tolist()
        return sums

    def resume(self, window: list[list[float]], core_s: float | None = None) -> None:
        """Continue with the window of a checkpoint, and with its core-seconds, if given."""
        self._bands = torch.tensor(window, dtype=torch.float64)
        self.core_s = self.core_s if core_s is None else core_s

    def _of_window(self, now: float, waited_s: float) -> Iterator[tuple[str, float]]:
        began, images, waited = self._window_start
        elapsed = max(now - began, 1e-9)
        yield RATES[0], (self._images - images) / elapsed
        yield RATES[1], (waited_s - waited) / elapsed
        yield RATES[2], self.core_s
        if self.use is not None:
            own = (self._images - images) / self._workers.count
            yield from self.use.metrics(own, self._window_steps, elapsed)
        for name, total, count in zip(BANDS, *self._bands.tolist(), strict=True):
            if count and self._terms is None:
                yield f"train/loss_logsnr/{name}", total / count
        self._bands.zero_()
        self._window_start = (now, self._images, waited_s)


def _to_grid(values: Tensor, bits: int = 40) -> Tensor:
    """Round to float64 multiples of 2^-bits, so that sums below 2^(53 - bits) are exact.

    Exact sums do not depend on the order of summation, hence not on the number of workers.
    """
    return (values.double() * 2.0**bits).round_() * 2.0**-bits
