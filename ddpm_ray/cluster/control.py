"""The desk between a run's driver and its workers: progress one way, a request to stop the other.

An actor of its own because Ray Train's report() is a barrier that waits for the controller's next
poll, up to 2 s; a note left here costs the worker nothing.
"""

from dataclasses import asdict
from typing import Any

import ray

from ddpm_ray.training.reporting import Progress

ANSWER_S = 120.0  # a loaded machine took 10 s to start the actor


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
        self._reply: Any = None  # on its way, of either side's last question

    def show(self, progress: Progress) -> bool:
        """Leave `progress` without waiting; True if a stop was asked for by the note before."""
        stop = self._answered() and bool(ray.get(self._reply))
        self._reply = self._actor.leave.remote(asdict(progress))
        return stop

    def glance(self) -> Progress | None:
        """The newest progress, if the actor has answered since the last glance; never waits."""
        if self._reply is not None and not self._answered():
            return None
        progress = ray.get(self._reply)[0] if self._reply is not None else None
        self._reply = self._actor.look.remote()
        return Progress(**progress) if progress else None

    def ask_to_stop(self) -> None:
        """The workers commit a checkpoint and return, at their next report (about a second)."""
        self._actor.ask_to_stop.remote()

    def give_up(self, reason: str) -> None:
        """Tell the driver, and workers that are started again, that to go on is of no use."""
        ray.get(self._actor.give_up.remote(reason), timeout=ANSWER_S)

    def given_up(self) -> str | None:
        """The reason to give up, if there is one."""
        fatal: str | None = self.last()[1]
        return fatal

    def last(self) -> tuple[Progress | None, str | None]:
        """The newest progress, and the reason to give up, if there are any."""
        progress, fatal = ray.get(self._actor.look.remote(), timeout=ANSWER_S)
        return Progress(**progress) if progress else None, fatal

    def _answered(self) -> bool:
        return self._reply is not None and bool(ray.wait([self._reply], timeout=0)[0])
