"""Run many sampling jobs at once: in each step, all of them share one network call.

A job is any function that samples or edits with a model of the engine (`Engine.shared`): all
samplers, guidance, inpainting and cascades work as they are. It runs in its own thread, and joins
or leaves the batch between two network calls. Requests are not batched, steps are: a job of 5 steps
does not wait for one of 50, and a cancelled job computes no further step.

An image depends on (seed, index, settings) only, whatever the other jobs are: its noise is a
function of them, and rows of a batch do not mix. The size of the batch may change the last bits
(up to one grey level of 255); with `exact` all batches have one size, and images equal bits.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from torch import Tensor

from ddpm_ray.diffusion.conditioning import Conditioning, Network
from ddpm_ray.serving.engine_settings import EngineSettings
from ddpm_ray.serving.engine_task import EngineJob, JobCancelledError, Task
from ddpm_ray.serving.job_turns import JobTurns, Output
from ddpm_ray.serving.shared_calls import (
    Model,
    NetworkCall,
    gpu_fault,
    next_batch,
    outputs_of,
    with_shared_networks,
)

log = logging.getLogger(__name__)

T = TypeVar("T")
RATE_DECAY = 0.9  # of the sums whose quotient is the rate, for each batch
EXIT_S = 30.0  # `close` waits that long for the engine's thread
CANCELLED, CLOSED = "the job was cancelled", "the engine was closed"


class Engine:
    """Runs jobs, and computes their network calls together. Close it, or use it in a `with`."""

    def __init__(self, settings: EngineSettings | None = None) -> None:
        self.settings = settings or EngineSettings()
        self.batches = 0  # network calls so far
        self._here = threading.local()  # .task: that of the current thread
        self._turns = JobTurns()
        self._calls: dict[Task, NetworkCall] = {}  # that wait; of the engine's thread alone
        self._call_s = 0.0  # the time of the last network call; of that thread as well
        self._lock = threading.Lock()  # of what follows
        self._queue: list[Task] = []
        self._running: set[Task] = set()
        self._closed = ""  # why; empty: it is open
        self._rows, self._seconds = 0.0, 0.0  # of recent batches
        self._moved_s = 0.0  # when a job or a network call last began or ended
        self._fault = ""  # why no network call succeeds any longer
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def shared(self, model: Model) -> Model:
        """A copy of `model` whose network calls in jobs of this engine share batches."""
        return with_shared_networks(model, self._answer)

    def submit(
        self, act: Callable[[], T], *, images: int, cost: int, allowance_s: float = 60.0
    ) -> EngineJob[T]:
        """Run `act` in a thread of its own, as soon as there is room for its `images`.

        `cost` is the number of network rows that it will take (costs.py). Among the jobs that wait,
        and among their calls, the one with the earliest deadline comes first: the time of its
        submission and `allowance_s`. With the time that a job takes alone, a short job passes a
        long one, and none waits for ever.
        The first call of each job comes before all other calls: previews are soon there.
        Raises RuntimeError after `close`, and in a job: it would wait for room that it takes.
        """
        if getattr(self._here, "task", None) is not None:
            raise RuntimeError("a job cannot submit another one: call its function instead")
        deadline_s = time.monotonic() + allowance_s
        task = Task(act, images, cost, deadline_s, Future(), threading.Lock())
        task.go_on.acquire()
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{self._closed}; make a new one")
            self._queue.append(task)
        self._start_tasks()
        return EngineJob(self, task)

    def stop(self, task: Task, why: str = CANCELLED) -> None:
        """End the job of `task` before its next network call."""
        with self._lock:
            task.stopped_by = why
            if queued := task in self._queue:
                self._queue.remove(task)
        self._turns.wake()
        if queued:
            task.end(JobCancelledError(f"{why} before it began"))
            self._start_tasks()  # it may have been the one that there was no room for

    def place(self, task: Task) -> int:
        """The number of jobs that wait and begin before it, and 1; 0 for one that has begun."""
        with self._lock:
            ahead = [one for one in self._queue if one.deadline_s < task.deadline_s]
            return len(ahead) + 1 if task in self._queue else 0

    def seconds_left(self, task: Task) -> float | None:
        """Estimate when it ends; None if no rate is known. What waits, waits for all that run."""
        with self._lock:
            if task.outcome.done():
                return 0.0
            if not self._seconds:
                return None
            waits = task in self._queue
            first = [one for one in self._queue if waits and one.deadline_s < task.deadline_s]
            first += [one for one in self._running if waits or one.deadline_s < task.deadline_s]
            rows = task.left + sum(one.left for one in first if one is not task)
            return rows * self._seconds / self._rows

    @property
    def load(self) -> tuple[int, float]:
        """Network rows that are left of all jobs, and rows per second lately; 0: unknown."""
        with self._lock:
            left = sum(task.left for task in (*self._running, *self._queue))
            return left, self._rows / self._seconds if self._seconds else 0.0

    @property
    def stalled_s(self) -> float:
        """Seconds since a job or a network call began or ended; 0 where no job runs."""
        with self._lock:
            return time.monotonic() - self._moved_s if self._running else 0.0

    @property
    def fault(self) -> str:
        """Why no job succeeds any longer; empty: none is known. A new process is needed then."""
        return self._fault

    def close(self) -> None:
        """Cancel all jobs, and wait for their end, at most EXIT_S."""
        for task in self._close(CLOSED):
            task.end(JobCancelledError(f"{CLOSED} before the job began"))
        if getattr(self._here, "task", None) is None:
            self._thread.join(EXIT_S)
            if self._thread.is_alive():
                log.warning("the engine is closed, and a job goes on after %g s", EXIT_S)

    def _close(self, why: str) -> list[Task]:
        """Take no more jobs, stop those that run; return those that have not begun."""
        with self._lock:
            self._closed = self._closed or why
            queued, self._queue = self._queue, []
            for task in self._running:
                task.stopped_by = task.stopped_by or why
        self._turns.wake()
        return queued

    def _answer(self, network: Network, x_t: Tensor, t: Tensor, inputs: Conditioning) -> Tensor:
        """The output of `network` for a job, from a batch with others; at once outside of a job.

        Raises JobCancelledError, and what the network raises for this call.
        """
        task: Task | None = getattr(self._here, "task", None)
        if task is None:
            return network(x_t, t, inputs)
        # A job's first call goes before all others, and so its first preview comes at once.
        deadline_s = task.deadline_s if task.computed else -math.inf
        self._turns.send(task, NetworkCall(network, x_t, t, inputs, deadline_s))
        task.go_on.acquire()
        output, task.output = task.output, None
        try:
            if isinstance(output, BaseException):
                raise output
            assert output is not None
            return output
        finally:
            del output  # an error holds this frame

    def _start_tasks(self) -> None:
        """Start the jobs that there is room for."""
        while (task := self._next_task()) is not None:
            self._turns.begin(task)
            try:
                threading.Thread(target=self._work, args=(task,), name="job", daemon=True).start()
            except RuntimeError as error:  # the system has no more threads
                with self._lock:
                    self._running.discard(task)
                task.end(error)
                self._turns.send(task)

    def _next_task(self) -> Task | None:
        """Take the next job out of the queue; None if there is none, or no room for it."""
        with self._lock:
            if not self._queue:
                return None
            task = min(self._queue, key=lambda one: one.deadline_s)
            images = sum(one.images for one in self._running) + task.images
            if self._running and images > self.settings.max_images:
                return None
            self._queue.remove(task)
            self._running.add(task)
            self._moved_s = time.monotonic()
            return task

    def _work(self, task: Task) -> None:
        """Do a job in this thread, and give its place to the next."""
        self._here.task = task
        try:
            task.run()
        finally:
            with self._lock:
                self._running.discard(task)
                self._moved_s = time.monotonic()
            self._start_tasks()
            self._turns.send(task)

    def _run(self) -> None:
        """Compute batches until the engine is closed and its jobs have ended."""
        while not self._closed or self._running:
            try:
                self._calls |= self._turns.collect(not self._calls, self._call_s)
                self._end_stopped()
                if self._calls:
                    self._compute_batch()
            except BaseException as error:
                log.exception("the engine has failed")
                self._fault = why = f"the engine has failed ({type(error).__name__}: {error})"
                for task in self._close(why):
                    task.end(RuntimeError(why))

    def _compute_batch(self) -> None:
        """Compute the most urgent rows, and let their jobs go on."""
        of = {call: task for task, call in self._calls.items()}
        rows = next_batch(of, self.settings.width)
        self._moved_s = begun_s = time.monotonic()
        outputs = outputs_of(rows, self.settings.width if self.settings.exact else None)
        self._moved_s = time.monotonic()
        self._call_s = self._moved_s - begun_s
        self._fault = self._fault or gpu_fault(outputs)
        with self._lock:
            self.batches += 1
            self._rows = RATE_DECAY * self._rows + sum(one.length for one in rows)
            self._seconds = RATE_DECAY * self._seconds + self._call_s
        complete: list[tuple[Task, Output]] = []
        for (call, _, count), output in zip(rows, outputs, strict=True):
            task = of[call]
            task.computed += count
            if isinstance(output, Tensor):
                call.parts.append(output)
                if call.left:
                    continue
                output = call.output()
            del self._calls[task]
            complete.append((task, output))
        self._turns.hand_out(complete)

    def _end_stopped(self) -> None:
        """Raise JobCancelledError in the jobs that wait and are to end."""
        for task in [task for task in self._calls if task.stopped_by]:
            del self._calls[task]
            task.resume(JobCancelledError(task.stopped_by))
