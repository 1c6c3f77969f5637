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

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from ddpm_ray.diffusion.conditioning import Conditioning, Network
from ddpm_ray.sampling.drawing_model import DrawingModel
from ddpm_ray.serving.shared_calls import NetworkCall, SharedNetwork, compute, fitting

T = TypeVar("T")
Model = TypeVar("Model", bound=DrawingModel)
# A batch waits that long for a job between two calls, whose arithmetic takes 0.1 ms. A job that
# takes longer decodes or writes images: it is not waited for again before its next call.
LINGER_S = 0.05
RATE_DECAY = 0.9  # of the mean rate, for each call
EXIT_S = 30.0  # `close` waits that long for the engine's thread


class JobCancelledError(Exception):
    """The job was cancelled, or the engine was closed; raised in the job at its next call."""


@dataclass(frozen=True)
class EngineSettings:
    """Sizes of batches, and limits of the memory that jobs take."""

    width: int = 8  # rows of one network call; guidance takes two for an image
    exact: bool = False  # all batches have `width` rows: equal bits whatever the other jobs
    max_images: int = 64  # of all jobs that run; others wait

    def __post_init__(self) -> None:
        for name in ("width", "max_images"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"engine.{name} is {value}; it must be at least 1")


class EngineJob(Generic[T]):
    """A job of an engine: its result, and how far it is."""

    def __init__(
        self, engine: Engine, act: Callable[[], T], images: int, cost: int, deadline_s: float
    ) -> None:
        self._engine, self._act = engine, act
        self.images, self.cost, self.deadline_s = images, cost, deadline_s
        self.computed = 0  # rows of network calls so far; `cost` are all, as announced
        self.running = False  # False: it waits, or it has ended
        self.cancelled = False
        self.output: Tensor | Exception | None = None  # of the call that it waits for
        self.go_on = threading.Lock()  # held while it waits
        self.go_on.acquire()
        self._outcome: Future[T] = Future()

    @property
    def done(self) -> bool:
        """Whether it has ended: with a result, an error or because it was cancelled."""
        return self._outcome.done()

    def result(self, timeout_s: float | None = None) -> T:
        """Wait for its result; raises its error, JobCancelledError, or TimeoutError."""
        return self._outcome.result(timeout_s)

    def when_done(self, call: Callable[[], object]) -> None:
        """Call `call` once it has ended, in the thread that ends it."""
        self._outcome.add_done_callback(lambda _: call())

    def cancel(self) -> None:
        """End it before its next network call; nothing happens to one that has ended."""
        self._engine.cancel(self)

    def run(self) -> None:
        """Do its work in this thread and keep the outcome."""
        try:
            value = self._act()
        except BaseException as error:  # noqa: BLE001 - `result` raises it
            self._outcome.set_exception(error)
        else:
            self._outcome.set_result(value)

    def resume(self, output: Tensor | Exception) -> None:
        """Give it the output of its call, or the error that the call raises."""
        self.output = output
        self.go_on.release()

    def end_unstarted(self) -> None:
        """Give it up before it has begun."""
        self._outcome.set_exception(JobCancelledError("the job was cancelled before it began"))


Message: TypeAlias = tuple[EngineJob[Any] | None, NetworkCall | None]
"""(job, its call), (job, None) at its end, or (None, None)."""


