"""Hand outputs to the jobs of an engine, and collect their next calls."""

import queue
import time
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from torch import Tensor

from ddpm_ray.serving.engine_task import Task
from ddpm_ray.serving.shared_calls import NetworkCall

# The engine waits so long for a job to call again, but not for one that took longer the last time.
LINGER_S = 0.05
Output: TypeAlias = Tensor | BaseException


class Message(NamedTuple):
    """A job begins, calls the network, or (with neither) has ended; without a job: wake up."""

    task: Task | None = None
    call: NetworkCall | None = None
    begins: bool = False


class JobTurns:
    """Messages of jobs to their engine, and the order in which they go on.

    Jobs go on one after the other: jobs that compute at once wait for the interpreter's lock at
    each operation. 8 jobs took 4 ms for what takes each of them 0.1 ms.
    """

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        # what follows is of the engine's thread alone
        self._calls: dict[Task, NetworkCall] = {}  # that were read and not collected
        self._begun_s: dict[Task, float] = {}  # when; jobs whose first call has not come

    def send(self, message: Message) -> None:
        """Put a message into the inbox of the engine."""
        self._inbox.put(message)

    def hand_out(self, outputs: Iterable[tuple[Task, Output]]) -> None:
        """Let jobs go on with the outputs of their calls; wait for the next call of each in turn.

        No wait is for a slow job, nor longer than LINGER_S for all together.
        """
        until_s = time.monotonic() + LINGER_S
        for task, output in outputs:
            task.resume(output)
            while not task.is_slow and (left_s := until_s - time.monotonic()) > 0:
                if self._read(left_s) is task:
                    break

    def collect(self, idle: bool, call_s: float) -> dict[Task, NetworkCall]:
        """The calls that have come, with the first calls of the jobs that begin.

        It waits for each of those at most `call_s`, the time of a network call (others lose one
        step by it), and at most LINGER_S. If `idle`, it waits for the first message.
        """
        begin_s = min(LINGER_S, call_s)
        self._read(None if idle and not self._calls else 0.0)
        while self._read(0.0):  # all that have come meanwhile
            pass
        while self._begun_s:
            if (left_s := max(self._begun_s.values()) + begin_s - time.monotonic()) <= 0:
                self._begun_s.clear()
            else:
                self._read(left_s)
        calls, self._calls = self._calls, {}
        return calls

    def _read(self, timeout_s: float | None) -> Task | None:
        """Take a message; return its job, None if there was none in time or it had no job."""
        try:
            task, call, begins = self._inbox.get(timeout_s != 0, timeout_s or None)
        except queue.Empty:
            return None
        if task is None:
            return None
        if begins:
            self._begun_s[task] = time.monotonic()
            return task
        self._begun_s.pop(task, None)
        if call is not None:
            self._calls[task] = call
            if task.resumed_s:
                task.is_slow = time.monotonic() - task.resumed_s > LINGER_S
        return task
