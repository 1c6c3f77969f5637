"""Classes that run in the processes of a server.

- `EngineReplica`: models with their engines, on a GPU; as many processes as the work needs
- `TableReplica`: the job table, in one process
- `ApiReplica`: the HTTP interface, behind Ray Serve's proxies
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from ddpm_ray.serving.http.access import LOCAL, Access
from ddpm_ray.serving.http.app import build_app
from ddpm_ray.serving.http.http_server import HttpSettings
from ddpm_ray.serving.job_entry import JobKey
from ddpm_ray.serving.job_table import JobTable
from ddpm_ray.serving.limits import TokenBucket
from ddpm_ray.serving.orders import Event, ImageOrder, ReplicaLostError
from ddpm_ray.serving.ray_serve.autoscaling import QUEUED_S
from ddpm_ray.serving.ray_serve.handles import RemoteDraw, RemoteJobs
from ddpm_ray.serving.ray_serve.server_setup import ServerSetup, start_log
from ddpm_ray.serving.request_errors import RequestError
from ddpm_ray.serving.table_settings import TableSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

MB = 2**20
UNIT = "megapixels of network calls"
MODELS_S = 5.0  # the list of models is asked for so often


class EngineReplica:
    """Draws: a process with all models."""

    def __init__(self, setup: ServerSetup) -> None:
        start_log()
        self._setup = setup
        import torch  # heavy, and other processes need none of it

        from ddpm_ray.serving.order_runner import OrderRunner
        from ddpm_ray.serving.ray_serve.engine_models import engine_models, engine_service

        torch.set_num_threads(max(1, round(setup.config.replicas.cpus)))
        self._models = engine_models(setup)
        self._runner = OrderRunner(engine_service(setup.config, self._models))
        self._looked_s = time.monotonic()
        self._looking: asyncio.Task[list[str]] | None = None

    async def draw(
        self, order: ImageOrder, source: str, affordable: float, table: str
    ) -> AsyncGenerator[Event | ReplicaLostError, None]:
        """See OrderRunner; a ReplicaLostError is yielded, since Ray would raise another class."""
        try:
            async for event in self._runner.draw(order, source, affordable, table):
                yield event
        except ReplicaLostError as error:
            yield error

    async def models(self) -> list[dict[str, Any]]:
        """The served models, as JSON."""
        return [one.facts for one in self._models.current]

    async def check_health(self) -> None:
        """Raise RuntimeError where jobs do not go on, or none can succeed: the replica is replaced.

        Ray Serve calls this every few seconds, so the registry is looked at from here.
        """
        limit_s = self._setup.config.replicas.stall_timeout_s
        for one in self._models.current:
            if fault := one.engine.fault:
                raise RuntimeError(f"{one.name}: {fault}")
            if (stalled_s := one.engine.stalled_s) > limit_s:
                raise RuntimeError(
                    f"no job of {one.name} has gone on for {stalled_s:.0f} s, more than "
                    f"replicas.stall_timeout_s={limit_s:g}"
                )
        done = self._looking is None or self._looking.done()
        if done and time.monotonic() - self._looked_s > self._setup.config.registry_every_s:
            self._looked_s = time.monotonic()
            self._looking = asyncio.create_task(asyncio.to_thread(self._models.refresh))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Seconds of accepted work, for QueuePolicy."""
        seconds = 0.0
        for one in self._models.current:
            rows, rate = one.engine.load
            seconds += rows / rate if rate else 0.0
        return {QUEUED_S: seconds}


class TableReplica:
    """The job table of the server. RequestErrors are returned: see RemoteJobs."""

    def __init__(self, setup: ServerSetup, engines: DeploymentHandle) -> None:
        start_log()
        limits = setup.config.limits
        per_s, burst_s = limits.client_megapixels_per_s, limits.client_burst_s
        buckets = {}
        if per_s:
            names = setup.clients or [LOCAL]
            buckets = {name: TokenBucket(per_s, per_s * burst_s, UNIT) for name in names}
        settings = TableSettings(kept_s=limits.kept_s, kept_bytes=round(limits.kept_mb * MB))
        self._table = JobTable(RemoteDraw(engines), settings, buckets)
        self._engines, self._drain_s = engines, setup.config.drain_s
        self._models: list[dict[str, Any]] = []
        self._asked_s = 0.0

    async def submit(self, key: JobKey, order: ImageOrder, is_kept: bool, *how: Any) -> Any:
        """See JobTable."""
        return await _returned(self._table.submit(key, order, is_kept, *how))

    async def report(
        self, key: JobKey, first: int, timeout_s: float, until_end: bool = False
    ) -> Any:
        """See JobTable."""
        return await _returned(self._table.report(key, first, timeout_s, until_end))

    async def cancel(self, key: JobKey) -> Any:
        """See JobTable."""
        return await _returned(self._table.cancel(key))

    async def leave(self, key: JobKey) -> None:
        """See JobTable."""
        await self._table.leave(key)

    async def file(self, secret: str, name: str) -> Any:
        """See JobTable."""
        return await _returned(self._table.file(secret, name))

    async def models(self) -> list[dict[str, Any]]:
        """The models that are served now, or were when a replica last answered."""
        if time.monotonic() - self._asked_s > MODELS_S or not self._models:
            with contextlib.suppress(RayError, RayServeException):
                self._models = await self._engines.models.remote()
                self._asked_s = time.monotonic()
        return self._models

    async def is_ready(self) -> bool:
        """Whether models are served, and jobs are taken."""
        return not self._table.is_draining and bool(await self.models())

    async def metrics_text(self) -> str:
        """Prometheus' text."""
        return self._table.metrics.text()

    async def drain(self, timeout_s: float) -> int:
        """See JobTable."""
        return await self._table.drain(timeout_s)

    async def __del__(self) -> None:
        """Ray Serve waits for this before it ends the process: jobs may end."""
        await self._table.drain(self._drain_s)


class ApiReplica:
    """The HTTP interface; Ray Serve asks for its application."""

    def __init__(self, setup: ServerSetup, table: DeploymentHandle) -> None:
        start_log()
        self._jobs = RemoteJobs(table)
        limits = setup.config.limits
        self._settings = HttpSettings(Access(setup.clients), round(limits.max_body_mb * MB))

    def __serve_build_asgi_app__(self) -> FastAPI:  # the name is Ray Serve's
        """The application."""
        return build_app(self._jobs, self._settings)


async def _returned(work: Awaitable[Any]) -> Any:
    """Return what `work` returns, or the RequestError that it raises."""
    try:
        return await work
    except RequestError as error:
        return error
