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
from collections import defaultdict
from collections.abc import Callable, Mapping

from ddpm_ray.redaction import counted
from ddpm_ray.serving.job_entry import (
    NO_WAIT,
    TABLE_HEADER,
    JobEntry,
    JobKey,
    JobReport,
    JobState,
    Submitted,
    Wait,
)
from ddpm_ray.serving.kept_jobs import KeptJobs
from ddpm_ray.serving.limits import OverloadedError, TokenBucket
from ddpm_ray.serving.orders import (
    Accepted,
    Draw,
    Event,
    Failed,
    Finished,
    ImageOrder,
    JobProgress,
    PreviewFiles,
    ReplicaLostError,
    Unaffordable,
)
from ddpm_ray.serving.request_errors import (
    RequestError,
    cancelled,
    overloaded,
    server_error,
    shutting_down,
)
from ddpm_ray.serving.served_metrics import ServedMetrics
from ddpm_ray.serving.table_settings import TableSettings

log = logging.getLogger(__name__)

OPEN_S = 5.0  # a client that finds too many open jobs may try again after that


class JobTable:
    """Runs orders by `draw`, and runs them again where that raises ReplicaLostError."""

    def __init__(
        self,
        draw: Draw,
        settings: TableSettings | None = None,
        buckets: Mapping[str, TokenBucket] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings, self.metrics = settings or TableSettings(), ServedMetrics()
        self.identity = secrets.token_hex(8)  # of this table: another has other jobs
        self._draw, self._buckets, self._clock = draw, dict(buckets or {}), clock
        self._open: dict[JobKey, JobEntry] = {}
        self._ended = KeptJobs(
            self.settings.kept_s, self.settings.kept_bytes, self.settings.lease_s, clock
        )
        self._alone = asyncio.Lock()
        self._undecided: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by client
        self._uploads = 0  # bytes of open jobs
        self.is_draining = False  # whether no more jobs are taken
        self._sweeping: asyncio.Task[None] | None = None

    @property
    def unfinished(self) -> int:
        """Jobs that wait or run."""
        return len(self._open)

    async def submit(
        self, key: JobKey, order: ImageOrder, is_kept: bool, source: str = "", wait: Wait = NO_WAIT
    ) -> Submitted:
        """Begin a job, unless it is there; return what `report` does from its first event on.

        RequestError: 409 for an id that has another order, 429 and 503 where there is no room.
        `source` is that of an Accepted of an earlier table, which was lost. A job that has failed
        begins again.
        """
        self._sweeping = self._sweeping or asyncio.create_task(self._sweep_always())
        found = self._open.get(key) or self._ended.get(key)
        if found is not None and found.state not in ("failed", "cancelled"):
            if found.digest != order.digest():
                raise RequestError(
                    f"job {key[1]} is there with other fields: take another id", "id", status=409
                )
            return Submitted(self.identity, await self.report(key, 0, *wait))
        self._require_room(order)
        self._ended.forget(key)
        entry = JobEntry(key, order, is_kept, self._clock(), source)
        self._open[key] = entry
        self._uploads += entry.uploads
        self.metrics.submitted(order.kind)
        entry.task = asyncio.create_task(self._run(entry))
        return Submitted(self.identity, await self.report(key, 0, *wait))

    async def report(
        self, key: JobKey, first: int, timeout_s: float, until_end: bool = False
    ) -> JobReport:
        """Wait for events from number `first` on, or other progress; return what there is.

        With `until_end`, only the end of the job ends the wait. RequestError: 404.
        """
        entry = self._entry(key)
        entry.seen_s = self._clock()
        if entry.ended_s is None and (until_end or len(entry.events) <= first):
            # Not asyncio.wait_for: in Python 3.11 it swallows a cancellation that comes together
            # with what it waits for (CPython issue 86296), and the request would never end.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await entry.changed.wait()
                    while until_end and entry.ended_s is None:
                        await entry.changed.wait()
            entry.seen_s = self._clock()
        entry.is_delivered |= until_end and entry.ended_s is not None
        return entry.report(first)

    async def cancel(self, key: JobKey) -> JobState:
        """End a job before its next step, and forget one that has ended; return its new state.

        RequestError: 404.
        """
        entry = self._entry(key)
        if entry.ended_s is None:
            self._end(entry, Failed(cancelled("the job was cancelled")))
        else:
            self._ended.forget(key)
        return entry.state

    async def leave(self, key: JobKey) -> None:
        """Nobody reads the job any longer: end it, unless it is kept; forget one that has ended."""
        entry = self._open.get(key) or self._ended.get(key)
        if entry is None or entry.is_kept or entry.has_url:
            return
        if entry.ended_s is None:
            self._end(entry, Failed(cancelled("the client has left")))
        self._ended.forget(key)

    async def file(self, secret: str, name: str) -> bytes:
        """The image of that name, as 0.png, of a job that has ended. RequestError: 404."""
        entry = self._ended.of_secret(secret)
        if entry is None or name not in (files := entry.files()):
            hours = self.settings.kept_s / 3600
            raise RequestError(
                f"there is no such image; images are kept for at most {hours:g} h", status=404
            )
        return files[name]

    async def drain(self, timeout_s: float) -> int:
        """Take no more jobs, wait for those that run, and end the rest; return their number."""
        self.is_draining = True
        until_s = self._clock() + timeout_s
        while self._open and (left_s := until_s - self._clock()) > 0:
            waiting = [entry.task for entry in self._open.values() if entry.task]
            await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        left = [*self._open.values()]
        for entry in left:
            self._end(entry, Failed(shutting_down()))
        return len(left)

    def sweep(self) -> None:
        """Cancel the jobs that nobody reads, and forget images that are old or too many."""
        now_s = self._clock()
        for entry in [*self._open.values()]:
            if not entry.is_kept and now_s - entry.seen_s > self.settings.lease_s:
                age_s = now_s - entry.seen_s
                log.warning("job %s: nobody has read it for %.0f s", entry.key[1], age_s)
                self._end(entry, Failed(cancelled("the client has left")))
        self._ended.sweep()

    async def _sweep_always(self) -> None:
        while True:
            await asyncio.sleep(self.settings.sweep_s)
            self.sweep()

    def _entry(self, key: JobKey) -> JobEntry:
        if (entry := self._open.get(key) or self._ended.get(key)) is None:
            headers = {TABLE_HEADER: self.identity}
            raise RequestError(f"there is no job {key[1]}", "id", status=404, headers=headers)
        return entry

    def _require_room(self, order: ImageOrder) -> None:
        """Raise RequestError where no job can be taken."""
        if self.is_draining:
            raise shutting_down()
        size = self._uploads + order.uploads
        if len(self._open) >= self.settings.max_jobs or size > self.settings.max_uploads:
            jobs = counted(len(self._open), "job")
            reason = f"{jobs} with {self._uploads / 2**20:.1f} MB of uploads are open"
            raise overloaded(OverloadedError(reason, OPEN_S))

    def _end(self, entry: JobEntry, event: Finished | Failed) -> None:
        """The last event of a job; its task ends, and with it the work of a replica."""
        if entry.ended_s is not None:
            return
        computed = event.computed if isinstance(event, Finished) else entry.progress.computed
        entry.advance(JobProgress(0, 0.0, computed, entry.progress.rows))
        if entry.unspent:
            self._buckets[entry.key[0]].charge(-entry.unspent)
        entry.events.append(event)
        entry.ended_s = self._clock()
        if entry.task is not None and entry.task is not asyncio.current_task():
            entry.task.cancel()
        seconds = entry.ended_s - entry.begun_s
        self.metrics.ended(entry.order.kind, entry.outcome, seconds, entry.progress.computed)
        self._open.pop(entry.key, None)
        self._uploads -= entry.uploads
        entry.forget_uploads()
        self._ended.add(entry)
        entry.notify()

    async def _run(self, entry: JobEntry) -> None:
        """Run a job until it has ended, in another replica where one is lost."""
        try:
            while entry.ended_s is None:
                try:
                    if entry.losses < self.settings.suspected_losses:
                        await self._follow(entry)
                    else:
                        async with self._alone:
                            await self._follow(entry)
                except ReplicaLostError as error:
                    await self._lost(entry, error)
        except Exception as error:  # noqa: BLE001 - logged, and the end of this job alone
            self._end(entry, Failed(server_error(log, f"job {entry.key[1]} has failed", error)))

    async def _follow(self, entry: JobEntry) -> None:
        """Run it once."""
        client = entry.key[0]
        bucket = None if entry.source else self._buckets.get(client)  # it is paid for once
        async with contextlib.AsyncExitStack() as undecided:
            if bucket is not None:  # one order at a time: another would spend the same again
                await undecided.enter_async_context(self._undecided[client])
            affordable = math.inf if bucket is None else bucket.affordable
            events = self._draw(entry.order, entry.source, affordable, self.identity)
            async with contextlib.aclosing(events):
                async for event in events:
                    self._take(entry, event, bucket)
                    if entry.ended_s is not None or isinstance(event, Unaffordable):
                        return
                    if isinstance(event, Accepted):
                        await undecided.aclose()
        raise ReplicaLostError("its events ended before its images")

    def _take(self, entry: JobEntry, event: Event, bucket: TokenBucket | None) -> None:
        """Note an event of a job."""
        match event:
            case JobProgress():
                entry.advance(event)
            case Accepted(source, _, cost, progress):
                entry.advance(progress)
                if not any(isinstance(one, Accepted) for one in entry.events):
                    entry.events.append(event)
                if bucket is not None:
                    bucket.charge(cost)
                    entry.paid = cost
                entry.source = source
            case PreviewFiles(number):  # after a loss they come again
                if number not in entry.previews:
                    entry.previews.add(number)
                    entry.events.append(event)
            case Unaffordable(cost):
                assert bucket is not None
                try:
                    bucket.require(cost)  # it was too little then
                except OverloadedError as error:
                    self._end(entry, Failed(overloaded(error)))
            case Finished() | Failed():
                self._end(entry, event)
        entry.notify()

    async def _lost(self, entry: JobEntry, error: ReplicaLostError) -> None:
        """Its replica was lost: wait a moment, or give it up."""
        entry.losses += 1
        self.metrics.restarted()
        if entry.losses > self.settings.max_losses:
            times = counted(entry.losses, "time")
            log.error("job %s: its replica was lost %s (%s)", entry.key[1], times, error)
            problem = f"the process that ran the job was lost {times}"
            self._end(entry, Failed(RequestError(problem, status=500)))
            return
        log.warning("job %s: its replica was lost (%s); it runs again", entry.key[1], error)
        entry.begin_again()
        await asyncio.sleep(self.settings.pause_s(entry.losses))
