"""Three ways to serve requests with one model, in this process and without HTTP.

- `StepBatching`: our engine
- `RequestBatching`: the rule of Ray Serve's `@serve.batch`
- the same with one request in a batch: one at a time
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.serving_load.traffic import Arrival
from ddpm_ray.counter_rng import Purpose, normal
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.sampling.sampling import Images, run_sampler, sampling_plan
from ddpm_ray.serving.engine import Engine
from ddpm_ray.serving.engine_settings import EngineSettings

WIDTH = 8
BATCH_WAIT_S = 0.01  # the default of @serve.batch


class Ticket(Protocol):
    """A request that was submitted."""

    @property
    def steps(self) -> int:
        """Steps that were computed for it so far."""
        ...

    def result(self) -> Images: ...

    def when_done(self, call: Callable[[], object]) -> None: ...

    def cancel(self) -> None: ...


class Contestant(Protocol):
    """Serves requests."""

    def submit(self, arrival: Arrival) -> Ticket: ...

    def close(self) -> None: ...


@dataclass(eq=False)
class EngineTicket:
    """A request that our engine serves."""

    job: Any
    images: int

    @property
    def steps(self) -> int:
        return int(self.job.computed) // self.images

    def result(self) -> Images:
        found: Images = self.job.result()
        return found

    def when_done(self, call: Callable[[], object]) -> None:
        self.job.when_done(call)

    def cancel(self) -> None:
        self.job.cancel()


class StepBatching:
    """Our engine: requests share network calls, and join and leave between two steps."""

    def __init__(self, model: TrainedModel, width: int = WIDTH) -> None:
        self.engine = Engine(EngineSettings(width=width))
        self._model = self.engine.shared(model)

    def submit(
        self, arrival: Arrival, on_step: Callable[[int, Tensor, Tensor], object] | None = None
    ) -> EngineTicket:
        count, steps, seed = arrival.images, arrival.steps, arrival.seed
        job = self.engine.submit(
            lambda: self._model.sample(count, steps=steps, seed=seed, on_step=on_step),
            images=count,
            cost=count * steps,
        )
        return EngineTicket(job, count)

    def close(self) -> None:
        self.engine.close()


@dataclass(eq=False)
class BatchTicket:
    """A request that waits for its batch, or is in one."""

    arrival: Arrival
    outcome: Future[Images] = field(default_factory=Future)
    steps: int = 0

    def result(self) -> Images:
        return self.outcome.result()

    def when_done(self, call: Callable[[], object]) -> None:
        self.outcome.add_done_callback(lambda _: call())

    def cancel(self) -> None:
        self.outcome.cancel()


class RequestBatching:
    """The rule of `@serve.batch`, with batch_size_fn counting images.

    A batch begins with the first request in the queue, and takes others until it has `width` images
    or `wait_s` are over; it runs to its end, and all its requests get their images then. Requests
    that are cancelled in the queue are dropped (as Ray 2.60 does), others run on. Batches are
    formed while none runs, as in a batch function that computes in its event loop.

    With `grouped` the function draws the requests of equal steps together, one group after the
    other; each request has the steps it asked for. Otherwise it has one sampling loop with the
    largest number of steps for all.
    """

    def __init__(
        self,
        model: TrainedModel,
        width: int = WIDTH,
        *,
        grouped: bool = False,
        wait_s: float = BATCH_WAIT_S,
        most: int | None = None,
    ) -> None:
        self._model, self._width, self._wait_s = model, width, wait_s
        self._grouped, self._most = grouped, most or width
        self._queue: queue.SimpleQueue[BatchTicket | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def submit(self, arrival: Arrival) -> BatchTicket:
        ticket = BatchTicket(arrival)
        self._queue.put(ticket)
        return ticket

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        first = self._queue.get()
        while first is not None:
            batch, first = self._collected(first)
            batch = [ticket for ticket in batch if ticket.outcome.set_running_or_notify_cancel()]
            for ticket, images in zip(batch, self._drawn(batch), strict=True):
                ticket.outcome.set_result(images)
            first = first or self._queue.get()

    def _collected(self, first: BatchTicket) -> tuple[list[BatchTicket], BatchTicket | None]:
        """A batch, and the request that did not fit."""
        batch, rows, until_s = [first], first.arrival.images, time.monotonic() + self._wait_s
        while rows < self._width and len(batch) < self._most:
            try:
                ticket = self._queue.get(timeout=max(0.0, until_s - time.monotonic()))
            except queue.Empty:
                return batch, None
            if ticket is None:
                self._queue.put(None)
                return batch, None
            if (rows := rows + ticket.arrival.images) > self._width:
                return batch, ticket
            batch.append(ticket)
        return batch, None

    def _drawn(self, batch: Sequence[BatchTicket]) -> list[Images]:
        arrivals = [ticket.arrival for ticket in batch]
        if self._grouped:
            return grouped(self._model, arrivals, lambda one: _count(batch, one))
        return drawn_together(self._model, arrivals, lambda *_: _count(batch))


def _count(batch: Sequence[BatchTicket], steps: int | None = None) -> None:
    """Note a step of all tickets, or of those that have so many."""
    for ticket in batch:
        ticket.steps += steps is None or ticket.arrival.steps == steps


def grouped(
    model: TrainedModel,
    arrivals: Sequence[Arrival],
    on_step: Callable[[int], object] = lambda _: None,
) -> list[Images]:
    """Images of each request, from one sampling loop for each number of steps, in turn."""
    found: dict[int, Images] = {}
    for steps in sorted({one.steps for one in arrivals}):
        places = [place for place, one in enumerate(arrivals) if one.steps == steps]
        images = drawn_together(
            model, [arrivals[place] for place in places], lambda *_, steps=steps: on_step(steps)
        )
        found |= zip(places, images, strict=True)
    return [found[place] for place in range(len(arrivals))]


def drawn_together(
    model: TrainedModel,
    arrivals: Sequence[Arrival],
    on_step: Callable[[int, Tensor, Tensor], object] | None = None,
) -> list[Images]:
    """Images of each request, from one sampling loop with the largest number of steps."""
    if not arrivals:
        return []
    of, shape = model.denoiser, model.denoiser.codec.shape(model.image_shape)
    noise = [
        normal(one.seed, Purpose.SAMPLE_START, 0, torch.arange(one.images), shape)
        for one in arrivals
    ]
    steps = max(one.steps for one in arrivals)
    plan = sampling_plan(model.with_settings(steps=steps).settings, of.schedule)
    denoise, x_T = of.bind_conditioning(), torch.cat(noise)
    x_0 = run_sampler(of, denoise, plan, x_T, lambda t: torch.zeros_like(x_T), on_step)
    ends = np.cumsum([one.images for one in arrivals])
    return np.split(of.codec.decode(x_0), ends[:-1])


CONTESTANTS: dict[str, Callable[[TrainedModel], Contestant]] = {
    "ours": StepBatching,
    "batch, largest steps": RequestBatching,
    "batch, equal steps": lambda model: RequestBatching(model, grouped=True),
    "one at a time": lambda model: RequestBatching(model, most=1, wait_s=0.0),
}
