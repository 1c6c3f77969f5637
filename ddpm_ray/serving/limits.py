"""Limits of a server: work that waits, and the rate of each client."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

Clock = Callable[[], float]
# An engine is full for any job if less than ROOM_S of its limit is free, and it has work for
# BUSY_S: no job is sent to it then for 1 s (recent_refusal.py), and it must not run dry.
ROOM_S, BUSY_S = 1.0, 2.0


class OverloadedError(Exception):
    """There is too much work, or too many requests of a client; args are (reason, seconds).

    `is_full`: there is little room for any job, not only none for this one.
    """

    def __init__(self, reason: str, seconds: float, is_full: bool = False) -> None:
        super().__init__(reason, seconds)
        self.reason, self.seconds, self.is_full = reason, seconds, is_full

    @property
    def retry_after_s(self) -> int:
        """Whole seconds after which a request may be accepted, at least 1: HTTP's Retry-After."""
        return max(1, math.ceil(self.seconds))

    def __str__(self) -> str:
        return f"{self.reason}: try again in {self.retry_after_s} s"


@dataclass(frozen=True)
class QueueLimit:
    """A bound of the work that an engine has accepted, in seconds at its measured rate."""

    max_s: float  # of accepted work
    load: Callable[[], tuple[int, float]]  # Engine.load: rows that are left, rows per second

    def require_room(self, rows: int) -> None:
        """Raise OverloadedError if there is no room for a job of so many rows.

        An idle engine accepts any job, and so does one whose rate is not known yet.
        """
        left, rate = self.load()
        if not left or not rate:
            return
        beyond_s = (left + rows) / rate - self.max_s
        if beyond_s > 0:
            raise OverloadedError(
                f"work for {left / rate:.1f} s is accepted, this takes {rows / rate:.1f} s, and "
                f"their sum has to be at most {self.max_s:g} s",
                min(beyond_s, left / rate),
                is_full=left / rate > max(self.max_s - ROOM_S, BUSY_S),
            )


@dataclass
class TokenBucket:
    """Allows `burst` units at once and `per_s` in the long run; starts full.

    A request above `burst` units is allowed when the bucket is full, and empties it below zero:
    later ones wait until it is paid.
    """

    per_s: float
    burst: float
    unit: str = "units"
    clock: Clock = time.monotonic
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        for name in ("per_s", "burst"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name} is {value:g}; it must be above 0")
        self._level, self._at_s = self.burst, self.clock()

    def require(self, units: float) -> None:
        """Raise OverloadedError if a request of `units` has to wait."""
        with self._lock:
            self._refill()
            lacking = min(units, self.burst) - self._level
            if lacking > 1e-9 * self.burst:
                raise OverloadedError(
                    f"this takes {units:g} {self.unit}, and a client has {self.per_s:g} a second "
                    f"and {self.burst:g} at once (a larger request waits until all are there)",
                    lacking / self.per_s,
                )

    @property
    def affordable(self) -> float:
        """The units that a request may take now; infinity where the bucket is full."""
        with self._lock:
            self._refill()
            return math.inf if self._level >= self.burst * (1 - 1e-9) else max(0.0, self._level)

    def charge(self, units: float) -> None:
        """Take `units` that were affordable."""
        with self._lock:
            self._refill()
            self._level -= units

    def _refill(self) -> None:
        now_s = self.clock()
        self._level = min(self.burst, self._level + (now_s - self._at_s) * self.per_s)
        self._at_s = now_s
