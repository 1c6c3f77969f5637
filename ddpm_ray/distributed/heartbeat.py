"""Whether the workers move: each tells every two seconds where it stands, and the driver judges.

A frozen process, a collective that one rank never enters, a device that hangs: the other workers
wait in the next sum for as long as the process group allows, and the error of the one that gives up
first names neither the rank nor the place. Here the one that is furthest behind is named, within
half a minute, and the group is started again from its newest checkpoint.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ddpm_ray import fault_injection

BEAT_S = 2.0
WAITS_FOR_OTHERS = ("gradient", "update", "reduce")  # points of a step that take a step's time
WAITS_FOR_STORAGE = ("batch",)  # not "snapshot": an upload may take long, and has its own limits
SLOW_STEPS = 10  # times the time of a usual step are no stall, whatever the config says
FIRST_BEAT = 4  # times the limit: a worker imports torch first, on a cold or busy disk
FIRST_STEP = 20  # times the limit: compilation, and the first use of each kernel


@dataclass(frozen=True)
class Beat:
    """Where a worker stood when it last told."""

    rank: int
    step: int
    point: str  # of faults.PLACES
    stood_s: float  # since it passed that
    step_s: float  # what its last steps took, the shortest of them; 0: it has done none
    silent_s: float = 0.0  # since it told, by the clock of the desk
    workers: int = 1  # of its group
    process: str = ""  # which one, of a worker that has not told anything yet

    @property
    def place(self) -> tuple[int, int]:
        """How far it is: grows along a step and from step to step."""
        return self.step, list(fault_injection.PLACES).index(self.point)

    def is_silent(self, limit_s: float) -> bool:
        """Whether it should have told something since."""
        return self.silent_s > limit_s * (FIRST_BEAT if self.process else 1)

    def stalls(self, limit_s: float, storage_s: float) -> bool:
        """Whether it is silent for too long, or stands where nobody stands for long."""
        if self.is_silent(limit_s):
            return True
        longest_s = max(limit_s, SLOW_STEPS * self.step_s)
        if not self.step_s:
            longest_s *= FIRST_STEP
        if self.point in WAITS_FOR_STORAGE:
            longest_s += storage_s
        elif self.point not in WAITS_FOR_OTHERS:
            return False
        return self.stood_s + self.silent_s > longest_s

    def told(self, limit_s: float) -> str:
        """It, for a person."""
        if self.process:
            return (
                f"worker {self.rank} ({self.process}) has not started: it gives no sign of life "
                f"for {self.silent_s:.0f} s"
            )
        if self.is_silent(limit_s):
            how = f"gives no sign of life for {self.silent_s:.0f} s, last"
        else:
            how = f"stands still for {self.stood_s + self.silent_s:.0f} s"
        return f"worker {self.rank} {how} {self.where}"

    @property
    def where(self) -> str:
        """Its place, for a person."""
        return f"at step {self.step}, {fault_injection.PLACES[self.point]}"


def stalled(beats: list[Beat], limit_s: float, storage_s: float) -> str:
    """Who holds all others up and where, in a line; empty while nobody does.

    Those furthest behind are to blame: the rest waits for them, and they for nobody. While they do
    something that may take long, nobody is.
    """
    silent = [beat for beat in beats if beat.is_silent(limit_s)]
    step = min((beat.step for beat in beats), default=0)
    behind = [beat for beat in beats if beat.step == step]
    last = min((beat.place for beat in behind), default=(0, 0))
    guilty = silent or [beat for beat in behind if beat.place == last]
    # One may wait in a sum of the scores for another that still draws its samples.
    if not silent and not all(beat.stalls(limit_s, storage_s) for beat in behind):
        return ""
    lines = [beat.told(limit_s) for beat in sorted(guilty, key=lambda beat: beat.rank)]
    waiting = [beat for beat in beats if silent and beat not in silent]
    # A silent one may have gone on for a while since it told; those who wait for it know how far.
    lines += [f"worker {beat.rank} waits {beat.where}" for beat in waiting[:1]]
    return "; ".join(lines)


class Pulse:
    """Tells `tell` every BEAT_S where worker `rank`'s training thread stands, from a thread.

    That begins before the worker opens anything: to load a large index or checkpoint takes as long
    as it takes, and beats go on meanwhile; those of a frozen process do not.
    """

    def __init__(self, rank: int, tell: Callable[[Beat], None], workers: int = 1) -> None:
        self._rank, self._tell, self._ends = rank, tell, threading.Event()
        self._workers = workers
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        """Begin; the first beat comes at once."""
        self._thread.start()

    def stop(self) -> None:
        """End; after that the worker owes nobody a beat."""
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            here = fault_injection.position()
            stood_s = time.monotonic() - here.since_s
            step_s = min(here.steps_s, default=0.0)
            self._tell(
                Beat(self._rank, here.step, here.point, stood_s, step_s, workers=self._workers)
            )
            if self._ends.wait(BEAT_S):
                return
