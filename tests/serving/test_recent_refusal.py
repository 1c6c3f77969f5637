"""A server without room refuses for a moment without asking again, and only what is new."""

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from ddpm_ray.serving.image_requests import ImageRequest
from ddpm_ray.serving.job_entry import JobReport, Submitted
from ddpm_ray.serving.limits import BUSY_S, OverloadedError, QueueLimit
from ddpm_ray.serving.orders import Event, Failed, Finished, ImageOrder, JobProgress
from ddpm_ray.serving.ray_serve.handles import RemoteDraw, RemoteJobs
from ddpm_ray.serving.recent_refusal import HOLD_S, RecentRefusal
from ddpm_ray.serving.request_errors import RequestError, overloaded
from tests.serving.in_loop import run

ORDER = ImageOrder("generation", ImageRequest(), {"seed": 0})
FULL = overloaded(OverloadedError("work for 60 s is accepted", 3.0, is_full=True))
OTHER = overloaded(OverloadedError("this client has none left", 3.0))


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(
        "ddpm_ray.serving.ray_serve.handles.RecentRefusal", lambda: RecentRefusal(made)
    )
    return made


class Handle:
    """A deployment whose method gives the same answer to each call, and counts them."""

    def __init__(self, event: Event) -> None:
        self.calls, self.cancelled, self._event = 0, 0, event
        self.submit = self.draw = self

    def options(self, **_: Any) -> "Handle":
        """Itself: events are a stream."""
        return self

    def remote(self, *_: Any) -> Any:
        """An answer, which is awaited or iterated."""
        self.calls += 1
        return Answered(self)


class Answered:
    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def __await__(self) -> Any:
        async def answer() -> Submitted:
            progress = JobProgress(0, 0.0, 0)
            event = self._handle._event
            report = JobReport("generation", ImageRequest(), "failed", (event,), progress, "")
            return Submitted("table", report)

        return answer().__await__()

    async def __aiter__(self) -> AsyncGenerator[Event, None]:
        yield self._handle._event

    def cancel(self) -> None:
        self._handle.cancelled += 1


@pytest.mark.parametrize("error, calls", [(FULL, 2), (OTHER, 4)])
def test_the_table_is_asked_again_after_a_moment(
    error: RequestError, calls: int, clock: Clock
) -> None:
    """Unless the refusal concerned one client alone; jobs that may be there always pass."""

    async def work() -> None:
        handle = Handle(Failed(error))
        jobs = RemoteJobs(handle)
        await jobs.submit(("alice", "1"), ORDER, False)
        for number in range(2):
            with contextlib.suppress(RequestError):
                await jobs.submit(("bob", f"{number}"), ORDER, False)
        assert handle.calls == calls - 1
        clock.now_s += HOLD_S
        await jobs.submit(("bob", "4"), ORDER, False)
        assert handle.calls == calls
        await jobs.submit(("bob", "kept"), ORDER, True)
        await jobs.submit(("bob", "of a lost table"), ORDER, False, "model/3")
        assert handle.calls == calls + 2

    run(work)


def test_processes_that_draw_are_asked_again_after_a_moment(clock: Clock) -> None:
    async def work() -> None:
        handle = Handle(Failed(FULL))
        draw = RemoteDraw(handle)

        async def last(source: str = "") -> Event:
            return [event async for event in draw(ORDER, source, 1.0, "table")][-1]

        for _ in range(3):
            event = await last()
            assert isinstance(event, Failed)
            assert event.error.headers == {"Retry-After": "3"}
        assert handle.calls == 1
        await last("model/3")  # a job that was accepted before, by a process that was lost
        assert handle.calls == 2
        clock.now_s += HOLD_S
        handle._event = Finished((), 1)
        assert await last() == Finished((), 1)
        assert (handle.calls, handle.cancelled) == (3, 0), "a stream at its end needs no cancel"

    run(work)


def test_a_stream_that_is_left_is_cancelled(clock: Clock) -> None:
    async def work() -> None:
        handle = Handle(JobProgress(0, 1.0, 1))
        events = RemoteDraw(handle)(ORDER, "", 1.0, "table")
        await anext(events)
        await events.aclose()
        assert handle.cancelled == 1

    run(work)


@pytest.mark.parametrize(
    "left, is_full", [(5950, True), (5850, False), (4400, False)], ids=["0.5 s", "1.5 s", "16 s"]
)
def test_a_server_is_full_where_little_room_is_left_for_any_job(left: int, is_full: bool) -> None:
    """A job that is too large for the room that there is holds up no smaller one."""
    with pytest.raises(OverloadedError, match="their sum has to be at most 60 s") as refused:
        QueueLimit(60.0, lambda: (left, 100.0)).require_room(2000)
    assert refused.value.is_full == is_full


def test_a_short_queue_is_never_full() -> None:
    """Its work would end before the next job is sent."""
    limit = QueueLimit(1.0, lambda: (100, 100.0))
    with pytest.raises(OverloadedError, match="at most 1 s") as refused:
        limit.require_room(10)
    assert not refused.value.is_full
    assert HOLD_S < BUSY_S


def test_a_refusal_concerns_its_model_and_is_not_held_again(clock: Clock) -> None:
    """Each model has an engine of its own. A held refusal must not hold others any longer."""
    refusal = RecentRefusal(clock)
    refusal.note("digits", FULL)
    with pytest.raises(RequestError, match="no room for a job a moment ago: try") as found:
        refusal.require_room("digits")
    assert (found.value.status, found.value.headers) == (429, {"Retry-After": "3"})
    refusal.require_room("faces")
    clock.now_s += HOLD_S / 2
    refusal.note("digits", found.value)  # as another process does that asked the first one
    clock.now_s += HOLD_S / 2
    refusal.require_room("digits")
