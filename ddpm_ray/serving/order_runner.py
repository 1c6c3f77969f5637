"""Runs orders in a replica of the engine, and yields their events."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator
from typing import TypeAlias

from ddpm_ray.serving.engine_task import JobCancelledError
from ddpm_ray.serving.image_files import encoded_image
from ddpm_ray.serving.image_jobs import ImageJob
from ddpm_ray.serving.image_requests import ImageRequest
from ddpm_ray.serving.image_service import ImageService, UnaffordableError
from ddpm_ray.serving.orders import (
    Accepted,
    Event,
    Failed,
    Finished,
    ImageOrder,
    JobProgress,
    PreviewFiles,
    ReplicaLostError,
    Unaffordable,
)
from ddpm_ray.serving.request_errors import RequestError, server_error

log = logging.getLogger(__name__)

PROGRESS_S = 0.5  # between two reports of the progress of a job
# All jobs together report at most so often: on Ray each report is a message between processes.
REPORTS_PER_S = 10

Inbox: TypeAlias = "asyncio.Queue[Event | ReplicaLostError]"
Started: TypeAlias = "asyncio.Future[tuple[ImageJob, Accepted]]"


class OrderRunner:
    """Runs the orders of a service; its `draw` is a `Draw`."""

    def __init__(self, service: ImageService) -> None:
        self.service = service
        self._table = ""  # identity of the job table whose orders run
        self._jobs: set[ImageJob] = set()

    async def draw(
        self, order: ImageOrder, source: str, affordable: float, table: str
    ) -> AsyncGenerator[Event, None]:
        """Yield the events of an order; closing the generator ends its job before the next step."""
        if table != self._table:  # a table that was lost cannot close the generators of its orders
            for left in self._jobs:
                left.cancel()
            self._table = table
        try:
            job, accepted = await self._started(order, source, affordable)
        except RequestError as error:
            yield Failed(error)
            return
        except UnaffordableError as error:
            yield Unaffordable(error.args[0])
            return
        self._jobs.add(job)
        try:
            yield accepted
            inbox: Inbox = asyncio.Queue()
            loop = asyncio.get_running_loop()
            threading.Thread(
                target=_watch, args=(job, order.request, loop, inbox), name="files", daemon=True
            ).start()
            async for event in self._events(job, inbox, accepted.progress):
                yield event
        finally:
            job.cancel()
            self._jobs.discard(job)

    async def _events(
        self, job: ImageJob, inbox: Inbox, shown: JobProgress
    ) -> AsyncGenerator[Event, None]:
        """Yield what comes to the inbox, and now and then how far the job is beyond `shown`."""
        while True:
            pause_s = max(PROGRESS_S, len(self._jobs) / REPORTS_PER_S)
            try:
                async with asyncio.timeout(pause_s):  # not wait_for: see JobTable.report
                    event = await inbox.get()
            except TimeoutError:
                event = job.progress()
                if event == shown:
                    continue
                shown = event
            if isinstance(event, ReplicaLostError):
                raise event
            if isinstance(event, Failed):
                yield job.progress()
            yield event
            if isinstance(event, Finished | Failed):
                return

    async def _started(
        self, order: ImageOrder, source: str, affordable: float
    ) -> tuple[ImageJob, Accepted]:
        """Begin a job. Raises what `ImageService.start` does."""
        if order.image is None and not source:  # quick: a thread would wait longer for its turn
            return self.service.start(order, source, affordable)
        # Reading an upload and a model may take seconds.
        start = asyncio.to_thread(self.service.start, order, source, affordable)
        starting = asyncio.ensure_future(start)
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(_cancel_started)  # the thread goes on
            raise


def _cancel_started(starting: Started) -> None:
    """Cancel a job that has begun after nobody waited for it."""
    if not starting.cancelled() and starting.exception() is None:
        starting.result()[0].cancel()


def _watch(
    job: ImageJob, request: ImageRequest, loop: asyncio.AbstractEventLoop, inbox: Inbox
) -> None:
    """Encode previews and images as they come, in a thread: the loop has other jobs to serve."""

    def report(event: Event | ReplicaLostError) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(inbox.put_nowait, event)

    try:
        for preview in job.previews():
            files = tuple(encoded_image(image, "png", {}) for image in preview.images)
            report(PreviewFiles(preview.number, files))
        report(Finished(tuple(job.files(request.output_format)), job.job.computed))
    except JobCancelledError as error:  # by a service that is closed
        report(ReplicaLostError(str(error)))
    except BaseException as error:  # noqa: BLE001 - one that a network raised, as SystemExit, too
        if job.job.is_lost:
            report(ReplicaLostError(f"its engine has failed ({type(error).__name__}: {error})"))
        else:
            report(Failed(server_error(log, "the images could not be drawn", error)))
