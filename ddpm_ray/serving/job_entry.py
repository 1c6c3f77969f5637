"""A job in the table of a server."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

from ddpm_ray.serving.image_requests import ImageRequest
from ddpm_ray.serving.orders import (
    Event,
    Failed,
    Finished,
    ImageOrder,
    JobProgress,
    Kind,
    PreviewFiles,
)
from ddpm_ray.serving.request_errors import CANCELLED

JobKey: TypeAlias = tuple[str, str]
"""(client, id): a client sees its own jobs only."""
JobState: TypeAlias = Literal["queued", "running", "succeeded", "failed", "cancelled"]
TABLE_HEADER = "Job-Table"  # identity of the table that has no such job
NOT_BEGUN = JobProgress(1, None, 0)
ENTRY_BYTES = 2000  # of an entry without files, about


@dataclass(frozen=True)
class JobReport:
    """The state of a job, with its events from a number on."""

    kind: Kind
    request: ImageRequest
    state: JobState
    events: tuple[Event, ...]
    progress: JobProgress
    secret: str  # in the URLs of its images


class Wait(NamedTuple):
    """The wait for news of a job or, with `until_end`, for its end."""

    timeout_s: float = 0.0
    until_end: bool = False


NO_WAIT = Wait()


class Submitted(NamedTuple):
    """A job that is there, and the identity of the table that has it."""

    table: str
    report: JobReport


@dataclass(eq=False)
class JobEntry:
    """A job, from its order to its images."""

    key: JobKey
    order: ImageOrder
    is_kept: bool  # whether it stays when nobody reads it
    begun_s: float  # when it was submitted
    source: str = ""  # of its weights, once it was accepted
    secret: str = field(default_factory=lambda: secrets.token_hex(16))  # in the URL of its files
    events: list[Event] = field(default_factory=list)  # without progress
    previews: set[int] = field(default_factory=set)  # numbers of those that were made
    progress: JobProgress = NOT_BEGUN
    losses: int = 0
    is_delivered: bool = False  # whether one that waited for its end has it
    paid: float = 0.0  # by its client, in megapixels of network calls
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    ended_s: float | None = None

    def __post_init__(self) -> None:
        self.seen_s = self.begun_s  # when it was last read
        self.digest = self.order.digest()

    @property
    def state(self) -> JobState:
        """The state in answers."""
        match self.events[-1] if self.events else None:
            case Finished():
                return "succeeded"
            case Failed(error):
                return "cancelled" if error.code == CANCELLED else "failed"
        return "queued" if self.progress.place else "running"

    @property
    def outcome(self) -> str:
        """The state of a job that has ended, with `refused` apart from other failures."""
        last = self.events[-1]
        if self.state == "failed" and isinstance(last, Failed) and last.error.status < 500:
            return "refused"  # the client's mistake, or no room
        return self.state

    @property
    def unspent(self) -> float:
        """The part of what was paid for network calls that were not computed."""
        rows = self.progress.rows
        return self.paid * max(0.0, 1 - self.progress.computed / rows) if rows else 0.0

    @property
    def has_url(self) -> bool:
        """Whether its images are read by URL, after the answer."""
        return self.state == "succeeded" and self.order.request.response_format == "url"

    @property
    def uploads(self) -> int:
        """Bytes of the files of its order."""
        return self.order.uploads

    @cached_property
    def kept_bytes(self) -> int:
        """Bytes of a job that has ended, with its previews and images."""
        made = [one.files for one in self.events if isinstance(one, PreviewFiles | Finished)]
        return ENTRY_BYTES + sum(len(file) for files in made for file in files)

    def report(self, first: int) -> JobReport:
        """Its state, with the events from number `first` on."""
        order, events = self.order, tuple(self.events[first:])
        return JobReport(order.kind, order.request, self.state, events, self.progress, self.secret)

    def notify(self) -> None:
        """Wake all who wait for news of it."""
        self.changed.set()
        self.changed = asyncio.Event()

    def advance(self, progress: JobProgress) -> None:
        """Take the progress that the process reports which runs it now."""
        self.progress = replace(progress, losses=self.losses)

    def begin_again(self) -> None:
        """Wait again, as before its first step."""
        self.advance(NOT_BEGUN)
        self.notify()

    def files(self) -> dict[str, bytes]:
        """Its images by name, as 0.png; none before its end."""
        made, suffix = self.events[-1] if self.events else None, self.order.request.output_format
        files = made.files if isinstance(made, Finished) else ()
        return {f"{index}.{suffix}": file for index, file in enumerate(files)}

    def forget_uploads(self) -> None:
        """Drop the files of its order, which are large, and are not needed again."""
        self.order = replace(self.order, image=None, mask=None)