class Engine:
    """Runs jobs, and computes their network calls together. Close it, or use it in a `with`."""

    def __init__(self, settings: EngineSettings = EngineSettings()) -> None:
        self.settings = settings
        self.batches = 0  # network calls so far
        self._here = threading.local()  # .job: the job of the current thread
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._calls: dict[EngineJob[Any], NetworkCall] = {}  # that wait; of the engine's thread
        self._between: set[EngineJob[Any]] = set()  # jobs whose next call is awaited; likewise
        self._lock = threading.Lock()  # of what follows
        self._queue: list[EngineJob[Any]] = []
        self._running: set[EngineJob[Any]] = set()
        self._closed = False
        self._rows_per_s = 0.0  # mean rate while there was work; 0: unknown
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def shared(self, model: Model) -> Model:
        """A copy of `model` whose network calls in jobs of this engine share batches."""
        network = SharedNetwork(model.denoiser.network, self)
        return replace(model, denoiser=replace(model.denoiser, network=network))

    def submit(
        self, act: Callable[[], T], *, images: int = 1, cost: int = 0, allowance_s: float = 60.0
    ) -> EngineJob[T]:
        """Run `act` in a thread of its own, as soon as there is room for its `images`.

        `cost` is the number of network rows that it will take, for `seconds_left`. Among the jobs
        that wait, and among their calls, the one with the earliest deadline comes first: the time
        of its submission and `allowance_s`. So a short job may pass a long one, and none waits for
        ever. Raises RuntimeError after `close`.
        """
        job = EngineJob(self, act, images, cost, time.monotonic() + allowance_s)
        with self._lock:
            if self._closed:
                raise RuntimeError("this engine is closed; make a new one")
            self._queue.append(job)
            self._start_jobs()
        return job

    def cancel(self, job: EngineJob[Any]) -> None:
        """End `job` before its next network call."""
        with self._lock:
            job.cancelled = True
            if queued := job in self._queue:
                self._queue.remove(job)
        self._inbox.put((None, None))
        if queued:
            job.end_unstarted()

    def place(self, job: EngineJob[Any]) -> int:
        """The number of jobs that begin before it; 0 for one that runs."""
        with self._lock:
            ahead = [other for other in self._queue if other.deadline_s < job.deadline_s]
            return len(ahead) + 1 if job in self._queue else 0

    def seconds_left(self, job: EngineJob[Any]) -> float | None:
        """Estimate when it ends, from the measured rate and the costs; None if that is unknown."""
        with self._lock:
            if not self._rows_per_s:
                return None
            known = {*self._running, *self._queue}
            before = sum(
                max(0, one.cost - one.computed)
                for one in known
                if one.deadline_s <= job.deadline_s or one is job
            )
            return before / self._rows_per_s

    @property
    def load(self) -> tuple[int, float]:
        """Network rows that are left of all jobs, and the measured rows per second (0: unknown)."""
        with self._lock:
            known = (*self._running, *self._queue)
            return sum(max(0, one.cost - one.computed) for one in known), self._rows_per_s

    def close(self) -> None:
        """Cancel all jobs and end the threads."""
        with self._lock:
            self._closed = True
            queued = list(self._queue)
            self._queue.clear()
            for job in self._running:
                job.cancelled = True
        for job in queued:
            job.end_unstarted()
        self._inbox.put((None, None))
        self._thread.join(EXIT_S)

    def answer(self, network: Network, x_t: Tensor, t: Tensor, inputs: Conditioning) -> Tensor:
        """The output of `network` for a job, from a batch with others; at once outside of a job.

        Raises JobCancelledError, and what the network raises for this call.
        """
        job: EngineJob[Any] | None = getattr(self._here, "job", None)
        if job is None:
            return network(x_t, t, inputs)
        self._inbox.put((job, NetworkCall(network, x_t, t, inputs, job.deadline_s)))
        job.go_on.acquire()
        output, job.output = job.output, None
        if isinstance(output, Exception):
            raise output
        assert output is not None
        return output

    def _start_jobs(self) -> None:
        """Start the jobs that there is room for, the most urgent first; `_lock` is held."""
        self._queue.sort(key=lambda job: job.deadline_s)
        while self._queue and not self._closed:
            images = sum(job.images for job in self._running) + self._queue[0].images
            if self._running and images > self.settings.max_images:
                return
            job = self._queue.pop(0)
            job.running = True
            self._running.add(job)
            threading.Thread(target=self._work, args=(job,), name="job", daemon=True).start()

    def _work(self, job: EngineJob[Any]) -> None:
        """Do a job in this thread, and give its place to the next."""
        self._here.job = job
        try:
            job.run()
        finally:
            with self._lock:
                job.running = False
                self._running.discard(job)
                self._start_jobs()
            self._inbox.put((job, None))

    def _run(self) -> None:
        """Compute batches until the engine is closed and its jobs have ended."""
        while not self._closed or self._running:
            self._read(None if not self._calls else 0.0)
            self._await_calls(lambda: self._rows() >= self.settings.width)
            self._end_cancelled()
            if self._calls and not self._closed:
                self._compute_batch()

    def _read(self, timeout_s: float | None) -> bool:
        """Take a message of a job; False if none came in time."""
        try:
            job, call = (
                self._inbox.get(timeout=timeout_s)
                if timeout_s
                else self._inbox.get(block=timeout_s is None)
            )
        except queue.Empty:
            return False
        if job is not None:
            self._between.discard(job)
            if call is not None:
                self._calls[job] = call
                self._end_cancelled()
        return True

    def _await_calls(self, enough: Callable[[], bool]) -> None:
        """Read messages until no job is between two calls, or there are `enough`."""
        until_s = time.monotonic() + LINGER_S
        while self._between and not enough() and not self._closed:
            if not self._read(max(0.0, until_s - time.monotonic())):
                self._between.clear()

    def _rows(self) -> int:
        return sum(call.rows for call in self._calls.values())

    def _compute_batch(self) -> None:
        """Compute the most urgent calls, and let their jobs go on, one after the other.

        Jobs that go on at once wait for the interpreter's lock at each operation: 8 jobs took 4 ms
        for what takes each of them 0.1 ms.
        """
        of = {call: job for job, call in self._calls.items()}
        calls = fitting(list(of), self.settings.width)
        jobs = [of[call] for call in calls]
        for job in jobs:  # one that is cancelled from now on learns of it at its next call
            del self._calls[job]
        begun_s = time.monotonic()
        outputs = self._outputs(calls)
        self._record(calls, jobs, time.monotonic() - begun_s)
        for job, output in zip(jobs, outputs, strict=True):
            self._between.add(job)
            job.resume(output)
            self._await_calls(lambda job=job: job not in self._between)  # type: ignore[misc]

    def _end_cancelled(self) -> None:
        """Raise JobCancelledError in the jobs that wait and were cancelled."""
        for job in [job for job in self._calls if job.cancelled]:
            del self._calls[job]
            job.resume(JobCancelledError("the job was cancelled"))

    def _outputs(self, calls: list[NetworkCall]) -> list[Tensor | Exception]:
        """The output of each call; its own error for one that fails alone as well."""
        width = self.settings.width if self.settings.exact else None
        with torch.inference_mode():
            try:
                return [*compute(calls, width)]
            except Exception as error:  # noqa: BLE001 - the job raises it
                if len(calls) == 1:
                    return [error]
            return [output for call in calls for output in self._outputs([call])]

    def _record(self, calls: list[NetworkCall], jobs: list[EngineJob[Any]], took_s: float) -> None:
        """Count what was computed and how fast."""
        rows = sum(call.rows for call in calls)
        with self._lock:
            for call, job in zip(calls, jobs, strict=True):
                job.computed += call.rows
            self.batches += 1
            rate = rows / max(took_s, 1e-9)
            kept = RATE_DECAY if self._rows_per_s else 0.0
            self._rows_per_s = kept * self._rows_per_s + (1 - kept) * rate
