"""Jobs that have ended, and whose images can be read again."""

from __future__ import annotations

from collections.abc import Callable

from ddpm_ray.serving.job_entry import JobEntry, JobKey

RESENT_S = 3.0  # an answer that was lost on its way is asked for again within that time


class KeptJobs:
    """Jobs that have ended, the oldest first; bounded by time and by size.

    Failed jobs stay for `least_s`. No job is forgotten before that, whatever its size: its client
    reads it now. One that nobody can come back to, and was delivered, is forgotten RESENT_S after
    its end.
    """

    def __init__(
        self, kept_s: float, kept_bytes: int, least_s: float, clock: Callable[[], float]
    ) -> None:
        self._kept_s, self._kept_bytes, self._least_s = kept_s, kept_bytes, least_s
        self._clock = clock
        self._made: dict[JobKey, JobEntry] = {}  # in the order of their ends, like the next
        self._failed: dict[JobKey, JobEntry] = {}
        self._by_secret: dict[str, JobEntry] = {}
        self._bytes = 0  # of _made

    def get(self, key: JobKey) -> JobEntry | None:
        """The job of this key, if it has ended."""
        return self._made.get(key) or self._failed.get(key)

    def of_secret(self, secret: str) -> JobEntry | None:
        """The job with images at the URL of this secret."""
        return self._by_secret.get(secret)

    def add(self, entry: JobEntry) -> None:
        """Keep a job that has just ended."""
        if entry.state == "succeeded":
            self._made[entry.key] = self._by_secret[entry.secret] = entry
            self._bytes += entry.kept_bytes
        else:
            self._failed[entry.key] = entry

    def forget(self, key: JobKey) -> None:
        """Forget a job, if it is there."""
        self._failed.pop(key, None)
        if (entry := self._made.pop(key, None)) is not None:
            self._by_secret.pop(entry.secret, None)
            self._bytes -= entry.kept_bytes

    def sweep(self) -> None:
        """Forget jobs that are old, and the oldest where they are too large together."""
        now_s = self._clock()
        for kept, kept_s in ((self._made, self._kept_s), (self._failed, self._least_s)):
            while kept and now_s - _ended_s(first := next(iter(kept.values()))) > kept_s:
                self.forget(first.key)
        for entry in [*self._made.values()]:
            is_done = entry.is_delivered and not (entry.is_kept or entry.has_url)
            if is_done and now_s - _ended_s(entry) > RESENT_S:
                self.forget(entry.key)
        while self._bytes > self._kept_bytes:
            first = next(iter(self._made.values()))
            if now_s - _ended_s(first) <= self._least_s:
                break
            self.forget(first.key)


def _ended_s(entry: JobEntry) -> float:
    assert entry.ended_s is not None
    return entry.ended_s
