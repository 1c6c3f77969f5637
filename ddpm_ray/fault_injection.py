"""Named points that training code passes: positions for heartbeats, and fault injection.

    DDPM_RAY_FAULTS="/tmp/faults kill@gradient:120/1 freeze@reduce:300/0"

The first word is a folder on this machine. Each other word is ACTION@POINT[:STEP][/RANK]: the fault
fires once, when the worker RANK (default: any) first passes POINT at training step STEP or later.
Before it fires, a marker file is created in the folder, so that a restarted process does not fire
it again. The folder is local to a node: a worker that moves to another node may fire a fault once
more. Without the variable, passing a point only records the time.
"""

import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NoReturn

VARIABLE = "DDPM_RAY_FAULTS"
STARTUP = {  # before the first step, at step 0
    "join": "at start-up, before the process group is created",
    "open": "at start-up, before the data set is opened",
    "restore": "at start-up, before the checkpoint is looked up",
    "begin": "at start-up, before the first step",
}
POINTS = {  # in the order in which a step passes them
    "batch": "before the batch of a step is read",
    "embeddings": "after a worker's own embeddings, before those of all workers are gathered",
    "gradient": "after a worker's own loss, before gradients are summed over the workers",
    "update": "after gradients are summed over the workers, before the weights change",
    "reduce": "before a sum of metrics over the workers",
    "between": "between steps: sample grids, scores, checkpoints",
    "snapshot": "before the state is copied for a checkpoint",
    "object": "before an object of a checkpoint is written",
    "manifest": "before a checkpoint's manifest, or one worker's list of its files, is written",
    "commit": "before the pointer to the new checkpoint is written",
    "retire": "after the commit, before old checkpoints are deleted",
    "flush": "before metric rows are sent to MLflow",
    "sent": "after MLflow acknowledged rows, before they are removed from the queue",
}
ALL_POINTS = STARTUP | POINTS  # in the order in which they are passed
ACTIONS = {
    "kill": "SIGKILL to the process",
    "term": "SIGTERM to the process, as a node sends that is about to be removed",
    "freeze": "SIGSTOP to the process",
    "hang": "block the calling thread for ever",
    "fail": "raise InjectedFaultError",
}


class InjectedFaultError(RuntimeError):
    """Raised by the action `fail`."""


class FaultSyntaxError(ValueError):
    """DDPM_RAY_FAULTS is malformed."""


@dataclass(frozen=True)
class Fault:
    """One fault of DDPM_RAY_FAULTS."""

    action: str
    point: str
    step: int
    rank: int | None
    marker: Path  # exists once the fault has fired


@dataclass
class Position:
    """Position of this process's training thread."""

    rank: int = 0
    step: int = 0  # in progress, from 1; 0: none has begun
    point: str = "open"  # the last one that was passed
    since_s: float = field(default_factory=time.monotonic)  # when it was passed
    steps_s: deque[float] = field(default_factory=lambda: deque(maxlen=5))  # times of last steps
    begun_s: float = 0.0  # when `step` began
    thread: int = 0


_here = Position()


def set_position(rank: int, step: int, point: str = "") -> None:
    """Declare the calling thread the training thread of `rank`, at the start of `step`.

    `point`, if given, replaces the last point that was passed.
    """
    now = time.monotonic()
    if step == _here.step + 1 and _here.begun_s:
        _here.steps_s.append(now - _here.begun_s)
    _here.rank, _here.step, _here.begun_s = rank, step, now
    _here.thread = threading.get_ident()
    _here.point = point or _here.point


def position() -> Position:
    """Return the training thread's position; read only."""
    return _here


def at(point: str) -> None:
    """Pass a point: record it, and fire the faults that are due there."""
    if threading.get_ident() == _here.thread:  # uploads and MLflow run in other threads
        _here.point, _here.since_s = point, time.monotonic()
    if VARIABLE in os.environ:
        for fault in parse_faults(os.environ[VARIABLE]):
            due = fault.point == point and _here.step >= fault.step
            if due and fault.rank in (None, _here.rank) and _claim(fault):
                _fire(fault)


@contextmanager
def during(point: str) -> Iterator[None]:
    """Pass a point, and return to the previous one after the body."""
    before = _here.point
    at(point)
    yield
    if threading.get_ident() == _here.thread:
        _here.point, _here.since_s = before, time.monotonic()


@cache
def parse_faults(text: str) -> tuple[Fault, ...]:
    """Parse `text`, a value of DDPM_RAY_FAULTS. Raises FaultSyntaxError."""
    folder, *words = text.split() or [""]
    if not Path(folder).is_absolute():
        raise FaultSyntaxError(
            f"{VARIABLE} starts with {folder!r}; start it with an absolute folder"
        )
    return tuple(_parse_fault(word, Path(folder, str(i))) for i, word in enumerate(words))


def _parse_fault(word: str, marker: Path) -> Fault:
    found = re.fullmatch(r"(\w+)@(\w+)(?::(\d+))?(?:/(\d+))?", word)
    if not found or found[1] not in ACTIONS or found[2] not in ALL_POINTS:
        raise FaultSyntaxError(
            f"{VARIABLE}: {word!r} is not ACTION@POINT[:STEP][/RANK]; actions: "
            f"{', '.join(ACTIONS)}; points: {', '.join(ALL_POINTS)}"
        )
    return Fault(
        found[1], found[2], int(found[3] or 0), int(found[4]) if found[4] else None, marker
    )


def _claim(fault: Fault) -> bool:
    """Create the marker file of `fault`; False if it exists: the fault has fired already."""
    try:
        fault.marker.parent.mkdir(parents=True, exist_ok=True)
        fault.marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _fire(fault: Fault) -> None:
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
            _block()  # the signal may arrive a moment later
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            _block()
        case "fail":
            raise InjectedFaultError(f"injected fault at {fault.point}, step {_here.step}")


def _block() -> NoReturn:
    while True:
        threading.Event().wait()
