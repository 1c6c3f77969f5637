"""The desk between a run's driver and its workers: progress one way, a request to stop the other.

An actor of its own because Ray Train's report() is a barrier that waits for the controller's next
poll, up to 2 s; a note left here costs the worker nothing.
"""

from dataclasses import asdict
from typing import Any

import ray

from ddpm_ray.training.reporting import Progress


class _Desk:
    def __init__(self) -> None:
        self.progress: dict[str, Any] | None = None
        self.stop = False
        self.fatal: str | None = None

    def leave(self, progress: dict[str, Any]) -> bool:
        self.progress = progress
        return self.stop

    def look(self) -> tuple[dict[str, Any] | None, str | None]:
        return self.progress, self.fatal

    def ask_to_stop(self) -> None:
        self.stop = True

    def give_up(self, reason: str) -> None:
        self.fatal = self.fatal or reason


class Desk:
    """A handle on the actor; both sides hold one."""

    def __init__(self) -> None:
        self._actor: Any = ray.remote(num_cpus=0)(_Desk).remote()
        self._reply: Any = None

    def show(self, progress: Progress) -> bool:
        """Leave `progress` without waiting; True if a stop was asked for by the note before."""
        stop = False
        if self._reply is not None and ray.wait([self._reply], timeout=0)[0]:
            stop = bool(ray.get(self._reply))
        self._reply = self._actor.leave.remote(asdict(progress))
        return stop

    def give_up(self, reason: str) -> None:
        """Tell the driver, and workers that are started again, that to go on is of no use."""
        ray.get(self._actor.give_up.remote(reason))

    def look(self, timeout_s: float = 10.0) -> tuple[Progress | None, str | None]:
        """The newest progress, and the reason to give up if there is one."""
        progress, fatal = ray.get(self._actor.look.remote(), timeout=timeout_s)
        return Progress(**progress) if progress else None, fatal

    def ask_to_stop(self) -> None:
        """The workers commit a checkpoint and return, at their next report (about a second)."""
        ray.get(self._actor.ask_to_stop.remote())
