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
    """A job begins, calls the network, or (with neither) has ended."""

    task: Task
    call: NetworkCall | None
    begins: bool
    sent_s: float  # on the monotonic clock


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

    def begin(self, task: Task) -> None:
        """Note that a job begins; its first call follows."""
        self._inbox.append(Message(task, None, True, time.monotonic()))

    def send(self, task: Task, call: NetworkCall | None = None) -> None:
        """Note a job's call, or its end, and let the next job go on; the last wakes the engine."""
        self._inbox.append(Message(task, call, False, time.monotonic()))
        self._go_on()

    def wake(self) -> None:
        """End the wait of the engine; one that is not read yet is enough."""
        if self._wakes.empty():
            self._wakes.put(None)

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

        It waits at most LINGER_S, and for jobs that begin at most `call_s`, the time of a network
        call: a longer wait costs the others more than the new job gains. If `idle`, it first waits
        for a message.
        """
        calls = self._read(begin_until_s := time.monotonic() + min(LINGER_S, call_s))
        if idle and not calls and not self._awaited:
            self._wakes.get()
            calls |= self._read(begin_until_s := time.monotonic() + min(LINGER_S, call_s))
        while self._awaited:
            try:
                self._wakes.get(timeout=max(0.0, max(self._awaited.values()) - time.monotonic()))
            except queue.Empty:
                break
            calls |= self._read(begin_until_s)
        calls |= self._read(begin_until_s)  # of jobs before a slow one, which woke nobody
        self._awaited.clear()
        while self._next:  # that wait for a slow one
            self._go_on()
        return calls

    def _read(self, begin_until_s: float) -> dict[Task, NetworkCall]:
        """Take all messages; return their calls. Jobs that begin are awaited until that time."""
        calls = {}
        while self._inbox:
            task, call, begins, sent_s = self._inbox.popleft()
            if begins:
                self._awaited[task] = begin_until_s
                continue
            self._awaited.pop(task, None)
            if call is not None:
                calls[task] = call
                if task.resumed_s:
                    task.is_slow = sent_s - task.resumed_s > LINGER_S
        return calls

    def _go_on(self) -> None:
        """Let the next job go on; wake the engine if there is none."""
        try:
            task, output = self._next.popleft()
        except IndexError:
            self.wake()
        else:
            task.resume(output)
