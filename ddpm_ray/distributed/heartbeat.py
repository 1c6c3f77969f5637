"""Stall detection: each worker sends its position every 2 s, and the driver finds who stalls.

Causes are a frozen process, a collective that one rank never enters, or a hung device. The other
workers wait in the next collective until the process group times out, and the error of the first to
time out names neither the rank nor the step. The driver names the worker that is furthest behind
within half a minute and restarts the group from the newest checkpoint.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ddpm_ray import fault_injection

INTERVAL_S = 2.0
# Points that take the time of a step.
WAITS_FOR_OTHERS = ("embeddings", "gradient", "update", "reduce")
WAITS_FOR_STORAGE = ("batch",)  # not "snapshot": uploads may be slow and have their own time-outs
SLOW_STEPS = 10  # the limit is at least this many times the usual step
FIRST_HEARTBEAT = 4  # times the limit: a worker imports torch first, from a cold or busy disk
FIRST_STEP = 20  # times the limit: compilation, and the first use of each kernel


@dataclass(frozen=True)
class Heartbeat:
    """Position of one worker at a moment."""

    rank: int
    step: int
    point: str  # a key of fault_injection.ALL_POINTS
    stalled_s: float  # time since it passed `point`
    step_s: float  # the shortest of its last steps; 0: it has completed none
    silent_s: float = 0.0  # time since the heartbeat arrived, by the control actor's clock
    workers: int = 1  # size of its group
    process: str = ""  # process and node of a worker that has not sent a heartbeat yet

    @property
    def position(self) -> tuple[int, int]:
        """Step and index of the point; grows as the worker proceeds."""
        return self.step, list(fault_injection.ALL_POINTS).index(self.point)

    def is_silent(self, limit_s: float) -> bool:
        """Whether the next heartbeat is overdue."""
        return self.silent_s > limit_s * (FIRST_HEARTBEAT if self.process else 1)

    def is_stalled(self, limit_s: float, storage_s: float) -> bool:
        """Whether the worker is silent, or at one point for longer than that point may take."""
        if self.is_silent(limit_s):
            return True
        longest_s = max(limit_s, SLOW_STEPS * self.step_s)
        if not self.step_s:
            longest_s *= FIRST_STEP
        if self.point in WAITS_FOR_STORAGE:
            longest_s += storage_s
        elif self.point not in WAITS_FOR_OTHERS:
            return False
        return self.stalled_s + self.silent_s > longest_s

    def describe(self, limit_s: float) -> str:
        """Say what is wrong with the worker, and where."""
        if self.process:
            return (
                f"worker {self.rank} ({self.process}) has not started: "
                f"no heartbeat for {self.silent_s:.0f} s"
            )
        if self.is_silent(limit_s):
            how = f"sent no heartbeat for {self.silent_s:.0f} s, last seen"
        else:
            how = f"stalled for {self.stalled_s + self.silent_s:.0f} s"
        return f"worker {self.rank} {how} {self.where}"

    @property
    def where(self) -> str:
        """Step and point in words."""
        return f"at step {self.step}, {fault_injection.ALL_POINTS[self.point]}"


def describe_stall(heartbeats: list[Heartbeat], limit_s: float, storage_s: float) -> str:
    """Name the workers that hold up the others and where, in a line; empty if there are none.

    Silent workers are to blame; without any, those furthest behind, because the others wait for
    them. Nobody is while one of those at the lowest step does something that may take long.
    """
    silent = [one for one in heartbeats if one.is_silent(limit_s)]
    step = min((one.step for one in heartbeats), default=0)
    behind = [one for one in heartbeats if one.step == step]
    last = min((one.position for one in behind), default=(0, 0))
    blamed = silent or [one for one in behind if one.position == last]
    # A worker may wait in a collective of the scores for another one that still draws samples.
    if not silent and not all(one.is_stalled(limit_s, storage_s) for one in behind):
        return ""
    lines = [one.describe(limit_s) for one in sorted(blamed, key=lambda one: one.rank)]
    waiting = [one for one in heartbeats if silent and one not in silent]
    # A silent worker may have gone on since its last heartbeat; a waiting one shows how far.
    lines += [f"worker {one.rank} waits {one.where}" for one in waiting[:1]]
    return "; ".join(lines)


class HeartbeatSender:
    """A thread that passes the position of the training thread of `rank` to `send` periodically.

    It starts before the worker opens anything: loading a large index or checkpoint may take long,
    and heartbeats go on meanwhile; a frozen process sends none.
    """

    def __init__(self, rank: int, send: Callable[[Heartbeat], None], workers: int = 1) -> None:
        self._rank, self._send, self._stopped = rank, send, threading.Event()
        self._workers = workers
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread; it sends the first heartbeat at once."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and wait for it."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            here = fault_injection.position()
            stalled_s = time.monotonic() - here.since_s
            step_s = min(here.steps_s, default=0.0)
            self._send(
                Heartbeat(
                    self._rank, here.step, here.point, stalled_s, step_s, workers=self._workers
                )
            )
            if self._stopped.wait(INTERVAL_S):
                return
