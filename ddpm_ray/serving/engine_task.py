"""A job of an engine, as the threads of the engine and of the job know it."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class JobCancelledError(Exception):
    """The job was cancelled, or the engine was closed; raised in the job at its next call."""


@dataclass(eq=False)
class Task:
    """A job as the engine's threads know it."""

    act: Callable[[], Any] | None  # None: it has begun, or never will
    images: int
    cost: int  # rows of network calls, as announced
    deadline_s: float  # on the monotonic clock
    outcome: Future[Any]
    go_on: threading.Lock  # held; released with the output of its call
    output: Tensor | BaseException | None = None  # of its call
    computed: int = 0  # rows so far
    stopped_by: str = ""  # why it is to end; empty: it is not
    resumed_s: float = 0.0  # when it last got an output
    is_slow: bool = False  # whether it then took longer than LINGER_S (job_turns.py) to call again

    @property
    def left(self) -> int:
        """Rows that are left, as announced."""
        return max(0, self.cost - self.computed)

    def resume(self, output: Tensor | BaseException) -> None:
        """Give it the output of its call, or the error that the call raises."""
        self.output, self.resumed_s = output, time.monotonic()
        self.go_on.release()

    def end(self, error: BaseException) -> None:
        """Give it up before it has begun."""
        self.act = None
        self.outcome.set_exception(error)

    def run(self) -> None:
        """Do its work in this thread, and keep the outcome but not what it worked with."""
        act, self.act = self.act, None
        assert act is not None
        try:
            value = act()
        except BaseException as error:  # noqa: BLE001 - the job's `result` raises it
            del act
            traceback.clear_frames(error.__traceback__)
            self.outcome.set_exception(error)
        else:
            self.outcome.set_result(value)


class TaskRunner(Protocol):
    """Runs tasks, as Engine (engine.py) does."""

    def stop(self, task: Task) -> None:
        """End the job of `task` before its next network call."""
        ...

    def place(self, task: Task) -> int:
        """The number of jobs that wait and begin before it, and 1; 0 for one that has begun."""
        ...

    @property
    def fault(self) -> str:
        """Why no job succeeds any longer; empty: none is known."""
        ...

    def seconds_left(self, task: Task) -> float | None:
        """Estimate when it ends; None if no rate is known."""
        ...


class EngineJob(Generic[T]):
    """A job of an engine: its result, and how far it is."""

    def __init__(self, engine: TaskRunner, task: Task) -> None:
        self._engine, self._task = engine, task

    @property
    def computed(self) -> int:
        """Rows of network calls so far."""
        return self._task.computed

    @property
    def done(self) -> bool:
        """Whether it has ended: with a result, an error or because it was cancelled."""
        return self._task.outcome.done()

    @property
    def is_lost(self) -> bool:
        """Whether no job of its engine succeeds any longer: another process may run it."""
        return bool(self._engine.fault)

    def result(self, timeout_s: float | None = None) -> T:
        """Wait for its result; raises its error, JobCancelledError, or TimeoutError."""
        found: T = self._task.outcome.result(timeout_s)
        return found

    def when_done(self, call: Callable[[], object]) -> None:
        """Call `call` once it has ended, in the thread that ends it; it must not wait for jobs."""
        self._task.outcome.add_done_callback(lambda _: call())

    def cancel(self) -> None:
        """End it before its next network call; nothing happens to one that has ended."""
        self._engine.stop(self._task)

    @property
    def place(self) -> int:
        """The number of jobs that wait and begin before it, and 1; 0 for one that has begun."""
        return self._engine.place(self._task)

    @property
    def seconds_left(self) -> float | None:
        """Estimate when it ends, from the measured rate and the costs; None if that is unknown."""
        return self._engine.seconds_left(self._task)
