"""Hand outputs to the jobs of an engine, and collect their next calls."""

import queue
import time
from collections import deque
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
    each operation. 8 jobs took 4 ms for what takes each of them 0.1 ms. A job that calls again lets
    the next one go on, and the last one wakes the engine: half as many threads are woken as with a
    return to the engine after each job, and on a busy machine each of them waits for a CPU.
    """

    def __init__(self) -> None:
        self._inbox: deque[Message] = deque()
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._next: deque[tuple[Task, Output]] = deque()  # that go on one after the other
        self._awaited: dict[Task, float] = {}  # until when; of the engine's thread alone

    def send(self, message: Message) -> None:
        """Put a message into the inbox of the engine, and let the next job go on, if any."""
        self._inbox.append(message)
        if not message.begins:  # its first call follows
            self._go_on()

    def hand_out(self, outputs: Iterable[tuple[Task, Output]]) -> None:
        """Let jobs go on with the outputs of their calls; slow ones at once, others in turn."""
        until_s = time.monotonic() + LINGER_S
        for task, output in outputs:
            if task.is_slow:
                task.resume(output)
            else:
                self._awaited[task] = until_s
                self._next.append((task, output))
        self._go_on()

    def collect(self, idle: bool, call_s: float) -> dict[Task, NetworkCall]:
        """The calls that have come, once all jobs have called that go on or begin.

        It waits for each at most LINGER_S, and for one that begins at most `call_s` as well, the
        time of a network call: others lose one step by it. If `idle`, it waits for a message too.
        """
        begin_s = min(LINGER_S, call_s)
        calls = self._read(begin_s)
        if idle and not calls and not self._awaited:
            self._wakes.get()
            calls |= self._read(begin_s)
        while self._awaited:
            try:
                self._wakes.get(timeout=max(0.0, max(self._awaited.values()) - time.monotonic()))
            except queue.Empty:
                break
            calls |= self._read(begin_s)
        self._awaited.clear()
        while self._next:  # that wait for a slow one
            self._go_on()
        return calls

    def _read(self, begin_s: float) -> dict[Task, NetworkCall]:
        """Take all messages; return their calls."""
        calls = {}
        while self._inbox:
            task, call, begins = self._inbox.popleft()
            if task is None:
                continue
            if begins:
                self._awaited[task] = time.monotonic() + begin_s
                continue
            self._awaited.pop(task, None)
            if call is not None:
                calls[task] = call
                if task.resumed_s:
                    task.is_slow = time.monotonic() - task.resumed_s > LINGER_S
        return calls

    def _go_on(self) -> None:
        """Let the next job go on; wake the engine if there is none."""
        try:
            task, output = self._next.popleft()
        except IndexError:
            self._wakes.put(None)
        else:
            task.resume(output)
