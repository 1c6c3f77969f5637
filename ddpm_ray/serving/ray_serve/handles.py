"""The job table and the processes that draw, called in other processes by Ray Serve's handles."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, TypeVar

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from ddpm_ray.serving.http.following import TableLostError
from ddpm_ray.serving.job_entry import (
    NO_WAIT,
    JobKey,
    JobReport,
    JobState,
    Submitted,
    Wait,
)
from ddpm_ray.serving.orders import Event, Failed, Finished, ImageOrder, ReplicaLostError
from ddpm_ray.serving.recent_refusal import RecentRefusal
from ddpm_ray.serving.request_errors import RequestError

T = TypeVar("T")


class RemoteJobs:
    """The job table of another process, as `Jobs`.

    Where there was no room a moment ago, no new job is sent. The process returns RequestErrors,
    which are raised here: an error that Ray raises is of another class, and has a traceback as its
    text.
    """

    def __init__(self, table: DeploymentHandle) -> None:
        self._table, self._refusal = table, RecentRefusal()

    async def submit(
        self, key: JobKey, order: ImageOrder, is_kept: bool, source: str = "", wait: Wait = NO_WAIT
    ) -> Submitted:
        """See JobTable."""
        if not (is_kept or source):  # else the table may have it already
            self._refusal.require_room(order.request.model)
        found: Submitted = await self._ask("submit", key, order, is_kept, source, wait)
        for event in found.report.events:
            if isinstance(event, Failed):
                self._refusal.note(order.request.model, event.error)
        return found

    async def report(
        self, key: JobKey, first: int, timeout_s: float, until_end: bool = False
    ) -> JobReport:
        """See JobTable."""
        found: JobReport = await self._ask("report", key, first, timeout_s, until_end)
        return found

    async def cancel(self, key: JobKey) -> JobState:
        """See JobTable."""
        found: JobState = await self._ask("cancel", key)
        return found

    async def leave(self, key: JobKey) -> None:
        """See JobTable."""
        await self._ask("leave", key)

    async def file(self, secret: str, name: str) -> bytes:
        """See JobTable."""
        found: bytes = await self._ask("file", secret, name)
        return found

    async def models(self) -> list[dict[str, Any]]:
        """The served models as JSON."""
        found: list[dict[str, Any]] = await self._ask("models")
        return found

    async def is_ready(self) -> bool:
        """Whether models are served, and jobs are taken."""
        found: bool = await self._ask("is_ready")
        return found

    async def metrics_text(self) -> str:
        """Prometheus' text."""
        found: str = await self._ask("metrics_text")
        return found

    async def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            found = await getattr(self._table, method).remote(*arguments)
        except RayTaskError:
            raise
        except (RayError, RayServeException) as error:
            raise TableLostError(_first_line(error)) from error
        if isinstance(found, RequestError):
            raise found
        return found


class RemoteDraw:
    """Runs orders in the processes of a deployment, as `Draw`.

    Where there was no room a moment ago, no new order is sent.
    """

    def __init__(self, engines: DeploymentHandle) -> None:
        self._engines, self._refusal = engines.options(stream=True), RecentRefusal()

    async def __call__(
        self, order: ImageOrder, source: str, affordable: float, table: str
    ) -> AsyncGenerator[Event, None]:
        """Yield the events of an order; raises ReplicaLostError."""
        try:
            if not source:  # else it was accepted before
                self._refusal.require_room(order.request.model)
        except RequestError as error:
            yield Failed(error)
            return
        events = self._engines.draw.remote(order, source, affordable, table)
        ended = False
        try:
            async for event in events:
                if isinstance(event, ReplicaLostError):
                    raise event
                ended = isinstance(event, Finished | Failed)
                if isinstance(event, Failed):
                    self._refusal.note(order.request.model, event.error)
                yield event
        except RayTaskError:
            raise
        except (RayError, RayServeException) as error:
            raise ReplicaLostError(_first_line(error)) from error
        finally:
            if not ended:
                events.cancel()


def _first_line(error: Exception) -> str:
    """The reason of an error of Ray, whose texts go on with advice of many lines."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:300]
