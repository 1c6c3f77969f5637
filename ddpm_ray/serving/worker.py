"""A server process: runs orders, and yields their events."""

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
    Event,
    Failed,
    Finished,
    ImageOrder,
    JobProgress,
    PreviewFiles,
    Unaffordable,
    WorkerLostError,
)
from ddpm_ray.serving.request_errors import RequestError

log = logging.getLogger(__name__)

PROGRESS_S = 0.5  # between two reports of progress

Inbox: TypeAlias = "asyncio.Queue[Event | WorkerLostError]"


class Worker:
    """Runs the orders of a service; its `draw` is a `Draw`."""

    def __init__(self, service: ImageService) -> None:
        self.service = service

    async def draw(
        self, order: ImageOrder, source: str = "", affordable: float = float("inf")
    ) -> AsyncGenerator[Event, None]:
        """Yield the events of an order; closing the generator ends its job before the next step."""
        try:
            # Reading an upload and a model may take seconds.
            job, accepted = await asyncio.to_thread(self.service.start, order, source, affordable)
        except RequestError as error:
            yield Failed(error)
            return
        except UnaffordableError as error:
            yield Unaffordable(error.args[0])
            return
        try:
            yield accepted
            inbox: Inbox = asyncio.Queue()
            loop = asyncio.get_running_loop()
            threading.Thread(
                target=_watch, args=(job, order.request, loop, inbox), name="files", daemon=True
            ).start()
            async for event in _events(job, inbox):
                yield event
        finally:
            job.cancel()


async def _events(job: ImageJob, inbox: Inbox) -> AsyncGenerator[Event, None]:
    """Yield what comes to the inbox, and now and then how far the job is."""
    shown = _progress(job)
    yield shown
    while True:
        try:
            event = await asyncio.wait_for(inbox.get(), PROGRESS_S)
        except TimeoutError:
            event = _progress(job)
            if event == shown:
                continue
            shown = event
        if isinstance(event, WorkerLostError):
            raise event
        if isinstance(event, Finished | Failed):
            yield _progress(job)
            yield event
            return
        yield event


def _progress(job: ImageJob) -> JobProgress:
    return JobProgress(job.job.place, job.job.seconds_left, job.job.computed, job.rows)


def _watch(
    job: ImageJob, request: ImageRequest, loop: asyncio.AbstractEventLoop, inbox: Inbox
) -> None:
    """Encode previews and images as they come, in a thread: the loop has other jobs to serve."""

    def report(event: Event | WorkerLostError) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(inbox.put_nowait, event)

    try:
        for preview in job.previews():
            files = tuple(encoded_image(image, "png", {}) for image in preview.images)
            report(PreviewFiles(preview.number, files))
        report(Finished(tuple(job.files(request.output_format))))
    except JobCancelledError as error:  # by a service that is closed
        report(WorkerLostError(str(error)))
    except Exception as error:
        log.exception("a job has failed")
        problem = f"the images could not be drawn ({type(error).__name__}: {error})"
        report(Failed(RequestError(problem, status=500)))
