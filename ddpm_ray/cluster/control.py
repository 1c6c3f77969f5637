"""The desk between a run's driver and its workers: progress one way, wishes the other.

An actor of its own because Ray Train's report() is a barrier that waits for the controller's next
poll, up to 2 s; a note left here costs the worker nothing.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import ray

from ddpm_ray.cluster import placement
from ddpm_ray.cluster.watch import Beat
from ddpm_ray.training.reporting import Progress, Wish

ANSWER_S = 120.0  # a loaded machine took 10 s to start the actor


_Lying: TypeAlias = tuple[
    dict[str, Any] | None, str | None, list[tuple[int, str]], list[dict[str, Any]]
]


class _Desk:
    def __init__(self) -> None:
        self.progress: dict[str, Any] | None = None
        self.wish = Wish.NOTHING
        self.fatal: str | None = None
        self.starts: list[tuple[int, str]] = []
        self.beats: dict[int, tuple[float, dict[str, Any]]] = {}  # when it came, by rank

    def leave(self, progress: dict[str, Any]) -> Wish:
        """What the driver asks for, in return for where the workers are."""
        self.progress, wish = progress, self.wish
        if wish is Wish.SAVE:  # once
            self.wish = Wish.NOTHING
        return wish

    def look(self) -> _Lying:
        now = time.monotonic()
        beats = [beat | {"silent_s": now - came} for came, beat in self.beats.values()]
        return self.progress, self.fatal, self.starts, beats

    def start(self, step: int, group: str) -> None:
        self.starts.append((step, group))
        self.beats.clear()  # those of workers that are gone

    def beat(self, beat: dict[str, Any]) -> None:
        self.beats[beat["rank"]] = time.monotonic(), beat

    def rest(self, rank: int) -> None:
        self.beats.pop(rank, None)

    def ask(self, wish: Wish) -> None:
        self.wish = max(self.wish, wish)

    def give_up(self, reason: str) -> None:
        self.fatal = self.fatal or reason


@dataclass(frozen=True)
class Notes:
    """What lies on the desk."""

    progress: Progress | None  # the newest
    fatal: str | None  # why to go on is of no use, if it is not
    starts: list[tuple[int, str]]  # the step that the workers began at, and their placement group
    beats: list[Beat]  # of each worker of the newest start, the last that came

    @classmethod
    def of(cls, notes: _Lying) -> "Notes":
        """From the actor's plain values."""
        progress, fatal, starts, beats = notes
        shown = Progress(**progress) if progress else None
        return cls(shown, fatal, starts, [Beat(**beat) for beat in beats])


class Desk:
    """A handle on the actor; both sides hold one."""

    def __init__(self) -> None:
        beside = placement.beside_me()
        self._actor: Any = ray.remote(num_cpus=0, scheduling_strategy=beside)(_Desk).remote()
        self._notes: list[Any] = []  # whose answers are on their way
        self._reply: Any = None  # on its way, to the last glance

    def show(self, progress: Progress) -> Wish:
        """Leave `progress` without waiting; what was asked for when notes before it were left."""
        answered: list[Any] = []
        if self._notes:
            answered, self._notes = ray.wait(self._notes, num_returns=len(self._notes), timeout=0)
        self._notes.append(self._actor.leave.remote(asdict(progress)))
        return max([Wish.NOTHING, *map(Wish, ray.get(answered))])

    def start(self, step: int, group: str) -> None:
        """Tell the driver at which step the workers of placement group `group` begin."""
        self._actor.start.remote(step, group)

    def beat(self, beat: Beat) -> None:
        """Tell the driver where this worker stands."""
        self._actor.beat.remote(asdict(beat))

    def rest(self, rank: int) -> None:
        """Tell the driver that this worker has done its steps."""
        self._actor.rest.remote(rank)

    def glance(self) -> Notes | None:
        """What lies on the desk, if the actor has answered since the last glance; never waits."""
        if self._reply is not None and not self._answered():
            return None
        notes = Notes.of(ray.get(self._reply)) if self._reply is not None else None
        self._reply = self._actor.look.remote()
        return notes

    def look(self) -> Notes:
        """What lies on the desk now."""
        return Notes.of(ray.get(self._actor.look.remote(), timeout=ANSWER_S))

    def ask(self, wish: Wish) -> None:
        """Leave a wish, for the workers' next report but one (a second or two)."""
        self._actor.ask.remote(wish)

    def give_up(self, reason: str) -> None:
        """Tell the driver, and workers that are started again, that to go on is of no use."""
        ray.get(self._actor.give_up.remote(reason), timeout=ANSWER_S)

    def _answered(self) -> bool:
        return self._reply is not None and bool(ray.wait([self._reply], timeout=0)[0])
