"""Counts of the jobs of a server, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ServedMetrics:
    """Counts of one job table."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kind = ("kind",)
        self._submitted = self._counter("submitted_jobs", "jobs that were begun", kind)
        self._ended = self._counter("ended_jobs", "jobs that have ended", ("kind", "state"))
        self._restarts = self._counter("restarted_jobs", "jobs whose process was lost", ())
        self._rows = self._counter(
            "network_rows", "images of network calls, of jobs that have ended", ("state",)
        )
        self._seconds = Histogram(
            "ddpm_ray_job_seconds",
            "from the request to the images",
            kind,
            registry=self.registry,
            buckets=SECONDS,
        )
        self._open = Gauge(
            "ddpm_ray_open_jobs", "jobs that wait or run", kind, registry=self.registry
        )

    def submitted(self, kind: str) -> None:
        """A job has begun."""
        self._submitted.labels(kind).inc()
        self._open.labels(kind).inc()

    def restarted(self) -> None:
        """A job runs again."""
        self._restarts.inc()

    def ended(self, kind: str, state: str, seconds: float, computed: int) -> None:
        """A job has ended after so many seconds and rows of network calls."""
        self._open.labels(kind).dec()
        self._ended.labels(kind, state).inc()
        self._rows.labels(state).inc(computed)
        if state == "succeeded":
            self._seconds.labels(kind).observe(seconds)

    def text(self) -> str:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry).decode()

    def _counter(self, name: str, meaning: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"ddpm_ray_{name}", meaning, labels, registry=self.registry)
