"""Clock of the parts of training steps, as the device sees them.

On a GPU a part begins when the device reaches it, not when the host queues it: CUDA events are
recorded in its stream and read later, so no step waits for them.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor, nn

Part: TypeAlias = Literal["data", "forward", "backward", "communication", "optimizer", "other"]
PARTS: tuple[Part, ...] = get_args(Part)
"""data: waiting for a batch. communication: after a worker's own backward pass, until the gradients
of all workers are there, and the gathering of embeddings; what overlaps the backward pass is not
seen. other: between steps."""


class PartMarker(Protocol):
    """Follows the parts of training steps."""

    def mark(self, part: Part) -> None:
        """Begin `part`."""
        ...


class StepClock:
    """Sums the time between marks. Without CUDA it reads the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._sums = dict.fromkeys(PARTS, 0.0)
        self._part: Part = "other"  # of the newest mark whose time is known
        self._since_s = time.perf_counter()
        self._marks: list[tuple[Part, torch.cuda.Event]] = []  # that the device may not have passed
        self._last: torch.cuda.Event | None = None

    def mark(self, part: Part) -> None:
        """Begin `part`."""
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append((part, event))
        else:
            now = time.perf_counter()
            self._sums[self._part] += now - self._since_s
            self._part, self._since_s = part, now

    def collect(self) -> dict[Part, float]:
        """Return the seconds of each part since the last call, as far as the device has come."""
        self._read_events()
        found, self._sums = self._sums, dict.fromkeys(PARTS, 0.0)
        return found

    def _read_events(self) -> None:
        done = 0
        for part, event in self._marks:
            if not event.query():  # type: ignore[no-untyped-call]
                break
            if self._last is not None:
                self._sums[self._part] += self._last.elapsed_time(event) / 1e3
            self._part, self._last = part, event
            done += 1
        del self._marks[:done]


_followers: ContextVar[tuple[PartMarker, ...]] = ContextVar("followers", default=())


def mark(part: Part) -> None:
    """Begin `part` for all that follow this thread's training loop: its clock, its trace."""
    for follower in _followers.get():
        follower.mark(part)


@contextmanager
def followed_by(follower: PartMarker) -> Iterator[None]:
    """Let `follower` know of the parts that begin inside."""
    token = _followers.set((*_followers.get(), follower))
    try:
        yield
    finally:
        _followers.reset(token)


@contextmanager
def running(clock: StepClock | None) -> Iterator[None]:
    """Start `clock` as that of this thread's training loop; None: it has no clock."""
    if clock is None:
        yield
        return
    clock.mark("other")
    clock.collect()  # the time before
    with followed_by(clock):
        yield


def watch_all_reduce(clock: StepClock, network: nn.Module) -> None:
    """Begin `communication` when the backward pass of a DDP network has reached its first layer.

    From then on the backward pass only waits for the other workers. The first layer's gradient is
    the last one to be computed.
    """

    def reached(parameter: Tensor) -> None:
        clock.mark("communication")

    first = next(parameter for parameter in network.parameters() if parameter.requires_grad)
    first.register_post_accumulate_grad_hook(reached)  # type: ignore[no-untyped-call]
