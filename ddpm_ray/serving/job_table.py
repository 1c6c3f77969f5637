"""The jobs of a server: each runs until its images are there, whichever process is lost meanwhile.

Clients read the events of a job by number, so that one that comes back misses none. No HTTP and no
Ray here. All methods are called in one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from ddpm_ray.redaction import counted
from ddpm_ray.serving.image_requests import ImageRequest
from ddpm_ray.serving.limits import OverloadedError, TokenBucket
from ddpm_ray.serving.orders import (
    Accepted,
    Draw,
    Event,
    Failed,
    Finished,
    ImageOrder,
    JobProgress,
    Kind,
    PreviewFiles,
    Unaffordable,
    WorkerLostError,
)
from ddpm_ray.serving.request_errors import RequestError
from ddpm_ray.serving.served_metrics import ServedMetrics

log = logging.getLogger(__name__)

JobKey: TypeAlias = tuple[str, str]
"""(client, id): a client sees its own jobs only."""
State: TypeAlias = Literal["queued", "running", "succeeded", "failed", "cancelled"]
NOT_BEGUN = JobProgress(1, None, 0)
CANCELLED = "job_cancelled"  # code of the error of a cancelled job
FAILED = ("failed", "cancelled")  # such a job may be submitted again


@dataclass(frozen=True)
class TableSettings:
    """Limits of the table."""

    max_jobs: int = 1000  # that have not ended
    max_uploads: int = 256 * 2**20  # bytes of the uploads of these
    kept_s: float = 3600.0  # images stay so long
    kept_bytes: int = 256 * 2**20  # of images that stay; the oldest go first
    lease_s: float = 20.0  # a job that nobody reads for so long is cancelled, unless it is kept
    max_losses: int = 5  # a job whose process was lost so often fails
    retry_s: float = 0.2  # pause before a lost job runs again


@dataclass(eq=False)
class _Job:
    key: JobKey
    order: ImageOrder
    is_kept: bool  # whether it stays when nobody reads it
    begun_s: float  # when it was submitted
    seen_s: float  # when it was last read
    digest: str
    secret: str = field(default_factory=lambda: secrets.token_hex(16))  # in the URL of its files
    events: list[Event] = field(default_factory=list)  # without JobProgress
    progress: JobProgress = NOT_BEGUN
    source: str = ""
    losses: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    ended_s: float | None = None

    @property
    def state(self) -> State:
        """The state in answers."""
        match self.events[-1] if self.events else None:
            case Finished():
                return "succeeded"
            case Failed(error):
                return "cancelled" if error.code == CANCELLED else "failed"
        return "queued" if self.progress.place else "running"

    @property
    def uploads(self) -> int:
        """Bytes of its order."""
        return len(self.order.image or b"") + len(self.order.mask or b"")

    @property
    def size(self) -> int:
        """Bytes of its previews and images, and of the rest of it."""
        made = [one.files for one in self.events if isinstance(one, PreviewFiles | Finished)]
        return 2000 + sum(len(file) for files in made for file in files)

    def notify(self) -> None:
        """Wake all who wait for news of it."""
        self.changed.set()
        self.changed = asyncio.Event()


@dataclass(frozen=True)
class JobReport:
    """The state of a job, with its events from a number on."""

    kind: Kind
    request: ImageRequest
    state: State
    events: tuple[Event, ...]
    progress: JobProgress
    secret: str


class JobTable:
    """Runs orders by `draw`, and runs them again where that raises WorkerLostError."""

    def __init__(
        self,
        draw: Draw,
        settings: TableSettings = TableSettings(),
        buckets: Mapping[str, TokenBucket] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings, self.metrics = settings, ServedMetrics()
        self._draw, self._buckets, self._clock = draw, dict(buckets or {}), clock
        self._jobs: dict[JobKey, _Job] = {}
        self._files: dict[str, _Job] = {}  # by secret
        self.draining = False

    @property
    def unfinished(self) -> int:
        """Jobs that wait or run."""
        return sum(job.ended_s is None for job in self._jobs.values())

    async def submit(self, key: JobKey, order: ImageOrder, is_kept: bool) -> None:
        """Begin a job; nothing happens where it is there already. Raises RequestError.

        409 for an id that has another order, 429 and 503 where there is no room.
        """
        self.sweep()
        digest = order.digest()
        if (found := self._jobs.get(key)) is not None and found.state not in FAILED:
            if found.digest != digest:
                raise RequestError(
                    f"job {key[1]} is there with other fields: take another id", "id", status=409
                )
            found.seen_s = self._clock()
            return
        self._require_room(order)
        now_s = self._clock()
        job = _Job(key, order, is_kept, now_s, now_s, digest)
        self._jobs[key] = self._files[job.secret] = job
        if found is not None:
            self._files.pop(found.secret, None)
        self.metrics.submitted(order.kind)
        job.task = asyncio.create_task(self._run(job))

    async def report(self, key: JobKey, first: int, timeout_s: float) -> JobReport:
        """Wait for events from number `first` on, or other progress; return what there is.

        Raises RequestError with status 404.
        """
        job = self._job(key)
        job.seen_s = self._clock()
        if len(job.events) <= first and job.ended_s is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(job.changed.wait(), timeout_s)
            job.seen_s = self._clock()
        kind, request = job.order.kind, job.order.request
        return JobReport(
            kind, request, job.state, tuple(job.events[first:]), job.progress, job.secret
        )

    async def cancel(self, key: JobKey) -> None:
        """End a job before its next step; one that has ended is forgotten. RequestError: 404."""
        job = self._job(key)
        if job.ended_s is not None:
            self._forget(job)
            return
        self._end(job, _cancelled("the job was cancelled"))

    async def leave(self, key: JobKey) -> None:
        """Nobody reads the job any longer: end it, unless it is kept; forget one that has ended."""
        job = self._jobs.get(key)
        if job is None or job.is_kept or _has_url(job):
            return
        if job.ended_s is None:
            self._end(job, _cancelled("the client has left"))
        self._forget(job)

    def file(self, secret: str, index: int) -> tuple[bytes, str]:
        """The file and format of image `index` of a job that has ended. RequestError: 404."""
        self.sweep()
        job = self._files.get(secret)
        made = job.events[-1] if job is not None and job.events else None
        if job is None or not isinstance(made, Finished) or not 0 <= index < len(made.files):
            hours = self.settings.kept_s / 3600
            raise RequestError(
                f"there is no such image; images are kept for at most {hours:g} h", status=404
            )
        return made.files[index], job.order.request.output_format

    async def drain(self, timeout_s: float) -> int:
        """Take no more jobs, and wait for those that run; return how many have not ended."""
        self.draining = True
        until_s = self._clock() + timeout_s
        while self.unfinished and (left_s := until_s - self._clock()) > 0:
            waiting = [job.task for job in self._jobs.values() if job.ended_s is None and job.task]
            await asyncio.wait(waiting, timeout=left_s)
        return self.unfinished

    def sweep(self) -> None:
        """Cancel the jobs that nobody reads, and forget images that are old or too many."""
        now_s = self._clock()
        for job in [*self._jobs.values()]:
            alone = not job.is_kept and now_s - job.seen_s > self.settings.lease_s
            if alone and job.ended_s is None:
                log.warning("job %s: nobody has read it for %.0f s", job.key[1], now_s - job.seen_s)
                self._end(job, _cancelled("the client has left"))
            old = job.ended_s is not None and now_s - job.ended_s > self.settings.kept_s
            if old or (alone and job.ended_s is not None and not _has_url(job)):
                self._forget(job)
        ended = [job for job in self._jobs.values() if job.ended_s is not None]
        size = sum(job.size for job in ended)
        for job in ended:  # the oldest first
            if size <= self.settings.kept_bytes:
                break
            size -= job.size
            self._forget(job)

    def _job(self, key: JobKey) -> _Job:
        if (job := self._jobs.get(key)) is None:
            raise RequestError(f"there is no job {key[1]}", "id", status=404)
        return job

    def _require_room(self, order: ImageOrder) -> None:
        """Raise RequestError where no job can be taken."""
        retry = {"Retry-After": "5"}
        if self.draining:
            raise RequestError("the server is shutting down", status=503, headers=retry)
        open_jobs = [job for job in self._jobs.values() if job.ended_s is None]
        size = sum(job.uploads for job in open_jobs) + len(order.image or b"")
        if len(open_jobs) >= self.settings.max_jobs or size > self.settings.max_uploads:
            raise RequestError(
                f"{counted(len(open_jobs), 'job')} with {size / 2**20:.1f} MB of images are open: "
                "try again later",
                status=429,
                headers=retry,
            )

    def _end(self, job: _Job, event: Finished | Failed) -> None:
        """The last event of a job; its task ends, and with it the work of a server process."""
        if job.ended_s is not None:
            return
        job.events.append(event)
        job.ended_s = self._clock()
        if job.task is not None and job.task is not asyncio.current_task():
            job.task.cancel()
        self.metrics.ended(job.order.kind, _outcome(job), job.ended_s - job.begun_s, job.progress)
        # The files of the order are large, and are not needed again.
        job.order = ImageOrder(job.order.kind, job.order.request, job.order.settings)
        job.notify()

    def _forget(self, job: _Job) -> None:
        self._jobs.pop(job.key, None)
        self._files.pop(job.secret, None)

    async def _run(self, job: _Job) -> None:
        """Run a job until it has ended, in another process where one is lost."""
        try:
            while job.ended_s is None:
                try:
                    await self._follow(job)
                except WorkerLostError as error:
                    await self._lost(job, error)
        except Exception as error:
            log.exception("job %s has failed", job.key[1])
            problem = f"the job has failed ({type(error).__name__}: {error})"
            self._end(job, Failed(RequestError(problem, status=500)))

    async def _follow(self, job: _Job) -> None:
        """Run it once."""
        bucket = self._buckets.get(job.key[0])
        is_paid = bucket is None or bool(job.source)
        affordable = math.inf if is_paid or bucket is None else bucket.affordable
        events = self._draw(job.order, job.source, affordable)
        async with contextlib.aclosing(events):
            async for event in events:
                self._take(job, event, bucket)
                if job.ended_s is not None or isinstance(event, Unaffordable):
                    return
        raise WorkerLostError("its events ended before its images")

    def _take(self, job: _Job, event: Event, bucket: TokenBucket | None) -> None:
        """Note an event of a job."""
        match event:
            case JobProgress():
                job.progress = event
            case Accepted():
                if not job.source:
                    if bucket is not None:
                        bucket.charge(event.cost)
                    job.events.append(event)
                job.source = event.source
            case PreviewFiles():  # after a loss they come again
                if all(getattr(one, "number", None) != event.number for one in job.events):
                    job.events.append(event)
            case Unaffordable(cost):
                assert bucket is not None
                try:
                    bucket.require(cost)  # it was too little then
                except OverloadedError as error:
                    headers = {"Retry-After": str(error.retry_after_s)}
                    self._end(job, Failed(RequestError(str(error), status=429, headers=headers)))
            case Finished() | Failed():
                self._end(job, event)
        job.notify()

    async def _lost(self, job: _Job, error: WorkerLostError) -> None:
        """Its process was lost: wait a moment, or give it up."""
        job.losses += 1
        self.metrics.restarted()
        if job.losses > self.settings.max_losses:
            times = counted(job.losses, "time")
            problem = f"the process that ran the job was lost {times} ({error})"
            self._end(job, Failed(RequestError(problem, status=500)))
            return
        log.warning("job %s: its process was lost (%s); it runs again", job.key[1], error)
        job.progress = NOT_BEGUN
        job.notify()
        await asyncio.sleep(self.settings.retry_s)


def _outcome(job: _Job) -> str:
    """The state of a job that has ended, with `refused` apart from other failures."""
    last = job.events[-1]
    return "refused" if isinstance(last, Failed) and last.error.status == 429 else job.state


def _has_url(job: _Job) -> bool:
    """Whether its images are read by URL, after the answer."""
    done = job.ended_s is not None and job.state == "succeeded"
    return done and job.order.request.response_format == "url"


def _cancelled(why: str) -> Failed:
    return Failed(RequestError(why, status=409, code=CANCELLED))
