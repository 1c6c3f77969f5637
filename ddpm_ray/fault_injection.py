"""Marked points: where a worker is, and, for tests and drills, faults that strike there.

    DDPM_RAY_FAULTS="/tmp/struck kill@gradient:120/1 freeze@reduce:300/0"

The first word is a folder on this machine; each other one is ACTION@POINT[:STEP][/RANK] and strikes
once, at the first passage of POINT at training step STEP or later, in the worker RANK (any, if it
is left out). What has struck is noted in the folder before it does, so that a process which is
started again does not die of it again; on a cluster, a worker that comes to lie on another node
does, once. Without the variable a point costs a note of the time.
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
    "join": "as it starts, before its process group is made",
    "open": "as it starts, before its data set is opened",
    "restore": "as it starts, before its checkpoint is looked for",
    "begin": "as it starts, before its first step",
}
POINTS = {  # in the order in which a step passes them
    "batch": "before the images of a step are asked for",
    "gradient": "after a worker's own loss, before its gradients meet those of the others",
    "update": "after the gradients were summed, before the weights change",
    "reduce": "before workers sum what they have to tell",
    "between": "after a step, and before the first one: grids, scores, checkpoints",
    "snapshot": "before the state is copied for a checkpoint",
    "object": "before an object of a checkpoint is written",
    "manifest": "before a checkpoint's manifest is written",
    "commit": "before the pointer that makes it the newest",
    "retire": "after that, before old checkpoints go",
    "flush": "before rows are sent to MLflow",
    "sent": "after MLflow took them, before they are forgotten here",
}
PLACES = STARTUP | POINTS  # in the order in which they are passed
ACTIONS = {
    "kill": "SIGKILL to itself",
    "term": "SIGTERM to itself, as a node sends that is taken away",
    "freeze": "SIGSTOP to itself",
    "hang": "this thread alone stands still",
    "fail": "an InjectedFaultError",
}


class InjectedFaultError(RuntimeError):
    """What the action `fail` raises."""


class FaultSyntaxError(ValueError):
    """A DDPM_RAY_FAULTS that cannot be understood."""


@dataclass(frozen=True)
class Fault:
    """One word of the variable."""

    action: str
    point: str
    step: int
    rank: int | None
    mark: Path  # the file that says it has struck


@dataclass
class Position:
    """Where the training thread of this process is."""

    rank: int = 0
    step: int = 0  # that it works on, from 1; 0: it has not begun
    point: str = "open"  # the last one that it passed
    since_s: float = field(default_factory=time.monotonic)  # when
    steps_s: deque[float] = field(default_factory=lambda: deque(maxlen=5))  # the last steps took
    begun_s: float = 0.0  # the step that it works on
    thread: int = 0


_here = Position()


def stand(rank: int, step: int, point: str = "") -> None:
    """Tell that this thread is the training thread, which rank it is, and that `step` begins.

    `point`, where it is given, is where it stands before it passes any.
    """
    now = time.monotonic()
    if step == _here.step + 1 and _here.begun_s:
        _here.steps_s.append(now - _here.begun_s)
    _here.rank, _here.step, _here.begun_s = rank, step, now
    _here.thread = threading.get_ident()
    _here.point = point or _here.point


def position() -> Position:
    """Where the training thread is now; read only."""
    return _here


def at(point: str) -> None:
    """Pass a marked point."""
    if threading.get_ident() == _here.thread:  # uploads and MLflow have threads of their own
        _here.point, _here.since_s = point, time.monotonic()
    if VARIABLE in os.environ:
        for fault in planned(os.environ[VARIABLE]):
            due = fault.point == point and _here.step >= fault.step
            if due and fault.rank in (None, _here.rank) and _first(fault):
                _strike(fault)


@contextmanager
def during(point: str) -> Iterator[None]:
    """Pass a marked point for as long as the body lasts; then this thread is where it was."""
    before = _here.point
    at(point)
    yield
    if threading.get_ident() == _here.thread:
        _here.point, _here.since_s = before, time.monotonic()


@cache
def planned(text: str) -> tuple[Fault, ...]:
    """The faults that `text`, a value of the variable, asks for; raises FaultSyntaxError."""
    folder, *words = text.split() or [""]
    if not Path(folder).is_absolute():
        raise FaultSyntaxError(f"{VARIABLE} begins with {folder!r}; begin with an absolute folder")
    return tuple(_parsed(word, Path(folder, str(i))) for i, word in enumerate(words))


def _parsed(word: str, mark: Path) -> Fault:
    found = re.fullmatch(r"(\w+)@(\w+)(?::(\d+))?(?:/(\d+))?", word)
    if not found or found[1] not in ACTIONS or found[2] not in PLACES:
        raise FaultSyntaxError(
            f"{VARIABLE}: {word!r} is not ACTION@POINT[:STEP][/RANK]; actions: "
            f"{', '.join(ACTIONS)}; points: {', '.join(PLACES)}"
        )
    return Fault(found[1], found[2], int(found[3] or 0), int(found[4]) if found[4] else None, mark)


def _first(fault: Fault) -> bool:
    """Whether this is the first process to come here; noted on disk before it is answered."""
    try:
        fault.mark.parent.mkdir(parents=True, exist_ok=True)
        fault.mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _strike(fault: Fault) -> None:
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
            _stand_still()  # the signal may come a moment later
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            _stand_still()
        case "fail":
            raise InjectedFaultError(f"fault at {fault.point}, step {_here.step}: as asked for")


def _stand_still() -> NoReturn:
    while True:
        threading.Event().wait()
