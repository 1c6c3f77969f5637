"""Follow a job from an HTTP request: its events, until it has ended or the client has left."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from starlette.requests import Request

from ddpm_ray.serving.job_entry import (
    NO_WAIT,
    TABLE_HEADER,
    JobKey,
    JobReport,
    JobState,
    Submitted,
    Wait,
)
from ddpm_ray.serving.orders import (
    Accepted,
    Event,
    Failed,
    ImageOrder,
    JobProgress,
    PreviewFiles,
)
from ddpm_ray.serving.request_errors import RequestError

log = logging.getLogger(__name__)

T = TypeVar("T")
POLL_S = 5.0  # a report is waited for so long; JobTable's lease is longer
LOST_S = 0.5  # pause before a lost table is asked again
TABLE_S = 60.0  # a table that is lost for longer is given up
OPEN = ("queued", "running")
_leaving: set[asyncio.Task[None]] = set()  # asyncio itself holds no task


class TableLostError(Exception):
    """The process of the job table has ended, or cannot be reached; it is started again."""


class Jobs(Protocol):
    """The job table of a server, in this process or another; all may raise TableLostError."""

    async def submit(
        self, key: JobKey, order: ImageOrder, is_kept: bool, source: str = "", wait: Wait = NO_WAIT
    ) -> Submitted:
        """See JobTable."""
        ...

    async def report(
        self, key: JobKey, first: int, timeout_s: float, until_end: bool = False
    ) -> JobReport:
        """See JobTable."""
        ...

    async def cancel(self, key: JobKey) -> JobState:
        """See JobTable."""
        ...

    async def leave(self, key: JobKey) -> None:
        """See JobTable."""
        ...

    async def file(self, secret: str, name: str) -> bytes:
        """See JobTable."""
        ...

    async def models(self) -> list[dict[str, Any]]:
        """The served models as JSON; empty until they are loaded."""
        ...

    async def is_ready(self) -> bool:
        """Whether models are served, and jobs are taken."""
        ...

    async def metrics_text(self) -> str:
        """Prometheus' text."""
        ...


@dataclass
class Followed:
    """A job that a request follows."""

    jobs: Jobs
    key: JobKey
    order: ImageOrder | None  # None: it was submitted by another request
    is_kept: bool
    until_end: bool = False  # whether its events are wanted once it has ended, not before
    secret: str = ""
    next: int = 0  # number of the first event that was not read
    report: JobReport | None = None
    source: str = ""  # of the weights, once it was accepted
    table: str = ""  # identity of the table that has it
    _first: JobReport | None = None  # came with the submission, and was not read yet
    _is_there: bool = False  # whether the table may hold it for this request

    async def submit(self) -> None:
        """Begin the job, or find it; wait a while for its first event. Raises RequestError.

        With `until_end` it waits for its end: one message to the table for most requests.
        """
        assert self.order is not None
        how = self.order, self.is_kept, self.source, Wait(POLL_S, self.until_end)
        self._is_there = True  # the table may have it as soon as the message is sent
        try:
            self.table, self._first = await patiently(lambda: self.jobs.submit(self.key, *how))
        except RequestError:
            self._is_there = False
            raise
        self.next, self.report = 0, None

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yield all events of the job until it has ended, with progress between them.

        A job whose table was lost is submitted again: it draws the same images. Raises
        RequestError, as for a job that is not there.
        """
        shown = -1  # the last preview
        reported: JobProgress | None = None
        while True:
            for event in await self._news():
                match event:
                    case PreviewFiles(number) if number <= shown:  # of a job that began again
                        continue
                    case PreviewFiles(number):
                        shown = number
                    case Accepted(source):
                        self.source = source
                yield event
            if self.report is None:  # the job was submitted again
                continue
            if self.report.state not in OPEN:
                return
            if self.report.progress != reported:
                reported = self.report.progress
                yield reported

    async def _news(self) -> tuple[Event, ...]:
        ask: Callable[[], Awaitable[JobReport]] = lambda: self.jobs.report(  # noqa: E731
            self.key, self.next, POLL_S, self.until_end
        )
        report, self._first = self._first, None
        try:
            if report is None:
                report = await (patiently(ask) if self.order is None else ask())
        except TableLostError:
            await asyncio.sleep(LOST_S)
            return await self._again()
        except RequestError as error:
            if error.status != 404 or self.order is None:
                raise
            if error.headers.get(TABLE_HEADER) == self.table:
                problem = "the job was cancelled, or its images were forgotten"
                raise RequestError(problem, status=410) from error
            return await self._again()  # the table was started again meanwhile
        self.report, self.secret = report, report.secret
        if self.until_end and report.state not in OPEN:
            self._is_there = False  # the table forgets it by itself
        self.next += len(report.events)
        return report.events

    async def _again(self) -> tuple[Event, ...]:
        """Submit it again; there are no events yet."""
        await self.submit()
        return ()

    async def first(self, timeout_s: float | None = None) -> None:
        """Wait until the job was accepted, or `timeout_s`. Raises the RequestError of a refusal."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), contextlib.aclosing(self.events()) as events:
                async for event in events:
                    if isinstance(event, Failed):
                        raise event.error
                    if not isinstance(event, JobProgress):
                        break
        self.next = 0  # the stream of the answer begins with the first event

    async def leave(self) -> None:
        """The request no longer follows it: a job that is not kept ends, and is forgotten."""
        if self.is_kept or not self._is_there:
            return
        # In a context of its own: Ray Serve cancels all calls of a cancelled request, and finds
        # them by a context variable.
        leaving = asyncio.get_running_loop().create_task(self._leave(), context=Context())
        _leaving.add(leaving)
        leaving.add_done_callback(_leaving.discard)
        await asyncio.shield(leaving)

    async def _leave(self) -> None:
        with contextlib.suppress(RequestError, TableLostError):
            await self.jobs.leave(self.key)


async def patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """Return what `ask` returns, from a table that may be lost and started again meanwhile.

    Raises RequestError, with status 503 if it does not come back.
    """
    until_s = asyncio.get_running_loop().time() + TABLE_S
    while True:
        try:
            return await ask()
        except TableLostError as error:
            if asyncio.get_running_loop().time() > until_s:
                log.error("the job table does not come back: %s", error)
                raise table_lost() from error
            await asyncio.sleep(LOST_S)


def table_lost() -> RequestError:
    """The error of a server whose job table cannot be reached."""
    problem = "the jobs of this server cannot be reached: submit the job again, with its id"
    return RequestError(problem, status=503, headers={"Retry-After": "5"})


async def unless_left(request: Request, work: Awaitable[T]) -> T:
    """Return what `work` does; it is cancelled if the client leaves. The body has been read.

    Raises RequestError with status 499, which nobody reads.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise RequestError("the client has left", status=499)
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
