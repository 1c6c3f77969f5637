"""The desk between a run's driver and its workers: progress one way, wishes the other.

An actor of its own because Ray Train's report() is a barrier that waits for the controller's next
poll, up to 2 s; a note left here costs the worker nothing.
"""

import contextlib
import time
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeAlias

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError

from ddpm_ray.distributed import placement_groups
from ddpm_ray.distributed.heartbeat import Beat
from ddpm_ray.fault_injection import PLACES
from ddpm_ray.reporting import Progress, Wish

ANSWER_S = 120.0  # a loaded machine took 10 s to start the actor
RETRY_S = 1.0


class ControlLostError(RuntimeError):
    """The actor between driver and workers is gone; args are (reason,)."""

    def __str__(self) -> str:
        return (
            f"the process that carries progress and wishes between the driver and its workers "
            f"{self.args[0]}; the same command continues from the newest checkpoint"
        )


_Lying: TypeAlias = tuple[
    dict[str, Any] | None, str | None, list["Start"], list[dict[str, Any]], str
]


class Start(NamedTuple):
    """One start of the workers."""

    step: int  # that they began at
    group: str  # their placement group
    workers: int
    reason: str = ""  # why those before them ended, as far as it is known


class _Desk:
    def __init__(self) -> None:
        self.progress: dict[str, Any] | None = None
        self.wish = Wish.NOTHING
        self.fatal: str | None = None
        self.starts: list[Start] = []
        self.restart_reason = ""  # for which the workers of the newest start have ended
        self.beats: dict[int, tuple[float, dict[str, Any]]] = {}  # when it came, by rank
        self.groups: list[str] = []  # whose workers were heard of; the beats are of the last

    def leave(self, progress: dict[str, Any]) -> Wish:
        """What the driver asks for, in return for where the workers are."""
        self.progress, wish = progress, self.wish
        if wish is Wish.SAVE:  # once
            self.wish = Wish.NOTHING
        return wish

    def look(self) -> _Lying:
        now = time.monotonic()
        beats = [beat | {"silent_s": now - came} for came, beat in self.beats.values()]
        return self.progress, self.fatal, self.starts, beats, (self.groups or [""])[-1]

    def start(self, step: int, group: str, workers: int) -> None:
        self.starts.append(Start(step, group, workers, self.restart_reason))
        self.restart_reason = ""

    def report_restart(self, reason: str) -> None:
        # Of several until a start succeeds the first is the cause: a group that finds no place for
        # itself afterwards fails too.
        self.restart_reason = self.restart_reason or reason

    def expect(self, processes: dict[int, str], group: str) -> None:
        """Miss these workers of `group`, by rank, from now on until they beat."""
        now, count = time.monotonic(), len(processes)
        self.groups.append(group)
        self.beats = {
            rank: (now, asdict(Beat(rank, 0, "join", 0.0, 0.0, workers=count, process=process)))
            for rank, process in processes.items()
        }

    def beat(self, beat: dict[str, Any], group: str) -> None:
        """Keep a worker's heartbeat; one of a group before the newest counts no more."""
        now = time.monotonic()
        if group not in self.groups:  # those before are of workers that are gone
            self.groups.append(group)
            first = beat | {"step": 0, "point": next(iter(PLACES)), "stood_s": 0.0, "step_s": 0.0}
            # Who never beats is missed: all workers of a group begin at the same time.
            self.beats = {rank: (now, first | {"rank": rank}) for rank in range(beat["workers"])}
        if group == self.groups[-1]:
            self.beats[beat["rank"]] = now, beat

    def rest(self, rank: int, group: str) -> None:
        if group in self.groups[-1:]:
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
    starts: list[Start]
    beats: list[Beat]  # of each worker of the newest group, the last that came
    group: str = ""  # the placement group of these, as soon as one of them lives

    @classmethod
    def of(cls, notes: _Lying) -> "Notes":
        """From the actor's plain values."""
        progress, fatal, starts, beats, group = notes
        shown = Progress(**progress) if progress else None
        return cls(shown, fatal, starts, [Beat(**beat) for beat in beats], group)


