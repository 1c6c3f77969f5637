"""Prometheus gauges of a run, which each Ray node exports with Ray's own metrics.

(docs.ray.io, "Collecting and monitoring metrics".) Ray puts `ray_` before the names.
"""

import time
from collections.abc import Iterable

from ray.util.metrics import Gauge

from ddpm_ray.reporting import Progress

GAUGES = {
    "step": "optimiser steps taken",
    "steps": "optimiser steps of the whole run, at most",
    "loss": "training loss of the newest reported step",
    "images_per_s": "images per second of all workers, over the last report",
    "core_seconds": "core-seconds of all training steps, earlier starts included",
    "checkpoint_age_s": "seconds since the newest checkpoint was committed, or the group started",
    "longest_stall_s": "seconds since the worker that is furthest behind passed a point of a step",
}


class RunGauges:
    """Gauges `ray_ddpm_ray_<name>` with the tag `run`."""

    def __init__(self, run: str) -> None:
        self._gauges = {
            name: Gauge(f"ddpm_ray_{name}", description=text, tag_keys=("run",))
            for name, text in GAUGES.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})
        self._checkpoint, self._since_s = "", time.monotonic()

    def set(self, progress: Progress, stalls_s: Iterable[float]) -> None:
        """Show `progress`, and the longest of `stalls_s`."""
        now = time.monotonic()
        if progress.checkpoint != self._checkpoint:
            self._checkpoint, self._since_s = progress.checkpoint, now
        values = {name: getattr(progress, name) for name in GAUGES if hasattr(progress, name)}
        values["checkpoint_age_s"] = now - self._since_s
        values["longest_stall_s"] = max(stalls_s, default=0.0)
        for name, value in values.items():
            self._gauges[name].set(value)