class Desk:
    """A handle on the actor; both sides hold one."""

    def __init__(self) -> None:
        beside = placement_groups.beside_me()
        self._actor: Any = ray.remote(num_cpus=0, scheduling_strategy=beside)(_Desk).remote()
        self._notes: list[Any] = []  # whose answers are on their way
        self._reply: Any = None  # on its way, to the last glance

    def show(self, progress: Progress) -> Wish:
        """Leave `progress` without waiting; what was asked for when notes before it were left."""
        answered: list[Any] = []
        if self._notes:
            answered, self._notes = ray.wait(self._notes, num_returns=len(self._notes), timeout=0)
        self._notes.append(self._actor.leave.remote(asdict(progress)))
        wishes = [_answer(one) for one in answered]
        return max([Wish.NOTHING, *(Wish(wish) for wish in wishes if wish is not None)])

    def start(self, step: int, group: str, workers: int) -> None:
        """Tell the driver at which step the `workers` of placement group `group` begin."""
        self._actor.start.remote(step, group, workers)

    def report_restart(self, reason: str) -> None:
        """Tell the driver why the workers end and others will be started; never waits or fails."""
        with contextlib.suppress(RayError):  # of a dead actor the driver knows by itself
            self._actor.report_restart.remote(reason)

    def expect(self, processes: dict[int, str], group: str) -> None:
        """Tell the driver which processes, by rank, are the workers of the placement group."""
        self._actor.expect.remote(processes, group)

    def beat(self, beat: Beat, group: str) -> None:
        """Tell the driver where this worker, of the placement group `group`, stands."""
        self._actor.beat.remote(asdict(beat), group)

    def rest(self, rank: int, group: str) -> None:
        """Tell the driver that this worker, of the placement group `group`, has done its steps."""
        self._actor.rest.remote(rank, group)

    def glance(self) -> Notes | None:
        """What lies on the desk, if the actor has answered since the last glance; never waits.

        Raises ControlLostError.
        """
        if self._reply is not None and not self._answered():
            return None
        found = _answer(self._reply) if self._reply is not None else None
        self._reply = self._actor.look.remote()
        return Notes.of(found) if found is not None else None

    def look(self) -> Notes:
        """What lies on the desk now. Raises ControlLostError."""
        until_s = time.monotonic() + ANSWER_S
        while (found := _answer(self._actor.look.remote(), ANSWER_S)) is None:
            if time.monotonic() > until_s:
                raise ControlLostError(f"cannot be reached for {ANSWER_S:.0f} s")
            time.sleep(RETRY_S)
        return Notes.of(found)

    def ask(self, wish: Wish) -> None:
        """Leave a wish, for the workers' next report but one (a second or two)."""
        self._actor.ask.remote(wish)

    def give_up(self, reason: str) -> None:
        """Tell the driver, and workers that are started again, that to go on is of no use."""
        _answer(self._actor.give_up.remote(reason), ANSWER_S)

    def _answered(self) -> bool:
        return self._reply is not None and bool(ray.wait([self._reply], timeout=0)[0])


def _answer(reply: Any, timeout_s: float | None = None) -> Any:
    """What the actor answered; None where it cannot be reached now, but lives.

    Raises ControlLostError where it is gone, or says nothing for `timeout_s`.
    """
    try:
        return ray.get(reply, timeout=timeout_s)
    except ActorUnavailableError:
        return None
    except RayActorError as error:
        raise ControlLostError(death(error)) from error
    except GetTimeoutError as error:
        raise ControlLostError(f"does not answer for {timeout_s:.0f} s") from error


def death(error: RayActorError) -> str:
    """How the process of an actor ended, out of Ray's page on it: `died (...)`."""
    text = str(error)
    if "low on memory" in text:
        return "died (killed by Ray: its node ran out of memory)"
    if "its node has died" in text:
        return "died (its node was lost)"
    return "died (killed, or a crash of its own)"
